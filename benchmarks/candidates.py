"""What evaluating K perturbed adapters in one forward saves, against one after another.

Floor: one after another reads the frozen weights K times and launches every kernel K times; in one
forward the operations are the same, the weights are read and the kernels launched once. So the
ratio is at most K, and 1 where a single forward is bound by its operations already.

    python benchmarks/candidates.py --output candidates.json

CUDA: a decoder of OPT-1.3B's size in bf16. CPU: an encoder of MiniLM's size in fp32. Random
weights, LoRA r=8, next-token and classification loss.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1])]

from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import ParameterView, Term
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions, JointRows
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.term import Shift

MU = 1e-3


def decoder() -> Any:
    """OPT-1.3B's shape in bf16, LoRA on q and v."""
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        ffn_dim=8192,
        word_embed_proj_dim=2048,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = OPTForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, lora).to(torch.bfloat16).eval()


def encoder() -> Any:
    """MiniLM's shape in fp32, LoRA on query and value, and a head."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"])
    return get_peft_model(BertForSequenceClassification(config), lora).eval()


def rows(count: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    found = {
        "input_ids": torch.randint(1000, 30000, (count, tokens), generator=generator),
        "attention_mask": torch.ones(count, tokens, dtype=torch.long),
    }
    if device != "cuda":
        found["labels"] = torch.randint(0, 2, (count,), generator=generator)
    return {name: value.to(device) for name, value in found.items()}


def waited(device: str) -> float:
    """The time when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Way:
    """One way to evaluate the probes, timed in turn with the others."""

    def __init__(self, objective: Any, view: ParameterView, joint_rows: JointRows) -> None:
        self.evaluator = LocalEvaluator(
            objective,
            view,
            EvaluationOptions(joint_rows="off" if joint_rows is None else joint_rows),
        )
        self.times: list[float] = []
        self.peak = 0
        self.answers: list[Evaluation] = []

    def run(self, probes: Sequence[Probe], device: str) -> None:
        """Once, timed."""
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = waited(device)
        self.answers = self.evaluator.evaluate(probes)
        self.times.append(waited(device) - start)
        if device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()


def measure(
    objective: Any, view: ParameterView, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds and values of each way, on one batch and K directions."""
    source = as_source(rows(batch, args.tokens, args.device))
    same = Batch(source, range(batch))
    probes = [Probe(Shift((Term(seed, MU),)), same) for seed in range(args.candidates)]
    limits: dict[str, JointRows] = {
        "alone": "off",
        "joined": args.candidates * batch,
        "auto": "auto",
    }
    ways = {name: Way(objective, view, limit) for name, limit in limits.items()}
    for _ in range(2 + args.repeats):
        for way in ways.values():
            way.run(probes, args.device)
    seconds = {name: statistics.median(way.times[2:]) for name, way in ways.items()}
    alone, joined = (torch.tensor([e.value for e in ways[n].answers]) for n in ("alone", "joined"))
    return {
        "batch": batch,
        "seconds": seconds,
        "ratio": {name: seconds["alone"] / seconds[name] for name in ("joined", "auto")},
        "difference": float((alone - joined).abs().max()),
        "spread": float(alone.std()),
        "peak GiB": {name: way.peak / 2**30 for name, way in ways.items()},
        "one at a time because": ways["joined"].evaluator.plan.why_not.get("joint"),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    torch.manual_seed(0)
    model = decoder() if args.device == "cuda" else encoder()
    objective = CausalLMLoss(model) if args.device == "cuda" else ClassificationLoss(model)
    view = ParameterView.trainable(model)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "candidates": args.candidates,
        "tokens": args.tokens,
        "rows": [measure(objective, view, batch, args) for batch in args.batch],
    }
    print(f"{args.candidates} candidates, {args.tokens} tokens\n")
    print("| rows | one by one, s | joined, s | times | auto, times | difference | peak, GiB |")
    print("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        seconds, ratio, peak = row["seconds"], row["ratio"], row["peak GiB"]
        print(
            f"| {row['batch']} | {seconds['alone']:.4f} | {seconds['joined']:.4f} "
            f"| {ratio['joined']:.2f} | {ratio['auto']:.2f} "
            f"| {row['difference']:.1e} of {row['spread']:.1e} "
            f"| {peak['alone']:.2f} / {peak['joined']:.2f} |"
        )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
