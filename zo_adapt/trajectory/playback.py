"""Replay: the weights of any step from the trajectory alone, with no forward pass and no data, of a
run that has ended or one that another process is still writing.

Passes over the weights: fp32 and fp64 arithmetic on the weights is a running sum, terms in order,
and reading or writing a weight between two terms rounds nothing; so consecutive updates without
decay are one list of T terms, applied in ceil(T / WIDTH) passes with the bits of T passes. A decay
multiplies before its own terms and begins a new list. In half precision every step rounds: one pass
a step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import CorruptTrajectoryError, TrajectoryError
from zo_adapt.options import positive, positive_or_none
from zo_adapt.term import Shift, Step, Term
from zo_adapt.trajectory.file import Reader
from zo_adapt.trajectory.header import check_header
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import whole

WIDTH, WIDTH_OF_FACTORS = 4096, 256
"""Terms that are brought onto the weights in one pass; fewer where each has factors in memory."""


def replay(
    view: ParameterView, path: str | Path, until: int | None = None, *, check_base: bool = True
) -> int:
    """Bring a view from the trajectory's initial weights to those of a step.

    theta_t = decay_t theta_{t-1} + sum_k c_k z(s_k), record by record, in the order and with the
    rounding of the run itself: bit-identical on the same kind of device.

    Args:
        view: At the weights that the trajectory starts from.
        path: The file.
        until: Number of the last step; 0 is the start, None the end.
        check_base: Refuse a model whose frozen weights are not those that the run had. They are
            compared by a sample; files of versions before 0.2 say nothing of them.

    Returns:
        The number of the last step.

    Raises:
        TrajectoryError: Another view, noise or start, or the file has fewer steps; nothing changes.
        CorruptTrajectoryError: A damaged record; nothing is applied.

    Example:
        >>> import tempfile, torch
        >>> from zo_adapt import MeZO, ParameterView, minimize, replay
        >>> path = tempfile.mkdtemp() + "/run.zot"
        >>> x = torch.zeros(2)
        >>> view = ParameterView({"x": x})
        >>> result = minimize(lambda batch: float(x.square().sum()), view, None, MeZO(lr=0.1),
        ...     max_steps=9, trajectory=path, progress=False)
        >>> y = torch.zeros(2)
        >>> replay(ParameterView({"x": y}), path), torch.equal(x, y)
        (9, True)
    """
    return Replay(view, path, until=until, keep_start=False, check_base=check_base).to(until)


class Replay:
    """A view that goes to any step of a trajectory, forwards and back.

    Forwards from where it stands. Additions cannot be undone exactly, so back is by way of the
    start, of which a copy is kept: the view's bytes, on its device.

    Args:
        view: At the weights that the trajectory starts from.
        path: The file. What is read of it is read and verified here.
        until: Read no further than this step: what comes after may be damaged. None reads all.
        keep_start: False keeps no copy: forwards only.
        check_base: As in ``replay``.

    Attributes:
        step: Where the view stands.

    Raises:
        TrajectoryError: Another view, noise or start; nothing changes.
        CorruptTrajectoryError: A damaged record; nothing is applied.

    Example:
        >>> import tempfile, torch
        >>> from zo_adapt import MeZO, ParameterView, Replay, minimize
        >>> path, x = tempfile.mkdtemp() + "/run.zot", torch.zeros(2)
        >>> result = minimize(lambda batch: float((x - 1).square().sum()), ParameterView({"x": x}),
        ...     None, MeZO(lr=0.1), max_steps=9, trajectory=path, progress=False)
        >>> y = torch.zeros(2)
        >>> run = Replay(ParameterView({"x": y}), path)
        >>> len(run), run.to(9), torch.equal(x, y), run.to(0), y
        (9, 9, True, 0, tensor([0., 0.]))
    """

    def __init__(
        self,
        view: ParameterView,
        path: str | Path,
        *,
        until: int | None = None,
        keep_start: bool = True,
        check_base: bool = True,
    ) -> None:
        reader = Reader(path)
        check_header(view, reader.header, path, check_base=check_base)
        view.leave_at_rest(reader.header.get("at_rest", ()))
        self.view, self.path, self.step = view, Path(path), 0
        steps = (step.update for step, _ in reader.steps())
        self._updates = list(islice(steps, until) if until is not None and until >= 0 else steps)
        self._start = view.snapshot() if keep_start else None

    def __len__(self) -> int:
        return len(self._updates)

    def to(self, step: int | None = None) -> int:
        """Bring the view to a step and return its number.

        Interrupted, the view is left on the way; the next call begins at the start.

        Args:
            step: 0 is the start, None the last.

        Raises:
            TrajectoryError: The file has no such step, or there is no way back; nothing changes.
        """
        goal = len(self) if step is None else step
        if not 0 <= goal <= len(self):
            raise TrajectoryError(
                f"{self.path} has {len(self)} steps, not {goal}; choose 0..{len(self)}"
            )
        if goal < self.step:
            self._go_to_start(goal)
        here, self.step = self.step, len(self) + 1  # past every step, until it is known
        try:
            apply_checked(self.view, self._updates[here:goal], self.path)
        except CorruptTrajectoryError:
            self.step = here
            raise
        self.step = goal
        return goal

    def _go_to_start(self, goal: int) -> None:
        if self._start is None:
            raise TrajectoryError(
                f"no way back to step {goal} without a copy of the start; use keep_start=True"
            )
        self.step = len(self) + 1  # on the way, where a signal ends this
        self.view.restore(self._start)
        self.step = 0


def apply_checked(
    view: ParameterView,
    updates: Sequence[Shift],
    path: Path,
    pause: tuple[int, Callable[[], None]] | None = None,
) -> None:
    """Apply updates one after the other, all of them or, where a weight would overflow, none.

    Args:
        view: What moves.
        updates: In order.
        path: Where they stand, for the message.
        pause: After how many of them something is to be done, and what.

    Raises:
        CorruptTrajectoryError: A weight would be infinite; nothing was applied.
    """
    for number, update in enumerate(updates, 1):
        if not view.room.fits(update.terms):
            raise CorruptTrajectoryError(
                f"{path} has a step ({number} from here) that is larger than the range of the "
                "view's dtype, which no run makes; nothing was applied"
            )

    def apply() -> None:
        number, do = pause or (0, lambda: None)
        apply_all(view, updates[:number])
        do()
        apply_all(view, updates[number:])

    if view.room.holds(updates):
        apply()
        return
    # By their bounds alone the weights may leave the dtype's range: only trying tells.
    before = view.snapshot()
    with np.errstate(over="ignore", invalid="ignore"):
        apply()
    finite = all(bool(tensor.isfinite().all()) for tensor in view.held.values())
    if any(view.shards.agreed([not finite])):
        view.restore(before)
        raise CorruptTrajectoryError(
            f"the steps of {path} leave the range of the view's dtype, which no run does; nothing "
            "was applied"
        )


def apply_all(view: ParameterView, updates: Sequence[Shift]) -> None:
    """Apply updates one after the other, many in one pass where that gives the same bits."""
    wide = all(t.dtype in (torch.float32, torch.float64) for t in view.tensors.values())
    width = WIDTH_OF_FACTORS if view.has_factors else WIDTH
    run: list[Term] = []
    decay = 1.0
    for update in updates:
        if not wide or update.decay != 1.0:
            view.apply_in_order(run, decay)
            run, decay = [], update.decay
        run += update.terms
        while wide and len(run) > width:
            view.apply_in_order(run[:width], decay)
            run, decay = run[width:], 1.0
    view.apply_in_order(run, decay)


def export(view: ParameterView) -> dict[str, Tensor]:
    """The view's tensors as contiguous copies, ready for a safetensors file; sharded ones whole."""
    return {name: whole(t).detach().cpu().contiguous().clone() for name, t in view.tensors.items()}


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
