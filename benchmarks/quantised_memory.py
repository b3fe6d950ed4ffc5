"""What a step above quantised weights costs in time and memory, beside the same model in bf16.

A decoder of Llama's kind with random weights is made on the device and quantised as transformers
does when it loads a checkpoint; a LoRA (r=16 on every linear layer, bf16) is tuned by the default
step on random tokens. Floor: a forward of the same model, and the bytes of its weights. AdamW with
checkpointing on the same adapter stands beside. Bytes are the allocator's (0 on a CPU).

    python benchmarks/quantised_memory.py --output quantised_memory.json       # 8B, on a GPU
    python benchmarks/quantised_memory.py --quick                              # a tiny one, CPU

Nothing is downloaded. A base whose package is missing is said to be so.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from decoders import SIZES, decoder, free
from llm import first_order, timed, tokens_of

from objectives import CausalLMLoss
from zo_adapt import MeZO, ParameterView, Step, minimize
from zo_adapt.loops.result import Result

PACKAGES = {"bf16": "torch", "nf4": "bitsandbytes", "torchao": "torchao", "int8": "bitsandbytes"}
COMPARED = 2
"""Steps after which a run is compared with itself."""


def is_late(args: argparse.Namespace) -> bool:
    """Whether nothing more should begin."""
    return time.perf_counter() - args.begun > args.deadline


def quantisation(base: str) -> Any:
    """What from_pretrained is told; computing in bf16."""
    if base == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def adapted(base: str, args: argparse.Namespace) -> Any:
    """The model with an adapter, both B of zeros as peft makes it."""
    model = decoder(SIZES[args.size], args.device, lora=False).to(torch.bfloat16)
    if base != "bf16":
        kind, config, weights = type(model), model.config, model.state_dict()
        del model
        model = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.bfloat16,
            device_map={"": args.device}, quantization_config=quantisation(base),
        )  # fmt: skip
        del weights
    settings = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, settings).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(args.device, torch.bfloat16)
    free()
    return model


class Ran(NamedTuple):
    """A run, what it said, its hash after some steps, and seconds and queries of the later ones."""

    result: Result
    told: list[str]
    digest: str
    seconds: float
    queries: float


def run(view: ParameterView, data: dict[str, Tensor], args: argparse.Namespace, last: int) -> Ran:
    """The default step, to the last one."""
    told: list[str] = []
    times, queries, digest = [time.perf_counter()], [0], ""
    spent: list[float] = []

    def look(step: Step) -> None:
        nonlocal digest
        if args.device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - times[-1])
        queries.append(step.queries)
        if step.step == COMPARED:
            digest = view.hash()
        times.append(time.perf_counter())
        if step.step == last or (step.step > COMPARED and is_late(args)):
            raise StopIteration

    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zo_adapt.evaluation.signal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = minimize(
            CausalLMLoss(view.model), view, data, MeZO(), batch_size=args.batch,  # type: ignore[arg-type]
            max_steps=args.steps, progress=False, callback=look,
        )  # fmt: skip
    logger.removeHandler(handler)
    told += sorted({f"{each.category.__name__}: {each.message}" for each in caught})
    made = [after - before for before, after in itertools.pairwise(queries)]
    kept = slice(min(COMPARED, len(spent) - 1), None)
    return Ran(result, told, digest, statistics.fmean(spent[kept]), statistics.fmean(made[kept]))


def peak(args: argparse.Namespace) -> float:
    """GiB since it was asked last; 0 on a CPU."""
    if args.device != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def row(base: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a base costs, and what the runs found out about it."""
    begun = time.perf_counter()
    model = adapted(base, args)
    made, loading, weights = time.perf_counter() - begun, peak(args), 0.0
    if args.device == "cuda":
        weights = torch.cuda.memory_allocated() / 2**30
    data, loss = tokens_of(args, SIZES[args.size]), CausalLMLoss(model)

    def forward() -> None:
        with torch.no_grad(), loss.evaluating():
            loss(data)

    floor = timed(forward, args)
    peak(args)
    view = ParameterView.trainable(model)
    start = [tensor.detach().clone() for tensor in view.tensors.values()]
    whole = run(view, data, args, args.steps)
    stepping = peak(args)
    for tensor, before in zip(view.tensors.values(), start, strict=True):
        tensor.data.copy_(before)
    again = run(view, data, args, COMPARED)
    plan = whole.result.evaluation
    found = {
        "base": base,
        "GiB of the weights": weights,
        "seconds to make": made,
        "peak GiB, made": loading,
        "seconds a step": whole.seconds,
        "queries a step": whole.queries,
        "ratio": whole.seconds / (whole.queries / args.batch * floor.seconds),
        "peak GiB, step": stepping,
        "seconds a forward": floor.seconds,
        "peak GiB, forward": floor.peak,
        "same again": whole.digest == again.digest,
        "plan": str(plan),
        "why not": plan.why_not,
        "told": whole.told,
    }
    print(json.dumps(found), flush=True)  # what follows may not fit
    if not args.no_adamw and not is_late(args):
        try:
            adamw = timed(first_order(model, data), args, warm=1)
            found |= {"seconds, AdamW": adamw.seconds, "peak GiB, AdamW": adamw.peak}
        except torch.OutOfMemoryError:
            found |= {"peak GiB, AdamW": "out of memory"}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    named = {
        "base": "base", "GiB of the weights": "weights", "peak GiB, forward": "forward",
        "peak GiB, step": "step", "peak GiB, AdamW": "AdamW", "seconds a forward": "s a forward",
        "seconds a step": "s a step", "queries a step": "queries", "ratio": "/ forwards",
        "seconds, AdamW": "s, AdamW", "same again": "same again",
    }  # fmt: skip
    lines = [f"| {' | '.join(named.values())} |", "|---" * len(named) + "|"]
    for each in rows:
        cells = [each.get(key, "-") for key in named]
        shown = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a line for every base as it is done, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=list(SIZES), default="8B" if on_gpu else "tiny")
    parser.add_argument("--bases", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2, help="of a forward, and of AdamW")
    parser.add_argument("--no-adamw", action="store_true")
    parser.add_argument("--deadline", type=float, default=80, help="nothing begins later (s)")
    parser.add_argument("--quick", action="store_true", help="the tiny model, short texts")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.size, args.tokens = "tiny", 16
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    rows: list[dict[str, Any]] = []
    args.begun = time.perf_counter()
    for base in args.bases:
        if find_spec(PACKAGES[base]) is None:
            print(f"{base}: {PACKAGES[base]} is not installed", flush=True)
        elif is_late(args):
            print(f"{base}: left out, --deadline {args.deadline:g} is over", flush=True)
        else:
            try:
                rows.append(row(base, args))
            except Exception:  # the others are worth knowing, too
                traceback.print_exc()
                print(f"{base}: failed", flush=True)
            free()
    print(table(rows))
    print(f"{time.perf_counter() - args.begun:.0f} s", flush=True)
    if args.output:
        packages = {*PACKAGES.values(), "transformers", "peft"}
        result = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "versions": {name: version(name) for name in sorted(packages) if find_spec(name)},
            "settings": {k: str(v) for k, v in vars(args).items()},
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
