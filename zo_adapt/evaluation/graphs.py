"""CUDA graphs: an evaluation of fixed shape is recorded once and then replayed.

A small model's forward on a GPU is bound by the time that Python takes to launch its kernels. A
graph holds the launches; a replay costs none of them. Weights are changed in place, and shifted
layers read the terms where ``ParameterView.memory`` holds them, so a graph stays valid from step to
step. Batches of other shapes get graphs of their own: ``pad_to_multiple_of`` of the objectives of a
model keeps their number small.

Memory: the activations of the largest shape (all graphs share one pool), and each shape's inputs.
"""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zo_adapt.noise.sums import GRAPH_TABLES
from zo_adapt.view.parameters import ParameterView

CALLS_BEFORE = 2
"""Calls of a shape before it is captured: they warm up, and a shape that never recurs costs
nothing."""
MOST = 64
"""Graphs that are kept; further shapes run without."""
WAITING = {"Linear8bitLt": "LLM.int8 waits for the GPU in every layer, to find its outliers"}
"""Modules, by class, of which a capture would fail."""

logger = logging.getLogger(__name__)


class Graphs:
    """Calls a function of a batch by way of CUDA graphs, where that is possible.

    Args:
        view: Its tensors, and its model's, lie on a GPU.

    Attributes:
        why_not: Why nothing is captured; None: it is, or not known yet.
    """

    def __init__(self, view: ParameterView) -> None:
        self._view = view
        self._seen: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        # A model may choose other kernels while it is captured, and a step's values are subtracted
        # from each other: a shape that has run without a graph does so to the end of the step.
        self._without: set[Hashable] = set()
        self._pool: Any = None
        # Listed now: while layers are shifted, reading a parameter through its module makes it.
        parameters = [] if view.model is None else view.model.parameters()
        self._weights = list({id(w): w for w in (*view.tensors.values(), *parameters)}.values())
        self._places = 0
        self.why_not = self._why_not()

    def _why_not(self) -> str | None:
        modules = () if self._view.model is None else self._view.model.modules()
        kinds = {type(module).__name__ for module in modules}
        if waiting := [why for kind, why in WAITING.items() if kind in kinds]:
            return waiting[0]
        on_gpu = all(tensor.is_cuda for tensor in self._view.tensors.values())
        return None if on_gpu else "the view is not on a GPU"

    def __len__(self) -> int:
        """Graphs that were captured so far."""
        return len(self._graphs)

    def call(self, function: Callable[[Any], Any], content: Any, key: Hashable) -> Any:
        """``function(content)``.

        Args:
            function: Runs kernels that depend on the tensors of the content alone.
            content: A mapping of tensors on a GPU; anything else is handed on.
            key: What else decides which kernels run.
        """
        if self.why_not is not None or not is_capturable(content):
            return function(content)
        if self.holds(content, key):
            return self._graphs[self._named(content, key)].replay(content)
        named, shape = self._named(content, key), signature(content)
        self._seen[named] = self._seen.get(named, 0) + 1
        late = shape in self._without or len(self._graphs) >= MOST
        if self._seen[named] <= CALLS_BEFORE or late:
            self._without.add(shape)
            return function(content)
        try:
            self._graphs[named] = self._captured(function, content)
        except RuntimeError as error:
            self.why_not = f"capturing failed: {str(error).splitlines()[0]}"
            logger.warning(f"evaluations run without CUDA graphs: {self.why_not}")
            torch.cuda.synchronize()
            return function(content)
        return self._graphs[named].replay(content)

    def begin(self) -> None:
        """Begin a step: look where the weights are now, for a graph holds their addresses."""
        self._places = hash(tuple([w.data_ptr() for w in self._weights]))
        self._without.clear()

    def holds(self, content: Any, key: Hashable) -> bool:
        """Whether a call would be a replay."""
        return (
            self.why_not is None
            and is_capturable(content)
            and signature(content) not in self._without
            and self._named(content, key) in self._graphs
        )

    def _named(self, content: Mapping[str, Tensor], key: Hashable) -> Hashable:
        return key, self._places, self._view.memory.generation, signature(content)

    def _captured(self, function: Callable[[Any], Any], content: Mapping[str, Tensor]) -> "_Graph":
        inputs = {name: tensor.clone() for name, tensor in content.items()}
        torch.cuda.synchronize()
        graph, tables = torch.cuda.CUDAGraph(), list[Tensor]()
        token = GRAPH_TABLES.set(tables)
        try:
            # Relaxed: tables of a layer's addresses are copied on a stream that is not captured.
            with (
                _no_garbage_collected(),
                self._view.recorded(),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"),
            ):
                returned = function(inputs)
        finally:
            GRAPH_TABLES.reset(token)
        if not isinstance(returned, Tensor):
            raise RuntimeError(f"the objective returned {type(returned).__name__}, not a tensor")
        self._pool = self._pool or graph.pool()
        return _Graph(graph, inputs, returned, tables)


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Inside, no graph of another run is destroyed: torch lets that disturb the one captured."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Graph:
    """One shape, with all that its kernels read."""

    def __init__(
        self,
        graph: "torch.cuda.CUDAGraph",
        inputs: dict[str, Tensor],
        output: Tensor,
        tables: list[Tensor],
    ) -> None:
        self._graph, self._inputs, self._output, self._tables = graph, inputs, output, tables
        self._loaded: Mapping[str, Tensor] | None = None

    def replay(self, content: Mapping[str, Tensor]) -> Tensor:
        """What the function returns for these inputs."""
        if content is not self._loaded:
            names = list(self._inputs)
            torch._foreach_copy_([self._inputs[n] for n in names], [content[n] for n in names])
            self._loaded = content
        self._graph.replay()
        return self._output.clone()


def is_capturable(content: Any) -> bool:
    """Whether it is a mapping of tensors on a GPU."""
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(value, Tensor) and value.is_cuda for value in content.values())
    )


def signature(content: Mapping[str, Tensor]) -> Hashable:
    """What a graph is captured for: names, shapes and dtypes."""
    return tuple((name, tuple(value.shape), value.dtype) for name, value in content.items())
