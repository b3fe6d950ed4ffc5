"""Which rows of a module's input belong to which of several points."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_adapt.evaluation.joint.candidates import NotJoint
from zo_adapt.evaluation.joint.row_blocks import Blocks, fits


class Rows:
    """Which rows of a module's input belong to which of n points.

    Args:
        here: n equal blocks, of which rows may be left out.
        leads: First sizes of an input that are rows in blocks.
    """

    def __init__(self, here: Blocks, leads: Collection[int]) -> None:
        self.here, self.leads, self.points = here, frozenset(leads), here.count
        self.only: int | None = None
        """The point whose rows alone are computed now."""
        self._masks: dict[Any, Tensor] = {}

    def check(self, input: Tensor, module: nn.Module) -> None:
        """Refuse an input that is not in blocks.

        Raises:
            NotJoint: It is not.
        """
        shared = type(module) is nn.Embedding and len(input) == 1
        in_blocks = input.dim() > 1 and fits(len(input), self.here, self.leads)
        if self.count > 1 and not (in_blocks or shared):
            raise NotJoint(
                f"a {type(module).__name__} was called with the shape {tuple(input.shape)}, whose "
                f"first size is none of {sorted(self.leads)}"
            )

    def in_blocks(self, compute: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """What is computed of rows in equal blocks, also where some were left out."""
        narrowed = self.here.narrowed if self.count > 1 else None
        if narrowed is None:
            return compute(input)
        return compute(input if len(input) == 1 else input[narrowed.padded])[narrowed.own]

    @property
    def total(self) -> int:
        """Rows in equal blocks."""
        narrowed = self.here.narrowed
        return min(self.leads) if narrowed is None else len(narrowed.padded)

    @property
    def count(self) -> int:
        """How many points the rows that are computed now belong to."""
        return 1 if self.only is not None else self.points

    @contextmanager
    def at(self, point: int) -> Iterator[None]:
        """Inside, all rows belong to one point."""
        before, self.only = self.only, point
        try:
            yield
        finally:
            self.only = before

    def of(self, stack: Tensor) -> Tensor:
        """What there is for each point, of the points that count now."""
        return stack if self.only is None else stack[self.only : self.only + 1]

    def mask(self, rows: int, like: Tensor) -> Tensor | None:
        """(rows, n): one where a row is the point's, zero elsewhere; None for a single point."""
        if self.count == 1:
            return None
        key = rows, like.device, like.dtype
        if key not in self._masks:
            each = torch.eye(self.points, device=like.device, dtype=like.dtype)
            self._masks[key] = each.repeat_interleave(rows // self.points, 0)
        return self._masks[key]

    def chosen(self, hidden: Tensor, select: Callable[[Tensor], Tensor]) -> "Chosen":
        """The rows that are left where positions are selected."""
        own = self.mask(len(hidden), hidden)
        if own is None:
            return Chosen(self, None)
        wide = own.view(len(own), *[1] * (hidden.dim() - 2), -1)
        return Chosen(self, select(wide.expand(*hidden.shape[:-1], -1)).flatten(0, -2))

    def part(self, args: Any, kwargs: Mapping[str, Any], point: int) -> tuple[Any, dict[str, Any]]:
        """Arguments with the rows of one point alone; what has no rows is for all."""
        if self.count == 1:
            return args, dict(kwargs)
        if self.here.narrowed is not None:
            raise NotJoint("a module of an unknown class was called with some rows left out")
        found: list[Tensor] = []

        def of(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(map(of, value))
            if isinstance(value, Tensor) and value.dim() and value.shape[0] in self.leads:
                found.append(value)
                size = value.shape[0] // self.points
                return value[point * size : (point + 1) * size]
            return value

        part = of(tuple(args)), {name: of(value) for name, value in kwargs.items()}
        if not found:
            raise NotJoint("a module was called without rows in blocks")
        return part

    def together(self, outputs: list[Any]) -> Any:
        """Outputs of one point after the other as one.

        Raises:
            NotJoint: They are no tensors of rows.
        """
        first = outputs[0]
        if len(outputs) == 1:
            return first
        if isinstance(first, Tensor) and first.dim():
            return torch.cat(outputs)
        if type(first) in (tuple, list):
            return type(first)(self.together(list(each)) for each in zip(*outputs, strict=True))
        if first is None:
            return None
        raise NotJoint(f"a module returned {type(first).__name__}")


class Chosen(Rows):
    """Rows that a mask tells apart."""

    def __init__(self, of: Rows, own: Tensor | None) -> None:
        super().__init__(of.here, of.leads)
        self.only, self._own = of.only, own

    def mask(self, rows: int, like: Tensor) -> Tensor | None:
        """As it was made."""
        return self._own
