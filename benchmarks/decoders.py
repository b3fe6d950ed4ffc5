"""Decoders of Llama's kind with random weights, by size, a tokenizer and a reward for them."""

import gc
from typing import Any, NamedTuple

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class Size(NamedTuple):
    """Of a decoder."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool = True


SIZES = {
    "tiny": Size(2, 64, 4, 2, 128, 512),
    "135M": Size(30, 576, 9, 3, 1536, 49152),
    "1B": Size(16, 2048, 32, 8, 8192, 128256),
    "3B": Size(28, 3072, 24, 8, 8192, 128256),
    "8B": Size(32, 4096, 32, 8, 14336, 128256, tied=False),
}


def decoder(size: Size, device: str, *, lora: bool) -> Any:
    """Random weights; bf16 on a GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.inner,
        tie_word_embeddings=size.tied,
        max_position_embeddings=2048,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
            if lora:
                settings = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
                model = peft.get_peft_model(model, settings)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token: "w7" is 7."""
    words = {"</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def free() -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Texts:
    """A reward, the share of tokens that are even, that keeps what was written."""

    def __init__(self) -> None:
        self.written: list[list[int]] = []

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.written += completion_ids
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def prompts(args: Any, vocabulary: int) -> list[dict[str, Any]]:
    """Of half the prompts' length to all of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = [args.prompt - (i % (args.prompt // 2 + 1)) for i in range(args.batch)]
    drawn = (torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths)
    return [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in drawn]


def alike(one: list[list[int]], other: list[list[int]]) -> str:
    """How many texts are the same to the token."""
    same = sum(a == b for a, b in zip(one, other, strict=True))
    first = sum(a[0] == b[0] for a, b in zip(one, other, strict=True))
    return f"{same} of {len(one)} texts the same, {first} first tokens"
