"""One or several points in a forward along directions of low rank: no weight is written.

At the point theta + c z a linear layer is

    y = x W^T + c (x b) a^T,

so n points share the large product, and what is their own is two thin ones: P = x [b_1 .. b_n], of
which every row keeps the columns of its own point, and y += P [a_1 .. a_n]^T. The same holds for
GPT-2's Conv1D and, with a row of ``a`` in the place of x b, for embeddings. Vectors (biases, norms)
are made for all points, as for adapters. A module that is none of these runs on one point's rows
after the other, each time with its parameters at that point.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_adapt.evaluation.joint import thin
from zo_adapt.evaluation.joint.candidates import NotJoint, frozen_layers, is_compiled
from zo_adapt.evaluation.joint.factor_room import FactorRoom
from zo_adapt.evaluation.joint.row_blocks import Blocks, calling_in
from zo_adapt.evaluation.joint.rows import Rows
from zo_adapt.evaluation.model_state import replaced_forwards
from zo_adapt.interrupt import Guard
from zo_adapt.noise.low_rank import Matrices
from zo_adapt.noise.sums import Memory, Sums
from zo_adapt.term import Shift
from zo_adapt.view.kept import KeptPlace
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.selection import owners

MOST_COLUMNS = 64
"""Products that one point may add to a layer: beyond, its weights are made instead."""
MOST_ROOMS = 8


class LowRankCandidates:
    """Runs a view's model at points that lie along directions of low rank.

    Args:
        view: Of a model, with low-rank noise.

    Attributes:
        why_not: Why that cannot be done with this view; None if it can.
    """

    def __init__(self, view: ParameterView) -> None:
        self.view = view
        self._modules: dict[nn.Module, dict[str, str]] = {}
        self._places = view.places()
        self._multiplied: dict[str, Matrices] = {}
        self.why_not = self._why_not()
        self._rooms: dict[Hashable, FactorRoom] = {}
        self._memory = Memory()
        self._scaling: dict[type, bool] = {}
        self._frozen = frozen_layers(view) if self.why_not is None else ()

    def _why_not(self) -> str | None:
        model, places = self.view.model, self._places
        if not any(self.view.noise.matrices(place.source.shape) for place in places.values()):
            return "no tensor of the view moves along factors"
        if model is None:
            return "the view has no model"
        if any(is_compiled(module) for module in model.modules()):
            return "the model is compiled"
        if self.view.inspection.shared:
            return f"{min(self.view.inspection.shared)!r} shares its memory with another tensor"
        name_of = {id(place.source): name for name, place in places.items()}
        for path, module, attribute, parameter in owners(model):
            if id(parameter) not in name_of:
                continue
            if "forward" in module.__dict__:
                return f"{path!r} has a forward of its own"
            name = name_of[id(parameter)]
            self._modules.setdefault(module, {})[attribute] = name
            of = self.view.noise.matrices(parameter.shape)
            if of is not None and thin.takes_factors(module):
                self._multiplied[name] = of
        found = {name for names in self._modules.values() for name in names.values()}
        missing = [name for name in places if name not in found]
        return f"{missing[0]!r} belongs to no module" if missing else None

    @property
    def nbytes(self) -> int:
        """Bytes that a point takes: its factors, and its own vectors."""
        nbytes = 0
        for name, place in self._places.items():
            of = self._multiplied.get(name)
            by_element = self.view.noise.matrices(place.source.shape) is None
            numel = place.source.numel() if by_element else 0 if of is None else of.numel
            nbytes += numel * place.source.element_size()
        return nbytes

    def at(self, points: Sequence[Shift], leads: Collection[int]) -> "LowRankPoints":
        """The place where block i of a batch's rows is computed at ``points[i]``.

        Args:
            points: n >= 1 of them; a batch's rows are n blocks of equal size.
            leads: Sizes of a module's first dimension that are rows in blocks.

        Raises:
            NotJoint: A point that factors are of no use for.
        """
        if any(point.decay != 1.0 or isinstance(point, KeptPlace) for point in points):
            raise NotJoint("a point lies where weights have decayed, or is seen from kept values")
        sums = self.view.sums_of_points(points)
        groups = len(sums) // len(points)
        count = max(len(each.terms) for each in sums)
        if count * max((of.rank for of in self._multiplied.values()), default=1) > MOST_COLUMNS:
            raise NotJoint(f"a point lies along {count} directions")
        moving = frozenset(i % groups for i, each in enumerate(sums) if each.terms)
        key = len(points), groups, count, moving
        if key not in self._rooms:
            self._rooms[key] = FactorRoom(self.view, self._places, self._multiplied, *key)
        while len(self._rooms) > MOST_ROOMS:
            del self._rooms[next(iter(self._rooms))]
        return LowRankPoints(
            self.view,
            self._modules,
            self._rooms[key],
            Sums(sums, memory=self._memory),
            leads,
            self._scaling,
            self._frozen,
        )


class _Module(NamedTuple):
    """A module, with what its parameters are at the points."""

    names: Mapping[str, str]
    pairs: Mapping[str, thin.Pair]
    stacks: Mapping[str, Tensor]


class LowRankPoints:
    """Points along directions of low rank, each for its own block of a batch's rows.

    Made by ``LowRankCandidates.at``, and written over by the next one.

    Attributes:
        used: Names of the tensors that were used; filled as the model runs.
    """

    def __init__(
        self,
        view: ParameterView,
        modules: Mapping[nn.Module, Mapping[str, str]],
        room: FactorRoom,
        sums: Sums,
        leads: Collection[int],
        scaling: dict[type, bool],
        frozen: Sequence[nn.Module],
    ) -> None:
        self._scaling = scaling
        self._usage, self._modules, self._room, self._sums = view.usage, modules, room, sums
        self._leads = tuple(sorted(leads))
        for device in {place.source.device for place in room.places.values()}:
            if device.type == "cuda":
                sums.on(device)  # now: a graph that is captured inside must not copy them
        with torch.no_grad():
            room.fill(sums)
        self._here = Blocks(room.points, frozen)
        self._rows = Rows(self._here, leads)
        self._before: dict[nn.Module, Any] = {}
        self.used: set[str] = set()

    @property
    def key(self) -> Hashable:
        """How many points and terms, and where their factors lie."""
        return "low rank", self._sums.generation, self._leads, self._room.key

    @contextmanager
    def entered(self, replaying: bool = False) -> Iterator[None]:
        """Inside, the model computes at the points.

        Raises:
            NotJoint: (inside) A module is called with rows that are not in blocks.
            ViewInUseError: Another thread uses the view.
        """
        forwards = {} if replaying else self._forwards()
        with (
            self._usage.shifting(),
            Guard(self._put_back) as guard,
            replaced_forwards(forwards),
            calling_in(self._here),
            self._usage.watching(),
        ):
            guard.open()
            yield

    def _put_back(self) -> None:
        """Give modules their parameters back, where one was cut short."""
        for module, live in self._before.items():
            module.__dict__["_parameters"] = live
        self._before.clear()

    def _forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        room, found = self._room, dict[nn.Module, Callable[..., Any]]()
        for module, names in self._modules.items():
            own = _Module(
                names,
                {a: room.pairs[n] for a, n in names.items() if n in room.pairs},
                {a: room.stacks[n] for a, n in names.items() if n in room.stacks},
            )
            if not room.places.keys().isdisjoint(names.values()):
                found[module] = self._forward(module, own)
        return found

    def _forward(self, module: nn.Module, own: _Module) -> Callable[..., Any]:
        compute = thin.forward_of(module, own.pairs)
        if compute is None:
            return lambda *args, **kwargs: self._unknown(module, own, args, kwargs)

        def forward(input: Tensor) -> Tensor:
            self.used.update(own.names.values())
            self._rows.check(input, module)
            return self._rows.in_blocks(
                lambda x: compute(module, x, own.pairs, own.stacks, self._rows), input
            )

        def at_selected(hidden: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
            """The layer at some positions alone, which need not be as many for each point."""
            self.used.update(own.names.values())
            self._rows.check(hidden, module)
            rows = self._rows.chosen(hidden, select)
            return compute(module, select(hidden), own.pairs, own.stacks, rows)

        if compute is thin.linear:
            forward.at_selected = at_selected  # type: ignore[attr-defined]
        return forward

    def _unknown(self, module: nn.Module, own: _Module, args: Any, kwargs: Any) -> Any:
        """A module of another class: a norm, as most are, for all points at once."""
        kind, count = type(module), self._rows.count
        is_plain = count > 1 and not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        of_vectors = len(own.stacks) == len(module._parameters) and not module._modules
        if not (is_plain and of_vectors) or self._scaling.get(kind) is False:
            return self._one_by_one(module, own, args, kwargs)
        if kind in self._scaling:
            self.used.update(own.names.values())
            self._rows.check(args[0], module)
            return self._rows.in_blocks(
                lambda x: thin.scaled(module, x, own.stacks, count), args[0]
            )
        expected = self._one_by_one(module, own, args, kwargs)
        self._scaling[kind] = thin.scales(module, args[0], own.stacks, count, expected)
        return expected

    def _one_by_one(
        self, module: nn.Module, own: _Module, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """The module's own forward, on the rows of one point after the other."""
        self.used.update(own.names.values())
        forward, outputs = type(module).forward, []
        for point in range(self._room.points):
            values = {
                attribute: self._room.values(name, point, self._sums)
                for attribute, name in own.names.items()
                if name in self._room.places
            }
            part = self._rows.part(args, kwargs, point)
            live = self._before[module] = module._parameters
            with self._rows.at(point):
                module.__dict__["_parameters"] = {**live, **values}
                outputs.append(forward(module, *part[0], **part[1]))
                module.__dict__["_parameters"] = live
            del self._before[module]
        return self._rows.together(outputs)
