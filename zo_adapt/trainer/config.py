"""ZOConfig: TrainingArguments with what a zeroth-order step needs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import ParallelMode

from zo_adapt.errors import OptionError
from zo_adapt.evaluation.options import CudaGraphs, EvaluationOptions
from zo_adapt.evaluation.trunk.frozen_trunk import DEFAULT_BYTES, LEAST_SHARE, FrozenTrunk
from zo_adapt.optimizers.named import optimizer_named
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.options import at_least_one, renamed
from zo_adapt.ranks.launched import begin_again
from zo_adapt.trainer.checks import OPTIONS
from zo_adapt.view.parameters import ParameterView

if TYPE_CHECKING:
    CountOrWord = int | str
else:  # HfArgumentParser reads the annotations, and of two types it takes but one.
    CountOrWord = str

UNLIMITED_EPOCHS = 1e6
"""A number like another for Trainer: the budget of queries ends the run."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ZOConfig(TrainingArguments):
    """TrainingArguments with what a zeroth-order step needs. What is None is the optimizer's own.

    Of Trainer's own arguments, ``lr_scheduler_type``, ``warmup_steps``, ``weight_decay`` and
    ``seed`` have their usual meaning; ``optim``, ``max_grad_norm``, Adam's and others that belong
    to gradients have none: ZOTrainer says so once where they are set.
    HfArgumentParser reads them all from a command line.

    Args:
        learning_rate: None: the step by distance, the optimizers' default. A number: the plain
            step at that rate.
        num_train_epochs: None: as many as ``max_queries`` is enough for; without it Trainer's 3.
        lr_scheduler_type: "warmup_stable_decay", where rates fall linearly in the last eighth of
            the steps (``lr_scheduler_kwargs`` says otherwise), or another of Trainer's.
        optimizer: "mezo", "mezo-svrg", "zo-svrg", "zo-spider", "zo-page", "zo-storm" or "zo-saga".
        displacement: How far noise alone would move a weight over the run, for the step by
            distance. None: measured by forward passes.
        perturbation_scale: mu.
        num_directions: K.
        one_sided, normalize, scale_memory: As in ``MeZO``.
        shaping: "base", "others", "ranks" or "zscore": how directions are compared.
        snapshot_interval: q, steps from one large batch to the next.
        snapshot_size: Rows of a large batch; "all" of them, or "batch", as many as a minibatch.
        snapshot_lr, coupling: As in ``MeZOSVRG``.
        coordinates: As in ``ZOSVRG``, with ``noise="coordinates"``.
        restart_probability, momentum: Of ``ZOPAGE`` and of ``ZOSTORM``.
        lora_start_rows: Training examples from which LoRA adapters get their A before training; see
            ``initialise_lora``. The adapter is then saved as it starts in OUTPUT/initial_adapter,
            from where the trajectory replays. 0: the adapters start as they are.
        noise: As for ``ParameterView``; None: the view's, or "gaussian".
        max_queries: Stop before more forward passes of one sample than this; None: no limit.
        stratify: Spread the classes evenly over batches and their parts, in the order of
            ``minimize``. Where Trainer is told how to draw (by length, by a sampler of yours), or a
            run of a former version goes on: over large batches and the parts of a batch alone.
        micro_batch_size: Most rows in one forward pass; None: the training batch size.
        joint_rows, reuse_trunk, cuda_graphs: As in ``EvaluationOptions``.
        trunk_storage: Where a reused trunk's activations are kept: "device", "host" or "disk".
        trunk_bytes: Most bytes of them.

    Raises:
        OptionError: An option that the optimizer does not have, or gradient accumulation.

    Example:
        >>> args = ZOConfig("runs", perturbation_scale=1e-2, max_queries=10_000, report_to="none")
        >>> args.optimizer
        'mezo'
    """

    learning_rate: float | None = _option(None, "None: the step by distance.")  # type: ignore[assignment]
    num_train_epochs: float | None = _option(None, "None: 3, or as many as max_queries is for.")  # type: ignore[assignment]
    lr_scheduler_type: SchedulerType | str = _option(
        "warmup_stable_decay", "How rates change; usual: they fall in the last eighth."
    )
    optimizer: str = _option("mezo", "mezo, mezo-svrg or zo-svrg, -spider, -page, -storm, -saga.")
    displacement: float | None = _option(None, "How far noise alone would move a weight.")
    perturbation_scale: float | None = _option(None, "mu.")
    num_directions: int | None = _option(None, "Directions of an estimate.")
    one_sided: bool | None = _option(None, "One point a direction, or a pair.")
    normalize: bool | None = _option(None, "Divide estimates by their running scale.")
    scale_memory: float | None = _option(None, "Of that scale, from step to step.")
    shaping: str | None = _option(None, "base, others, ranks or zscore.")
    snapshot_interval: int | None = _option(None, "Steps between large batches.")
    snapshot_size: CountOrWord | None = _option(None, "Rows of a large batch, all or batch.")
    snapshot_lr: float | None = _option(None, "Learning rate of snapshot steps.")
    coupling: str | None = _option(None, "shared or independent.")
    coordinates: bool | None = _option(None, "Of zo-svrg: along every coordinate.")
    restart_probability: float | None = _option(None, "Of zo-page.")
    momentum: float | None = _option(None, "Of zo-storm.")
    lora_start_rows: int = _option(0, "Examples from which LoRA adapters get their A.")
    noise: str | None = _option(None, "gaussian, rademacher, lowrank, lowrank-RANK or coordinates.")
    max_queries: int | None = _option(None, "Budget in forward passes of one sample.")
    stratify: bool = _option(True, "Spread the classes evenly.")
    micro_batch_size: int | None = _option(None, "Most rows in one forward pass.")
    joint_rows: CountOrWord = _option("auto", "Most rows of several points at once, auto or off.")
    reuse_trunk: Literal["auto", "on", "off"] = _option(
        "auto", "Run frozen layers below the view once an example."
    )
    trunk_storage: Literal["device", "host", "disk"] = _option("device", "Where these are kept.")
    trunk_bytes: int = _option(DEFAULT_BYTES, "Most bytes of what is kept.")
    cuda_graphs: CudaGraphs = _option("auto", "Capture evaluations on a GPU.")

    def __post_init__(self) -> None:
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0 if self.max_queries is None else UNLIMITED_EPOCHS
        begin_again(self.ddp_timeout)  # Accelerate finds it
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.gradient_accumulation_steps != 1:
            raise OptionError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}; choose 1 and "
                "raise per_device_train_batch_size: no gradient is accumulated, and "
                "micro_batch_size bounds the memory of a forward pass"
            )
        self._read_words()
        if self.max_queries is not None:
            self.max_queries = at_least_one("max_queries", self.max_queries)
        self.trunk_bytes = at_least_one("trunk_bytes", self.trunk_bytes)
        if self.lora_start_rows < 0:
            raise OptionError(f"lora_start_rows={self.lora_start_rows}; choose 0 or more")
        if self.trunk_storage not in ("device", "host", "disk"):
            raise OptionError(
                f"trunk_storage={self.trunk_storage!r}; choose 'device', 'host' or 'disk'"
            )
        # What is wrong with the options is said here, before any work.
        ParameterView({"x": torch.zeros(1)}, noise=self.noise or "gaussian")
        self._switches()
        self.build_optimizer()

    shares_steps: ClassVar[bool] = False
    """Whether Trainer is to take the processes for one: they share its steps."""

    @property
    def world_size(self) -> int:
        """The number of processes that train on batches of their own."""
        return 1 if self.shares_steps else int(super().world_size)

    @property
    def parallel_mode(self) -> ParallelMode:
        """As Trainer's, but in a run whose steps several processes share."""
        mode: ParallelMode = super().parallel_mode
        return ParallelMode.NOT_PARALLEL if self.shares_steps else mode

    @property
    def has_epochs(self) -> bool:
        """Whether epochs end a run."""
        return self.num_train_epochs != UNLIMITED_EPOCHS

    def _read_words(self) -> None:
        """Numbers of a command line, and the booleans of the version before."""
        for name in ("snapshot_size", "joint_rows"):
            if isinstance(value := getattr(self, name), str) and value.lstrip("-").isdigit():
                setattr(self, name, int(value))
        if self.joint_rows == "measured":  # its checkpoints come before what could be measured
            raise OptionError(
                "joint_rows='measured' is of minimize alone; choose 'auto' or a number"
            )
        for name in ("reuse_trunk", "cuda_graphs"):
            if isinstance(value := getattr(self, name), bool):
                word = "auto" if value else "off"
                renamed(f"{name}={value}", f"{name}={word!r}", stacklevel=5)
                setattr(self, name, word)

    def _switches(self) -> EvaluationOptions:
        return EvaluationOptions(
            micro_batch_size=self.micro_batch_size,
            joint_rows=self.joint_rows,  # type: ignore[arg-type]  # checked there
            reuse_trunk=self.reuse_trunk,
            cuda_graphs=self.cuda_graphs,
        )

    def evaluation_options(self, view: ParameterView) -> EvaluationOptions:
        """How evaluations of a view are made, a trunk of that view included.

        Raises:
            OptionError: ``reuse_trunk="on"`` where the view rules it out.
        """
        options = self._switches()
        kept_as_usual = (self.trunk_storage, self.trunk_bytes) == ("device", DEFAULT_BYTES)
        if self.reuse_trunk == "off" or kept_as_usual:
            return options
        trunk = FrozenTrunk(
            view,
            max_bytes=self.trunk_bytes,
            storage=self.trunk_storage,
            least=LEAST_SHARE if self.reuse_trunk == "auto" else 0.0,
        )
        if trunk.why_not is None:
            return replace(options, reuse_trunk=trunk)
        # Refused here or there alike: "on" is an error, "auto" goes without.
        return options

    def build_optimizer(self, schedule: str | Callable[[float], float] | None = None) -> Optimizer:
        """The optimizer that these arguments describe.

        Args:
            schedule: Progress 0..1 -> factor on the learning rate, or the name of such a one; None
                is the optimizer's own.

        Raises:
            OptionError: No such optimizer, or an option it does not have.
        """
        given = {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}
        given["lr"] = given.pop("learning_rate", None)
        more = {"weight_decay": self.weight_decay, "schedule": schedule}
        return optimizer_named(self.optimizer, given | more)
