"""Share a fine-tune as its trajectory: send kilobytes, rebuild the weights, predict the same.

One side tunes a LoRA adapter by forward passes and keeps the trajectory. The other side has the
public model and the seed of the new weights; it applies the file, without data or a forward pass.

    python examples/share_by_trajectory.py
"""

import argparse
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from support import real_data
from objectives import ClassificationLoss
from support.text_classifier import accuracy, build_model, predict, tokenize
from zo_adapt import MeZOSVRG, ParameterView, minimize, replay

SEED, LENGTH = 0, 48


def fresh_model(names: list[str], tokenizer: Any) -> Any:
    """The public model with new weights from the seed: what both sides have before anything."""
    torch.manual_seed(SEED)
    return build_model(str(real_data.minilm_folder()), names, tokenizer, lora=True)


def main() -> None:
    """Tune, send, rebuild, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-queries", type=int, default=6_000)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    corpus = real_data.bbc()
    split = real_data.balanced_split(corpus.texts, corpus.labels, 256, 128, SEED)
    tokenizer = AutoTokenizer.from_pretrained(str(real_data.minilm_folder()))
    train = tokenize(tokenizer, split.train_texts, split.train_labels, LENGTH)
    test = tokenize(tokenizer, split.test_texts, split.test_labels, LENGTH)

    with TemporaryDirectory() as folder:
        file = Path(folder) / "fine-tune.zot"
        sender = fresh_model(corpus.names, tokenizer)
        before = accuracy(sender, tokenizer, test)
        minimize(
            ClassificationLoss(sender),
            ParameterView.trainable(sender),
            train,
            MeZO(),
            batch_size=16,
            max_queries=args.max_queries,
            seed=SEED,
            trajectory=file,
        )
        receiver = fresh_model(corpus.names, tokenizer)
        started = time.perf_counter()
        steps = replay(ParameterView.trainable(receiver), file)
        seconds = time.perf_counter() - started
        size = file.stat().st_size

    ours, theirs = (predict(model, tokenizer, test) for model in (sender, receiver))
    if not torch.equal(ours, theirs):
        raise RuntimeError("the rebuilt model predicts otherwise")
    adapter = sum(p.numel() * p.element_size() for p in sender.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in sender.parameters())
    print(f"\nheld-out accuracy   {before:.3f} -> {accuracy(receiver, tokenizer, test):.3f}")
    print(f"rebuilt             {steps} steps in {seconds:.2f} s, predictions equal bit for bit")
    print(f"trajectory          {size:>12,} bytes")
    print(f"adapter             {adapter:>12,} bytes")
    print(f"full checkpoint     {whole:>12,} bytes")


if __name__ == "__main__":
    main()
