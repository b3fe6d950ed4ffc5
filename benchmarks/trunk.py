"""What frozen-trunk reuse is worth: evaluations with and without it, last 4 of 24 layers tuned.

Bound: with layers of equal cost and a head that costs nothing, 24 / 4 = 6 times. Bytes moved
besides: the kept activations once, batch x tokens x width numbers. The plain baseline is the same
call of the same evaluator on the same model, without a trunk, in the same process. On a GPU both
are also captured in CUDA graphs, where the objective allows it; a captured one is compared with the
captured baseline, and with the eager one.

    python benchmarks/trunk.py --output trunk.json
"""

import argparse
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
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1])]

from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import FrozenTrunk, MeZO, ParameterView, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE

LAYERS, TUNED = 24, 4
REPEATS = 5
WARM = 7
"""Calls before: recorded, checked, warmed up, captured."""
VOCABULARY = 50265


class Kind(NamedTuple):
    """A way to evaluate."""

    reused: bool
    captured: bool


KINDS = {
    "plain": Kind(reused=False, captured=False),
    "reused": Kind(reused=True, captured=False),
    "plain, captured": Kind(reused=False, captured=True),
    "reused, captured": Kind(reused=True, captured=True),
}


COMPARED = {
    "eager": ("plain", "reused"),
    "captured": ("plain, captured", "reused, captured"),
    "captured, against eager": ("plain", "reused, captured"),
}
"""A baseline, and what is held against it."""


class Size(NamedTuple):
    """Of the models and of a batch."""

    width: int
    heads: int
    batch: int
    tokens: int


SIZES = {"cuda": Size(1024, 16, 64, 128), "cpu": Size(256, 4, 8, 128)}


def encoder(size: Size) -> nn.Module:
    """RoBERTa-large on CUDA, as wide as ``size`` elsewhere; with a classification head."""
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=LAYERS,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=514,
    )
    return transformers.RobertaForSequenceClassification(config)


def decoder(size: Size, kind: Any = transformers.GPT2ForSequenceClassification) -> nn.Module:
    """GPT-2 medium on CUDA, as wide as ``size`` elsewhere."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=size.width,
        n_layer=LAYERS,
        n_head=size.heads,
        pad_token_id=1,
    )
    model: nn.Module = kind(config)
    return model


def language_model(size: Size) -> nn.Module:
    """The decoder with its output embedding, which is run in either case."""
    return decoder(size, transformers.GPT2LMHeadModel)


MODELS: dict[str, tuple[Callable[[Size], nn.Module], Any]] = {
    "encoder, classification": (encoder, ClassificationLoss),
    "decoder, classification": (decoder, ClassificationLoss),
    "decoder, language model": (language_model, CausalLMLoss),
}


def rows(size: Size, batches: int) -> list[dict[str, Any]]:
    """Examples of the full length: what is timed is the layers, not the padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50000, (batches * size.batch, size.tokens), generator=generator)
    return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def times(calls: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Median seconds of each call, the calls taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(one) for name, one in taken.items()}


def step(loss: Any, view: ParameterView, data: Any, size: Size, device: str, kind: Kind) -> float:
    """Median seconds of a MeZO step: two forwards, the noise of three shifts."""
    ends: list[float] = []

    def note(_: object) -> None:
        wait(device)
        ends.append(time.perf_counter())

    minimize(
        loss,
        view,
        data,
        MeZO(lr=1e-9, num_directions=1, one_sided=False),
        batch_size=size.batch,
        max_steps=WARM + REPEATS + 1,
        callback=note,
        progress=False,
        evaluation=EvaluationOptions(
            reuse_trunk="on" if kind.reused else "off",
            cuda_graphs="on" if kind.captured else "off",
        ),
    )
    return statistics.median(b - a for a, b in pairwise(ends[WARM:]))


def faster(seconds: dict[str, float]) -> dict[str, float]:
    """By how much the trunk is, in each comparison that was made."""
    return {
        title: seconds[plain] / seconds[reused]
        for title, (plain, reused) in COMPARED.items()
        if reused in seconds
    }


def measure(name: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One model in one precision."""
    torch.manual_seed(0)
    size, (build, loss_of) = SIZES[device], MODELS[name]
    with torch.device(device):  # random numbers are drawn faster there
        model = build(size)
    model = model.to(device, dtype).eval()
    view, loss = ParameterView.last_layers(model, TUNED), loss_of(model)
    data = rows(size, 1)
    if loss_of is CausalLMLoss:
        data = [{"input_ids": row["input_ids"]} for row in data]
    trunk = FrozenTrunk(view)
    capturable = device == "cuda" and getattr(loss, "capturable", False)
    kinds = {title: kind for title, kind in KINDS.items() if capturable or not kind.captured}
    evaluators = {
        title: LocalEvaluator(
            loss,
            view,
            EvaluationOptions(
                reuse_trunk=trunk if kind.reused else "off",
                cuda_graphs="on" if kind.captured else "off",
            ),
        )
        for title, kind in kinds.items()
    }
    probe = Probe(HERE, Batch(as_source(data, loss.collate), range(len(data))))
    calls = {title: lambda e=e: e.evaluate([probe]) for title, e in evaluators.items()}
    values = {title: [call()[0].value for _ in range(WARM)][-1] for title, call in calls.items()}
    if trunk.why_not is not None:
        raise RuntimeError(f"{name}: {trunk.why_not}")
    for title, evaluator in evaluators.items():
        if kinds[title].captured and not (evaluator._graphs and evaluator._graphs._graphs):
            raise RuntimeError(f"{name}: {title}: nothing was captured")
    seconds = times(calls, device)
    steps = {title: step(loss, view, data, size, device, kind) for title, kind in kinds.items()}
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "size": size._asdict(),
        "evaluation, s": seconds,
        "evaluation, times faster": faster(seconds),
        "MeZO step, s": steps,
        "MeZO step, times faster": faster(steps),
        "relative difference of the values": {
            title: abs(value / values["plain"] - 1) for title, value in values.items()
        },
        "bytes taken": trunk.nbytes,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    dtypes = [torch.float32] + [torch.bfloat16] * (args.device == "cuda")
    found = [measure(name, args.device, dtype) for dtype in dtypes for name in args.models]
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": LAYERS,
        "tuned": TUNED,
        "rows": found,
    }
    print(f"last {TUNED} of {LAYERS} layers tuned, {result['device']}\n")
    print("| model | dtype | compared | plain, ms | reused, ms | evaluation | MeZO step | off by |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        for compared, (plain, reused) in COMPARED.items():
            if compared not in row["evaluation, times faster"]:
                continue
            seconds = row["evaluation, s"]
            print(
                f"| {row['model']} | {row['dtype']} | {compared} "
                f"| {1e3 * seconds[plain]:.1f} | {1e3 * seconds[reused]:.1f} "
                f"| {row['evaluation, times faster'][compared]:.2f} x "
                f"| {row['MeZO step, times faster'][compared]:.2f} x "
                f"| {row['relative difference of the values'][reused]:.1e} |"
            )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
