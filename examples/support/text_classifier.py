"""A pretrained text model with a new classification head: built, saved, loaded, asked."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

EVALUATION_BATCH = 32

Model = Any  # a transformers model, or the peft model around it
Example = dict[str, Any]  # input_ids, attention_mask, labels


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer, with a token to pad with also where the model has none."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def build_model(source: str, names: list[str], tokenizer: Any, *, lora: bool) -> Model:
    """The model with a new head for the classes `names` and, if `lora`, a fresh adapter."""
    model = AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
        dtype=torch.float32,
    )
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders read the last token before it
    if lora:
        model = get_peft_model(model, lora_config(model.config.model_type))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def lora_config(model_type: str) -> LoraConfig:
    """The matrices that peft adapts by default where it knows the model, else all linear layers."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,  # puts the new head into modules_to_save
        r=8,
        lora_alpha=16,
        target_modules=None if model_type in KNOWN_TARGETS else "all-linear",
    )


def reload_model(
    source: str, names: list[str], tokenizer: Any, folder: Path, *, lora: bool
) -> Model:
    """What was saved in `folder`, loaded as a user would; an adapter goes onto `source`."""
    if not lora:
        return build_model(str(folder), names, tokenizer, lora=False)
    base = build_model(source, names, tokenizer, lora=False)
    return PeftModel.from_pretrained(base, folder).eval()


def tokenize(tokenizer: Any, texts: list[str], labels: list[int], max_length: int) -> list[Example]:
    """Texts cut to `max_length` tokens and not padded: the objective pads, batch by batch."""
    tokens = tokenizer(texts, truncation=True, max_length=max_length)
    columns = zip(tokens["input_ids"], tokens["attention_mask"], labels, strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": label} for i, m, label in columns]


@torch.inference_mode()
def predict(model: Model, tokenizer: Any, examples: list[Example]) -> torch.Tensor:
    """Logits of all examples, by ordinary forward passes."""
    device = next(model.parameters()).device
    inputs = [{k: v for k, v in one.items() if k != "labels"} for one in examples]
    logits = []
    for start in range(0, len(inputs), EVALUATION_BATCH):
        batch = tokenizer.pad(inputs[start : start + EVALUATION_BATCH], return_tensors="pt")
        logits.append(model(**batch.to(device)).logits.float().cpu())
    return torch.cat(logits)


def accuracy(model: Model, tokenizer: Any, examples: list[Example]) -> float:
    """Share of the examples that the model labels correctly."""
    labels = torch.tensor([one["labels"] for one in examples])
    return (predict(model, tokenizer, examples).argmax(-1) == labels).float().mean().item()
