"""What has no gradient, on pre-trained models and real texts, for benchmarks/evidence.py.

BBC topics by a sentence encoder tuned on accuracy or macro-F1 itself; a search by the same encoder
tuned on NDCG@10 (examples/ranking.py); texts of SmolLM2-135M-Instruct tuned on a rule that scores
them (examples/generation_reward.py). Each seed has examples, an adapter and directions of its own.

    python -c "import evidence_metrics as m; m.prepare(m.Path('FOLDER'))"    # in benchmarks/
"""

import functools
import gzip
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from objectives import F1, NDCG, Accuracy, BiEncoder, GenerationReward
from zo_adapt import ParameterView

ASSETS = os.environ.get("ZO_EVIDENCE_ASSETS")
"""Folder that ``prepare`` wrote, with the models, for a machine without a network."""
SEEDS = (0, 1, 2, 9)
LISTS, HELD_OUT_LISTS, LONGEST = 192, 256, 16
"""To learn from; half to choose a rate by and half to test on; tokens of a text."""
HEADLINES, CHOOSING, TESTED = 64, 48, 64
NEW_TOKENS = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rows = list[dict[str, Any]]


def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _problem(
    objective: Any, view: ParameterView, name: str, train: Rows, validation: Rows, test: Rows
) -> Any:
    """What is climbed: as a loss 1 - R where a rate is chosen by it, itself on the test's rows."""
    from evidence_problems import Problem

    @torch.no_grad()
    def mean(rows: Rows) -> float:
        with objective.evaluating():
            return float(torch.as_tensor(objective(objective.collate(rows))).mean())

    def measure() -> dict[str, Any]:
        return {"training": 1 - mean(train), "validation": 1 - mean(validation), name: mean(test)}

    return Problem(objective, view, train, measure)


def topics(seed: int, kind: str) -> Any:
    """BBC topics by all-MiniLM-L6-v2 with LoRA and a new head, as ``encoder`` has it.

    ``kind``: "accuracy" or "F1" is tuned; "accuracy" is read of both.
    """
    import accuracy as texts

    _quiet()
    train, rest, folder = texts.examples_of(texts.TASKS["bbc-48"], seed, ASSETS)
    model = texts.build(folder, 5, seed, "lora")
    objective = {"accuracy": Accuracy, "F1": F1}[kind](model)
    view = texts.view_of(model, "lora", "", "gaussian")
    made = _problem(objective, view, kind, train, rest[:256], rest[256:512])

    def measure() -> dict[str, Any]:
        right = texts.accuracy(objective.classifier, rest[256:512])
        return made.measure() | {"accuracy": right}

    return made._replace(measure=measure)


def passages(seed: int) -> Any:
    """The bi-encoder of examples/ranking.py, on lists drawn from the seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    _quiet()
    folder, train, held_out = _lists(seed)
    torch.manual_seed(seed)
    encoder = get_peft_model(
        AutoModel.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]),
    ).to(DEVICE)
    objective = NDCG(BiEncoder(encoder, pooling="first", max_length=LONGEST), k=10)
    half = len(held_out) // 2
    parts = train, held_out[:half], held_out[half:]
    return _problem(objective, ParameterView.trainable(encoder), "NDCG", *parts)


def _lists(seed: int) -> tuple[str, Rows, Rows]:
    """Folder of the encoder, and lists in token ids: what is learnt from, and the others."""
    if ASSETS is not None:
        with gzip.open(Path(ASSETS) / f"passages-{seed}.json.gz", "rt") as file:
            train, held_out = json.load(file)
        return str(Path(ASSETS) / "model"), train, held_out
    from transformers import AutoTokenizer

    from support.passages import passage_queries

    folder, *parts = passage_queries(LISTS, HELD_OUT_LISTS, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = BiEncoder(torch.nn.Identity(), tokenizer, max_length=LONGEST)
    train, held_out = ([scorer.encoded(query) for query in part] for part in parts)
    return folder, train, held_out


def headlines(seed: int, adapted: Callable[[str], Any] | None = None) -> Any:
    """SmolLM2 goes on from headlines drawn by the seed; plain words are the reward.

    ``adapted`` makes the model from its folder; None: with the adapter of the example.
    """
    from generation_reward import build_model, plain_words

    _quiet()
    prompts, folder = _prompts()
    chosen = random.Random(seed).sample(prompts, HEADLINES + CHOOSING + TESTED)
    model = (build_model(folder, seed) if adapted is None else adapted(folder)).to(DEVICE)
    objective = GenerationReward(model, _tokenizer(folder), plain_words, max_new_tokens=NEW_TOKENS)
    cut = HEADLINES + CHOOSING
    parts = chosen[:HEADLINES], chosen[HEADLINES:cut], chosen[cut:]
    return _problem(objective, ParameterView.trainable(model), "reward", *parts)


@functools.cache
def _tokenizer(folder: str) -> Any:
    """Read once a process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def _prompts() -> tuple[Rows, str]:
    """All headlines, and the folder of the model."""
    if ASSETS is not None:
        folder = Path(ASSETS)
        return json.loads((folder / "headlines.json").read_text()), str(folder / "smollm2")
    import generation_reward
    from support import real_data

    return generation_reward.headlines(), str(real_data.smollm2_folder())


def prepare(folder: Path) -> None:
    """Write what ``passages`` and ``headlines`` read, but the weights of the models.

    These go into the folders "model" (``accuracy.py --prepare``) and "smollm2".
    """
    small = folder / "smollm2"
    small.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        _, train, held_out = _lists(seed)
        with gzip.open(folder / f"passages-{seed}.json.gz", "wt") as file:
            json.dump([train, held_out], file)
    prompts, source = _prompts()
    (folder / "headlines.json").write_text(json.dumps(prompts))
    for one in Path(source).iterdir():
        if one.suffix != ".safetensors":
            shutil.copy(one, small / one.name)
