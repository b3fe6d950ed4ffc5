"""What a step costs beside its forwards, in time and in memory.

Floor: MeZO asks two forwards, a minibatch step of MeZO-SVRG four, and each step moves the weights
three times (two shifts and the update; a minibatch step five times): 2 * bytes / bandwidth each.

Every ratio is against the same forwards, run the same way (eager or captured) in the same process;
"plain" is the textbook MeZO step, in place, with torch's generator. ``--reference PATH`` times the
steps of the published code (a checkout of github.com/amazon-science/mezo_svrg) on the same model.

    python benchmarks/step.py --sizes roberta-large distilbert --output step.json
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from published import LR, Published

from objectives import ClassificationLoss
from zo_adapt import MeZO, MeZOSVRG, ParameterView
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.optimizers.schedule import Budget


class Size(NamedTuple):
    """Of an encoder."""

    layers: int
    width: int
    heads: int
    vocabulary: int


SIZES = {
    "roberta-large": Size(24, 1024, 16, 50265),
    "distilbert": Size(6, 768, 12, 30522),
    "minilm": Size(6, 384, 12, 30522),
}
WARM = 6
"""Calls of each kind before those that are timed: captured, compiled, grown."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def encoder(size: Size, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Random weights."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    with torch.device(device):  # random numbers are drawn faster there
        model = transformers.RobertaForSequenceClassification(config)
    return model.to(device, dtype).eval()


def rows(batch: int, tokens: int, device: str) -> dict[str, Tensor]:
    """Random tokens, no padding."""
    generator = torch.Generator().manual_seed(0)
    made = {
        "input_ids": torch.randint(1000, 30000, (batch, tokens), generator=generator),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.long),
        "labels": torch.randint(0, 2, (batch,), generator=generator),
    }
    return {name: value.to(device) for name, value in made.items()}


class Timed(NamedTuple):
    """Median seconds of a call and the peak of allocated memory."""

    seconds: float
    peak: int


def timed(call: Callable[[], object], device: str, repeats: int) -> Timed:
    """Calls in a row, as a run makes them."""
    return timed_in_turn(call, device, repeats, 1)[0]


def timed_in_turn(call: Callable[[], object], device: str, repeats: int, kinds: int) -> list[Timed]:
    """Calls in a row, of which every so many are of one kind; each kind's time apart.

    A call's time is from the end of the one before to its own end. On a GPU both are seen by the
    GPU: what the host does for a call may hide behind the work of the one before, as in a run.
    """
    warm, on_gpu = kinds * WARM, device == "cuda"
    for _ in range(warm):
        call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    ends = [_now(on_gpu)]
    for _ in range(kinds * repeats):
        call()
        ends.append(_now(on_gpu))
    if on_gpu:
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(ends)]
    else:
        seconds = [b - a for a, b in pairwise(ends)]
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return [Timed(statistics.median(seconds[kind::kinds]), peak) for kind in range(kinds)]


def _now(on_gpu: bool) -> Any:
    """The time on the host, or an event that the GPU reaches when its work so far is done."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def stepper(
    loss: ClassificationLoss,
    data: dict[str, Tensor],
    optimizer: Optimizer,
    noise: str,
    graphs: bool,
) -> Callable[[], object]:
    """One step of a run over all weights on one and the same batch."""
    view = ParameterView.full(loss.model, noise=noise)
    evaluator = LocalEvaluator(
        loss, view, EvaluationOptions(joint_rows="off", cuda_graphs="on" if graphs else "off")
    )
    size = len(data["labels"])
    samples = Samples(as_source(data), size, 0)
    return Run(optimizer, evaluator, samples, Budget(10**9, None), 0).step


def svrg() -> MeZOSVRG:
    """Algorithm 1 as published: two-sided, one direction, a snapshot at every other step."""
    return MeZOSVRG(LR, snapshot_interval=2, one_sided=False, num_directions=1)


def forwards(
    loss: ClassificationLoss, data: dict[str, Tensor], graphs: bool
) -> Callable[[], object]:
    """One forward as an evaluation of the engine makes it, at the weights themselves."""
    if not graphs:

        def forward() -> None:
            with torch.no_grad(), loss.evaluating():
                loss(data)

        return forward
    with torch.no_grad(), loss.evaluating():
        for _ in range(3):
            loss(data)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = loss(data)
    graph.kept = kept  # type: ignore[attr-defined]  # the graph writes there
    return graph.replay


def plain(loss: ClassificationLoss, data: dict[str, Tensor]) -> Callable[[], object]:
    """The textbook step: +mu z, -2 mu z, +mu z in place, then the update, z drawn four times."""
    parameters = list(loss.model.parameters())
    mu = 1e-3

    def move(coefficient: Any) -> None:
        torch.manual_seed(1)
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter), alpha=coefficient)

    def step() -> None:
        with torch.no_grad(), loss.evaluating():
            move(mu)
            up = float(loss(data).mean())
            move(-2 * mu)
            down = float(loss(data).mean())
            move(mu)
            move(-LR * (up - down) / (2 * mu))

    return step


def measure(name: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model."""
    device, repeats = args.device, args.repeats
    data = rows(args.batch, args.tokens, device)
    found: list[dict[str, Any]] = []
    bare: dict[bool, Timed] = {}

    def note(step: str, way: str, result: Timed, count: int, base: Timed) -> None:
        row = {
            "model": name,
            "dtype": dtype,
            "step": step,
            "way": way,
            "seconds": result.seconds,
            "ratio": result.seconds / (count * base.seconds),
            "peak GiB": result.peak / 2**30,
            "memory ratio": result.peak / base.peak if base.peak else None,
        }
        found.append(row)
        print(json.dumps(row), flush=True)

    for graphs in (False, True) if device == "cuda" else (False,):
        way = "captured" if graphs else "eager"
        loss = ClassificationLoss(encoder(SIZES[name], DTYPES[dtype], device))
        bare[graphs] = timed(forwards(loss, data, graphs), device, repeats)
        note("forward", way, bare[graphs], 1, bare[graphs])
        for noise in ("gaussian", "rademacher"):
            step = stepper(loss, data, MeZO.paper(LR), noise, graphs)
            note(f"MeZO {noise}", way, timed(step, device, repeats), 2, bare[graphs])
            del step
            free()
            step = stepper(loss, data, svrg(), noise, graphs)
            snapshot, minibatch = timed_in_turn(step, device, repeats, 2)
            note(f"MeZO-SVRG {noise}, snapshot step", way, snapshot, 2, bare[graphs])
            note(f"MeZO-SVRG {noise}, minibatch step", way, minibatch, 4, bare[graphs])
            del step
            free()
    note("MeZO, textbook", "plain", timed(plain(loss, data), device, repeats), 2, bare[False])
    if args.reference:
        published = Published(args.reference, loss.model, data)
        note("MeZO", "published", timed(published.mezo, device, repeats), 2, bare[False])
        snapshot, minibatch = timed_in_turn(published.svrg, device, repeats, 2)
        note("MeZO-SVRG, snapshot step", "published", snapshot, 2, bare[False])
        note("MeZO-SVRG, minibatch step", "published", minibatch, 4, bare[False])
    free()
    return found


def free() -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    usual = ["roberta-large", "distilbert"] if on_gpu else ["minilm"]
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=usual)
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"][: 1 + on_gpu]
    )
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15 if on_gpu else 5)
    parser.add_argument("--reference", type=Path, help="checkout of the published code")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = [
        row for size in args.sizes for dtype in args.dtypes for row in measure(size, dtype, args)
    ]
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch": args.batch,
        "tokens": args.tokens,
        "rows": found,
    }
    print("\n| model | dtype | step | way | ms | / forwards | peak GiB | / forward's |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        memory = (
            f"{row['peak GiB']:.2f} | {row['memory ratio']:.2f}" if row["memory ratio"] else "- | -"
        )
        print(
            f"| {row['model']} | {row['dtype']} | {row['step']} | {row['way']} | "
            f"{1000 * row['seconds']:.1f} | {row['ratio']:.3f} | {memory} |"
        )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
