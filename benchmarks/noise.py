"""What the noise costs: numbers a second, and its share of a step.

Floor on a CPU: a number needs 16 bits of the generator, a look-up in a 256 KiB table, and one read
and one write of its weight; on a GPU, where it is computed, the read and the write alone, which is
what a copy of the same bytes costs. The plain baseline is torch's own ``normal_`` and ``add_``.

    python benchmarks/noise.py --output noise.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

sys.path[:0] = [str(Path(__file__).parents[1])]

from objectives import ClassificationLoss
from zo_adapt import EvaluationOptions, MeZO, ParameterView, Shift, Term, minimize

REPEATS = 5
BATCH, TOKENS = 16, 128
WIDTH = 4096
"""Of the matrix that moves along factors: a layer of a language model of 8B."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(call: Callable[[], object], in_a_row: int = 1) -> float:
    """Median wall time of a call after one to warm up; on a GPU several may queue."""
    times = []
    for _ in range(1 + REPEATS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(in_a_row):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / in_a_row)
    return statistics.median(times[1:])


def throughput(numel: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Numbers a second of one update, beside torch's generator and an addition."""
    row = 20 if device == "cuda" else 1
    x = torch.zeros(numel, device=device, dtype=dtype)
    made = seconds(lambda: x.add_(torch.empty_like(x).normal_()), row)
    rates = {"torch normal_ + add_": numel / made}
    y = torch.empty_like(x)
    rates["copy of the weights"] = numel / seconds(lambda: y.copy_(x), row)
    for noise in ("gaussian", "rademacher"):
        view = ParameterView({"x": x}, noise=noise)
        for count in (1, 8):
            update = Shift(tuple(Term(seed, 1e-3) for seed in range(count)))
            name = noise if count == 1 else f"{noise}, {count} directions at once"
            call = partial(view.apply, update)
            rates[name] = numel / seconds(call, row)
            if device == "cuda" and count == 1:
                rates[f"{name}, a call that is waited for"] = numel / seconds(call)
    matrix = x[: numel // WIDTH * WIDTH].view(-1, WIDTH)
    view = ParameterView({"x": matrix}, noise="lowrank")
    for count in (1, 8, 32):
        update = Shift(tuple(Term(seed, 1e-3) for seed in range(count)))
        call = partial(view.apply, update)
        rates[f"rank 1, {count} directions at once"] = matrix.numel() / seconds(call, row)
    return rates


def share_of_step(noise: str, device: str, adapter: bool) -> dict[str, float]:
    """Time of a MeZO step on a 22.7M encoder, or on its LoRA adapter, and of its forwards alone."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model: Any = BertForSequenceClassification(config)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8))
    model = model.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    rows = {
        "input_ids": torch.randint(1000, 30000, (BATCH, TOKENS), generator=generator).to(device),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long, device=device),
        "labels": torch.randint(0, 2, (BATCH,), generator=generator).to(device),
    }
    view = (ParameterView.trainable if adapter else ParameterView.full)(model, noise=noise)
    loss = ClassificationLoss(model)

    def forwards() -> None:
        with torch.no_grad():
            loss(rows)
            loss(rows)

    ends: list[float] = []

    def note(_: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    minimize(
        loss,
        view,
        rows,
        MeZO(lr=1e-9, num_directions=1, one_sided=False),
        batch_size=BATCH,
        max_steps=2 + REPEATS,
        callback=note,
        progress=False,
        evaluation=EvaluationOptions(joint_rows="off", cuda_graphs="off"),
    )
    whole = statistics.median(b - a for a, b in pairwise(ends[1:]))
    bare = seconds(forwards)
    return {"step": whole, "forwards": bare, "noise share": 1 - bare / whole}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    usual = 355_000_000 if torch.cuda.is_available() else 22_000_000
    parser.add_argument("--numel", type=int, default=usual)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numbers per second": {
            name: throughput(args.numel, args.device, dtype) for name, dtype in DTYPES.items()
        },
        "step": {
            f"{noise}, {'LoRA' if adapter else 'all weights'}": share_of_step(
                noise, args.device, adapter
            )
            for noise in ("gaussian", "rademacher")
            for adapter in (False, True)
        },
    }
    print("| pass over the weights | dtype | million weights/s | times torch | share of the copy |")
    print("|---|---|---|---|---|")
    for dtype, rates in result["numbers per second"].items():
        base, copy = rates["torch normal_ + add_"], rates["copy of the weights"]
        for name, rate in rates.items():
            shares = f"{rate / base:.2f} | {rate / copy:.2f}"
            print(f"| {name} | {dtype} | {rate / 1e6:.0f} | {shares} |")
    print("\n| noise and view | step, s | two forwards, s | share of the step |\n|---|---|---|---|")
    for name, row in result["step"].items():
        print(f"| {name} | {row['step']:.3f} | {row['forwards']:.3f} | {row['noise share']:.1%} |")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
