"""What a cell of benchmarks/defaults.py tunes: a model or variables, data, and what is measured.

Adapters of all-MiniLM-L6-v2 and of SmolLM2-135M by name; what has no texts is in default_plain.py.
"""

import copy
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accuracy import Task, examples_of
from default_plain import DEVICE, Measured, Problem, digit_problem, least_squares, variables
from torch import nn

from objectives import CausalLMLoss, ClassificationLoss, VerbalizerLoss
from zo_adapt import ParameterView, initialise_lora

TEXTS = {
    "BBC 32 tokens, 7,680": Task("bbc", 32, 7_680),
    "movie, 30,000": Task("movie", 48, 30_000),
    "BBC 48 tokens, 40,000": Task("bbc", 48, 40_000),
    "BBC 128 tokens, 100,000": Task("bbc", 128, 100_000),
    "movie, 100,000": Task("movie", 48, 100_000),
    "movie, 400,000": Task("movie", 48, 400_000),
}
QUERY_VALUE = ["query", "value"]


def _lora(r: int, targets: Any = None, **more: Any) -> Callable[[], Any]:
    def config() -> Any:
        from peft import LoraConfig

        return LoraConfig(
            task_type="SEQ_CLS",
            r=r,
            lora_alpha=2 * r,
            target_modules=targets or QUERY_VALUE,
            **more,
        )

    return config


def _of_peft(name: str, **settings: Any) -> Callable[[], Any]:
    def config() -> Any:
        import peft

        return getattr(peft, name)(task_type="SEQ_CLS", **settings)

    return config


ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA q,v r=1": _lora(1),
    "LoRA q,v r=8": _lora(8),
    "LoRA q,v r=32": _lora(32),
    "LoRA all-linear r=8": _lora(8, "all-linear"),
    "rsLoRA q,v r=8": _lora(8, use_rslora=True),
    "DoRA q,v r=8": _lora(8, use_dora=True),
    "LoHa q,v r=8": _of_peft("LoHaConfig", r=8, alpha=16, target_modules=QUERY_VALUE),
    "LoKr q,v r=8": _of_peft("LoKrConfig", r=8, alpha=16, target_modules=QUERY_VALUE),
    "VeRA q,v r=256": _of_peft("VeraConfig", r=256, target_modules=QUERY_VALUE),
    "IA3": _of_peft(
        "IA3Config",
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
    ),
}
"""With the new head each, which peft saves along."""
_QUERY_VALUE = partial(_of_peft, target_modules=QUERY_VALUE)
OTHER_ADAPTERS: dict[str, Callable[[], Any]] = {
    "AdaLoRA q,v r=8": _QUERY_VALUE("AdaLoraConfig", init_r=8, target_r=8, total_step=10**6),
    "BOFT q,v": _QUERY_VALUE("BOFTConfig", boft_block_size=32),
    "C3A q,v": _QUERY_VALUE("C3AConfig", block_size=32),
    "DeLoRA q,v r=8": _QUERY_VALUE("DeloraConfig", r=8),
    "FourierFT q,v": _QUERY_VALUE("FourierFTConfig", n_frequency=1000),
    "GraLoRA q,v r=8": _QUERY_VALUE("GraloraConfig", r=8, gralora_k=2),
    "HiRA q,v r=8": _QUERY_VALUE("HiraConfig", r=8),
    "HRA q,v r=8": _QUERY_VALUE("HRAConfig", r=8),
    "LN tuning": _of_peft("LNTuningConfig", target_modules=["LayerNorm"]),
    "MiSS q,v r=8": _QUERY_VALUE("MissConfig", r=8),
    "OFT q,v": _QUERY_VALUE("OFTConfig", oft_block_size=32),
    "PVeRA q,v r=256": _QUERY_VALUE("PveraConfig", r=256),
    "RandLoRA q,v r=32": _QUERY_VALUE("RandLoraConfig", r=32),
    "RoAd q,v": _QUERY_VALUE("RoadConfig", group_size=32),
    "SHiRA q,v r=8": _QUERY_VALUE("ShiraConfig", r=8),
    "TinyLoRA q,v": _QUERY_VALUE("TinyLoraConfig"),
    "VB-LoRA q,v r=8": _QUERY_VALUE("VBLoRAConfig", r=8, num_vectors=64, vector_length=32, topk=2),
    "WaveFT q,v": _QUERY_VALUE("WaveFTConfig", n_frequency=1000),
    "p-tuning, 8 tokens": _of_peft(
        "PromptEncoderConfig", num_virtual_tokens=8, encoder_hidden_size=128
    ),
    "prefix tuning, 8 tokens": _of_peft("PrefixTuningConfig", num_virtual_tokens=8),
    "prompt tuning, 8 tokens": _of_peft("PromptTuningConfig", num_virtual_tokens=8),
}
"""What else peft has for this model, by the default alone, without a sweep."""
PARTS: dict[str, Callable[[nn.Module], ParameterView]] = {
    "LayerNorm": partial(ParameterView.matching, pattern="LayerNorm|classifier"),
    "biases": partial(ParameterView.matching, pattern="bias$|classifier"),
    "head": partial(ParameterView.matching, pattern="classifier"),
    "last 2 layers": partial(ParameterView.last_layers, n=2),
    "all weights": ParameterView.full,
}
WHITE = ", white A"
VIEWS = (*ADAPTERS, *PARTS, f"LoRA q,v r=8{WHITE}", f"LoRA all-linear r=8{WHITE}")


@cache
def _examples(task: Task, seed: int, assets: str | None) -> tuple[list[Any], list[Any], str]:
    return examples_of(task, seed, assets)


def text_problem(view: str, name: str, seed: int, assets: str | None) -> Problem:
    """The encoder with a new head on labelled texts, 512 to learn from, up to 1,024 held out."""
    from peft import get_peft_model

    task = TEXTS[name]
    train, test, folder = _examples(task, seed, assets)
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len({row["labels"] for row in train}), dtype=torch.float32
    )
    plain = view.removesuffix(WHITE)
    if adapter := (ADAPTERS | OTHER_ADAPTERS).get(plain):
        model = get_peft_model(model, adapter())
    model = model.to(DEVICE).eval()
    loss = ClassificationLoss(model)
    if view.endswith(WHITE):
        initialise_lora(model, loss, train, seed=seed)
    chosen = PARTS.get(plain, ParameterView.trainable)(model)
    budget = {"max_queries": task.max_queries}
    measure = partial(_classified, loss.logits, loss.collate, test)
    return Problem(loss, chosen, train, 16, budget, chosen.displacement, measure)


@torch.no_grad()
def _classified(logits: Any, collate: Any, test: list[Any], most: int | None) -> Measured:
    """Share of right answers and mean loss."""
    right, loss, test = 0, 0.0, test[:most]
    for start in range(0, len(test), 128):
        batch = collate(test[start : start + 128])
        scores, labels = logits(batch), batch["labels"]
        right += int((scores.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
    return {"accuracy": right / len(test), "loss": loss / len(test)}


LANGUAGE_ADAPTERS = {
    "LoRA q,v r=8": _lora(8, ["q_proj", "v_proj"]),
    "LoRA all-linear r=8": _lora(8, "all-linear"),
}
PROMPT, WORDS = "{text} It was", (" terrible", " great")
LANGUAGE = ("SmolLM2, movie by words", "SmolLM2, BBC headlines")
LANGUAGE_QUERIES, LANGUAGE_TOKENS, LANGUAGE_TEST = 7_680, 48, 64


@cache
def _smollm2() -> tuple[Any, Any]:
    from support import real_data

    folder = str(real_data.smollm2_folder())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def language_problem(view: str, name: str, seed: int, assets: str | None) -> Problem:
    """A language model: label words after film reviews, or the first words of news."""
    from peft import get_peft_model

    from support import real_data

    base, tokenizer = copy.deepcopy(_smollm2())  # an adapter changes its base
    torch.manual_seed(seed)
    config = LANGUAGE_ADAPTERS[view]()
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base, config).to(DEVICE).eval()
    loss: Any
    if name == "SmolLM2, movie by words":
        corpus = real_data.movie_reviews()
        split = real_data.balanced_split(corpus.texts, corpus.labels, 512, LANGUAGE_TEST, seed)
        loss = VerbalizerLoss(
            model, WORDS, tokenizer=tokenizer, template=PROMPT, max_length=LANGUAGE_TOKENS
        )
        train = _rows(split.train_texts, split.train_labels)
        measure = partial(
            _classified, loss.logits, loss.collate, _rows(split.test_texts, split.test_labels)
        )
    else:
        headlines = [text.split("\n", 1)[0] for text in real_data.bbc().texts]
        random.Random(seed).shuffle(headlines)
        loss = CausalLMLoss(model, tokenizer=tokenizer, max_length=LANGUAGE_TOKENS)
        train = [{"text": text} for text in headlines[:512]]
        test = [{"text": text} for text in headlines[512 : 512 + LANGUAGE_TEST]]
        measure = partial(_mean_loss, loss, test)
    chosen = ParameterView.trainable(model)
    budget = {"max_queries": LANGUAGE_QUERIES}
    return Problem(loss, chosen, train, 16, budget, chosen.displacement, measure)


def _rows(texts: list[str], labels: list[int]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


@torch.no_grad()
def _mean_loss(loss: CausalLMLoss, test: list[Any], most: int | None) -> Measured:
    test = test[:most]
    parts = [loss(loss.collate(test[i : i + 16])) for i in range(0, len(test), 16)]
    return {"loss": float(torch.cat(parts).mean())}


def problem(view: str, task: str, seed: int, assets: str | None) -> Problem:
    """The problem of a cell."""
    if task in TEXTS:
        return text_problem(view, task, seed, assets)
    if task in LANGUAGE:
        return language_problem(view, task, seed, assets)
    kinds = {"MNIST": digit_problem, "least squares": least_squares, "variables": variables}
    kind = next(make for name, make in kinds.items() if name in task)
    return kind(view, task, seed, assets)
