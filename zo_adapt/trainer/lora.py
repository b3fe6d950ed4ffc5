"""LoRA adapters that start where the training data are, before ZOTrainer's first step."""

from pathlib import Path
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.objective import Objective
from zo_adapt.loops.loop import announce
from zo_adapt.loops.lora_start import start_on
from zo_adapt.trainer.data import TrainingRows
from zo_adapt.trainer.state import INITIAL
from zo_adapt.view.parameters import ParameterView


def start_adapters(trainer: Any, objective: Objective, source: TrainingRows) -> int:
    """Set the adapters' A on training examples, and say so.

    Returns:
        Forwards of one sample that it took.

    Raises:
        OptionError: The training set is a stream.
        AdapterError: No LoRA on a linear layer, or one that has been tuned.
    """
    args, model = trainer.args, trainer.view.model
    if not source.has_length:
        raise OptionError(
            f"lora_start_rows={args.lora_start_rows} with a train_dataset without a length; call "
            "initialise_lora on some of its examples before training"
        )
    count = min(args.lora_start_rows, len(source))
    classes = source.classes if args.stratify else None
    batch = Samples(source, count, args.seed, classes).minibatch()
    start = start_on(model, objective, batch.micro_batches(args.train_batch_size))
    source.forget()
    announce(
        f"LoRA's A of {len(start.layers)} layers from the inputs of {count:,} examples: "
        f"{start.queries:,} forwards of one sample, beside the budget",
        shown=trainer.is_first_rank and not args.disable_tqdm,
    )
    return start.queries


def save_start(view: ParameterView, folder: Path) -> None:
    """Save the adapters as the trajectory begins."""
    model: Any = view.model
    model.save_pretrained(folder / INITIAL)
