"""Tune a text classifier without backpropagation and show what came of it.

By default a LoRA adapter of the encoder all-MiniLM-L6-v2 learns the five topics of BBC news, on a
CPU, in minutes. The result is a table, a figure of loss and held-out accuracy against queries
(forward passes of one sample) with AdamW's beside, and the saved model, which is loaded again and
compared.

    python examples/tune_lora.py
    python examples/tune_lora.py --dataset movie --max-length 64 --optimizer mezo --lr 1e-3
    python examples/tune_lora.py --model FOLDER --dataset texts.csv --view partial
"""

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from objectives import ClassificationLoss
from support import real_data
from support.registry import FetchError
from support.report import Curve, draw, figures, table
from support.text_classifier import (
    Example,
    Model,
    accuracy,
    build_model,
    load_tokenizer,
    predict,
    reload_model,
    tokenize,
)
from zo_adapt import (
    SGD,
    ZOSVRG,
    Adam,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Result,
    Step,
    initialise_lora,
    minimize,
)
from zo_adapt.errors import ZOError

MAX_QUERIES = 24_000
ADAM_QUERIES = 1_536  # and as many backward passes: enough for it to be ahead
ACCURACY_POINTS = 6  # on the curve, first and last included; not counted as queries
LARGEST_GAP = 1e-5  # of logits, between the tuned model and its saved copy
FORWARD, BACKWARD = "forward passes alone", "backpropagation, AdamW"
OPTIMIZERS = {"mezo": MeZO, "mezo-svrg": MeZOSVRG, "zo-svrg": ZOSVRG, "sgd": SGD, "adam": Adam}
FIRST_ORDER_LR = {"sgd": 1e-1, "adam": 1e-3}  # the others have a default that works


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the defaults are the demonstration."""
    parser = argparse.ArgumentParser(
        description="Tune a text classifier without backpropagation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="hub name or folder (default: all-MiniLM-L6-v2, fetched once)")
    add(
        "--dataset", default="bbc", help="bbc, movie, a hub name, a folder or a CSV with text,label"
    )
    add("--view", choices=["lora", "partial", "full"], default="lora", help="what is tuned")
    add("--plain-start", action="store_true", help="LoRA begins as peft makes it")
    add("--optimizer", choices=list(OPTIMIZERS), default="mezo", help="sgd, adam: backprop")
    add("--lr", type=float, help="learning rate (default: the optimizer's own)")
    add("--max-queries", type=int, default=MAX_QUERIES, help="forward passes of one sample")
    add("--adam-queries", type=int, default=ADAM_QUERIES, help="of AdamW's curve beside; 0: none")
    add("--batch-size", type=int, default=16, help="samples of a step")
    add("--max-length", type=int, default=64, help="tokens of a text that are read")
    add("--train-size", type=int, default=512, help="training texts, balanced by class")
    add("--test-size", type=int, default=256, help="held-out texts, balanced by class")
    add("--seed", type=int, default=0, help="draws the split, the new head and the directions")
    add("--output", type=Path, default=Path("runs/tune_lora"), help="folder for figure and model")
    return parser.parse_args()


def load_corpus(name: str) -> real_data.Corpus:
    """One of the fetched sets, or any table of texts and labels that `datasets` can read."""
    if name in ("bbc", "movie"):
        return real_data.bbc() if name == "bbc" else real_data.movie_reviews()
    if name.endswith(".csv"):
        loaded = datasets.load_dataset("csv", data_files=name)
    else:
        loaded = datasets.load_dataset(name)
    rows = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if missing := {"text", "label"} - set(rows.column_names):
        raise ValueError(f"{name} has no column {missing}; it has {rows.column_names}")
    return real_data.labelled(list(rows["text"]), list(rows["label"]))


def load_examples(
    args: argparse.Namespace, tokenizer: Any
) -> tuple[list[Example], list[Example], list[str]]:
    """Disjoint, balanced examples to train with and to test with, and the names of the classes."""
    corpus = load_corpus(args.dataset)
    split = real_data.balanced_split(
        corpus.texts, corpus.labels, args.train_size, args.test_size, args.seed
    )
    train = tokenize(tokenizer, split.train_texts, split.train_labels, args.max_length)
    test = tokenize(tokenizer, split.test_texts, split.test_labels, args.max_length)
    return train, test, corpus.names


def choose_view(model: Model, view: str) -> ParameterView:
    """What is tuned: the adapter and the head, the last two layers and the head, or all of it."""
    if view == "partial":
        return ParameterView.last_layers(model, 2, head=True)
    return ParameterView.full(model) if view == "full" else ParameterView.trainable(model)


def tune(
    model: Model,
    tokenizer: Any,
    train: list[Example],
    test: list[Example],
    args: argparse.Namespace,
) -> tuple[Result, Curve]:
    """Minimise the training loss; look at the held-out set a few times on the way."""
    curve = [(0, accuracy(model, tokenizer, test))]
    tqdm.write(f"held-out accuracy {curve[0][1]:.3f} before")

    def look(step: Step) -> None:
        due = args.max_queries * len(curve) / (ACCURACY_POINTS - 1)
        if step.queries >= due and len(curve) < ACCURACY_POINTS - 1:
            curve.append((step.queries, accuracy(model, tokenizer, test)))
            tqdm.write(f"held-out accuracy {curve[-1][1]:.3f} after {step.queries} queries")

    make = OPTIMIZERS[args.optimizer]
    lr = FIRST_ORDER_LR.get(args.optimizer) if args.lr is None else args.lr
    result = minimize(
        ClassificationLoss(model),
        choose_view(model, args.view),
        train,
        make() if lr is None else make(lr=lr),
        batch_size=args.batch_size,
        max_queries=args.max_queries,
        seed=args.seed,
        callback=look,
        progress=True,
    )
    curve.append((result.queries, accuracy(model, tokenizer, test)))
    return result, curve


def backpropagated(
    source: str,
    names: list[str],
    tokenizer: Any,
    train: list[Example],
    test: list[Example],
    args: argparse.Namespace,
) -> tuple[Result, Curve]:
    """The same start, view and texts by AdamW: where backpropagation fits, it learns faster."""
    model = started(source, names, tokenizer, train, args)
    options = {"optimizer": "adam", "lr": None, "max_queries": args.adam_queries}
    return tune(model, tokenizer, train, test, argparse.Namespace(**(vars(args) | options)))


def started(
    source: str, names: list[str], tokenizer: Any, train: list[Example], args: argparse.Namespace
) -> Model:
    """The model with its new head and adapter."""
    torch.manual_seed(args.seed)
    model = build_model(source, names, tokenizer, lora=args.view == "lora")
    if args.view == "lora" and not args.plain_start:
        start = initialise_lora(model, ClassificationLoss(model), train, seed=args.seed)
        print(f"{len(start.layers)} LoRA layers start from {start.queries} forward passes")
    return model


def main() -> None:
    """Fetch, tune, save, check what was saved, and report."""
    args = parse_arguments()
    # peft reads an attribute of transformers by its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.set_verbosity_error()  # the head is new by intent: no report on it
    transformers.utils.logging.disable_progress_bar()
    source = args.model or str(real_data.minilm_folder())
    lora = args.view == "lora"
    tokenizer = load_tokenizer(source)
    train, test, names = load_examples(args, tokenizer)

    begun = time.perf_counter()
    model = started(source, names, tokenizer, train, args)
    result, curve = tune(model, tokenizer, train, test, args)
    name = {"adam": BACKWARD, "sgd": "backpropagation, SGD"}.get(args.optimizer, FORWARD)
    rows, runs = (
        [figures(name, curve, time.perf_counter() - begun)],
        {name: (result.history, curve)},
    )

    # Apart: transformers applies an adapter that it finds in the folder of a whole model.
    folder = args.output / ("adapter" if lora else "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = reload_model(source, names, tokenizer, folder, lora=lora)
    gap = predict(again, tokenizer, test) - predict(model, tokenizer, test)
    if gap.abs().max() > LARGEST_GAP:
        raise RuntimeError(f"{folder}: loaded again, logits differ by {gap.abs().max():.1e}")
    if name == FORWARD and args.adam_queries:
        print("the same by backpropagation, to compare")
        begun = time.perf_counter()
        beside, other = backpropagated(source, names, tokenizer, train, test, args)
        runs[BACKWARD] = (beside.history, other)
        rows.append(figures(BACKWARD, other, time.perf_counter() - begun))
    picture = args.output / "curves.png"
    draw(runs, picture)
    print(f"\nstopped because {result.message}\n\n{table(rows)}\n")
    print(f"saved to {folder}, loaded again with equal predictions; {picture} shows the way")


if __name__ == "__main__":
    try:
        main()
    except (FetchError, real_data.NotEnoughTextsError, ZOError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
