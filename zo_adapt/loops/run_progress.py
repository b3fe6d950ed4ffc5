"""What a run changes from step to step beside the weights, and how a step is undone."""

from collections.abc import Mapping
from typing import Any

from zo_adapt.data.samples import Samples
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.protocol import Evaluator, Measuring
from zo_adapt.loops.resume import LEAST_SHARES
from zo_adapt.optimizers.first_order import FirstOrder
from zo_adapt.optimizers.optimizer import Optimizer, ZerothOrder
from zo_adapt.trajectory.writer import check_terms_fit


class RunProgress:
    """How far a run is: its steps and queries, its place in the data, its optimizer's state.

    Args:
        optimizer, evaluator, samples: As for ``Run``.
    """

    def __init__(self, optimizer: Optimizer, evaluator: Evaluator, samples: Samples) -> None:
        self.optimizer, self.evaluator, self.samples = optimizer, evaluator, samples
        view = evaluator.view
        samples.least_share = LEAST_SHARES[view.is_large and not view.has_factors]
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """All that a run changes beside the weights, and the tensors of a first-order optimizer.

        Raises:
            OptionError: An optimizer of another origin, which cannot be kept.
        """
        if not isinstance(self.optimizer, ZerothOrder | FirstOrder):
            raise OptionError(
                f"a run of {type(self.optimizer).__name__} cannot be kept: it is no optimizer of "
                "this package"
            )
        tokens = getattr(self.evaluator, "joint_tokens", None)
        return {
            "steps": self.steps,
            "queries": self.evaluator.queries,
            "positions": list(self.samples.positions.items()),
            "optimizer": self.optimizer.state_dict(),
            **({} if tokens is None else {"joint_tokens": tokens}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the weights are restored apart."""
        self.steps = state["steps"]
        if isinstance(self.evaluator, Measuring):
            self.evaluator.joint_tokens = state.get("joint_tokens")
        self._go_back({**state, "positions": dict(state["positions"])})

    def _progress(self) -> dict[str, Any]:
        """All that a step changes before it is taken."""
        own = isinstance(self.optimizer, ZerothOrder | FirstOrder)
        return {
            "queries": self.evaluator.queries,
            "positions": dict(self.samples.positions),
            "optimizer": self.optimizer.state_dict() if own else None,  # type: ignore[attr-defined]
        }

    def _go_back(self, before: Mapping[str, Any]) -> None:
        self.evaluator.queries = before["queries"]
        self.samples.positions = before["positions"]
        if before["optimizer"] is not None:
            self.optimizer.load_state_dict(before["optimizer"])  # type: ignore[attr-defined]

    def _check_record(self) -> None:
        """Refuse, before anything is evaluated, a step that no record can hold."""
        if not isinstance(self.optimizer, ZerothOrder):
            return
        before = self._progress()
        self.optimizer.propose(self.samples)
        directions = len(self.optimizer.asked.seeds)
        self._go_back(before)
        moving = [group for group in self.evaluator.view.groups if group.perturbation_scale > 0]
        check_terms_fit(directions * max(1, len(moving)))
