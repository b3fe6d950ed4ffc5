"""What benchmarks/evidence.py tunes: least squares, a perceptron, an encoder, and metrics.

The causal language model is in evidence_lm.py, metrics of pre-trained models are in
evidence_metrics.py.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from evidence_lm import causal_lm
from evidence_metrics import headlines, passages, topics
from torch import Tensor, nn

from objectives import F1, NDCG, Accuracy, ClassificationLoss, GenerationReward
from zo_adapt import ParameterView

Figures = dict[str, Any]
ASSETS = os.environ.get("ZO_EVIDENCE_ASSETS")
"""Prepared data, for a machine without a network (``accuracy.py --prepare``, ``write_digits``)."""
VALIDATION = 1_024


class Problem(NamedTuple):
    """Something to tune, and its figures at the present weights.

    ``measure`` gives "training" and "validation", both to be small, and what a table shows.
    """

    objective: Any
    view: ParameterView
    data: Any
    measure: Callable[[], Figures]


def squares(x: Tensor, batch: Tensor) -> Tensor:
    """Squared residuals at x of rows that end with the right side."""
    return (batch[:, :-1] @ x - batch[:, -1]).square()


def least_squares_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Appendix B.2: d = 100, n = 1000, y = X w + 0.1 noise; and as many rows held out."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2000, 100, generator=generator, dtype=torch.float64)
    truth = torch.randn(100, generator=generator, dtype=torch.float64)
    right = rows @ truth + 0.1 * torch.randn(2000, generator=generator, dtype=torch.float64)
    data, held_out = torch.cat([rows, right[:, None]], dim=1).chunk(2)
    return data, held_out


def squares_at(x: Tensor, seed: int) -> Figures:
    """Mean squares of the rows of a seed."""
    data, held_out = least_squares_rows(seed)
    return {
        "training": float(squares(x, data).mean()),
        "validation": float(squares(x, held_out).mean()),
    }


def least_squares(seed: int) -> Problem:
    """Appendix B.2, from zero."""
    x, (data, _) = torch.zeros(100, dtype=torch.float64), least_squares_rows(seed)

    def objective(batch: Tensor) -> Tensor:
        return squares(x, batch)

    objective.mean_over_rows = True  # type: ignore[attr-defined]
    return Problem(objective, ParameterView({"x": x}), data, lambda: squares_at(x, seed))


def perceptron(
    seed: int, kind: str = "loss", images: int = 2_048, dtype: torch.dtype = torch.float32
) -> Problem:
    """Table 5's 784-32-16-10 perceptron from scratch, so many images of MNIST to learn from.

    ``kind``: "loss"; "accuracy" and "F1" tune these themselves.
    """
    from mnist import digits

    found = digits(ASSETS)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    ).to(dtype)
    pixels, labels = (found.train.float() / 255).to(dtype), found.train_labels
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    train, held_out = order[:images], order[images : images + VALIDATION]
    data = {"input": pixels[train], "labels": labels[train]}
    others = {
        "validation": {"input": pixels[held_out], "labels": labels[held_out]},
        "accuracy": {
            "input": (found.test.float() / 255).to(dtype),
            "labels": found.test_labels,
        },
    }
    kinds = {"loss": ClassificationLoss, "accuracy": Accuracy, "F1": F1}
    objective = kinds[kind](model)

    def badness(rows: dict[str, Tensor]) -> float:
        if kind == "loss":
            return float(F.cross_entropy(model(rows["input"]).float(), rows["labels"]))
        return 1 - float(torch.as_tensor(objective(rows)).mean())

    @torch.no_grad()
    def measure() -> Figures:
        test = others["accuracy"]
        right = model(test["input"]).argmax(-1) == test["labels"]
        return {
            "training": badness(data),
            "validation": badness(others["validation"]),
            "accuracy": float(right.float().mean()),
        }

    return Problem(objective, ParameterView.full(model), data, measure)


def ranking(seed: int) -> Problem:
    """NDCG@10 of 20 documents a list by a 20-16-1 scorer; relevance 0 to 4, made up."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    truth, model = (nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in range(2))
    features = torch.randn(512, 20, 20, generator=generator)
    with torch.no_grad():
        grade = truth(features).squeeze(-1)
    noisy = grade + 0.5 * grade.std() * torch.randn(grade.shape, generator=generator)
    bounds = noisy.flatten().quantile(torch.tensor([0.5, 0.7, 0.85, 0.95]))
    relevance = torch.bucketize(noisy, bounds)
    lists = [
        {"features": one, "relevance": grades}
        for one, grades in zip(features, relevance, strict=True)
    ]
    data, held_out = lists[:256], lists[256:]
    objective = NDCG(model, undefined="skip")

    measure = partial(_rewards, objective, "NDCG", data, held_out)
    return Problem(objective, ParameterView.full(model), data, measure)


def _rewards(objective: Any, name: str, data: list[Any], held_out: list[Any]) -> Figures:
    """What is climbed, and as a loss 1 - R, on both parts."""
    of_train, of_held_out = (
        float(torch.as_tensor(objective(objective.collate(one))).mean()) for one in (data, held_out)
    )
    return {"training": 1 - of_train, "validation": 1 - of_held_out, name: of_held_out}


def generation(seed: int) -> Problem:
    """Share of even tokens among eight that a tiny decoder writes; greedy, random weights."""
    from decoders import SIZES, Texts, decoder, word_tokenizer

    torch.manual_seed(seed)
    model = decoder(SIZES["tiny"], "cpu", lora=False)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn(weight.shape)
    tokenizer = word_tokenizer(SIZES["tiny"].vocabulary)
    objective = GenerationReward(model, tokenizer, Texts(), max_new_tokens=8)
    words = torch.randint(3, 512, (128, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in words]
    data, held_out = prompts[:64], prompts[64:]

    measure = partial(_rewards, objective, "reward", data, held_out)
    return Problem(objective, ParameterView.full(model), data, measure)


def encoder(seed: int, view: str, dtype: torch.dtype = torch.float32) -> Problem:
    """BBC topics by all-MiniLM-L6-v2 with a new head: 512 / 256 / 256 texts of 48 tokens."""
    import accuracy as texts
    import transformers

    transformers.utils.logging.set_verbosity_error()
    train, rest, folder = texts.examples_of(texts.TASKS["bbc-48"], seed, ASSETS)
    model = texts.build(folder, 5, seed, view, dtype)
    objective = ClassificationLoss(model)

    @torch.no_grad()
    def loss_of(rows: list[Any]) -> float:
        with objective.evaluating():
            return float(objective(objective.collate(rows)).float().mean())

    def measure() -> Figures:
        return {
            "training": loss_of(train),
            "validation": loss_of(rest[:256]),
            "accuracy": texts.accuracy(objective, rest[256:512]),
        }

    chosen = texts.view_of(model, view, "", "gaussian")
    return Problem(objective, chosen, train, measure)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "least squares": least_squares,
    "MNIST": perceptron,
    "MNIST, 16,384 images": partial(perceptron, images=16_384),
    "MNIST, bf16": partial(perceptron, dtype=torch.bfloat16),
    "MNIST, accuracy": partial(perceptron, kind="accuracy"),
    "MNIST, F1": partial(perceptron, kind="F1"),
    "ranking, NDCG": ranking,
    "generation, reward": generation,
    "encoder, accuracy": partial(topics, kind="accuracy"),
    "encoder, F1": partial(topics, kind="F1"),
    "passages, NDCG": passages,
    "headlines, reward": headlines,
    **{
        f"encoder, {name}{', bf16' if dtype == torch.bfloat16 else ''}": partial(
            encoder, view=view, dtype=dtype
        )
        for name, view in (("LoRA", "lora"), ("last layers", "partial"), ("all weights", "full"))
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        f"causal LM, {view}{', bf16' if dtype == torch.bfloat16 else ''}": partial(
            causal_lm, view=view, dtype=dtype
        )
        for view in ("LoRA", "last layers", "all weights")
        for dtype in (torch.float32, torch.bfloat16)
    },
}
