"""ZO-SVRG: variance-reduced gradient descent with a direction for every sample (a baseline)."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Self, Unpack

from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.errors import OptionError
from zo_adapt.noise.coordinates import Coordinates
from zo_adapt.optimizers.directions import Directions
from zo_adapt.optimizers.estimator import TwoSided
from zo_adapt.optimizers.keywords import StepSizeKeywords, split, step_size_of
from zo_adapt.optimizers.step_size import Rate, StepSize
from zo_adapt.optimizers.variance_reduced import SnapshotSize, VarianceReduced, size_named
from zo_adapt.view.parameters import ParameterView


@dataclass(frozen=True, repr=False, init=False)
class ZOSVRG(VarianceReduced):
    """ZO-SVRG (Gautam et al. 2024, Algorithm 2; Liu et al. 2018).

    As MeZO-SVRG, but every estimate is a mean over samples that each have their own direction:
        g_B(theta) = 1/|B| sum_{i in B} p_i(theta; z_i) z_i
    Every q steps theta_bar <- theta, g <- g_{all}(theta); in every step
        theta <- theta - lr * (g_I(theta) - g_I(theta_bar) + g)
    with the same z_i at both points. At the snapshot the two cancel: no minibatch is drawn.

    With ``coordinates``, for small views, ZO-SVRG-Coord: the whole gradient by coordinates,
        g_B(theta) = sum_l [f_B(theta + h e_l) - f_B(theta - h e_l)] / (2 h) e_l,  h = mu sqrt(d),
    along the directions 0 .. d - 1 of a view of ``noise="coordinates"``.

    Queries: 2 n at a snapshot, 4 b otherwise, and d times as many by coordinates. Slow by design: a
    forward pass for one sample at a time (by coordinates, for one batch), and n (d) terms in every
    update.

    Args:
        lr: Learning rate, short for ``apply=Rate(lr)``. None: the step by distance,
            ``ByDistance()``.
        apply: How an estimate is applied.
        snapshot_interval: q >= 1.
        snapshot_size: Rows of the large batch; "all" is the whole set.
        perturbation_scale: mu; None: 0.04 of the displacement, 0.4 where values are counts.
        coordinates: Whether estimates are along every coordinate, on the whole batch.
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

    _: KW_ONLY
    coordinates: bool = False

    def __init__(
        self,
        lr: float | None = None,
        *,
        apply: StepSize | None = None,
        snapshot_interval: int = 5,
        snapshot_size: SnapshotSize | None = "all",
        perturbation_scale: float | None = None,
        coordinates: bool = False,
        **keywords: Unpack[StepSizeKeywords],
    ) -> None:
        self._set(
            estimate=TwoSided(perturbation_scale=perturbation_scale),
            apply=step_size_of(apply, lr, split(keywords)[1]),
            snapshot_interval=snapshot_interval,
            snapshot_size=size_named(snapshot_size),
            snapshot_lr=None,
            coupling="shared",
            coordinates=coordinates,
        )
        self._check()

    @classmethod
    def paper(
        cls, lr: float, *, snapshot_interval: int = 5, perturbation_scale: float = 1e-3
    ) -> Self:
        """Algorithm 2 of Gautam et al. 2024 (arXiv 2404.08080), by name.

        Pairs along a direction for every sample, a snapshot of the whole set, one constant rate.

        Args:
            lr: eta, chosen for each problem.
            snapshot_interval: q.
            perturbation_scale: mu.

        Example:
            >>> ZOSVRG.paper(1e-3).apply
            Rate(lr=0.001, schedule='constant')
        """
        return cls(
            apply=Rate(lr, schedule="constant"),
            snapshot_interval=snapshot_interval,
            snapshot_size="all",
            perturbation_scale=perturbation_scale,
        )

    def start(self, view: ParameterView, seed: int, *, step_like: bool = False) -> None:
        """Begin a run on a view; by coordinates, one of ``noise="auto"`` takes these.

        Raises:
            OptionError: By coordinates, along a view of another noise, or of which nothing moves.
        """
        if self.coordinates:
            view.follow_noise(Coordinates.name)
        if self.coordinates and not (isinstance(view.noise, Coordinates) and view.noise.count):
            raise OptionError(
                f"coordinates=True along a view whose noise is {view.noise.name!r}; make the view "
                "with noise='coordinates', and let some of it move"
            )
        super().start(view, seed, step_like=step_like)
        self._set(_count=view.noise.count if isinstance(view.noise, Coordinates) else 0)

    def divide(self, batch: Batch, samples: Samples) -> list[Batch]:
        """A direction for every sample; the whole batch for every coordinate."""
        return [batch] * vars(self)["_count"] if self.coordinates else each_sample(batch, samples)

    def new_directions(self, batches: Sequence[Batch]) -> Directions:
        """A new direction for every sample, or all coordinates."""
        if not self.coordinates:
            return super().new_directions(batches)
        state = self.state
        return Directions(range(len(batches)), batches, state.groups, state.perturbation_scale)


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
