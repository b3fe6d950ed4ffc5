"""What a computation depends on: every operation of torch is observed, none is changed.

Each followed tensor has a bit. What an operation puts out has the bits of all that went in, however
the numbers were changed, moved or cut on the way; what leaves torch (a returned tensor, ``item``,
``numpy``, ``tolist``) says which tensors reach the caller. Two more bits tell data from constants,
and what comes after a certain module from what comes before.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zo_adapt.interrupt import undone
from zo_adapt.view.shards import local

DATA, AFTER, FIRST = 1, 2, 4
"""Bits: made of the model's inputs; of a marked output; of the first tensor that is followed."""
LEAVING = frozenset({"item", "tolist", "numpy", "__array__", "__dlpack__", "data_ptr"})
DEPTH = 6


class Trace:
    """Follows named tensors through whatever runs inside ``following()``.

    Args:
        tensors: What is followed.
        gathered_by: A model whose parameters are put together of parts for a forward.

    Attributes:
        reached: Bits of what has left torch.
        read: Bits of what an operation read.
        before, after: Bits of what met data that do not, or do, come from a marked output.
        marked: Whether there was such an output.

    Example:
        >>> a, b, c = (torch.ones(2) for _ in range(3))
        >>> trace = Trace({"a": a, "b": b, "c": c})
        >>> with trace.following():
        ...     d = a + 1          # goes into what is returned
        ...     unused = b * 2     # is computed for nothing
        ...     value = d.sum().item()
        >>> trace.names(trace.reached), trace.names(trace.read)
        (['a'], ['a', 'b'])
    """

    def __init__(self, tensors: Mapping[str, Tensor], gathered_by: nn.Module | None = None) -> None:
        self._names, self._tensors, self._model = list(tensors), list(tensors.values()), gathered_by
        self._bits: dict[int, list[tuple[int, int, int]]] = {}
        self._masks: dict[int, int] = {}
        self._held: dict[int, StorageWeakRef | Tensor] = {}
        self.reached = self.read = self.before = self.after = 0
        self.marked = False
        for index, tensor in enumerate(map(local, tensors.values())):
            start = tensor.data_ptr()
            span = (start, start + _nbytes(tensor), FIRST << index)
            self._bits.setdefault(self._key(tensor), []).append(span)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, operations of this thread are observed."""
        with undone(self._gathered()), _Dispatched(self), _Left(self):
            yield

    def _gathered(self) -> Iterator[Callable[[], None]]:
        """Know the tensors again that FSDP puts together of parts, all of a module's in one piece.

        What comes of that piece depends on all of them; so as a module begins, what it then has for
        a parameter is that parameter again.
        """
        index_of = {id(tensor): index for index, tensor in enumerate(self._tensors)}
        for module in () if self._model is None else self._model.modules():
            own = {
                attribute: FIRST << index_of[id(parameter)]
                for attribute, parameter in module._parameters.items()
                if id(parameter) in index_of
            }

            def entering(module: nn.Module, _: Any, own: dict[str, int] = own) -> None:
                for attribute, bit in own.items():
                    parameter = module._parameters[attribute]
                    if parameter is not None:
                        self._masks[self._key(local(parameter))] = bit

            if own:
                yield module.register_forward_pre_hook(entering).remove

    @contextmanager
    def marking(self, model: nn.Module, block: nn.Module | None = None) -> Iterator[None]:
        """Inside, what enters the model is data, and what leaves the block is marked."""

        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.mark((args, kwargs), DATA)

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            self.mark(output, AFTER)

        def hooks() -> Iterator[Callable[[], None]]:
            yield model.register_forward_pre_hook(entering, with_kwargs=True).remove
            if block is not None:
                yield block.register_forward_hook(leaving).remove

        with undone(hooks()):
            yield

    def names(self, mask: int) -> list[str]:
        """The followed tensors that a mask has."""
        return [name for index, name in enumerate(self._names) if mask & FIRST << index]

    def mark(self, value: Any, bit: int) -> None:
        """Give a bit to all tensors in a value."""
        for tensor in _tensors_of(value):
            key = self._key(tensor)
            self._masks[key] = self._masks.get(key, 0) | bit
            self.marked = self.marked or bit == AFTER

    def leave(self, value: Any) -> None:
        """Note that a value is read by other code than torch's."""
        for tensor in _tensors_of(value):
            self.reached |= self._mask(tensor)

    def observe(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """An operation has run."""
        given = list(_tensors_of((args, kwargs)))
        masks = [self._mask(tensor) for tensor in given]
        mask = plain = 0
        for one in masks:
            mask |= one
            plain |= 0 if one & (DATA | AFTER) else one
        self.read |= mask
        if plain and any(one & DATA and not one & AFTER for one in masks):
            self.before |= plain
        elif plain and mask & AFTER:
            self.after |= plain
        keys = {self._key(tensor) for tensor in given}
        for tensor in _tensors_of(output):
            key = self._key(tensor)
            self._masks[key] = mask | (self._masks.get(key, 0) if key in keys else 0)
        if func._schema.is_mutable:
            for argument, value in _arguments(func, args, kwargs):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.mark(value, mask)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reached |= mask

    def _mask(self, tensor: Tensor) -> int:
        key = self._key(tensor)
        mask = self._masks.get(key, 0)
        spans = self._bits.get(key)
        if spans is None:
            return mask
        if len(spans) == 1:
            return mask | spans[0][2]
        start = tensor.data_ptr()
        stop = start + _nbytes(tensor)
        return mask | sum(bit for low, high, bit in spans if low < stop and start < high)

    def _key(self, tensor: Tensor) -> int:
        """Names the storage; not given away to another one while this lives."""
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, or of a wrapping class
            self._held.setdefault(id(tensor), tensor)
            return id(tensor)
        key = int(storage._cdata)
        if key not in self._held:
            self._held[key] = StorageWeakRef(storage)
        return key


class _Dispatched(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if hasattr(func, "_schema"):
            with torch._C.DisableTorchFunction():
                self._trace.observe(func, args, kwargs or {}, output)
        return output


class _Left(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LEAVING:
            with torch._C.DisableTorchFunction():
                self._trace.leave(args)
        return func(*args, **(kwargs or {}))


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            yield argument, args[index]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _nbytes(tensor: Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * s for n, s in steps)) * tensor.element_size() * bool(tensor.numel())


def _tensors_of(value: Any) -> Iterator[Tensor]:
    return (local(leaf) for leaf in leaves_of(value) if isinstance(leaf, Tensor))


def leaves_of(value: Any, depth: int = DEPTH) -> Iterator[Any]:
    """Tensors, arrays and plain values in nested containers and objects."""
    if depth == 0 or value is None or isinstance(value, Tensor | np.ndarray | str | bytes | float):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves_of(item, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from leaves_of(item, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from leaves_of(vars(value), depth - 1)
    else:
        yield value
