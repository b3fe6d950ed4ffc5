"""ZOConfig: TrainingArguments with what a zeroth-order step needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from zo_adapt.errors import OptionError
from zo_adapt.noise.distributions import noise_named
from zo_adapt.optimizers.named import optimizer_named
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.options import at_least_one
from zo_adapt.trainer.checks import OPTIONS


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ZOConfig(TrainingArguments):
    """TrainingArguments with what a zeroth-order step needs. What is None is the optimizer's own.

    Of Trainer's own arguments, ``lr_scheduler_type``, ``warmup_steps``, ``weight_decay`` and
    ``seed`` have their usual meaning; ``optim``, ``max_grad_norm`` and Adam's have none.

    Args:
        learning_rate: None: the step by distance, the optimizers' default. A number: the plain
            step at that rate.
        optimizer: "mezo-svrg", "mezo" or "zo-svrg".
        displacement: How far noise alone would move a weight over the run, for the step by
            distance.
        perturbation_scale: mu.
        num_directions: K.
        shaping: "base", "others", "ranks" or "zscore": how directions are compared.
        snapshot_interval: q, steps from one large batch to the next.
        snapshot_size: Rows of a large batch.
        noise: "gaussian" or "rademacher".
        max_queries: Stop before more forward passes of one sample than this.
        micro_batch_size: Most rows in one forward pass; the training batch size by default.
        reuse_trunk: As ``minimize``'s "auto", or never.
        cuda_graphs: As ``minimize``'s "auto", or never.

    Raises:
        OptionError: An option that the optimizer does not have, or gradient accumulation.

    Example:
        >>> args = ZOConfig("runs", perturbation_scale=1e-2, max_queries=10_000, report_to="none")
        >>> args.optimizer
        'mezo-svrg'
    """

    learning_rate: float | None = _option(None, "None: the step by distance.")  # type: ignore[assignment]
    optimizer: str = _option("mezo-svrg", "mezo-svrg, mezo or zo-svrg.")
    displacement: float | None = _option(None, "How far noise alone would move a weight.")
    perturbation_scale: float | None = _option(None, "mu.")
    num_directions: int | None = _option(None, "Directions of an estimate.")
    shaping: str | None = _option(None, "base, others, ranks or zscore.")
    snapshot_interval: int | None = _option(None, "Steps between large batches.")
    snapshot_size: int | None = _option(None, "Rows of a large batch.")
    noise: str | None = _option(None, "gaussian or rademacher.")
    max_queries: int | None = _option(None, "Budget in forward passes of one sample.")
    micro_batch_size: int | None = _option(None, "Most rows in one forward pass.")
    reuse_trunk: bool = _option(True, "Run frozen layers below the view once an example.")
    cuda_graphs: bool = _option(True, "Capture evaluations that can be, on a GPU.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.gradient_accumulation_steps != 1:
            raise OptionError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}; choose 1 and "
                "raise per_device_train_batch_size: no gradient is accumulated, and "
                "micro_batch_size bounds the memory of a forward pass"
            )
        for name in ("max_queries", "micro_batch_size"):
            if (value := getattr(self, name)) is not None:
                at_least_one(name, value)
        noise_named(self.noise or "gaussian")
        self.build_optimizer()  # what is wrong with the options is said here, before any work

    def build_optimizer(self, schedule: Callable[[float], float] | None = None) -> Optimizer:
        """The optimizer that these arguments describe.

        Args:
            schedule: Progress 0..1 -> factor on the learning rate; None is the optimizer's own.

        Raises:
            OptionError: No such optimizer, or an option it does not have.
        """
        given = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        given["lr"] = given.pop("learning_rate", None)
        more = {"weight_decay": self.weight_decay, "schedule": schedule}
        return optimizer_named(self.optimizer, given | more)
