"""What a step of the main job costs beside its forwards: LoRA, by the optimizers' defaults.

Floor: a step of q queries on batches of b rows costs q / b forwards of b rows; joined to larger
ones they may cost less. Noise moves the bytes of an adapter, which is little, so what there is
beyond is work of the host: directions, batches, launches, the update. "tensors" are rows that are
in place, "examples" a list that is collated at every step.

    python benchmarks/adapter.py --output adapter.json
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from step import DTYPES, SIZES, encoder, forwards, free, rows, timed

from objectives import ClassificationLoss
from zo_adapt import MeZO, MeZOSVRG, ParameterView
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Source, as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.schedule import Budget

OPTIMIZERS = {"MeZO()": MeZO, "MeZOSVRG()": MeZOSVRG}


def adapted(size: str, dtype: str, device: str) -> torch.nn.Module:
    """An encoder with LoRA r=8 on query and value, and a head."""
    lora = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    model = peft.get_peft_model(encoder(SIZES[size], DTYPES[dtype], device), lora)
    return model.to(device, DTYPES[dtype]).eval()


def sources(data: dict[str, Tensor], loss: ClassificationLoss) -> dict[str, Source]:
    """The same rows in place, and to be collated."""
    listed = {name: value.tolist() for name, value in data.items()}
    examples = [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)]
    return {"tensors": as_source(data), "examples": as_source(examples, loss.collate)}


def measure(size: str, dtype: str, graphs: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All steps of one model, run one way."""
    loss = ClassificationLoss(adapted(size, dtype, args.device))
    batch = rows(args.batch, args.tokens, args.device)
    forward = timed(forwards(loss, batch, graphs), args.device, args.repeats).seconds
    data = rows(8 * args.batch, args.tokens, args.device)
    data["labels"] = torch.arange(8 * args.batch, device=args.device) % 2
    found = []
    for title, optimizer in OPTIMIZERS.items():
        for kind, source in sources(data, loss).items():
            evaluator = LocalEvaluator(
                loss,
                ParameterView.trainable(loss.model),
                EvaluationOptions(cuda_graphs="on" if graphs else "off"),
            )
            samples = Samples(source, args.batch, 0, classes=data["labels"].tolist())
            run = Run(optimizer(), evaluator, samples, Budget(10**9, None), 0)
            seconds = timed(run.step, args.device, args.repeats).seconds
            queries = evaluator.queries // run.steps
            row = {
                "model": size,
                "dtype": dtype,
                "way": "captured" if graphs else "eager",
                "optimizer": title,
                "data": kind,
                "queries": queries,
                "seconds": seconds,
                "forward, s": forward,
                "ratio": seconds / (queries / args.batch * forward),
            }
            found.append(row)
            print(json.dumps(row), flush=True)
            del run, evaluator
            free()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=list(SIZES), default="distilbert" if on_gpu else "minilm")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"][: 1 + on_gpu]
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30 if on_gpu else 5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    found = [
        row
        for dtype in args.dtypes
        for graphs in ((False, True) if args.device == "cuda" else (False,))
        for row in measure(args.size, dtype, graphs, args)
    ]
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "batch": args.batch,
        "tokens": args.tokens,
        "rows": found,
    }
    print(f"\n{args.batch} rows of {args.tokens} tokens, {result['device']}\n")
    print("| model | dtype | way | optimizer | data | queries | step, ms | / its forwards |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row['model']} | {row['dtype']} | {row['way']} | `{row['optimizer']}` "
            f"| {row['data']} | {row['queries']} | {1e3 * row['seconds']:.1f} "
            f"| {row['ratio']:.2f} |"
        )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
