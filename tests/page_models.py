"""What the pages' code calls yours: tiny models, a tokenizer and a few examples."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[UNK]", "[PAD]", "[END]", "a", "b", "c", "d", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} [END] {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> Any:
    """Of a few words, with a chat template."""
    table = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=table,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[END]",
        chat_template=TEMPLATE,
    )


def classifier() -> Any:
    """BERT with LoRA and a new head for two classes."""
    torch.manual_seed(0)
    return get_peft_model(tiny_model("bert"), LoraConfig(task_type="SEQ_CLS", r=2)).eval()


def labelled(count: int) -> list[dict[str, Any]]:
    """The second token says the label."""
    return [{"input_ids": [2, 5 + i % 2, 7 + i % 5, 9], "labels": i % 2} for i in range(count)]


def yours(folder: Path) -> dict[str, Any]:
    """The names, and what lies in the folder that the code runs in."""
    torch.manual_seed(0)
    causal = get_peft_model(tiny_model("llama", "causal"), LoraConfig(task_type="CAUSAL_LM", r=2))
    for name in ("formal", "brief"):  # what a mixture is made of
        causal.save_pretrained(folder / name)
    tiny_model("bert").save_pretrained(folder / "base")  # what a command line tunes
    tokenizer().save_pretrained(folder / "base")
    lines = [{"text": f"{'ab'[i % 2]} {'cd'[i // 2 % 2]}", "label": i % 2} for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    encoder = get_peft_model(
        hf.BertModel(tiny_config("bert")), LoraConfig(r=2, target_modules=["query", "value"])
    )
    return {
        "__name__": "page",
        "model": classifier(),
        "causal": causal.eval(),
        "encoder": encoder.eval(),
        "tokenizer": tokenizer(),
        "train": labelled(64),
        "test": labelled(32),
    }
