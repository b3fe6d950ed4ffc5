"""The same fine-tune by one process or by several, which exchange values alone.

    torchrun --nproc_per_node=2 --local-ranks-filter 0 examples/distributed.py
    python examples/distributed.py                       # the same weights, bit for bit

Every process has the whole model, evaluates its part of a step's points, and applies the same step.
On machines with GPUs each process takes its own. Ended processes go on from the trajectory where
torchrun may start them anew (--max-restarts=3).
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from objectives import Accuracy, ClassificationLoss
from support import real_data
from support.registry import FetchError
from support.text_classifier import build_model, load_tokenizer, tokenize
from zo_adapt import Metrics, MeZOSVRG, ParameterView, minimize
from zo_adapt.errors import ZOError


def main() -> None:
    """Tune, and print what every process then has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--max-queries", type=int, default=6_000, help="forward passes of one text")
    add("--batch-size", type=int, default=64, help="texts of a step")
    add("--trajectory", type=Path, help="file that rank 0 writes, and that a restart goes on from")
    args = parser.parse_args()
    # As torchrun does: with another number of threads, sums round otherwise.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # peft reads an attribute of transformers by its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    corpus, source = real_data.bbc(), str(real_data.minilm_folder())
    split = real_data.balanced_split(corpus.texts, corpus.labels, 1024, 256, seed=0)
    tokenizer = load_tokenizer(source)
    train = tokenize(tokenizer, split.train_texts, split.train_labels, 32)
    test = tokenize(tokenizer, split.test_texts, split.test_labels, 32)
    torch.manual_seed(0)  # the new head and the adapter: the same in every process
    model = build_model(source, corpus.names, tokenizer, lora=True)
    view = ParameterView.trainable(model)
    started = time.perf_counter()
    result = minimize(
        ClassificationLoss(model),
        view,
        train,
        MeZOSVRG(),
        batch_size=args.batch_size,
        max_queries=args.max_queries,
        metrics=Metrics({"accuracy": Accuracy(model)}, test),
        trajectory=args.trajectory,
        resume=args.trajectory is not None,
    )
    print(result)
    print(f"{time.perf_counter() - started:.0f} s; sha256 of the weights {view.hash()[:16]}")


if __name__ == "__main__":
    try:
        main()
    except (FetchError, real_data.NotEnoughTextsError, ZOError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
