"""Evaluations that a trunk answers, captured: what enters the first tuned layer is one more input.

With a(x) the activations that are kept (``frozen_trunk``), an evaluation f(x) = g(x, a(x)). a(x) is
looked up before, by what the model would be called with; g, the tuned layers and all that is the
model's own around them, is a CUDA graph with the inputs x and a(x). While a graph runs, nothing can
be looked up or checked, so only what the trunk has checked before goes this way.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from zo_adapt.evaluation.graphs import Graphs, is_capturable, signature
from zo_adapt.evaluation.trunk.calls import Call
from zo_adapt.evaluation.trunk.form import Form, form_of
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk

logger = logging.getLogger(__name__)
ENTERING = "zo_adapt: enters the first tuned layer"
"""Names a(x) among a graph's inputs; so no graph is taken for one that runs the frozen layers."""


class TrunkGraphs:
    """Calls a function of a batch by way of a trunk and, where that is possible, of CUDA graphs.

    Args:
        trunk: Answers for the frozen layers.
        graphs: Of the same view, for one function.
    """

    def __init__(self, trunk: FrozenTrunk, graphs: Graphs) -> None:
        self._trunk, self._graphs = trunk, graphs
        self._forms: dict[Hashable, Form | None] = {}

    def call(self, function: Callable[[Any], Any], content: Any, way: Hashable) -> Any:
        """``function(content)``.

        Args:
            function: Always the same; see ``Graphs.call`` and ``FrozenTrunk.call``.
            content: A batch.
            way: What else decides which kernels run.
        """
        if self._graphs.obstacle is not None or not is_capturable(content):
            return self._trunk.call(function, content)
        kind = signature(content)
        form = self._forms.get(kind)
        if form is not None:
            try:
                given = self._given(form, function, content)
                if given is not None:
                    return self._answered(function, given, way)
            except Exception as error:  # the trunk's own way finds out whose fault it is
                logger.info("a shape is evaluated without CUDA graphs: %r", error)
                self._forms[kind] = None
        if kind in self._forms:
            return self._trunk.call(function, content)
        return self._trunk.call(function, content, partial(self._learn, kind, content))

    def _given(
        self, form: Form, function: Callable[[Any], Any], content: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The inputs of a graph; None where the trunk does not give them.

        New rows, too, go this way: the values of a step's probes are subtracted from each other, so
        the same kernels should compute them all.
        """
        entering = self._trunk.entering(function, content, form)
        return None if entering is None else {**content, ENTERING: entering}

    def _answered(
        self, function: Callable[[Any], Any], given: dict[str, Tensor], way: Hashable
    ) -> Any:
        def skipping(inputs: Mapping[str, Tensor]) -> Any:
            content = dict(inputs)
            with self._trunk.skipping(content.pop(ENTERING)):
                return function(content)

        try:
            return self._graphs.call(skipping, given, way)
        finally:
            given.clear()  # a graph keeps the mapping that it has loaded

    def _learn(self, kind: Hashable, content: Mapping[str, Tensor], call: Call) -> None:
        form = form_of(content, call)
        if form is not None and call.rows is not None:
            # Unequal where the function calls the model under an autocast of its own, for one.
            same = self._trunk.rows_of(form, content).keys == call.rows.keys
            form = form if same else None
        self._forms[kind] = form
