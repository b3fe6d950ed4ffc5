"""Kill a run again and again, resume it each time, and compare with the run that was never stopped.

A LoRA run on real text, killed by SIGKILL at random moments. At the end the weights and the
trajectory must be equal bit for bit to the uninterrupted run's; a run that ends before all kills
are spent is begun anew.

    python benchmarks/soak.py --kills 100
"""

import argparse
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from objectives import ClassificationLoss
from zo_adapt import MeZOSVRG, ParameterView, minimize

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
FORK = get_context("fork")  # a child starts at once: nothing is imported again


def tiny() -> tuple[Any, list[Any]]:
    """A model and data that need no download."""
    config = transformers.BertConfig(**TINY, intermediate_size=32, initializer_range=0.3)
    model = transformers.BertForSequenceClassification(config)
    return model, [{"input_ids": [2, 5 + i % 2, 7 + i % 11], "labels": i % 2} for i in range(64)]


def real() -> tuple[Any, list[Any]]:
    """MiniLM and BBC news, 32 tokens of a text."""
    import real_data

    folder, corpus = str(real_data.minilm_folder()), real_data.bbc()
    split = real_data.balanced_split(corpus.texts, corpus.labels, 128, 5, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(split.train_texts, truncation=True, max_length=32)["input_ids"]
    examples = [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(tokens, split.train_labels, strict=True)
    ]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    return model, examples


def life(source: Callable[[], tuple[Any, list[Any]]], steps: int, folder: Path) -> None:
    """One life of the run: from the initial weights to the end, or to the kill."""
    torch.manual_seed(0)
    model, examples = source()
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    view = ParameterView.trainable(get_peft_model(model, config))
    minimize(
        ClassificationLoss(view.model),
        view,
        examples,
        MeZOSVRG(snapshot_interval=2),
        batch_size=5,
        max_steps=steps,
        trajectory=folder / "run.zot",
        resume=True,
        progress=False,
    )
    weights = {name: tensor.detach().contiguous() for name, tensor in view.tensors.items()}
    save_file(weights, folder / "new.safetensors")
    os.replace(folder / "new.safetensors", folder / "final.safetensors")


def main() -> None:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="a tiny model; no download")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a forked child must not wait for its parent's threads
    with TemporaryDirectory() as temporary:
        soak(args, args.folder or Path(temporary))


def soak(args: argparse.Namespace, folder: Path) -> None:
    """Spend the kills."""
    source, steps = (tiny, 120) if args.tiny else (real, 100)
    whole = folder / "whole"
    whole.mkdir()
    began = time.perf_counter()
    start(source, steps, whole).join()
    once = time.perf_counter() - began
    moments, kills, runs = random.Random(args.seed), 0, 0
    while kills < args.kills:
        runs += 1
        parts = folder / f"run{runs}"
        parts.mkdir()
        while not (parts / "final.safetensors").exists():
            child = start(source, steps, parts)
            if kills < args.kills:
                # Short lives, so that a run is killed many times; long enough to move on.
                child.join(moments.uniform(0.0, 0.15 * once))
            else:
                child.join()
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
            elif child.exitcode != 0:
                sys.exit(f"a life ended with exit code {child.exitcode}")
        compare(whole, parts)
    seconds = time.perf_counter() - began
    print(
        f"{kills} kills, {runs} runs of {steps} steps, every one equal bit for bit, {seconds:.0f} s"
    )


def start(source: Callable[[], tuple[Any, list[Any]]], steps: int, folder: Path) -> Any:
    """A child process that runs or goes on."""
    child = FORK.Process(target=life, args=(source, steps, folder))
    child.start()
    return child


def compare(whole: Path, parts: Path) -> None:
    """Stop with a message unless both runs left the same bits."""
    one, other = (load_file(folder / "final.safetensors") for folder in (whole, parts))
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            sys.exit(f"{name} differs after the kills")
    if (whole / "run.zot").read_bytes() != (parts / "run.zot").read_bytes():
        sys.exit("the trajectories differ after the kills")


if __name__ == "__main__":
    main()
