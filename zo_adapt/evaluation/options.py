"""How evaluations are made: what a user may say of memory and speed, and of where they are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zo_adapt.errors import OptionError
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk
from zo_adapt.evaluation.workers import Workers, as_workers
from zo_adapt.options import at_least_one

if TYPE_CHECKING:
    from zo_adapt.evaluation.protocol import EvaluatedBy

JointRows = int | Literal["auto", "measured", "off"]
ReuseTrunk = Literal["auto", "on", "off"] | FrozenTrunk
CudaGraphs = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class EvaluationOptions:
    """Memory and speed of evaluations, and where they are made; none changes what is asked.

    Args:
        micro_batch_size: Most rows in one call of the objective; None: the rows of a minibatch, so
            that a snapshot needs no more memory than a minibatch.
        joint_rows: Most rows in a call that evaluates several points together, each on its own
            rows; it needs the memory of inference on so many. "auto": 8192 tokens on a GPU, 2048 on
            a CPU, beyond which joining gains little, and what the device has room for beside the
            model, by its size; of texts that are written as many as the memory holds. "measured":
            the same with the number of tokens up to which one more candidate costs less than 0.8 of
            a forward of its own on this device, timed before the first step (not counted as
            queries) and kept with the run, so that it is resumed with the same; two runs may round
            values in other ways, since times differ. "off": one
            point at a time. Views of linear layers, norms and embeddings (LoRA, new heads), any
            view with low-rank noise, and objectives with a value per example can be joined, the
            others never are. Never more than ``micro_batch_size``, where given.
        reuse_trunk: Run the layers below the first that the view holds weights of once for each
            example, and keep what they put out: "auto" where it is possible, is checked to give the
            same values, and a quarter of the layers or more are frozen (up to 1 GiB, on the model's
            device); "on": wherever it is possible, an error where the view rules it out; "off":
            never; a ``FrozenTrunk`` says how much is kept and where. Queries are counted as always.
        cuda_graphs: Capture an evaluation's kernels on a GPU, once for each shape of a batch, and
            replay them: "auto" for objectives that say they can be captured; "on": for any; "off":
            never. Where a trunk is reused, the frozen layers are not captured.
        workers: Processes on this machine that share the evaluations, or ``Workers``; the objective
            and the data are pickled for them. None: those that a launcher has started, or this one
            alone. The result is bit for bit the same. Files and the bar are those of rank 0; the
            callback is called on every rank that a launcher has started.
        evaluator: Where values come from: None, this process; ``ServedEvaluator(server)``, a model
            behind a server.

    Raises:
        OptionError: A value that is none of these.

    Example:
        >>> EvaluationOptions(joint_rows="off").joint_rows
        'off'
    """

    micro_batch_size: int | None = None
    joint_rows: JointRows = "auto"
    reuse_trunk: ReuseTrunk = "auto"
    cuda_graphs: CudaGraphs = "auto"
    workers: int | Workers | None = None
    evaluator: "EvaluatedBy | None" = None

    def __post_init__(self) -> None:
        as_workers(self.workers)  # refuses what is none
        if self.micro_batch_size is not None:
            size = at_least_one("micro_batch_size", self.micro_batch_size)
            object.__setattr__(self, "micro_batch_size", size)
        if not isinstance(self.joint_rows, str):
            object.__setattr__(self, "joint_rows", at_least_one("joint_rows", self.joint_rows))
        elif self.joint_rows not in ("auto", "measured", "off"):
            raise OptionError(
                f"joint_rows={self.joint_rows!r}; choose an integer >= 1, 'auto', "
                "'measured' or 'off'"
            )
        choices = ("auto", "on", "off")
        if self.reuse_trunk not in choices and not isinstance(self.reuse_trunk, FrozenTrunk):
            raise OptionError(
                f"reuse_trunk={self.reuse_trunk!r}; choose 'auto', 'on', 'off' or a FrozenTrunk"
            )
        if self.cuda_graphs not in choices:
            raise OptionError(f"cuda_graphs={self.cuda_graphs!r}; choose 'auto', 'on' or 'off'")
