"""One evaluation before the first write: what it reads of the view, and what it changes.

It is made on the first two examples, the same ones in every run and in one that is resumed, and not
counted as queries: no optimizer sees it. Of tensors without a model values may be dear (a
simulation): what is evaluated before the first step anyway is followed, and no more.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from zo_adapt.data.sources import Source
from zo_adapt.errors import (
    ChangingBufferError,
    NoisyObjectiveWarning,
    UnreadTensorWarning,
    ViewError,
)
from zo_adapt.evaluation.objective import Objective, SetObjective, ready
from zo_adapt.evaluation.start_checks import randomness_kept, warn_of_noise
from zo_adapt.interrupt import gradients_off, is_from_handler, undone
from zo_adapt.view.buffers import Buffers, check_max_norm
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.shards import gathering_modules
from zo_adapt.view.trace import Trace, leaves_of
from zo_adapt.view.weights import Attributes, Weights

logger = logging.getLogger(__name__)
LOOK_SEED = 3
FAR = 4.0
"""Shift of tensors that nothing seems to read, in displacements of the view."""
OTHER = "not of the view: "


def look_first(objective: Objective, source: Source, view: ParameterView) -> None:
    """Find what an evaluation would do that no run survives, and tensors that it does not read.

    An objective that gives other values for the same examples is warned of.

    Where the objective cannot be called on two examples, or computes where torch does not see it
    (another process or thread), nothing is concluded.

    Args:
        objective: What is asked.
        source: Of the examples.
        view: What is tuned. Tensors that the value does not depend on are left at rest.

    Raises:
        ChangingBufferError: Every evaluation changes a buffer or a weight of the model, or one a
            weight that is tuned.
        ViewError: The value depends on no tensor of the view.
        DropoutError: The model is not in evaluation mode.
    """
    view.leave_at_rest(())
    view.changing = frozenset()
    if view.model is None:
        return
    check_max_norm(view.model)
    call = objective.predict if isinstance(objective, SetObjective) else objective
    with gradients_off(), randomness_kept(view.model), ready(objective, view.model):
        try:
            content = source.take(range(min(2, len(source))))
            unread = _unread(call, content, view, view.model)
        # What is wrong with the data or the function says itself again, where it counts.
        except (ChangingBufferError, ViewError, NoisyObjectiveWarning):
            raise
        except Exception as error:
            if is_from_handler(error):
                raise
            logger.debug("the view was not looked at: %r", error)
            return
    _judge(unread, view)


@contextmanager
def naming_unread(objective: Objective, source: Source, view: ParameterView) -> Iterator[None]:
    """Inside, an objective is called; where the view has no model, what it did not read is named.

    That is all: a function of plain tensors may read others for other examples.
    """
    if view.model is not None:
        yield
        return
    trace = Trace(view.tensors)
    with trace.following():
        yield
    reached = trace.names(trace.reached)
    unread = [name for name in view.tensors if name not in reached]
    if not reached or not unread:
        return
    with gradients_off(), randomness_kept(None), ready(objective, None):
        try:
            content = source.take([0, 1])
            if _moves(unread, view, lambda: objective(content), objective(content)):
                return
        except Exception as error:  # as above
            if is_from_handler(error):
                raise
            return
    _warn_of_unread(unread, view, " and are moved by noise alone")


def _unread(
    call: Callable[[Any], Any], content: Any, view: ParameterView, model: nn.Module
) -> list[str]:
    """Names of the tensors that the value does not depend on."""
    gathered_by = model if gathering_modules(model) else None
    holds = view.inspection.holding()
    others = {f"{OTHER}{n}": p for n, p in model.named_parameters() if not holds(p)}
    trace = Trace({**view.tensors, **others}, gathered_by)
    entered, buffers, weights = set[str](), Buffers(model), Weights(view, model)
    attributes = Attributes(model)

    def value() -> Any:
        with randomness_kept(model):
            return call(content)

    with _noting_items(model, entered), trace.following():
        found = value()
    trace.leave(found)
    _check_buffers(buffers, value)
    _check_weights(weights, view, model, value)
    view.changing = frozenset(attributes.changed())
    # What is made at first use is none of those that every call changes.
    again = Attributes(model) if view.changing else None
    warn_of_noise(found, call, content, list if again is None else again.changed)
    reached = set(trace.names(trace.reached))
    # Of a tensor in parts, a process may hold nothing that could be seen to be read.
    is_any, *are_read = view.shards.agreed([bool(reached), *(n in reached for n in view.tensors)])
    unread = [name for name, is_read in zip(view.tensors, are_read, strict=True) if not is_read]
    items = tuple(_skipped_items(model, entered))
    unread = [name for name in unread if not name.startswith(items)]
    # What a kernel of another library reads is not seen: so they are moved, all together.
    if not is_any or not unread or any(view.shards.agreed([_moves(unread, view, value, found)])):
        return []
    return unread


def _check_buffers(buffers: Buffers, value: Callable[[], Any]) -> None:
    """Tell statistics, which drift, from tables that are filled at first use."""
    if not buffers.changed():
        return
    buffers_then = Buffers(buffers.model)
    value()
    drifting = buffers_then.changed()
    if drifting:
        buffers.restore()
        raise ChangingBufferError(
            f"every evaluation changes {drifting[0]!r} ({len(drifting)} buffers in all), so that "
            "no two points would see the same model; call model.eval() before tuning"
        )


def _check_weights(
    weights: Weights, view: ParameterView, model: nn.Module, value: Callable[[], Any]
) -> None:
    """Tell an objective that changes weights, in place and for good, from one that puts them back.

    What is tuned must stay; frozen weights may be made ready at first use.
    """
    if tuned := weights.tuned_changed():
        weights.restore()
        raise ChangingBufferError(
            f"the objective changes {tuned[0]!r} in place ({len(tuned)} tensors of the view in "
            "all), which it is to be evaluated at; compute with a changed copy of the weights, or "
            "put back the numbers that were there. If they are made ready at first use, call it "
            "once before the view is made"
        )
    if not weights.frozen_changed():
        return
    weights_then = Weights(view, model)
    value()
    if frozen := weights_then.frozen_changed():
        raise ChangingBufferError(
            f"every evaluation changes {frozen[0]!r} in place ({len(frozen)} frozen weights in "
            "all), so that no two points would see the same model; load the model anew, and "
            "compute with a changed copy of the weights"
        )


def _moves(
    names: Collection[str], view: ParameterView, value: Callable[[], Any], before: Any
) -> bool:
    """Whether the value changes with the tensors."""
    tensors = {name: view.tensors[name] for name in names}
    part = ParameterView(
        tensors,
        model=view.model if view.by_layer or view.is_sharded else None,
        noise=view.noise.name,
        groups=(),
    )
    with part.shifted(part.everywhere(LOOK_SEED, FAR * view.displacement)):
        there = value()
    return not _equal(list(leaves_of(before)), list(leaves_of(there)))


def _equal(before: list[Any], there: list[Any]) -> bool:
    return len(before) == len(there) and all(
        np.array_equal(_array(a), _array(b)) for a, b in zip(before, there, strict=True)
    )


def _array(value: Any) -> Any:
    return value.detach().float().cpu().numpy() if isinstance(value, Tensor) else value


@contextmanager
def _noting_items(model: nn.Module, entered: set[str]) -> Iterator[None]:
    """Inside, the items of lists of modules are noted as they run."""

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: entered.add(name)

    hooks = (
        model.get_submodule(name).register_forward_pre_hook(noting(name)).remove
        for name in _items(model)
    )
    with undone(hooks):
        yield


def _items(model: nn.Module) -> list[str]:
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return [f"{path}.{index}" for path, items in lists for index in range(len(items))]


def _skipped_items(model: nn.Module, entered: set[str]) -> list[str]:
    """Items of a list that did not run while others did: experts, which other examples may need."""
    active = {name.rpartition(".")[0] for name in entered}
    return [
        f"{name}."
        for name in _items(model)
        if name not in entered and name.rpartition(".")[0] in active
    ]


def _judge(unread: list[str], view: ParameterView) -> None:
    if not unread:
        return
    if len(unread) == len(view.tensors):
        raise ViewError(
            f"the objective's value depends on no tensor of the view ({_listed(unread)}): is the "
            "adapter active, and is this the model that the objective runs?"
        )
    _warn_of_unread(unread, view, " and stay as they are")
    view.leave_at_rest(unread)


def _warn_of_unread(unread: list[str], view: ParameterView, also: str) -> None:
    warnings.warn(
        f"{len(unread)} of {len(view.tensors)} tensors of the view do not reach the objective's "
        f"value on the first examples{also}: {_listed(unread)}. Leave them out of the view; "
        "if other examples need them, put one of these first",
        UnreadTensorWarning,
        stacklevel=6,
    )


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
