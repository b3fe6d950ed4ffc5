"""What is found out about an objective before the first step, so that no run finds it later."""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_adapt.data.examples import is_transformed, labels_to_check, stored_column
from zo_adapt.data.rows import NoRowsError, select_rows
from zo_adapt.data.sources import Source
from zo_adapt.errors import NoisyObjectiveWarning, OptionError
from zo_adapt.evaluation.objective import (
    Objective,
    SetObjective,
    keeps_batch_whole,
    ready,
    with_attributes,
)
from zo_adapt.interrupt import Guard, gradients_off, is_from_handler
from zo_adapt.view.trace import leaves_of

SAME = 0.02
"""Relative difference up to which a row's value alone and beside another is rounding (fp16)."""
NOISE = 1e-3
"""Relative difference of two values at one place that is more than rounding."""
DRIFT = 1e-5
"""The same where an attribute of a module is seen to change from call to call."""
CALLS = 4
"""Most calls by which noise is looked for; one where the value has the same bits again."""


def check_all_examples(objective: Objective, data: Any, *, as_stored: bool = True) -> None:
    """Look at all examples at once, so that a bad one is not found in the middle of a run.

    Args:
        objective: Says what is to be looked at: ``check_labels``, ``check_columns``.
        data: The examples.
        as_stored: Whether their fields mean to the objective what is stored: no collate function of
            another origin makes something else of them.

    Raises:
        DataError: (usually) The objective has no use for one of them.
    """
    if objective.check_labels is not None and (labels := labels_to_check(data)) is not None:
        objective.check_labels(labels)
    if objective.check_columns is not None and as_stored and not is_transformed(data):
        objective.check_columns(partial(stored_column, data))


def check_micro_batch_size(
    objective: Objective, micro_batch_size: int | None, batch_size: int | None
) -> None:
    """Refuse micro-batches of what cannot be cut.

    Args:
        objective: After ``resolve_mean_over_rows``.
        micro_batch_size: As the caller gives it; None: no limit was asked for.
        batch_size: Rows of a batch; None: not known.

    Raises:
        OptionError: The objective gives one number for a whole batch.
    """
    cuts = micro_batch_size is not None and (batch_size is None or micro_batch_size < batch_size)
    if cuts and keeps_batch_whole(objective):
        raise OptionError(
            f"micro_batch_size={micro_batch_size} with an objective that gives one number for a "
            "batch: the mean over micro-batches would be another number; return one value per "
            "example, set mean_over_rows=True if the number is a mean over rows, give the "
            "objective predict and score, or leave micro_batch_size out"
        )


def resolve_mean_over_rows(
    objective: Objective, source: Source, model: nn.Module | None
) -> Objective:
    """The objective, saying whether its value is a mean over rows, so that a batch may be cut.

    One that does not say is called on the first two rows, and on the first of them alone: the same
    in every run, also in one that is resumed. One value for each row, the same alone as beside
    another, is a mean over rows. One number need not be: a metric is another figure on another
    number of rows; and so is a value that depends on the others (in-batch negatives).

    Args:
        objective: What is asked.
        source: Of the rows.
        model: Looked at for dropout, where the objective has no evaluation mode of its own.

    Raises:
        DropoutError: The model is not in evaluation mode.
    """
    if objective.mean_over_rows != "auto" or len(source) < 2:  # a single row cannot be cut
        return objective
    is_mean = False
    if objective.independent_rows:
        with gradients_off(), randomness_kept(model), ready(objective, model):
            is_mean = _gives_each_row_its_own(objective, source, looked_at=model is not None)
    return with_attributes(objective, mean_over_rows=is_mean)


def _gives_each_row_its_own(objective: Objective, source: Source, *, looked_at: bool) -> bool:
    """Whether two rows have a value each, and the first has the same one alone.

    Where it has not, an objective that was not looked at yet is asked once more: it may draw.
    """
    try:
        two = source.take([0, 1])
        both = _array(objective(two))
        if both.shape != (2,):
            if not looked_at:
                warn_of_noise(both, objective, two)
            return False
        try:
            # What the collate function has drawn, it has drawn for both.
            first = select_rows(two, slice(0, 1), 2)
        except NoRowsError:
            first = source.take([0])
        alone = _array(objective(first))
        difference = abs(alone.reshape(-1) - both[:1])
        is_mean = alone.size == 1 and bool((difference <= SAME * abs(both).max()).all())
        if not looked_at and bool((difference > NOISE * abs(both).max()).any()):
            warn_of_noise(alone, objective, first)
    except NoisyObjectiveWarning:  # where warnings are errors
        raise
    # A metric may have no value on two rows. What is wrong with the data or the function says
    # itself again, where it counts, at the first step.
    except Exception as error:
        if is_from_handler(error):
            raise
        return False
    return is_mean


def is_made_of_its_parts(objective: SetObjective, source: Source, model: nn.Module | None) -> bool:
    """Whether the score of some rows together is that of the same rows predicted one by one.

    It is not where a loss compares the rows of a batch (in-batch negatives).

    Args:
        objective: What is asked about the first eight rows; nothing is concluded where it fails.
        source: Of the rows.
        model: Whose generators are put back.
    """
    rows = min(8, len(source))
    with gradients_off(), randomness_kept(model), ready(objective, model):
        try:
            batch = source.take(range(rows))
            whole = _array(objective(batch))
            each = [objective.predict(_row(batch, row, rows)) for row in range(rows)]
            parts = _array(objective.score(each))
        except Exception as error:  # as above: it says itself where it counts
            if is_from_handler(error):
                raise
            return True
    # Rows without a label that counts say nothing.
    return not abs(whole - parts).max() > SAME * abs(whole).max()


def _row(batch: Any, row: int, rows: int) -> Any:
    """One of the rows that were collated together, with what is of no row (``return_loss``)."""
    part = slice(row, row + 1)
    if not isinstance(batch, Mapping):
        return select_rows(batch, part, rows)
    single = (bool, int, float, str, type(None))
    return {
        name: value if isinstance(value, single) else select_rows(value, part, rows)
        for name, value in batch.items()
    }


def _array(returned: Any) -> np.ndarray:
    here = returned.detach().cpu() if isinstance(returned, Tensor) else returned
    return np.asarray(here, dtype=np.float64)


def warn_of_noise(
    found: Any,
    call: Callable[[Any], Any],
    content: Any,
    changing: Callable[[], list[str]] = list,
) -> None:
    """Call again with other random numbers, of which the value should know nothing.

    Two draws may be alike by chance. Where the bits differ and the values hardly do, it is called
    a few times more.

    Args:
        found: What the first call returned.
        call: Returns it again.
        content: What it is called with.
        changing: Gives the names of attributes that the calls have changed.
    """
    apart = 0.0
    for _ in range(CALLS):
        random.random(), np.random.random(), torch.rand(())  # noqa: NPY002
        pairs = zip(_numbers(found), _numbers(call(content)), strict=False)
        differences = [
            float(abs(one - other).max() / abs(one).max())
            for one, other in pairs
            if one.shape == other.shape and abs(one).max() > 0
        ]
        apart = max(differences, default=0.0)
        if not 0 < apart <= NOISE:
            break
    if apart > DRIFT and (names := changing()):
        where = f"for the same examples at the same weights, and every call changes {names[0]!r}"
        _say_noise(apart, where, "batch")
    elif apart > NOISE:
        _say_noise(apart, "for the same examples at the same weights", "batch")


def warn_of_change(before: float | None, now: float) -> None:
    """Compare two values of a function without data at the same point."""
    if before is not None and abs(now - before) > NOISE * max(abs(now), abs(before)):
        apart = abs(now - before) / max(abs(now), abs(before))
        _say_noise(apart, "at the same point", "step")


def _say_noise(apart: float, where: str, seed: str) -> None:
    warnings.warn(
        f"the objective gives values that differ by {apart:.1%} {where}: it draws random numbers "
        "or depends on something else, and what a step learns is the rest of a difference; let it "
        f"draw the same ones for all points (of a generator of its own, seeded by the {seed}), or "
        "average them",
        NoisyObjectiveWarning,
        stacklevel=8,
    )


def _numbers(value: Any) -> list[Any]:
    arrays = [
        np.asarray(leaf.detach().float().cpu() if isinstance(leaf, Tensor) else leaf)
        for leaf in leaves_of(value)
    ]
    return [a.astype(float) for a in arrays if a.dtype.kind in "biuf" and a.size]


@contextmanager
def randomness_kept(model: nn.Module | None) -> Iterator[None]:
    """The global generators afterwards as before: a collate function or an objective may draw."""
    parameters = () if model is None else model.parameters()
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torchs = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in sorted(devices)}

    def undo() -> None:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(torchs[0])
        for device, state in torchs[1].items():
            torch.cuda.set_rng_state(state, device)

    with Guard(undo) as guard:
        guard.open()
        yield
