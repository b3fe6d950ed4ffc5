"""Steps corrected by a snapshot, which is kept as terms: what the SVRG optimizers share."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.optimizers.directions import Directions, Estimate
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.schedule import Progress
from zo_adapt.options import at_least_one, positive_or_none, renamed
from zo_adapt.term import HERE, Shift, Step, Term, Terms, coalesced, scaled
from zo_adapt.view.kept import KeptValues
from zo_adapt.view.parameters import ParameterView

SnapshotSize = int | Literal["auto", "batch", "all"]
Coupling = Literal["shared", "independent"]
MOST_STEPS_BACK = 16
"""A longer way back than so many steps is not drawn anew for every probe."""
SNAPSHOT_BATCHES = 4
"""Minibatches in a large batch of no given size."""


@dataclass
class Snapshot:
    """The last snapshot of a run.

    Neither theta_bar nor g need be a copy of the weights: g is its terms, and theta_bar is where
    the weights are less all that was applied since.

    Args:
        gradient: g, the large-batch estimate at the snapshot.
        directions: N, such that the noise of g is that of an estimate from N directions.
        since: The updates since then, as one shift; ``HERE`` where values are kept.
        elsewhere: The directions asked about at theta_bar, of a step that has not been taken.
        kept: The values of theta_bar, where the way back would be long and the view is small.
    """

    gradient: Terms = ()
    directions: float = 1
    since: Shift = HERE
    elsewhere: Directions | None = None
    kept: KeptValues | None = None

    @property
    def place(self) -> Shift:
        """theta_bar."""
        return self.since.inverse() if self.kept is None else self.kept.at()


@dataclass(frozen=True, repr=False)
class VarianceReduced(ZerothOrder):
    """Base of the optimizers with snapshots: theta_bar and g as terms, one copy of the weights.

    Args:
        estimate: Of the large batch; minibatch steps take its differences along one direction.
        apply: How an estimate is applied.
        snapshot_interval: q >= 1, steps from one snapshot to the next. Up to ``MOST_STEPS_BACK``,
            and of any number with a view that has no room for copies, the way back to theta_bar is
            a term for every step since, which its probes draw anew; beyond, values are kept.
        snapshot_size: Rows of the large batch; "auto": of four minibatches, or the whole set where
            that is smaller; "batch": of a minibatch; "all": the whole set.
        snapshot_lr: Rate of the snapshot steps; None: as of the others.
        coupling: Whether the two estimates of a minibatch step share their directions.

    Raises:
        OptionError: A number outside its range.
    """

    _: KW_ONLY
    snapshot_interval: int = 2
    snapshot_size: SnapshotSize = "auto"
    snapshot_lr: float | None = None
    coupling: Coupling = "shared"

    def _check(self) -> None:
        interval = at_least_one("snapshot_interval", self.snapshot_interval)
        self._set(snapshot_interval=interval)
        if isinstance(self.snapshot_size, str):
            if self.snapshot_size not in ("auto", "batch", "all"):
                raise OptionError(
                    f"snapshot_size={self.snapshot_size!r}; choose rows, 'auto', 'batch' or 'all'"
                )
        else:
            self._set(snapshot_size=at_least_one("snapshot_size", self.snapshot_size))
        self._set(snapshot_lr=positive_or_none("snapshot_lr", self.snapshot_lr))
        if self.coupling not in ("shared", "independent"):
            raise OptionError(f"coupling={self.coupling!r}; choose 'shared' or 'independent'")
        if self.estimate.shaping != "none" and self.snapshot_interval != 1:
            # g has no unit then, and a difference of two estimates along one direction has.
            raise OptionError(
                f"shaping={self.estimate.shaping!r} needs snapshot_interval=1, as minibatch steps "
                f"have none; choose that, or MeZO(shaping={self.estimate.shaping!r})"
            )

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Begin a run on a view, without a snapshot."""
        super().start(view, seed, step_like=step_like)
        # Others hold no weights: an optimizer may be copied and outlive its run.
        kept = KeptValues(view.tensors) if self.steps_back > MOST_STEPS_BACK else None
        keeps = view.has_room_for_copies
        self._set(_kept=kept, _snapshot=Snapshot(kept=kept if keeps else None))

    @property
    def steps_back(self) -> int:
        """Most steps from theta_bar to the weights."""
        return self.snapshot_interval

    @property
    def snapshot(self) -> Snapshot:
        """The last one of the last run."""
        snapshot: Snapshot = vars(self)["_snapshot"]
        return snapshot

    @property
    def at_snapshot(self) -> bool:
        """Whether the next step begins with a snapshot."""
        return self.begins_at(self.steps)

    def begins_at(self, step: int) -> bool:
        """Whether a step, by its number from 0 on, begins with a snapshot."""
        return step % self.snapshot_interval == 0

    def divide(self, batch: Batch, samples: Samples) -> list[Batch]:
        """A large batch as the estimator does; a minibatch is whole, for one direction."""
        return self.estimate.divide(batch, samples) if self.at_snapshot else [batch]

    def propose(self, samples: Samples) -> list[Probe]:
        """The probes of the next step: at a snapshot here, otherwise here and at theta_bar."""
        state, snapshot = self.state, self.snapshot
        batches = self.divide(self.batch_of(self.steps, samples), samples)
        here = state.asked = self.new_directions(batches)
        if self.at_snapshot:
            return self.estimate.probes(here)
        # One z for the pair: the proof conditions on it, and with a z of its own for theta_bar the
        # correction has more variance than the plain estimate that it is to improve.
        there = here if self.coupling == "shared" else self.new_directions(batches)
        snapshot.elsewhere = there
        one = self.estimate.of_one_direction
        return one.probes(here) + one.probes(there, snapshot.place)

    def advance(self, evaluations: Sequence[Evaluation], progress: Progress) -> Step:
        """A step along g, or along g_I(theta) - g_I(theta_bar) + g."""
        snapshot = self.snapshot
        if self.at_snapshot:
            here = self.estimate.combine(self.asked, evaluations)
            snapshot.gradient, snapshot.since = here.terms, HERE
            snapshot.directions = len(here.projected)
            self.keep_values()
            return self._move(here.terms, here, progress, 1.0 / snapshot.directions, "snapshot")
        one, half = self.estimate.of_one_direction, len(evaluations) // 2
        here = one.combine(self.asked, evaluations[:half])
        there = one.combine(snapshot.elsewhere or self.asked, evaluations[half:])
        terms = self.corrected(here.terms, there.terms)
        pairs = zip(here.projected, there.projected, strict=True)
        change = sum((p - q) ** 2 for p, q in pairs) / len(here.projected) ** 2
        # The noise of g is 1 / N in squares of the running scale, and the correction's directions
        # add theirs: together that of an estimate from fewer directions.
        scale = self.state.descent.scale.value
        noise = self.noise(change / scale**2 if scale else 0.0)
        return self._move(terms, here, progress, noise, "minibatch")

    def _move(
        self, terms: Terms, here: Estimate, progress: Progress, noise: float, kind: str
    ) -> Step:
        step = self.descend(
            terms,
            here,
            progress,
            lr=self.snapshot_lr if kind == "snapshot" else None,
            kind=kind,
            directions=1.0 / noise,
            reuse=self.steps_of_an_estimate,
        )
        self.remember(terms, step.update, noise)
        return step

    @property
    def steps_of_an_estimate(self) -> int:
        """About how many steps share the noise of one large-batch estimate."""
        return self.snapshot_interval

    def corrected(self, here: Terms, there: Terms) -> Terms:
        """g_I(theta) - g_I(theta_bar) + g, of which the first two are given."""
        # Along shared directions the pair is one term each: p - q, small near the snapshot.
        return coalesced((*here, *scaled(there, -1.0), *self.snapshot.gradient))

    def noise(self, change: float) -> float:
        """The mean square of what a minibatch step goes along, in squares of the running scale.

        Args:
            change: That of the correction alone.
        """
        return 1.0 / self.snapshot.directions + change

    def remember(self, terms: Terms, update: Shift, noise: float) -> None:
        """Keep what the next step needs of this one."""
        if self.snapshot.kept is None:
            self.snapshot.since = self.snapshot.since.then(self._undecayed(update))

    def _undecayed(self, update: Shift) -> Shift:
        """The update as a part of ``since``, whose way back divides every term by all decays.

        Parts that do not decay are not to be divided: their terms are multiplied by them here.
        """
        groups, factor = self.state.groups, self.snapshot.since.decay * update.decay
        if factor == 1.0 or all(group.decays for group in groups):
            return update
        terms = (
            term
            if groups[term.group or 0].decays
            else term._replace(coefficient=term.coefficient * factor)
            for term in update.terms
        )
        return update._replace(terms=tuple(terms))

    def batch_of(self, step: int, samples: Samples) -> Batch:
        """A large batch at a snapshot, a minibatch otherwise."""
        if not self.begins_at(step):
            return samples.minibatch()
        size, rows = self.snapshot_size, samples.batch_size
        if size == "auto":
            return samples.large(min(SNAPSHOT_BATCHES * rows, len(samples.source)))
        return samples.large(rows if size == "batch" else size)

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, the snapshot included."""
        snapshot = self.snapshot
        return super().state_dict() | {
            "gradient": snapshot.gradient,
            "directions_of_snapshot": snapshot.directions,
            "since": snapshot.since,
            "keeps": snapshot.kept is not None,
        }

    def brief_state(self) -> dict[str, Any]:
        """Without the way back to theta_bar, which has a term for every step since."""
        return self.state_dict() | {"since": HERE}

    def load_brief_state(self, state: Mapping[str, Any], updates: Sequence[Shift]) -> None:
        """Go on from a brief state, or from a whole one of a former version."""
        self.load_state_dict(state)
        if self.snapshot.kept is None and self.snapshot.since == HERE:
            for update in updates[len(updates) - self.steps_since :]:
                self.snapshot.since = self.snapshot.since.then(self._undecayed(update))

    @property
    def steps_since(self) -> int:
        """How many updates lie between theta_bar and here."""
        return (self.steps - 1) % self.snapshot_interval + 1 if self.steps else 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ``start`` comes first."""
        super().load_state_dict(state)
        terms, decay = state["since"]
        self._set(
            _snapshot=Snapshot(
                tuple(Term(*term) for term in state["gradient"]),
                state["directions_of_snapshot"],
                Shift(tuple(Term(*term) for term in terms), decay),
                kept=vars(self)["_kept"] if state.get("keeps", False) else None,
            )
        )

    @property
    def steps_since_kept(self) -> int | None:
        """How many steps ago the weights had the values that are kept; None: none are."""
        return None if self.snapshot.kept is None else self.steps_since

    def keep_values(self) -> None:
        """Keep the present weights, if any."""
        if self.snapshot.kept is not None:
            self.snapshot.kept.keep()

    def tensors(self) -> dict[str, Tensor]:
        """The values that are kept; whoever restores the weights restores them as well."""
        return {} if self.snapshot.kept is None else self.snapshot.kept.tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what ``tensors`` gave; ``load_state_dict`` comes first."""
        if self.snapshot.kept is not None and tensors:
            self.snapshot.kept.load(tensors)


def size_named(snapshot_size: SnapshotSize | None) -> SnapshotSize:
    """The size by its present name."""
    if snapshot_size is not None:
        return snapshot_size
    renamed("snapshot_size=None", "snapshot_size='all'", stacklevel=4)
    return "all"
