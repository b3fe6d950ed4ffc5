"""How a run of Trainer's ends before its last step: saved and evaluated as at a normal end.

And what is done when a step of it ends.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from zo_adapt.loops.result import StopReason
from zo_adapt.loops.run import Run
from zo_adapt.loops.step_advice import verdict
from zo_adapt.term import Step

logger = logging.get_logger(__name__)


class AtRunEnds(TrainerCallback):
    """Begins the run when Trainer has its data, schedule and state, and sees to how it ends.

    A run that its budget of queries ends is logged, evaluated and saved as one that reaches its
    last step. One that a fault ends has nothing new to save. Either way no checkpoint and no
    evaluation of the last good step is made a second time: what was saved then stays.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.reason: StopReason | None = None
        self._made = True
        """Whether the step that ended the run was made."""
        self.steps: list[Step] = []
        """Those that this process made."""

    def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        """Begin the run."""
        self.reason, self._made, self.steps = None, True, []
        self._trainer.begin_run(train_dataloader)

    def stop(self, reason: StopReason, *, made: bool) -> None:
        """End the run at this step."""
        self.reason, self._made = reason, made
        control, state = self._trainer.control, self._trainer.state
        control.should_training_stop = True
        control.should_log = self._trainer.args.logging_strategy != "no"
        if not made:
            state.global_step -= 1  # Trainer counts one now; nothing was evaluated or moved

    def advise(self, run: Run) -> None:
        """Log what the values of the steps say about their length."""
        steps, self.steps = self.steps, []
        if advice := verdict(steps, run.evaluator.sign, run.optimizer):
            logger.warning(advice)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for what a normal end brings."""
        if self.reason is StopReason.MAX_QUERIES:
            state.max_steps = state.global_step  # planned without measurements, it was a bound
            due = args.eval_delay <= state.global_step
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS and due
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
        self._only_once(args, state, control)
        if self._made:
            self._trainer.log_watched()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer asks again here."""
        self._only_once(args, state, control)

    def _only_once(self, args: Any, state: Any, control: Any) -> None:
        if self._made:
            return
        step = state.global_step
        saved = Path(args.output_dir or ".") / f"checkpoint-{step}"
        control.should_save = control.should_save and not saved.exists()
        found = (e for e in state.log_history if e.get("step") == step)
        evaluated = any(name.startswith("eval_") for entry in found for name in entry)
        control.should_evaluate = control.should_evaluate and not evaluated
