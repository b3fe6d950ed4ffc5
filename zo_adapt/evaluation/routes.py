"""How the value of one batch comes about: composed once a run of the ways that can be trusted.

Direct(function)                        the objective is called
Reusing(function, trunk)                ... without the frozen layers, where they have run
Captured(Direct or Reusing, graphs)     ... by replaying what was captured for such a batch
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from zo_adapt.errors import OptionError
from zo_adapt.evaluation.graphs import Graphs, is_capturable, signature
from zo_adapt.evaluation.objective import Objective
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.places import Route
from zo_adapt.evaluation.trunk.call import Call, Form, form_of
from zo_adapt.evaluation.trunk.frozen_trunk import LEAST_SHARE, FrozenTrunk
from zo_adapt.interrupt import is_from_handler
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import WHY_SHARDED

Function = Callable[[Any], Any]
ENTERING = "zo_adapt: enters the first tuned layer"
"""Names the kept activations among a graph's inputs: no graph with them runs the frozen layers."""

logger = logging.getLogger(__name__)


class Pure(NamedTuple):
    """A call whose kernels depend on its inputs' shapes alone, so that it can be captured."""

    function: Function
    inputs: Mapping[str, Tensor]


class Direct:
    """The objective is called."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def __call__(self, content: Any, key: Hashable) -> Any:
        """What the objective returns."""
        return self._function(content)

    def replays(self, content: Any, key: Hashable) -> bool:
        """Never."""
        return False

    @property
    def is_whole(self) -> bool:
        """Whether a captured call is all that an evaluation runs."""
        return True

    def pure(self, content: Mapping[str, Tensor]) -> Pure | None:
        """The same as a call that can be captured; None where it cannot yet."""
        return Pure(self._function, content)

    def recovers(self, content: Any, error: Exception) -> bool:
        """Whether a batch that could not be captured can be computed after all: not knowingly."""
        return False


class Reusing(Direct):
    """The objective is called, and the frozen layers run only on rows that they have not seen.

    With a(x) the activations that the trunk keeps, f(x) = g(x, a(x)). Captured is g, the tuned
    layers and all that is the model's own around them; a(x) is looked up before, by what the model
    would be called with. While a graph runs nothing can be looked up or checked, so only batches of
    a form that the trunk has checked go that way.

    Args:
        function: Of a batch; always the same.
        trunk: Answers for the frozen layers.
    """

    def __init__(self, function: Function, trunk: FrozenTrunk) -> None:
        super().__init__(function)
        self._trunk = trunk
        self._forms: dict[Hashable, Form | None] = {}

    def __call__(self, content: Any, key: Hashable) -> Any:
        """What the objective returns."""
        kind = signature(content) if is_capturable(content) else None
        if kind is None or kind in self._forms:
            return self._trunk.call(self._function, content)
        return self._trunk.call(self._function, content, partial(self._learn, kind, content))

    @property
    def is_whole(self) -> bool:
        """Not while a trunk is reused: new rows may have to run the frozen layers."""
        return self._trunk.why_not is not None

    def pure(self, content: Mapping[str, Tensor]) -> Pure | None:
        """The same as a call that can be captured; None where the trunk has not seen its like."""
        if self._trunk.why_not is not None:
            return Pure(self._function, content)
        form = self._forms.get(signature(content))
        if form is None:
            return None
        try:
            # New rows, too: the values of a step's probes are subtracted from each other, so the
            # same kernels should compute them all.
            entering = self._trunk.entering(self._function, content, form)
        except Exception as error:
            if is_from_handler(error):
                raise
            self.recovers(content, error)
            return None
        return None if entering is None else Pure(self._tuned, {**content, ENTERING: entering})

    def recovers(self, content: Any, error: Exception) -> bool:
        """Compute such batches by the trunk's own way, which finds out whose fault it was."""
        if self._trunk.why_not is not None:
            return False
        logger.info("a shape is evaluated without CUDA graphs: %r", error)
        self._forms[signature(content)] = None
        return True

    def _tuned(self, inputs: Mapping[str, Tensor]) -> Any:
        """g(x, a(x))."""
        content = dict(inputs)
        with self._trunk.skipping(content.pop(ENTERING)):
            return self._function(content)

    def _learn(self, kind: Hashable, content: Mapping[str, Tensor], call: Call) -> None:
        """Remember how a batch of this kind calls the model."""
        form = form_of(content, call)
        if form is not None and call.rows is not None:
            # Unequal where the function calls the model under an autocast of its own, for one.
            same = self._trunk.rows_of(form, content).keys == call.rows.keys
            form = form if same else None
        self._forms[kind] = form


class Captured:
    """What a route computes, replayed from CUDA graphs."""

    def __init__(self, inner: Direct, graphs: Graphs) -> None:
        self._inner, self._graphs = inner, graphs

    def __call__(self, content: Any, key: Hashable) -> Any:
        """What the objective returns."""
        capturable = self._graphs.why_not is None and is_capturable(content)
        pure = self._inner.pure(content) if capturable else None
        if pure is None:
            return self._inner(content, key)
        try:
            return self._graphs.call(pure.function, pure.inputs, key)
        except Exception as error:
            if is_from_handler(error) or not self._inner.recovers(content, error):
                raise
            return self._inner(content, key)
        finally:
            if isinstance(pure.inputs, dict) and pure.inputs is not content:
                pure.inputs.clear()  # a graph keeps the mapping that it has loaded last

    def replays(self, content: Any, key: Hashable) -> bool:
        """Whether a graph holds the whole evaluation."""
        return self._inner.is_whole and self._graphs.holds(content, key)


def route_of(function: Function, trunk: FrozenTrunk | None, graphs: Graphs | None) -> Route:
    """The route of a run."""
    inner = Direct(function) if trunk is None else Reusing(function, trunk)
    return inner if graphs is None else Captured(inner, graphs)


def trunk_for(
    view: ParameterView, reuse: "Literal['auto', 'on', 'off'] | FrozenTrunk"
) -> FrozenTrunk | str:
    """The trunk that a run should use, or why it has none.

    Raises:
        OptionError: Reuse was asked for and is impossible, or the trunk is another view's.
    """
    if isinstance(reuse, FrozenTrunk):
        if reuse.view is not view:
            raise OptionError("reuse_trunk is a trunk of another view; make one of this view")
        return reuse
    if reuse == "off":
        return "it is switched off"
    trunk = FrozenTrunk(view, least=LEAST_SHARE if reuse == "auto" else 0.0)
    if trunk.why_not is not None and reuse == "on":
        raise OptionError(f"reuse_trunk='on', but {trunk.why_not}; choose 'auto'")
    return trunk if trunk.why_not is None else trunk.why_not


def graphs_for(
    objective: Objective, view: ParameterView, options: EvaluationOptions
) -> Graphs | str:
    """The graphs of a run, or why there are none."""
    if view.is_sharded:
        return WHY_SHARDED
    if options.cuda_graphs == "off":
        return "they are switched off"
    if options.cuda_graphs == "auto" and not objective.capturable:
        return "the objective does not say that it can be captured"
    graphs = Graphs(view)
    return graphs if graphs.why_not is None else graphs.why_not
