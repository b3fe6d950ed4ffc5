"""The README's figure: loss and held-out accuracy against queries, with backpropagation beside.

A LoRA adapter (r=8) and a new head on all-MiniLM-L6-v2, BBC topics, 512 texts of 48 tokens: the
job of examples/lora.py, by the recommended optimizer and by `Adam` (torch.optim.AdamW). A query is
one forward pass of one text; AdamW's backward passes are not counted.

    python benchmarks/beside_adam.py --seeds 0 1 2 --output beside_adam.json
    python benchmarks/beside_adam.py --draw beside_adam.json docs/figures/beside_adam.png
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from objectives import Accuracy, ClassificationLoss
from support.topics import Topics, bbc_topics
from zo_adapt import Adam, Metrics, ParameterView, initialise_lora, minimize
from zo_adapt.loops.figure import smoothed

FORWARD, BACKWARD = "forward passes alone, minimize(...)", "backpropagation, AdamW at 1e-3"
BUDGETS = {FORWARD: 40_000, BACKWARD: 7_680}
Curve = dict[str, list[float]]


def run(topics: Topics, method: str, seed: int) -> Curve:
    """Values of all steps and held-out accuracies, each with the queries made by then."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        topics.folder, num_labels=len(topics.names)
    )
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    loss, accuracy = ClassificationLoss(model), Accuracy(model)
    if method == FORWARD:
        initialise_lora(model, loss, topics.train, seed=seed)
    first = float(accuracy(topics.test))
    started = time.perf_counter()
    result = minimize(
        loss,
        ParameterView.trainable(model),
        topics.train,
        Adam(1e-3) if method == BACKWARD else None,
        batch_size=16,
        max_queries=BUDGETS[method],
        seed=seed,
        metrics=Metrics({"accuracy": accuracy}, data=topics.test, every=10),
        progress=False,
    )
    last = float(accuracy(topics.test))
    print(
        f"{method}, seed {seed}: accuracy {first:.3f} -> {last:.3f}, {result.queries} queries, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    seen = [step for step in result.history if step.metrics]
    return {
        "queries": [step.queries for step in result.history],
        "loss": [round(step.value, 4) for step in result.history],
        "seen": [0, *(step.queries for step in seen), result.queries],
        "accuracy": [first, *(step.metrics["accuracy"] for step in seen if step.metrics), last],
    }


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Two panels: training loss, smoothed, and held-out accuracy; thin lines are seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (method, runs) in zip(("C0", "C1"), curves.items(), strict=True):
        for curve in runs:
            values = smoothed(curve["loss"], len(curve["loss"]) / 20)
            left.plot(curve["queries"], values, color=color, alpha=0.7, linewidth=1)
            right.plot(curve["seen"], curve["accuracy"], color=color, alpha=0.7, linewidth=1)
        mean = statistics.mean(curve["accuracy"][-1] for curve in runs)
        right.plot([], [], color=color, label=f"{method}: {mean:.2f} in the end")
    left.set(ylabel="training loss", ylim=(0, None))
    right.set(ylabel="held-out accuracy", ylim=(0, 1))
    right.legend(loc="lower right", frameon=False, fontsize="small")
    for axes in (left, right):
        axes.set(xscale="symlog", xlim=(0, max(BUDGETS.values())), xlabel="queries")
        axes.set_xscale("symlog", linthresh=200)
        axes.set_xticks([0, 200, 1000, 10_000, 40_000], ["0", "200", "1,000", "10,000", "40,000"])
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/beside_adam.json"))
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("RESULTS", "PICTURE"))
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw[0].read_text()), args.draw[1])
        return
    curves: dict[str, list[Any]] = {method: [] for method in BUDGETS}
    for seed in args.seeds:
        topics = bbc_topics(48, test=512, seed=seed)
        for method in BUDGETS:
            curves[method].append(run(topics, method, seed))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(curves))


if __name__ == "__main__":
    main()
