"""Kill runs again and again, resume them each time, and compare with those that were never stopped.

Runs on real text (MiniLM on BBC news, a tiny model where text is generated), killed by SIGKILL at
random moments: a LoRA, last layers above a trunk that is reused, a bf16 LoRA and a full view in
ZOTrainer, and a reward of generated text. At the end the weights and the trajectory must be equal
bit for bit to the uninterrupted run's; a run that ends before all its kills are spent is begun
anew.

    python benchmarks/soak.py --kills 100
"""

import argparse
import random
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from killed_runs import KillError, Life, Source, by_minimize, by_trainer, real, spend, tiny, written

from zo_adapt import EvaluationOptions

SHORT, SHORTEST = 20, 10
"""Steps of a run on real text, and on none."""


def kinds(source: Source) -> dict[str, Life]:
    """What is soaked, by name."""
    steps = SHORTEST if source is tiny else SHORT
    run = partial(by_minimize, source=source, steps=steps)
    training = partial(by_trainer, source=source, steps=min(steps, 6))
    trunk = EvaluationOptions(reuse_trunk="on")
    return {
        "LoRA": run,
        "last layers, trunk reused": partial(run, view="last layers", evaluation=trunk),
        "bf16 LoRA in ZOTrainer": partial(training, view="bf16 LoRA"),
        "full view in ZOTrainer": partial(training, view="full"),
        "generation reward": partial(written, steps=steps),
    }


def quiet() -> None:
    """Say nothing but results, and let a forked child not wait for its parent's threads."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main() -> None:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="divided over the kinds of runs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; no download")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    quiet()
    found, began = kinds(tiny if args.tiny else real), time.perf_counter()
    with TemporaryDirectory() as temporary:
        for index, (name, life) in enumerate(found.items()):
            kills = len(range(index, args.kills, len(found)))
            start = time.perf_counter()
            folder = (args.folder or Path(temporary)) / str(index)
            try:
                runs = spend(life, kills, folder, random.Random(args.seed + index))
            except KillError as error:
                sys.exit(f"{name}: {error}")
            print(
                f"{name}: {kills} kills, {runs} runs, every one equal bit for bit, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    print(f"{args.kills} kills in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
