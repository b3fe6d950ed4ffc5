"""Named errors and warnings. A message gives the value, the allowed range and the way out."""


class ZOError(Exception):
    """Base of every error that zo_adapt raises on purpose.

    Example:
        >>> from zo_adapt import MeZO
        >>> try:
        ...     MeZO(displacement=-1.0)
        ... except ZOError as error:
        ...     print(type(error).__name__)
        OptionError
    """


class ViewError(ZOError, ValueError):
    """The view cannot be tuned: empty, integer, quantised, meta, not finite, or read by nothing."""


class NoMatchingParameterError(ViewError):
    """A pattern matches no parameter; the message lists near names."""


class AdapterError(ViewError):
    """A peft adapter is merged, disabled, inactive, or not cut as its tensor-parallel layer is."""


class ViewInUseError(ViewError, RuntimeError):
    """A view is changed, or used by another thread, while it is shifted."""


class TermError(ZOError, ValueError):
    """A term has a seed, coefficient or group outside its range."""


class OptionError(ZOError, ValueError):
    """A hyper-parameter is outside its range."""


class ArgumentTypeError(OptionError, TypeError):
    """An argument is of another kind than is asked for; the message says what to pass."""


class MissingPackageError(ZOError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class PerturbationError(OptionError):
    """The perturbation is smaller than the resolution of the tensors' dtype."""


class DataError(ZOError, ValueError):
    """The data cannot supply the batches asked for."""


class DropoutError(ZOError, RuntimeError):
    """Dropout is active: the two points of an estimate would differ by more than the direction."""


class ChangingBufferError(ZOError, RuntimeError):
    """Forwards change a buffer (BatchNorm's) or a weight: no two points see one model."""


class ObjectiveError(ZOError, ValueError):
    """The objective returned something other than a scalar or one value per example."""


class NonFiniteObjectiveError(ObjectiveError):
    """The objective returned NaN or infinity; the weights are those of the last good step."""


class StepTooLargeError(ZOError, OverflowError):
    """A step would leave the range of the dtype; the weights are those of the last good step."""


class TrajectoryError(ZOError, ValueError):
    """A trajectory file is not one, or belongs to another view, base or noise."""


class CorruptTrajectoryError(TrajectoryError):
    """A trajectory file is damaged; nothing was applied."""


class TrajectoryInUseError(TrajectoryError):
    """A trajectory file is being written by another run."""


class TrajectoryWriteError(ZOError, OSError):
    """A trajectory cannot be written; the steps before are safe."""


class TruncatedTrajectoryWarning(UserWarning):
    """The end of a trajectory file was cut off in the middle of a record, which was dropped."""


class ServedModelError(ZOError, RuntimeError):
    """A served model cannot do what is asked of it; the weights are those of the last good step."""


class ServerLostError(ServedModelError, ConnectionError):
    """A server did not answer, however often it was asked; its last words are in the message."""


class ServerReplyError(ServedModelError):
    """A server refused a request, or answered something else than it was asked."""


class NotServableError(ServedModelError, OptionError):
    """An adapter, or an objective, that this server cannot run."""


class SelfTestError(ServedModelError):
    """A served model failed the self-test before the first step; the message says which part."""


class UndefinedMetricError(ObjectiveError):
    """A metric has no value on these rows: one class only, no relevant document, NaN."""


class RankError(ZOError, RuntimeError):
    """Something went wrong in another of the processes that share a run."""


class LostRankError(RankError):
    """A process has ended or hangs; the weights of the others are those of the last good step."""


class ReplicaError(RankError):
    """The processes of a run differ in what must be the same: weights, settings, data, values."""


class FlatObjectiveWarning(UserWarning):
    """Both points of the estimate gave the same loss many times in a row: nothing is learned."""


class NoisyObjectiveWarning(UserWarning):
    """The objective gives other values for the same examples at the same weights."""


class RoundingWarning(UserWarning):
    """The differences of a half-precision or quantised model's values are mostly rounding."""


class UnreadTensorWarning(UserWarning):
    """Tensors of the view do not reach the objective's value; they stay as they are."""
