"""``zo-adapt tune``: a model, a file of examples, an objective and a view; ends with an adapter."""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS
from transformers import AutoTokenizer, HfArgumentParser

from objectives import F1, Accuracy, CausalLMLoss, ClassificationLoss, ExactMatch
from zo_adapt import Metrics, ParameterView, ZOConfig, ZOTrainer
from zo_adapt.errors import DataError
from zo_adapt_cli.card import write_card
from zo_adapt_cli.examples import Example, class_names, held_out, read_lines, tokenized

MAX_QUERIES = 20_000
"""Budget where neither queries nor steps nor epochs are given."""
LORA_START_ROWS = 128
"""Examples from which a new LoRA adapter gets its A unless another number is given."""
USAGE = """zo-adapt tune --model MODEL --data FILE.jsonl [--objective ...] [--view ...] [OPTIONS]
       --help lists all options, those of Trainer among them"""
SPELLED = ("last_layers", "soft_accuracy", "causal_lm", "exact_match")
"""As in Python; here they have a hyphen."""
TEXT = ("causal-lm", "exact-match")
"""Objectives of language models; the others are of classifiers."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TuneArguments:
    """What ``zo-adapt tune`` asks for; everything of ``ZOConfig`` is an option as well.

    With ``--view lora`` the adapter's A comes from 128 training examples (``initialise_lora``);
    these forwards are said, and are beside the budget. ``--lora_start_rows 0`` leaves A as peft
    draws it.

    Args:
        model: Hub name or folder.
        data: File of JSON lines: ``text`` and ``label`` for a classifier; ``prompt`` and
            ``completion``, ``messages`` or ``text`` for a language model.
        test: The same, held out; None: a share of ``data``.
        held_out: That share.
        objective: "loss", "accuracy", "soft-accuracy" or "f1" of a classifier; "causal-lm" or
            "exact-match" of a language model.
        view: "lora", "last-layers" or "full".
        lora_rank: r.
        layers: How many last layers.
        max_length: Tokens of an example that are read.

    Example:
        >>> TuneArguments("MODEL", "train.jsonl").view
        'lora'
    """

    model: str = _option(None, "Hub name or folder.")
    data: str = _option(None, "File of JSON lines.")
    test: str | None = _option(None, "Held-out examples; a share of the data by default.")
    held_out: float = _option(0.2, "Share of the data that is held out.")
    objective: Literal["loss", "accuracy", "soft-accuracy", "f1", "causal-lm", "exact-match"] = (
        _option("loss", "What is tuned for.")
    )
    view: Literal["lora", "last-layers", "full"] = _option("lora", "What may change.")
    lora_rank: int = _option(8, "r of the adapter.")
    layers: int = _option(2, "How many last layers.")
    max_length: int = _option(128, "Tokens of an example that are read.")


def main(words: Sequence[str]) -> None:
    """Tune, say what came of it, save adapter and card."""
    parser = HfArgumentParser((TuneArguments, ZOConfig), prog="zo-adapt tune", usage=USAGE)  # type: ignore[arg-type]
    words = [word.replace("_", "-") if word in SPELLED else word for word in words]
    parser.set_defaults(
        output_dir="runs/tune",
        report_to="none",
        per_device_train_batch_size=16,
        lora_start_rows=LORA_START_ROWS if _asked_view(words) == "lora" else 0,
    )
    given, args = parser.parse_args_into_dataclasses(args=list(words))
    for name in ("model", "data"):
        if getattr(given, name) is None:
            parser.error(f"--{name} is needed")
    tune(given, args)


def _asked_view(words: Sequence[str]) -> str:
    """The view, which says what the other defaults are."""
    first = ArgumentParser(add_help=False)
    first.add_argument("--view", default="lora")
    view: str = first.parse_known_args(list(words))[0].view
    return view


def tune(given: TuneArguments, args: ZOConfig) -> dict[str, float]:
    """One run.

    Returns:
        Held-out figures, by name with " before" and " after".
    """
    if args.max_queries is None and args.max_steps <= 0:
        args.max_queries = MAX_QUERIES
        args.num_train_epochs = 1e6
    train, test = _data(given, args.seed)
    torch.manual_seed(args.seed)  # of the new weights
    model, tokenizer, train, test = _model(given, train, test)
    objective, watched = _objective(given, model, tokenizer)
    view = _view(given, model)
    print(view.summary())
    trainer = ZOTrainer(
        model,
        args,
        view=view,
        train_dataset=train,
        objective=objective,
        metrics=Metrics(watched, data=test),
    )
    figures = _measured(watched, test, "before")
    resume = args.resume_from_checkpoint  # "true": the newest in the output folder
    trainer.train(resume_from_checkpoint=str(resume).lower() == "true" or resume)
    figures |= _measured(watched, test, "after")
    for name in watched:
        print(f"held-out {name}: {figures[f'{name} before']:.3f} -> {figures[f'{name} after']:.3f}")
    folder = Path(args.output_dir or "runs/tune") / ("adapter" if given.view == "lora" else "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, given, trainer, figures, rows=(len(train), len(test)))
    print(f"{trainer.queries:,} queries; saved to {folder}, with a model card")
    return figures


def _data(given: TuneArguments, seed: int) -> tuple[list[Example], list[Example]]:
    examples = read_lines(given.data)
    if given.test is not None:
        return examples, read_lines(given.test)
    return held_out(examples, given.held_out, seed)


def _model(
    given: TuneArguments, train: list[Example], test: list[Example]
) -> tuple[Any, Any, list[Example], list[Example]]:
    """The model with what is new on it, its tokenizer, and the examples as its objective reads."""
    tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if given.objective in TEXT:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    else:
        names = class_names(train)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            given.model,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        train, test = (
            tokenized(part, tokenizer, names, given.max_length) for part in (train, test)
        )
    if given.view == "lora":
        model = get_peft_model(model, _lora(given, model.config.model_type))
    return model.eval(), tokenizer, train, test


def _lora(given: TuneArguments, model_type: str) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM" if given.objective in TEXT else "SEQ_CLS",
        r=given.lora_rank,
        lora_alpha=2 * given.lora_rank,
        target_modules=None if model_type in KNOWN_TARGETS else "all-linear",
    )


def _objective(given: TuneArguments, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """What is tuned for, and what is measured on the held-out examples."""
    if given.objective in TEXT:
        loss = CausalLMLoss(model, tokenizer=tokenizer, max_length=given.max_length)
        exact = ExactMatch(loss)
        wanted: Any = loss if given.objective == "causal-lm" else exact
        return wanted, {"loss": loss, "exact match": exact}
    makers: dict[str, Callable[[], Any]] = {
        "loss": lambda: ClassificationLoss(model),
        "accuracy": lambda: Accuracy(model),
        "soft-accuracy": lambda: Accuracy(model, softness=1.0),
        "f1": lambda: F1(model, average="macro"),
    }
    return makers[given.objective](), {
        "accuracy": Accuracy(model),
        "macro-F1": F1(model, average="macro"),
    }


def _view(given: TuneArguments, model: Any) -> ParameterView:
    if given.view == "last-layers":
        return ParameterView.last_layers(model, given.layers, head=True)
    return ParameterView.full(model) if given.view == "full" else ParameterView.trainable(model)


@torch.inference_mode()
def _measured(watched: dict[str, Any], test: list[Example], when: str) -> dict[str, float]:
    """Over all held-out examples, a few at a time."""
    found = {}
    for name, metric in watched.items():
        parts = [test[start : start + 32] for start in range(0, len(test), 32)]
        if hasattr(metric, "predict"):
            value = metric.score([metric.predict(metric.collate(part)) for part in parts])
        else:
            value = torch.cat([metric(metric.collate(part)).reshape(-1) for part in parts])
        mean = float(torch.as_tensor(value).double().mean())
        if mean != mean:
            raise DataError(f"{name} is undefined on the held-out examples")
        found[f"{name} {when}"] = mean
    return found
