"""How far a run goes by a count: the default beside the displacement that the view assumes.

Accuracy and F1 of a classifier that AdamW has tuned for 40 steps, and NDCG@10 of a bi-encoder, all
of all-MiniLM-L6-v2; a reward on what SmolLM2-135M-Instruct writes (examples/generation_reward.py).
Held-out figures before and after, at equal queries.

    python benchmarks/counts.py --seeds 2 3 --queries 4000 --processes 2
    python benchmarks/counts.py --tasks reward --seeds 3 4 --queries 1920 --processes 2
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from accuracy import TASKS, examples_of

from objectives import F1, NDCG, Accuracy, BiEncoder, ClassificationLoss
from zo_adapt import MeZO, ParameterView, minimize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = {"LoRA q,v r=8": ["query", "value"], "LoRA all-linear r=8": "all-linear"}
VIEWS = (*TARGETS, "LayerNorm")
WRITERS = ("LoRA r=1, last layer", "LoRA q,v r=8")
METRICS = {"accuracy, fine-tuned": Accuracy, "macro-F1, fine-tuned": F1}
POOLINGS = {"NDCG@10, first token": "first", "NDCG@10, mean of tokens": "mean"}
FINE_TUNING_STEPS, BATCH, CHUNK = 40, 16, 32
TASK = TASKS["movie-48"]


class Problem(NamedTuple):
    """What is tuned, and its figure on examples."""

    objective: Any
    model: nn.Module
    train: list[Any]
    test: list[Any]
    measure: Callable[[list[Any]], float]


class Row(NamedTuple):
    """One run: figures on held-out examples; ``found`` as a multiple of the view's own."""

    task: str
    view: str
    seed: int
    before: float
    after: float
    found: float


def adapted(model: Any, view: str, task_type: str | None) -> Any:
    """The model with the view's adapter, if it has one."""
    from peft import LoraConfig, get_peft_model

    if view not in TARGETS:
        return model.to(DEVICE).eval()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[view], task_type=task_type)
    return get_peft_model(model, config).to(DEVICE).eval()


def classifier(metric: type[Any], view: str, seed: int) -> Problem:
    """Film reviews, by a classifier that gradients have tuned a little."""
    train, test, folder = examples_of(TASK, seed, None)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, dtype=torch.float32
    ).to(DEVICE)
    loss, generator = ClassificationLoss(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    for _ in range(FINE_TUNING_STEPS):
        rows = torch.randint(0, len(train), (BATCH,), generator=generator).tolist()
        batch = loss.collate([train[i] for i in rows])
        error = nn.functional.cross_entropy(loss.logits(batch), batch["labels"])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    model = adapted(model, view, "SEQ_CLS")
    right = Accuracy(model)
    return Problem(metric(model), model, train, test, partial(mean_of, right, right.collate))


def bi_encoder(pooling: str, view: str, seed: int) -> Problem:
    """A few words of a text, and eight beginnings of texts of its topic."""
    from support.passages import passage_queries

    folder, *parts = passage_queries(train=512, test=256, seed=seed)
    model = adapted(transformers.AutoModel.from_pretrained(folder, dtype=torch.float32), view, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scorer = BiEncoder(model, tokenizer, pooling=pooling, max_length=16)
    train, test = ([scorer.encoded(query) for query in part] for part in parts)
    ndcg = NDCG(scorer, k=10)
    return Problem(ndcg, model, train, test, partial(mean_of, ndcg, list))


def views_of(task: str) -> tuple[str, ...]:
    """What is tuned on a task."""
    return WRITERS if task == "reward" else VIEWS


def writer(view: str, seed: int) -> Problem:
    """What a language model writes after headlines, rewarded for short words that are new."""
    import evidence_metrics

    adapt = None if view == WRITERS[0] else partial(adapted_writer, seed=seed)
    made = evidence_metrics.headlines(seed, adapt)
    return Problem(
        made.objective, made.view.model, made.data, [], lambda _: float(made.measure()["reward"])
    )


def adapted_writer(folder: str, seed: int) -> Any:
    """LoRA on every query and value."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).eval()


@torch.no_grad()
def mean_of(objective: Any, collate: Callable[[list[Any]], Any], rows: list[Any]) -> float:
    """The mean over examples."""
    total = 0.0
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        total += len(part) * float(torch.as_tensor(objective(collate(part))).float().mean())
    return total / len(rows)


def run(task: str, view: str, seed: int, by_default: bool, queries: int) -> Row:
    """Tune once."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if task == "reward":
        problem = writer(view, seed)
    elif task in METRICS:
        problem = classifier(METRICS[task], view, seed)
    else:
        problem = bi_encoder(POOLINGS[task], view, seed)
    tuned = (
        ParameterView.trainable(problem.model)
        if view != "LayerNorm"
        else ParameterView.matching(problem.model, "LayerNorm")
    )
    before = problem.measure(problem.test)
    optimizer = MeZO(displacement=None if by_default else tuned.displacement)
    minimize(
        problem.objective,
        tuned,
        problem.train,
        optimizer,
        batch_size=BATCH,
        max_queries=queries,
        seed=seed,
        progress=False,
    )
    found = optimizer.state.descent.displacement / tuned.displacement
    return Row(task, view, seed, before, problem.measure(problem.test), found)


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--queries", type=int, default=4_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", default=[*METRICS, *POOLINGS])
    parser.add_argument("--views", nargs="+", help="all of a task by default")
    args = parser.parse_args()
    for task, view in product(args.tasks, args.views or ()):
        if view not in views_of(task):
            parser.error(f"{task} has no view {view!r}: {', '.join(views_of(task))}")
    print(f"{args.queries:,} queries, seeds {args.seeds}, {DEVICE}, torch {torch.__version__}")
    print("| objective | view | before | the view's own | default | found |")
    print("|---" * 6 + "|")
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        cells = {
            (task, view): [
                [pool.submit(run, task, view, seed, how, args.queries) for seed in args.seeds]
                for how in (False, True)
            ]
            for task in args.tasks
            for view in args.views or views_of(task)
        }
        for (task, view), runs in cells.items():
            own, default = ([future.result() for future in futures] for futures in runs)
            figures = [[r.before for r in own], [r.after for r in own], [r.after for r in default]]
            shown = " | ".join(f"{statistics.fmean(one):.3f}" for one in figures)
            found = ", ".join(f"{r.found:.2f}" for r in default)
            print(f"| {task} | {view} | {shown} | {found} |")


if __name__ == "__main__":
    main()
