"""Bytes and seconds to restore a fine-tune: trajectory, adapter, full checkpoint.

The view is that of the demonstration (LoRA r=8 on a 22.7M encoder, and its head), the weights are
random: neither size nor time depends on them. The baseline is loading the files with safetensors.

    python benchmarks/restore.py --steps 8000
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

sys.path[:0] = [str(Path(__file__).parents[1])]

from zo_adapt import MeZO, ParameterView, minimize, replay


def model() -> Any:
    """The demonstration's model, from a configuration and a seed."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=5,
    )
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    return get_peft_model(BertForSequenceClassification(config), lora).eval()


def seconds(call: Callable[[], object]) -> float:
    """Median of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(steps: int, folder: Path) -> dict[str, Any]:
    """Make a trajectory of so many steps, then restore from each kind of file."""
    tuned = model()
    view = ParameterView.trainable(tuned)
    weight = next(t for name, t in view.tensors.items() if "lora_B" in name)
    path = folder / "run.zot"
    minimize(
        # Any function of the adapter will do: what is restored are the updates.
        lambda batch: float((weight - 1).square().mean()),
        view,
        None,
        MeZO(),
        max_steps=steps,
        trajectory=path,
    )
    whole, adapter = folder / "model.safetensors", folder / "adapter.safetensors"
    save_file({n: t.contiguous() for n, t in tuned.state_dict().items()}, whole)
    save_file({n: t.detach().contiguous() for n, t in view.tensors.items()}, adapter)

    def rebuild() -> None:
        again = ParameterView.trainable(model())
        start = time.perf_counter()
        replay(again, path)
        times.append(time.perf_counter() - start)
        if again.hash() != view.hash():
            raise RuntimeError("replay did not give the weights of the run")

    times: list[float] = []
    seconds(rebuild)
    return {
        "steps": steps,
        "scalars": view.numel,
        "rows": [
            ("trajectory", path.stat().st_size, statistics.median(times)),
            ("adapter", adapter.stat().st_size, seconds(lambda: load_file(adapter))),
            ("full checkpoint", whole.stat().st_size, seconds(lambda: load_file(whole))),
        ],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    with TemporaryDirectory() as folder:
        result = measure(args.steps, Path(folder))
    print(f"\n{result['steps']:,} steps of a view of {result['scalars']:,} scalars\n")
    print("| what is kept | bytes | seconds to restore |\n|---|---|---|")
    for name, size, time_taken in result["rows"]:
        print(f"| {name} | {size:,} | {time_taken:.3f} |")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
