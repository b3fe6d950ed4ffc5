"""SAGA on SPSA estimates: a term for every example, kept from one visit to the next."""

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
from zo_adapt.optimizers.zo_svrg import each_sample
from zo_adapt.term import Step, Term, Terms, coalesced, scaled
from zo_adapt.view.parameters import ParameterView


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

    def begins_at(self, step: int) -> bool:
        """The first step alone."""
        return step == 0

    def batch_of(self, step: int, samples: Samples) -> Batch:
        """The whole set at first, then minibatches."""
        return samples.large("all") if self.begins_at(step) else samples.minibatch()

    def propose(self, samples: Samples) -> list[Probe]:
        """A pair for every sample: of the minibatch, or at first of the whole set.

        Raises:
            OptionError: The rows of batches do not say which examples they are.
        """
        if not samples.knows_rows:
            raise OptionError(
                "ZOSAGA keeps a term for every example, and batches that something else draws do "
                "not say which examples they hold; in ZOTrainer, leave the order to it: "
                "stratify=True, and no sampler or loader of your own"
            )
        batch = self.batch_of(self.steps, samples)
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
