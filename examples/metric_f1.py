"""Tune a LoRA adapter on macro-F1 itself: no loss, no gradient, no new head.

all-MiniLM-L6-v2 sorts BBC news by comparing each text with the name of each topic. The adapter is
moved along the directions that raise the macro-F1 of a batch, and by nothing else.

    python examples/metric_f1.py    # two minutes on 2 idle cores
"""

import argparse
import sys
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from transformers import AutoModel

from support import real_data
from objectives import F1
from support.registry import FetchError
from support.text_classifier import Example, load_tokenizer, tokenize
from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.errors import ZOError


class TopicMatcher(nn.Module):
    """Logits of a text: the cosines of its embedding and those of the topics' names.

    Args:
        encoder: A model with hidden states (b, t, h).
        names: The tokenised names, padded.
    """

    def __init__(self, encoder: nn.Module, names: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder, self.names = encoder, names

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean over the tokens, of length 1, (b, h)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize((hidden * attention_mask[..., None]).sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosines (b, topics)."""
        names = self.embed(self.names["input_ids"], self.names["attention_mask"])
        return self.embed(input_ids, attention_mask) @ names.T


def build(source: str, tokenizer: Any, names: list[str]) -> TopicMatcher:
    """The encoder with a fresh adapter, which changes nothing yet, and the names of the topics."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    encoder = get_peft_model(AutoModel.from_pretrained(source, dtype=torch.float32), config)
    tokens = tokenizer(names, padding=True, return_tensors="pt")
    kept = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return TopicMatcher(encoder, kept).eval()


def figures(f1: F1, examples: list[Example]) -> str:
    """Held-out macro-F1 and accuracy, computed apart from the objective."""
    with torch.inference_mode():
        said = torch.cat(
            [f1.classifier.logits(examples[i : i + 32]) for i in range(0, len(examples), 32)]
        ).argmax(-1)
    labels = [one["labels"] for one in examples]
    macro = f1_score(labels, said, average="macro")
    return f"macro-F1 {macro:.3f}, accuracy {accuracy_score(labels, said):.3f}"


def main() -> None:
    """Fetch, tune, report."""
    parser = argparse.ArgumentParser(description="Tune a LoRA adapter on macro-F1 itself.")
    add = parser.add_argument
    add("--max-queries", type=int, default=20_000, help="forward passes of one text")
    add("--batch-size", type=int, default=32, help="texts that one value of F1 is made of")
    add("--displacement", type=float, default=0.25, help="how far noise would move a weight")
    add("--max-length", type=int, default=32, help="tokens of a text that are read")
    add("--seed", type=int, default=0, help="draws the split and the directions")
    args = parser.parse_args()
    # peft reads an attribute of transformers by its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    source = str(real_data.minilm_folder())
    tokenizer = load_tokenizer(source)
    corpus = real_data.bbc()
    split = real_data.balanced_split(corpus.texts, corpus.labels, 1024, 512, args.seed)
    train = tokenize(tokenizer, split.train_texts, split.train_labels, args.max_length)
    test = tokenize(tokenizer, split.test_texts, split.test_labels, args.max_length)
    torch.manual_seed(args.seed)
    model = build(source, tokenizer, corpus.names)
    f1 = F1(model, average="macro")
    print(f"before: held-out {figures(f1, test)}")
    started = time.perf_counter()
    result = minimize(
        f1,
        ParameterView.trainable(model),
        train,
        # A metric counts: mu is ten times that for a loss, so that some answers change.
        MeZO(displacement=args.displacement, num_directions=1, one_sided=False),
        batch_size=args.batch_size,
        max_queries=args.max_queries,
        seed=args.seed,
    )
    print(f"after:  held-out {figures(f1, test)}")
    print(f"{result.queries} queries, {time.perf_counter() - started:.0f} s; {result.message}")


if __name__ == "__main__":
    try:
        main()
    except (FetchError, real_data.NotEnoughTextsError, ZOError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
