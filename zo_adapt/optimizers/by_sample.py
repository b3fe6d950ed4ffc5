"""Variance-reduced baselines with a direction for every sample: ZO-SVRG and ZO-SAGA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.optimizers.directions import direction_terms
from zo_adapt.optimizers.estimator import TwoSided
from zo_adapt.optimizers.keywords import StepSizeKeywords, split, step_size_of
from zo_adapt.optimizers.optimizer import ZerothOrder
from zo_adapt.optimizers.schedule import Progress
from zo_adapt.optimizers.step_size import StepSize
from zo_adapt.optimizers.variance_reduced import SnapshotSize, VarianceReduced, size_named
from zo_adapt.term import Step, Term, Terms, coalesced, scaled
from zo_adapt.view.parameters import ParameterView


@dataclass(frozen=True, repr=False, init=False)
class ZOSVRG(VarianceReduced):
    """ZO-SVRG (Gautam et al. 2024, Algorithm 2; Liu et al. 2018).

    As MeZO-SVRG, but every estimate is a mean over samples that each have their own direction:
        g_B(theta) = 1/|B| sum_{i in B} p_i(theta; z_i) z_i
    Every q steps theta_bar <- theta, g <- g_{all}(theta); in every step
        theta <- theta - lr * (g_I(theta) - g_I(theta_bar) + g)
    with the same z_i at both points. At the snapshot the two cancel: no minibatch is drawn.

    Queries: 2 n at a snapshot, 4 b otherwise. Slow by design: a forward pass for one sample at a
    time, and n terms in every update.

    Args:
        lr: Learning rate, short for ``apply=Rate(lr)``. None: the step by distance,
            ``ByDistance()``.
        apply: How an estimate is applied.
        snapshot_interval: q >= 1.
        snapshot_size: Rows of the large batch; "all" is the whole set.
        perturbation_scale: mu; None: 0.04 of the displacement, 0.4 where values are counts.
        keywords: Short for the parts of ``apply``; as in ``MeZO``.

    Raises:
        OptionError: A number outside its range, or the same thing said twice.

    Example:
        >>> import torch
        >>> from zo_adapt import ParameterView, ZOSVRG, minimize
        >>> x, data = torch.zeros(1), torch.linspace(0, 1, 16)[:, None]
        >>> result = minimize(
        ...     lambda batch: (x - batch).square().sum(1), ParameterView({"x": x}), data,
        ...     ZOSVRG(lr=2e-2), batch_size=4, max_queries=6000, progress=False)
        >>> bool((x - data.mean()).abs() < 0.1)
        True

    Reference: arXiv 2404.08080, arXiv 1805.10367.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        apply: StepSize | None = None,
        snapshot_interval: int = 5,
        snapshot_size: SnapshotSize | None = "all",
        perturbation_scale: float | None = None,
        **keywords: Unpack[StepSizeKeywords],
    ) -> None:
        self._set(
            estimate=TwoSided(perturbation_scale=perturbation_scale),
            apply=step_size_of(apply, lr, split(keywords)[1]),
            snapshot_interval=snapshot_interval,
            snapshot_size=size_named(snapshot_size),
            snapshot_lr=None,
            coupling="shared",
        )
        self._check()

    def divide(self, batch: Batch, samples: Samples) -> list[Batch]:
        """A direction for every sample."""
        return each_sample(batch, samples)


def each_sample(batch: Batch, samples: Samples) -> list[Batch]:
    """Every row of a batch as a batch of its own.

    Raises:
        OptionError: The objective wants more rows in one call.
    """
    # A batch of one row, as a function without data has, is whole already.
    if samples.min_rows > 1 and len(batch) > 1:
        raise OptionError(
            "this optimizer asks for one sample at a time, and the objective wants more: its "
            "min_rows is larger, or it gives one number for a batch (return one value per example, "
            "or set mean_over_rows=True if the number is a mean); or choose MeZO or MeZOSVRG"
        )
    return batch.split(len(batch))


@dataclass(frozen=True, repr=False, init=False)
class ZOSAGA(ZerothOrder):
    """ZO-SAGA (Huang et al. 2019, with Gaussian smoothing): a table of one term an example.

    The first step fills the table, t_i = p_i(theta; z_i) z_i for all n examples, and goes along its
    mean. Every other, on a minibatch I of b rows with new directions z_i':
        v = 1/b sum_{i in I} [p_i(theta; z_i') z_i' - t_i] + 1/n sum_j t_j,
        theta <- theta - lr v,  t_i <- p_i(theta; z_i') z_i'  for i in I

    Memory: n seeds and numbers, no copy of the weights. Queries: 2 n at first, then 2 b. Slow by
    design: one sample a forward pass, and n terms in every update.

    Args:
        lr: Learning rate, short for ``apply=Rate(lr)``. None: the step by distance.
        apply: How v is applied.
        perturbation_scale: mu; None: 0.04 of the displacement, 0.4 where values are counts.
        keywords: Short for the parts of ``apply``; as in ``MeZO``.

    Raises:
        OptionError: A number outside its range, or the same thing said twice.

    Example:
        >>> import torch
        >>> from zo_adapt import ParameterView, ZOSAGA, minimize
        >>> x, data = torch.zeros(1), torch.linspace(0, 1, 16)[:, None]
        >>> result = minimize(
        ...     lambda batch: (x - batch).square().sum(1), ParameterView({"x": x}), data,
        ...     ZOSAGA(lr=2e-2), batch_size=4, max_queries=6000, progress=False)
        >>> bool((x - data.mean()).abs() < 0.1)
        True

    Reference: arXiv 1902.06158; SAGA: arXiv 1407.0202.
    """

    def __init__(
        self,
        lr: float | None = None,
        *,
        apply: StepSize | None = None,
        perturbation_scale: float | None = None,
        **keywords: Unpack[StepSizeKeywords],
    ) -> None:
        self._set(
            estimate=TwoSided(perturbation_scale=perturbation_scale),
            apply=step_size_of(apply, lr, split(keywords)[1]),
        )

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Begin a run on a view, with an empty table."""
        super().start(view, seed, step_like=step_like)
        self._set(_table={})

    @property
    def table(self) -> dict[int, Terms]:
        """The terms of every example, by its row; empty before the first step."""
        table: dict[int, Terms] = vars(self)["_table"]
        return table

    def propose(self, samples: Samples) -> list[Probe]:
        """A pair for every sample: of the minibatch, or at first of the whole set."""
        batch = samples.minibatch() if self.table else samples.large("all")
        asked = self.state.asked = self.new_directions(each_sample(batch, samples))
        return self.estimate.probes(asked)

    def advance(self, evaluations: Sequence[Evaluation], progress: Progress) -> Step:
        """A step along the mean of the new terms, corrected by what the table had."""
        asked, table = self.asked, self.table
        found = self.estimate.combine(asked, evaluations)
        rows = [batch.rows[0] for batch in asked.batches]
        new = [
            direction_terms(seed, p, asked.groups)
            for seed, p in zip(asked.seeds, found.projected, strict=True)
        ]
        terms = found.terms
        if table:
            old = (table[row] for row in rows)
            gone = scaled((term for one in old for term in one), -1.0 / len(rows))
            mean = scaled((term for one in table.values() for term in one), 1.0 / len(table))
            terms = coalesced((*found.terms, *gone, *mean))
        step = self.descend(terms, found, progress, kind="minibatch" if table else "snapshot")
        table.update(zip(rows, new, strict=True))
        return step

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, the table included."""
        return super().state_dict() | {"table": list(self.table.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ``start`` comes first."""
        super().load_state_dict(state)
        table = {row: tuple(Term(*term) for term in terms) for row, terms in state["table"]}
        self._set(_table=table)
