"""Bytes and seconds to restore a fine-tune from its trajectory.

``--view lora`` (the default): the view of the demonstration (LoRA r=8 on a 22.7M encoder, and its
head), against the adapter's file and the full checkpoint's, loaded by safetensors.

``--view 355m``: plain tensors of RoBERTa-large's shapes in fp32, on the GPU if there is one. Replay
is timed against a copy of the same bytes in the same process: one pass over the weights reads and
writes each once, as a copy does.

The weights are random: neither size nor time depends on them.

    python benchmarks/restore.py --steps 8000
    python benchmarks/restore.py --view 355m --steps 200
"""

import argparse
import json
import math
import random
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

from zo_adapt import MeZO, ParameterView, Shift, Term, minimize, replay
from zo_adapt.noise.seeds import Seeds
from zo_adapt.term import Step
from zo_adapt.trajectory.file import Reader
from zo_adapt.trajectory.header import header_of
from zo_adapt.trajectory.playback import WIDTH, apply_all
from zo_adapt.trajectory.writer import Writer

SEED = 0


def model() -> Any:
    """The demonstration's model, from a configuration and a seed."""
    torch.manual_seed(SEED)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=5,
    )
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    return get_peft_model(BertForSequenceClassification(config), lora).eval()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(call: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def seconds(call: Callable[[], object]) -> float:
    """Median of three."""
    return statistics.median(once(call) for _ in range(3))


def measure_lora(steps: int, folder: Path) -> dict[str, Any]:
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
    times = []
    for _ in range(3):
        again = ParameterView.trainable(model())
        times.append(once(lambda view=again: replay(view, path)))
        if again.hash() != view.hash():
            raise RuntimeError("replay did not give the weights of the run")
    return {
        "steps": steps,
        "scalars": view.numel,
        "rows": [
            ("trajectory", path.stat().st_size, statistics.median(times)),
            ("adapter", adapter.stat().st_size, seconds(lambda: load_file(adapter))),
            ("full checkpoint", whole.stat().st_size, seconds(lambda: load_file(whole))),
        ],
    }


def print_lora(result: dict[str, Any]) -> None:
    """The table of the README."""
    print(f"\n{result['steps']:,} steps of a view of {result['scalars']:,} scalars\n")
    print("| what is kept | bytes | seconds to restore |\n|---|---|---|")
    for name, size, time_taken in result["rows"]:
        print(f"| {name} | {size:,} | {time_taken:.3f} |")


def roberta_large_shapes() -> dict[str, tuple[int, ...]]:
    """RoBERTa-large with a head of two classes: 355M scalars."""
    d, inner = 1024, 4096
    shapes: dict[str, tuple[int, ...]] = {"words": (50265, d), "places": (514, d), "types": (1, d)}
    linear = {
        "q": (d, d),
        "k": (d, d),
        "v": (d, d),
        "o": (d, d),
        "up": (inner, d),
        "down": (d, inner),
    }
    for layer in range(24):
        for name, (rows, columns) in linear.items():
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = (
                (rows, columns),
                (rows,),
            )
        for name in ("norm1", "norm2"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (d,)
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    return shapes | {
        "dense.weight": (d, d),
        "dense.bias": (d,),
        "out.weight": (2, d),
        "out.bias": (2,),
    }


def write_steps(path: Path, view: ParameterView, steps: int, directions: int) -> None:
    """A trajectory of so many steps with random coefficients."""
    numbers, stream = random.Random(SEED), Seeds(SEED)
    writer = Writer(path, header_of(view, SEED))
    for step in range(steps):
        seeds = stream.take(step * directions, directions)
        update = Shift(tuple(Term(seed, numbers.gauss(0, 1e-5)) for seed in seeds))
        writer.append(Step(step + 1, 0, 0.0, 0.0, 0.0, update), (step + 1) * directions)


def measure_large(steps: int, folder: Path) -> dict[str, Any]:
    """Replay the same number of terms as steps of one direction and of eight."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(SEED)
    start = {
        name: 0.02 * torch.randn(shape, generator=generator, device=device)
        for name, shape in roberta_large_shapes().items()
    }
    moved = {name: tensor.clone() for name, tensor in start.items()}
    view = ParameterView(moved)

    def copy() -> None:
        torch._foreach_copy_(list(moved.values()), list(start.values()))

    copy()
    copied = seconds(copy)
    rows = []
    for directions in (1, 8):
        path, count = folder / f"{directions}.zot", -(-steps // directions)
        write_steps(path, view, count, directions)
        replay(view, path, 1)  # the first launch compiles the kernel
        copy()
        from_file = once(lambda path=path: replay(view, path))
        fused = ParameterView({name: tensor.clone() for name, tensor in moved.items()})
        updates = [step.update for step, _ in Reader(path).steps()]
        copy()
        in_passes = once(lambda updates=updates: apply_all(view, updates))
        copy()
        one_by_one = once(lambda updates=updates: [view.apply(update) for update in updates])
        equal = all(torch.equal(moved[name], t) for name, t in fused.tensors.items())
        copy()
        rows.append(
            {
                "directions": directions,
                "steps": count,
                "file_bytes": path.stat().st_size,
                "passes": math.ceil(count * directions / WIDTH),
                "seconds_with_checks": from_file,
                "seconds": in_passes,
                "seconds_one_by_one": one_by_one,
                "equal_bits": equal,
            }
        )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "scalars": view.numel,
        "bytes": view.nbytes,
        "copy_seconds": copied,
        "copy_bytes_per_second": 2 * view.nbytes / copied,
        "rows": rows,
    }


def print_large(result: dict[str, Any]) -> None:
    """Seconds, rates, and each as a share of the copy's."""
    moved, copied = 2 * result["bytes"], result["copy_seconds"]
    print(f"\n{result['scalars']:,} scalars of fp32, {result['device']}; a copy of them takes ")
    print(f"{1e3 * copied:.3f} ms, {moved / copied / 1e9:.0f} GB/s read and written\n")
    print(
        "| K | steps | how | seconds | steps/s | bytes/s as if one by one | share of the copy's |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        ways = {
            f"replay, {row['passes']} pass(es)": row["seconds"],
            "one pass a step": row["seconds_one_by_one"],
            "replay, with reading and sha256 of the start": row["seconds_with_checks"],
        }
        for way, taken in ways.items():
            each = taken / row["steps"]
            print(
                f"| {row['directions']} | {row['steps']} | {way} | {taken:.3f} | {1 / each:.1f} "
                f"| {moved / each / 1e9:.1f} G | {copied / each:.2f} |"
            )
    if not all(row["equal_bits"] for row in result["rows"]):
        sys.exit("the fused replay and single steps differ")
    print("\nthe same bits one by one and fused")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--view", choices=("lora", "355m"), default="lora")
    parser.add_argument("--steps", type=int, help="8,000 of the LoRA view, 200 of the large one")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    with TemporaryDirectory() as folder:
        if args.view == "lora":
            result = measure_lora(args.steps or 8000, Path(folder))
            print_lora(result)
        else:
            result = measure_large(args.steps or 200, Path(folder))
            print_large(result)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
