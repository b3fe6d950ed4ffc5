"""What ``diagnose`` found, what follows from it, and how it reads."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

SAME_AGREEMENT = 0.1
"""Scales whose agreement is this near to the best are as good."""

MOST_TIMES = 8.0
"""The batch is not advised to grow further than this: a probe at one point is no more than that."""


class Scale(NamedTuple):
    """What differences look like at one perturbation scale.

    Args:
        perturbation_scale: mu.
        signal: Root mean square of the projected gradients; NaN if the objective was not finite.
        equal: Share of pairs whose two values are equal, but for rounding.
        curvature: Error of a one-sided difference as a share of the signal.
        agreement: Cosine of the projected gradients with those at the next scales, the smaller one:
            low where rounding or steps rule, and where the function is no longer linear.
    """

    perturbation_scale: float
    signal: float
    equal: float
    curvature: float
    agreement: float


class Noise(NamedTuple):
    """Random-effects analysis of variance of the per-example projected gradients.

    Args:
        direction: G, variance between directions: the squared norm of the gradient.
        error: Standard error of G.
        data: sigma^2, variance within a direction, of one example; NaN if it cannot be estimated: a
            batch has one value, and can neither be cut nor be scored without some of its rows.
    """

    direction: float
    error: float
    data: float

    @property
    def rows(self) -> float:
        """Rows on which data noise is as large as direction noise; NaN if G is not visible."""
        return self.data / self.direction if self.direction > self.error else math.nan

    @property
    def data_share(self) -> float:
        """sigma^2 / (G + sigma^2): the data's share in the noise of one example."""
        total = self.data + max(self.direction, 0.0)
        return self.data / total if total > 0.0 else math.nan


class Diagnosis(NamedTuple):
    """What ``diagnose`` found. ``print`` it.

    Args:
        scales: One row per perturbation scale.
        noise: At the recommended scale.
        displacement: Recommended: how far noise alone may move a weight over a run.
        perturbation_scale, batch_size, num_directions: Recommended. The directions are for pairs
            (two-sided), each on its own part of the batch.
        snapshot_helps: Whether variance reduction can pay at these weights.
        reasons: A sentence for each of the five.
        queries: Forwards of one sample made.
        search_queries: Those of them that the displacement took.

    Example:
        >>> import torch
        >>> from zo_adapt import ParameterView, diagnose
        >>> x = torch.zeros(4)
        >>> found = diagnose(lambda batch: float((x - 1).square().sum()), ParameterView({"x": x}))
        >>> found.batch_size, len(found.scales)
        (1, 5)
    """

    scales: tuple[Scale, ...]
    noise: Noise
    displacement: float
    perturbation_scale: float
    batch_size: int
    num_directions: int
    snapshot_helps: bool
    reasons: dict[str, str]
    queries: int
    search_queries: int

    def __str__(self) -> str:
        head = f"{'mu':>10} {'signal':>10} {'equal pairs':>12} {'curvature':>10} {'agreement':>10}"
        table = [
            f"{mu:>10.3g} {signal:>10.3g} {_percent(equal):>12} {_percent(curvature):>10} "
            f"{agreement:>10.2f}"
            for mu, signal, equal, curvature, agreement in self.scales
        ]
        noise = (
            f"direction noise G = {self.noise.direction:.3g} +- {self.noise.error:.1g}, "
            f"data noise sigma^2 = {self.noise.data:.3g} an example, "
            f"{_percent(self.noise.data_share)} of both"
        )
        advice = [
            textwrap.fill(f"{name}: {reason}", 100, subsequent_indent="    ")
            for name, reason in self.reasons.items()
        ]
        return "\n".join([head, *table, noise, *advice, f"queries made: {self.queries}"])


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def choose_scale(scales: Sequence[Scale], usual: float) -> tuple[Scale, str]:
    """The scale nearest to the usual one among those of the best agreement, and why.

    Where most pairs are equal, two scales agree on the few directions that moved, by chance; such
    scales count only where there are no others.
    """
    scales = [scale for scale in scales if not scale.equal > 0.5] or scales
    best = max(scale.agreement for scale in scales)
    if best <= 0.0:
        far = scales[-1]
        return far, f"{far.perturbation_scale:.3g} or more, for no two scales agree on a direction"
    good = [scale for scale in scales if scale.agreement >= best - SAME_AGREEMENT]
    chosen = min(good, key=lambda scale: abs(math.log(scale.perturbation_scale / usual)))
    return chosen, (
        f"{chosen.perturbation_scale:.3g}, the one nearest to the usual {usual:.3g} where scales "
        f"agree ({chosen.agreement:.2f}, the best is {best:.2f}); {chosen.equal:.0%} of the pairs "
        "are equal there"
    )


def choose_batch(
    noise: Noise, equal: float, batch_size: int, rows: int
) -> tuple[int, int, dict[str, str]]:
    """Rows and directions of a step, and why.

    Args:
        noise: Of the recommended scale.
        equal: Share of equal pairs there.
        batch_size: Rows that a direction was measured on.
        rows: Rows of the data.
    """
    if rows == 1:
        return 1, 1, {"batch_size": "1, for there is no data", "num_directions": "1 or any other"}
    wanted, why = _rows_wanted(noise, equal, batch_size)
    each = max(1, min(math.ceil(wanted), round(MOST_TIMES * batch_size), rows))
    batch = max(batch_size, each)
    directions = batch // each
    limit = "" if each >= wanted else f" (no further than {each} from one probe of {rows} rows)"
    reasons = {
        "batch_size": f"{batch}, {why}{limit}",
        "num_directions": f"{directions}, each on its own part of the batch, as "
        "MeZO(one_sided=False, num_directions=...) cuts it, or the objective's "
        f"min_rows={each} beside MeZO's defaults: on more rows a direction the "
        "same queries buy fewer directions, on fewer data noise leaves nothing to gain",
    }
    return batch, directions, reasons


def _rows_wanted(noise: Noise, equal: float, batch_size: int) -> tuple[float, str]:
    if equal > 0.5:
        # If a pair on b rows is equal with probability t, one on m b rows is with about t^m.
        more = math.log(0.5) / math.log(equal) if equal < 1.0 else MOST_TIMES
        return more * batch_size, (
            f"for {equal:.0%} of the pairs are equal on {batch_size}; about {more:.0f} times as "
            "many rows leave half of them so, and a metric that counts moves on any number once it "
            "is soft: softness=..., as in Accuracy(model, softness=1.0)"
        )
    if math.isnan(noise.data):
        return batch_size, "as given: one value of a whole batch does not show data noise"
    if math.isnan(noise.rows):
        return 4 * batch_size, (
            f"at least, for on {batch_size} rows the gradient does not show above the noise"
        )
    return noise.rows, f"for on sigma^2 / G = {noise.rows:.3g} rows both noises are equal"


def judge_snapshot(noise: Noise, rows: int) -> tuple[bool, str]:
    """Whether a snapshot can pay, and why.

    A step from it has the direction noise of the snapshot's directions and no data noise if it is
    of all n rows. Fresh directions on the same 2 n queries have (G + sigma^2) / n: less, unless
    sigma^2 / G > n.
    """
    if math.isnan(noise.data):
        return False, "cannot be estimated from the one value of a whole batch"
    # An unlucky sample of directions should not advise it: two standard errors.
    most = max(noise.direction, 0.0) + 2 * noise.error
    if noise.data > rows * most:
        return True, (
            f"yes, sigma^2 / G is above the {rows} rows of data even at G = {most:.2g}, and "
            "removing data noise pays there"
        )
    known = "cannot be estimated" if math.isnan(noise.rows) else f"= {noise.rows:.3g}"
    return False, (
        f"no, removing data noise pays where sigma^2 / G (here {known}) is above the {rows} rows "
        "of data; below, the same queries do more in fresh directions"
    )
