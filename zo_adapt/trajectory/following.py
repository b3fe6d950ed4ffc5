"""A view that follows a run of another process, step by step, by its trajectory alone."""

import time
from collections.abc import Iterator
from pathlib import Path

from zo_adapt.errors import TrajectoryError
from zo_adapt.options import positive, positive_or_none
from zo_adapt.term import Step
from zo_adapt.trajectory.file import Reader
from zo_adapt.trajectory.header import check_header
from zo_adapt.trajectory.playback import apply_checked
from zo_adapt.view.parameters import ParameterView


def follow(
    view: ParameterView,
    path: str | Path,
    *,
    until: int | None = None,
    patience: float | None = None,
    interval: float = 0.2,
    check_base: bool = True,
) -> Iterator[Step]:
    """Go along with a trajectory that another process is still writing: a hot spare, an evaluator.

    The view is at the weights after a step when that step is given, bit for bit; the file is only
    read.

    Args:
        view: At the weights that the trajectory starts from.
        path: The file; it need not be there yet.
        until: Number of the last step; None goes on.
        patience: Seconds without a new step after which it ends; None waits for ever.
        interval: Seconds from one look at the file to the next.
        check_base: As in ``replay``.

    Yields:
        Every step, after it was applied.

    Raises:
        TrajectoryError: Another view, noise or start; or no file in time.
        CorruptTrajectoryError: A damaged record, or a run that has gone back behind a step that was
            applied already: begin again from the start.

    Example:
        >>> import tempfile, torch
        >>> from zo_adapt import MeZO, ParameterView, minimize
        >>> file, x, y = tempfile.mkdtemp() + "/run.zot", torch.zeros(2), torch.zeros(2)
        >>> _ = minimize(lambda batch: float((x - 1).square().sum()), ParameterView({"x": x}),
        ...     None, MeZO(lr=0.1), max_steps=3, trajectory=file, progress=False)
        >>> [step.step for step in follow(ParameterView({"x": y}), file, patience=0.1)]
        [1, 2, 3]
        >>> torch.equal(x, y)
        True
    """
    path, patience = Path(path).expanduser(), positive_or_none("patience", patience)
    interval, since = positive("interval", interval), time.monotonic()
    while not path.exists():
        if patience is not None and time.monotonic() - since > patience:
            raise TrajectoryError(f"there is no {path} after {patience:g} s; start the run first")
        time.sleep(interval)
    reader = Reader(path)
    check_header(view, reader.header, path, check_base=check_base)
    view.leave_at_rest(reader.header.get("at_rest", ()))
    number, position, since = 0, reader.start, time.monotonic()
    while until is None or number < until:
        for step, after in reader.steps(position, number, is_growing=True):
            apply_checked(view, [step.update], path)
            number, position, since = step.step, after, time.monotonic()
            yield step
            if number == until:
                return
        if patience is not None and time.monotonic() - since > patience:
            return
        time.sleep(interval)
