"""A cut model's calls while one objective is asked: answered from the store, or recorded.

The order in which modules run is observed; what does not run as supposed is refused.
"""

import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from zo_adapt.evaluation.model_state import replaced_forwards
from zo_adapt.evaluation.trunk.call import Call, Cut, kind_of
from zo_adapt.evaluation.trunk.keys import ForeignArgumentError, Keys, Rows, parts_of, tensors_of
from zo_adapt.evaluation.trunk.store import Store
from zo_adapt.interrupt import undone


class Recorded(Exception):
    """Ends a forward when the frozen layers have run, where no more is wanted."""


class Calls:
    """The model's calls while one objective is asked once.

    Args:
        where: The cut model.
        store: Of activations that leave the last frozen block.
        keys: Names the rows.
        shapes: By frozen block, what follows the hidden states in the tuple that it returns; None
            where it returns a tensor. Filled as calls are recorded.
        serving: Answer what the store holds.
        verified: Kinds of calls that were checked.
        ending: Raise ``Recorded`` when the store holds the rows; the rest is not run.
    """

    def __init__(
        self,
        where: Cut,
        store: Store,
        keys: Keys,
        shapes: dict[int, tuple[Any, ...] | None],
        *,
        serving: bool,
        verified: Container[str],
        ending: bool = False,
    ) -> None:
        self.where, self.store, self.keys, self.shapes = where, store, keys, shapes
        self.serving, self.verified, self.ending = serving, verified, ending
        self.refusal: str | None = None
        self.done: list[Call] = []
        self._now: Call | None = None
        self._wanted: frozenset[bytes] = frozenset()

    @property
    def served(self) -> list[Call]:
        """The calls that were answered from the store."""
        return [call for call in self.done if call.served]

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Inside, the model's own code calls what is defined here."""
        where = self.where
        forwards = {module: _wrapped(module, self._around) for module in where.around}
        forwards |= {b: _wrapped(b, self._frozen, i) for i, b in enumerate(where.frozen)}
        forwards |= {block: _wrapped(block, self._tuned) for block in where.tuned}
        # Hooks, since objectives look for a forward that was put on the instance.
        hooks = (
            module.register_forward_pre_hook(self._noting(name)).remove
            for name, module in where.after.items()
        )
        with replaced_forwards(forwards), undone(hooks):
            yield

    def _around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._now is not None:
            return forward(*args, **kwargs)
        self._now = call = self._begun({str(i): a for i, a in enumerate(args)} | kwargs)
        try:
            if call.rows is not None and self.serving and not call.served:
                self._make(call, call.rows, forward, args, kwargs)
            if self.ending and self.refusal is None:
                raise Recorded
            returned = forward(*args, **kwargs)
        finally:
            self._now = None
            self.done.append(call)
        self._end(call, returned)
        return returned

    def _begun(self, arguments: dict[str, Any]) -> Call:
        if torch.compiler.is_compiling() or _captured():
            self._refuse("the model's calls are compiled or captured")
            return Call(None, served=False, watched=False)
        try:
            rows = self.keys.of(arguments)
        except ForeignArgumentError as error:
            self._refuse(f"the model is called with a {error}, whose content is not known")
            return Call(None, served=False, watched=False)
        if arguments.get("use_cache") is True:  # which later calls would read
            self._refuse("the model is asked for a cache of keys and values")
            return Call(None, served=False, watched=False)
        known = bool(rows.keys) and self.refusal is None
        served = known and self.serving and self.store.holds(rows.keys)
        watched = kind_of(rows) not in self.verified
        return Call(rows if known else None, served, watched, arguments)

    def _make(
        self,
        call: Call,
        rows: Rows,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Run the frozen layers on the rows that are new, and keep what leaves them.

        In parts whose shapes are functions of the row: in another batch, or after resuming, a row
        has the very same activations. (Kernels, and with them the last bits, differ from shape to
        shape.)
        """
        self._wanted = frozenset(rows.keys)
        try:
            for part in parts_of(rows, self.store.missing(rows.keys), (args, kwargs)):
                self._now = Call(part.rows, served=False, watched=False, making=True)
                with suppress(Recorded):
                    forward(*part.args, **part.kwargs)
                if self.refusal is not None:
                    return
        finally:
            self._now = call
        call.is_new = True
        call.served = self.refusal is None and self.store.holds(rows.keys)

    def _frozen(self, forward: Callable[..., Any], index: int, /, *args: Any, **kwargs: Any) -> Any:
        call = self._now
        if call is None or call.rows is None:
            return forward(*args, **kwargs)
        call.order.append(index)
        last = index == len(self.where.frozen) - 1
        if not call.served:
            returned = forward(*args, **kwargs)
            self._record(call, index, returned, last)
            if last and call.making:
                raise Recorded
            return returned
        hidden = hidden_of(args, kwargs)
        if last and hidden is not None:
            call.entry = hidden.shape[1], hidden.device
            hidden = self.store.get(call.rows, *call.entry)
        return _output(hidden, self.shapes[index])

    def _record(self, call: Call, index: int, returned: Any, last: bool) -> None:
        whole = isinstance(returned, Tensor)
        hidden, *more = (returned,) if whole else returned if type(returned) is tuple else (None,)
        if not isinstance(hidden, Tensor) or any(isinstance(item, Tensor) for item in more):
            self._refuse(f"layer {index} of {self.where.path!r} returns more than hidden states")
            return
        self.shapes[index] = None if whole else tuple(more)
        if not last:
            call.outputs.append(weakref.ref(hidden))
            return
        rows = call.rows
        if rows is None or hidden.is_nested or hidden.dim() < 3 or len(hidden) != len(rows.keys):
            self._refuse("the hidden states do not have the shape (batch, positions, ...)")
        elif rows.starts is not None and rows.width != hidden.shape[1]:
            self._refuse("the attention mask is not that of the hidden states")
        elif self.refusal is None and call.making:
            try:
                self.store.put(rows, hidden, self._wanted)
            except ValueError as error:
                self._refuse(str(error))

    def _tuned(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        call = self._now
        if call is not None and call.watched:
            hidden = hidden_of(args, kwargs)
            if not call.inputs:
                call.entering = hidden
            others = tuple(None if a is hidden else a for a in args)
            call.inputs.append((others, {n: None if a is hidden else a for n, a in kwargs.items()}))
        return forward(*args, **kwargs)

    def _noting(self, name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            if self._now is not None:
                past = len(self._now.order) >= len(self.where.frozen)
                (self._now.late if past else self._now.early).add(name)

        return note

    def _end(self, call: Call, returned: Any) -> None:
        if call.rows is None or not call.order:
            return
        if call.order != list(range(len(self.where.frozen))):
            self._refuse(f"the layers of {self.where.path!r} do not run once each and in order")
        if call.early:
            self._refuse(f"the view holds weights of {min(call.early)!r}, which runs before")
        seen = {id(leaf) for leaf in tensors_of(returned)}
        if any(id(output()) in seen for output in call.outputs):
            self._refuse("the model returns what the frozen layers put out")
        if call.watched:
            if unseen := set(self.where.after) - call.late - call.early:
                self._refuse(f"the view holds weights of {min(unseen)!r}, which is not called")
            if len(call.inputs) != len(self.where.tuned):
                self._refuse(f"the layers of {self.where.path!r} do not run once each")
        call.outputs.clear()

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason


@contextmanager
def skipped(
    where: Cut, shapes: Mapping[int, tuple[Any, ...] | None], entering: Tensor
) -> Iterator[None]:
    """Inside, the frozen blocks are not run: ``entering`` enters the first tuned one.

    Nothing is looked up or checked here, so this can be captured.

    Args:
        where: The cut model.
        shapes: As of ``Calls``.
        entering: Hidden states, (batch, positions, ...).
    """
    last = len(where.frozen) - 1

    def skip(_: Callable[..., Any], index: int, /, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        if index == last:
            if hidden is None or hidden.shape[:2] != entering.shape[:2]:
                raise ValueError("the hidden states have another shape than those that are kept")
            hidden = entering
        return _output(hidden, shapes[index])

    with replaced_forwards({b: _wrapped(b, skip, i) for i, b in enumerate(where.frozen)}):
        yield


def _output(hidden: Tensor | None, more: tuple[Any, ...] | None) -> Any:
    """What a block returns that puts out these hidden states."""
    return hidden if more is None else (hidden, *more)


def _captured() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _wrapped(module: nn.Module, function: Callable[..., Any], *more: Any) -> Callable[..., Any]:
    """``function(forward, *more, ...)`` in place of the module's forward."""
    forward = module.forward

    @wraps(forward)  # generate() looks at the signature for what a model takes
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(forward, *more, *args, **kwargs)

    return replacement


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states among a block's arguments: the first tensor."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
