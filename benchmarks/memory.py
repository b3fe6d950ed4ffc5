"""Peak memory of one step over all weights, in the paper's form: a model of RoBERTa-large's size.

Floor: what the forward needs, weights included; a backward pass keeps every activation besides.

    python benchmarks/memory.py --output memory.json
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from step import DTYPES, LR, SIZES, encoder, rows, svrg

from objectives import ClassificationLoss
from zo_adapt import SGD, Adam, EvaluationOptions, MeZO, ParameterView, minimize
from zo_adapt.optimizers.optimizer import Optimizer

SHAPES = [(16, 128), (32, 128), (64, 128), (64, 256), (64, 512)]
METHODS = ["forward", "MeZO", "MeZO-SVRG", "SGD", "Adam"]


def optimizer(method: str) -> Optimizer:
    """One of the methods."""
    made: dict[str, Optimizer] = {
        "MeZO": MeZO.paper(LR),
        "MeZO-SVRG": svrg(),
        "SGD": SGD(LR),
        "Adam": Adam(LR),
    }
    return made[method]


def peak(method: str, dtype: str, batch: int, tokens: int, size: str) -> float | None:
    """GiB; None: it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    loss = ClassificationLoss(encoder(SIZES[size], DTYPES[dtype], "cuda"))
    data = rows(batch, tokens, "cuda")
    torch.cuda.reset_peak_memory_stats()
    try:
        if method == "forward":
            with torch.no_grad(), loss.evaluating():
                loss(data)
        else:
            minimize(
                loss,
                ParameterView.full(loss.model, noise="gaussian"),
                data,
                optimizer(method),
                batch_size=batch,
                max_steps=4,
                progress=False,
                evaluation=EvaluationOptions(cuda_graphs="off"),
            )
    except torch.cuda.OutOfMemoryError:
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="roberta-large")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the allocator's peak is read from a GPU: torch finds none here")
    found: list[dict[str, Any]] = []
    print(f"| dtype | batch x tokens | {' | '.join(METHODS)} |\n|{'---|' * (2 + len(METHODS))}")
    for dtype in DTYPES:
        for batch, tokens in SHAPES:
            row = {m: peak(m, dtype, batch, tokens, args.size) for m in METHODS}
            found.append({"dtype": dtype, "batch": batch, "tokens": tokens, "GiB": row})
            cells = ["out of memory" if g is None else f"{g:.2f}" for g in row.values()]
            print(f"| {dtype} | {batch} x {tokens} | {' | '.join(cells)} |", flush=True)
    if args.output:
        result = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": args.size,
            "rows": found,
        }
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
