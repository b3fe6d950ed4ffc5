"""Held-out accuracy at equal queries: which optimizer, and which default, learns most.

LoRA (r=8) and a new head on all-MiniLM-L6-v2, 512 training and up to 1,024 held-out texts, several
seeds (split, new weights and directions). A query is one forward of one sample. Every row is
measured on the weights after the last step; nothing is selected on the held-out set.

    python benchmarks/accuracy.py --seeds 0 1 2 --jobs 4 --output results.json
    python benchmarks/accuracy.py --prepare FOLDER      # for a machine without a network ...
    python benchmarks/accuracy.py --assets FOLDER       # ... that runs from this folder
"""

import argparse
import gzip
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from objectives import F1, Accuracy, ClassificationLoss
from zo_adapt import Adam, Data, MeZO, MeZOSVRG, ParameterView, minimize
from zo_adapt.optimizers.optimizer import Optimizer

TRAIN, TEST = 512, 1024
PREPARED_SEEDS = range(5)


class Task(NamedTuple):
    """A data set, how much of a text is read, the budget, and what is tuned for."""

    dataset: str
    max_length: int
    max_queries: int
    view: str = "lora"
    objective: str = "loss"
    noise: str = "gaussian"


TASKS = {
    "bbc-128": Task("bbc", 128, 100_000),
    "movie-48": Task("movie", 48, 400_000),
    "bbc-32": Task("bbc", 32, 7_680),
    "bbc-48": Task("bbc", 48, 40_000),
    "bbc-48 last 2 layers": Task("bbc", 48, 40_000, "partial"),
    "bbc-48 all weights": Task("bbc", 48, 40_000, "full"),
    "bbc-48 last 2 layers, lowrank": Task("bbc", 48, 40_000, "partial", noise="lowrank"),
    "bbc-48 all weights, lowrank": Task("bbc", 48, 40_000, "full", noise="lowrank"),
    "bbc-48 all weights, lowrank-4": Task("bbc", 48, 40_000, "full", noise="lowrank-4"),
    "bbc-32 last 2 layers": Task("bbc", 32, 7_680, "partial"),
    "bbc-32 all weights": Task("bbc", 32, 7_680, "full"),
    "bbc-32 last 2 layers, lowrank": Task("bbc", 32, 7_680, "partial", noise="lowrank"),
    "bbc-32 all weights, lowrank": Task("bbc", 32, 7_680, "full", noise="lowrank"),
    "movie-48 last 2 layers": Task("movie", 48, 30_000, "partial"),
    "movie-48 all weights": Task("movie", 48, 30_000, "full"),
    "movie-48 last 2 layers, lowrank": Task("movie", 48, 30_000, "partial", noise="lowrank"),
    "movie-48 all weights, lowrank": Task("movie", 48, 30_000, "full", noise="lowrank"),
    "bbc-48 count": Task("bbc", 48, 50_000, objective="count"),
    "bbc-48 soft count": Task("bbc", 48, 50_000, objective="soft count"),
    "bbc-48 macro-F1": Task("bbc", 48, 50_000, objective="macro-F1"),
}
OBJECTIVES: dict[str, Callable[[Any], Any]] = {
    "loss": ClassificationLoss,
    "count": Accuracy,
    "soft count": partial(Accuracy, softness=1.0),
    "macro-F1": F1,
}
COUNTED = 128
"""Rows of a batch of an objective that counts."""

PAIRS = partial(MeZO, num_directions=1, one_sided=False)
"""One pair on the whole batch, as published."""

METHODS: dict[str, tuple[Callable[[], Optimizer], int]] = {
    "MeZO()": (MeZO, 16),
    "MeZO(), LoRA's A moves too": (MeZO, 16),
    "MeZOSVRG()": (MeZOSVRG, 16),
    "MeZO, pairs": (PAIRS, 16),
    "Adam(lr=1e-3)": (partial(Adam, lr=1e-3), 16),
}
for _mu in (0.01, 0.03, 0.1, 0.2):  # of a LoRA view: 1, 3, 10 and 20 times the scale for a loss
    METHODS[f"MeZO mu={_mu:g}"] = (partial(MeZO, perturbation_scale=_mu), 16)
METHODS["MeZO, ranks"] = (partial(MeZO, shaping="ranks"), 16)
METHODS["MeZO, base points"] = (partial(MeZO, shaping="base"), 16)
for _rho in (0.15, 0.25, 0.4):
    for _batch in (16, 64):
        METHODS[f"MeZO, pairs, rho={_rho:g} b={_batch}"] = (
            partial(PAIRS, displacement=_rho),
            _batch,
        )
for _lr in (5e-3, 1e-2, 2e-2):
    for _batch in (16, 64):
        METHODS[f"MeZO, pairs, lr={_lr:g} b={_batch}"] = (
            partial(PAIRS, _lr, normalize=True, perturbation_scale=1e-2),
            _batch,
        )


class Job(NamedTuple):
    """One run."""

    task: str
    method: str
    seed: int
    assets: str | None
    stratify: bool = True
    max_queries: int | None = None
    batch_size: int | None = None


def examples_of(task: Task, seed: int, assets: str | None) -> tuple[list[Any], list[Any], str]:
    """Training and held-out examples, and the folder of the model."""
    if assets is not None:
        name = f"{task.dataset}-{task.max_length}-{seed}.json.gz"
        with gzip.open(Path(assets) / name, "rt") as file:
            train, test = json.load(file)
        return train, test, str(Path(assets) / "model")
    from support import real_data

    folder = str(real_data.minilm_folder())
    corpus = real_data.bbc() if task.dataset == "bbc" else real_data.movie_reviews()
    counts = [corpus.labels.count(label) for label in range(len(corpus.names))]
    held_out = min(TEST, min(counts) * len(counts) - TRAIN - len(counts))
    split = real_data.balanced_split(corpus.texts, corpus.labels, TRAIN, held_out, seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tokenize(texts: list[str], labels: list[int]) -> list[Any]:
        tokens = tokenizer(texts, truncation=True, max_length=task.max_length)["input_ids"]
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
            for ids, label in zip(tokens, labels, strict=True)
        ]

    return (
        tokenize(split.train_texts, split.train_labels),
        tokenize(split.test_texts, split.test_labels),
        folder,
    )


def build(
    folder: str, classes: int, seed: int, view: str = "lora", dtype: torch.dtype = torch.float32
) -> Any:
    """The encoder with a new head and, for LoRA, a fresh adapter, drawn from the seed."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=classes, dtype=dtype
    )
    if view == "lora":
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"]
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def view_of(model: Any, view: str, method: str, noise: str) -> ParameterView:
    """What the task tunes."""
    if "LoRA's A moves" in method:
        return ParameterView.trainable(model, groups=())
    if view == "partial":
        return ParameterView.last_layers(model, 2, noise=noise)
    make = ParameterView.full if view == "full" else ParameterView.trainable
    return make(model, noise=noise)


@torch.inference_mode()
def accuracy(loss: ClassificationLoss, test: list[Any]) -> float:
    """Share of the held-out examples that are labelled correctly."""
    right = 0
    for start in range(0, len(test), 128):
        batch = loss.collate(test[start : start + 128])
        right += int((loss.logits(batch).argmax(-1) == batch["labels"]).sum())
    return right / len(test)


def run(job: Job) -> dict[str, Any]:
    """Tune once and measure."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1 if torch.cuda.is_available() else torch.get_num_threads())
    task, (make, batch_size) = TASKS[job.task], METHODS[job.method]
    train, test, folder = examples_of(task, job.seed, job.assets)
    model = build(folder, len({example["labels"] for example in train}), job.seed, task.view)
    started = time.perf_counter()
    result = minimize(
        OBJECTIVES[task.objective](model),
        view_of(model, task.view, job.method, task.noise),
        Data(train, stratify=job.stratify),
        make(),
        batch_size=job.batch_size or (batch_size if task.objective == "loss" else COUNTED),
        max_queries=job.max_queries or task.max_queries,
        seed=job.seed,
        progress=False,
    )
    return {
        **job._asdict(),
        "accuracy": accuracy(ClassificationLoss(model), test),
        "value": statistics.fmean(record.value for record in result.history[-50:]),
        "queries": result.queries,
        "steps": result.steps,
        "stop_reason": result.stop_reason.name,
        "seconds": time.perf_counter() - started,
    }


def prepare(folder: Path) -> None:
    """Write the model in half precision and the tokens of every task, about 60 MB."""
    for name, task in {f"{t.dataset}-{t.max_length}": t for t in TASKS.values()}.items():
        for seed in PREPARED_SEEDS:
            train, test, source = examples_of(task, seed, None)
            folder.mkdir(parents=True, exist_ok=True)
            with gzip.open(folder / f"{name}-{seed}.json.gz", "wt") as file:
                json.dump([train, test], file)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(folder / "model")


def table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, as a Markdown table."""
    lines = [
        "| task | queries | method | accuracy | value | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in results):
        rows = [r for r in results if (r["task"], r["method"]) == (task, method)]
        values = [r["accuracy"] for r in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(
            f"| {task} | {max(r['queries'] for r in rows):,} | {method} | "
            f"{statistics.fmean(values):.3f} ± {spread:.3f} ({len(values)}) | "
            f"{statistics.fmean(r['value'] for r in rows):.3f} | "
            f"{statistics.fmean(r['seconds'] for r in rows):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every task with every method and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-queries", type=int, help="instead of each task's own budget")
    parser.add_argument("--batch-size", type=int, help="instead of each method's own")
    parser.add_argument("--uniform", action="store_true", help="batches not stratified by class")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--assets", help="folder that --prepare made")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, help="JSON of all runs")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare)
        return
    jobs = [
        Job(task, method, seed, args.assets, not args.uniform, args.max_queries, args.batch_size)
        for task in args.tasks
        for method in args.methods
        for seed in args.seeds
        if TASKS[task].objective == "loss" or not method.startswith("Adam")  # counts have no slope
    ]
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            results.append(done.result())
            print(json.dumps(results[-1]), flush=True)
            if args.output:
                args.output.write_text(json.dumps(results, indent=1))
    results.sort(key=lambda r: (r["task"], r["method"], r["seed"]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"\n{device}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(table(results))


if __name__ == "__main__":
    main()
