"""What one step did: what optimizers return, callbacks see and trajectories keep."""

from typing import NamedTuple

from zo_adapt.term import HERE, Shift

MEASUREMENT = "measurement"
"""The kind of what moves nothing: optimizers find by it how far steps may go."""


class Step(NamedTuple):
    """One step of a run.

    Args:
        step: Number of the step, from 1.
        queries: Forwards of one sample so far, this step's included.
        value: Mean of the objective over the step's batch at the weights before the step, or at the
            perturbed points where the step asks about no others.
        lr: Learning rate applied, schedule and annealing included.
        projected_gradient: Root mean square of the step's projected gradients; NaN first-order.
        update: The shift applied; ``HERE`` for a first-order step, and in what callbacks and the
            history are given.
        kind: "minibatch", or "snapshot" for a large-batch step. By ask and tell also "measurement",
            which moves nothing and is no step.
        metrics: The watched metrics after the step, where they were due.

    Example:
        >>> Step(step=1, queries=128, value=0.7, lr=0.1, projected_gradient=2.0).kind
        'minibatch'
    """

    step: int
    queries: int
    value: float
    lr: float
    projected_gradient: float
    update: Shift = HERE
    kind: str = "minibatch"
    metrics: dict[str, float] | None = None

    def brief(self) -> "Step":
        """The step without its terms, of which a long history would be full; files keep them."""
        return self._replace(update=HERE)
