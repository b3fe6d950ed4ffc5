"""ParameterView: the tensors that may change, and the only code that changes them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import numpy as np
from torch import Tensor, nn

from zo_adapt.errors import OptionError
from zo_adapt.interrupt import gradients_off
from zo_adapt.noise.sums import Sum, Sums
from zo_adapt.term import Shift, Term, Terms, check_directions, check_terms, coalesced
from zo_adapt.view.group import Groups
from zo_adapt.view.kept import KeptPlace, KeptValues
from zo_adapt.view.moved import PlannedMoves
from zo_adapt.view.precision import Room
from zo_adapt.view.shards import local
from zo_adapt.view.tuned import Scratch
from zo_adapt.view.usage import check_mode


class ParameterView(PlannedMoves):
    """An ordered mapping name -> live tensor: what an optimizer may change, and nothing else.

    ``shifted(terms)`` computes at theta + sum_k c_k z(s_k) and restores every bit;
    ``apply(update)`` moves theta for good. Tensors outside the view are never written.

    Memory: while shifted, either a copy of the view (``scratch="copy"``) or the largest module's
    parameters (``scratch="layer"``; the live weights are then never written); "auto" takes the copy
    up to 64 MiB and for views without a model. ``apply`` needs no copy.

    Args:
        tensors: Names and live tensors of dtype fp32, fp16, bf16 or fp64, or numpy arrays, which
            are changed in place as well. A tensor that appears under several names counts once.
            Several devices are fine.
        model: The model that owns them; None for plain tensors.
        noise: "gaussian" (the paper's), "rademacher", or "lowrank": of every matrix z = a b^T, or
            "lowrank-4" a sum of four such products. A model's forward at a point then writes no
            weight, and full views are evaluated at several points together; see
            ``noise/low_rank.py``. "coordinates", for small views: one scalar each, what
            ``ZOSVRG(coordinates=True)`` goes along. "auto", which ``full`` and ``last_layers``
            take: "lowrank" of a million scalars or more, "gaussian" of fewer; or the noise of a
            trajectory that is replayed or gone on with.
        groups: Parts with their own step; the first that a tensor belongs to wins. "auto": LoRA's A
            factors rest and a new head goes further than pretrained weights (see ``defaults``); ()
            treats all alike.
        scratch: "auto", "copy" or "layer".

    Raises:
        ViewError: No tensors; an integer, quantised, meta or expanded tensor, one made in inference
            mode, of a class of its own, or that shares part of its memory with another.
        NoMatchingParameterError: A group has no tensor.
        AdapterError: The model's peft adapter is merged or disabled, or the view's is not active.

    Example:
        >>> import torch
        >>> x = torch.zeros(3)
        >>> view = ParameterView({"x": x}, noise="rademacher")
        >>> with view.shifted([Term(seed=1, coefficient=0.5)]):
        ...     print(x)
        tensor([ 0.5000,  0.5000, -0.5000])
        >>> x
        tensor([0., 0., 0.])
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | np.ndarray],
        *,
        model: nn.Module | None = None,
        noise: str = "gaussian",
        groups: Groups = "auto",
        scratch: Scratch = "auto",
    ) -> None:
        super().__init__(tensors, model=model, noise=noise, groups=groups, scratch=scratch)
        self.check_adapters()

    def leave_at_rest(self, names: Iterable[str]) -> None:
        """Let some tensors stay as they are, whatever is applied, and no others.

        For those that the objective does not read: a step would move them at random.

        Args:
            names: Of the view's tensors; with none, all move again.
        """
        self.usage.check_free("leave_at_rest")
        at_rest = frozenset(names) & self.tensors.keys()
        if at_rest != self.at_rest:
            self.at_rest = at_rest
            self._plan_moves()

    def follow_noise(self, name: str) -> None:
        """Move along the noise of a run that is gone on with, if none was chosen for the view.

        Args:
            name: As the run's file says it.
        """
        self.usage.check_free("follow_noise")
        if self.noise_is_open and name != self.noise.name:
            with suppress(OptionError):  # of a later version: what differs is said elsewhere
                self._set_noise(name)
            self.room = Room(self.held.values(), self.noise.largest, self.shards)
            self._plan_moves()

    @contextmanager
    def shifted(self, terms: Iterable[Term], decay: float = 1.0) -> Iterator[None]:
        """Inside, the model computes at ``decay * theta + sum_k c_k z(s_k)``.

        Afterwards every tensor is bit-identical to before, also when the body raises or is
        interrupted.

        Args:
            terms: Seeds and coefficients; empty is theta itself.
            decay: Factor on theta.

        Raises:
            TermError: A seed, coefficient or group outside its range.
            ViewInUseError: (at the end) The body has given a tensor other numbers, for the second
                time.
        """
        check_mode(self.tensors)
        self._find_parts()
        sums = self._sums_of_shift(terms, decay)
        way = nullcontext() if sums is None else self._way.shifted(sums)
        watching = nullcontext() if self.is_sharded else self.usage.watching()
        with self.usage.shifting(), way, self.shards.noting_failures(), watching:
            yield

    @contextmanager
    def shifted_from(self, kept: KeptValues, terms: Iterable[Term]) -> Iterator[None]:
        """Inside, the model computes at ``kept + sum_k c_k z(s_k)``; else as ``shifted``.

        By way of a copy, whatever ``scratch`` says.
        """
        check_mode(self.tensors)
        sums = self._packed(coalesced(check_terms(terms, len(self.groups))), 1.0)
        copied, run = self._ways_from(kept)
        with self.usage.shifting(), copied.shifted(sums, run), self.usage.watching():
            yield

    @contextmanager
    def shifted_for_graphs(self, terms: Iterable[Term], decay: float = 1.0) -> Iterator[None]:
        """As ``shifted``, for code that only replays graphs that were captured inside it.

        Such graphs shift the layers by themselves: they read the terms from ``memory``.
        """
        sums = self._sums_of_shift(terms, decay)
        with self.usage.shifting(), nullcontext() if sums is None else self._way.loaded(sums):
            yield

    def _sums_of_shift(self, terms: Iterable[Term], decay: float) -> Sums | None:
        """What a shift adds, on every GPU of the view; None for a shift that changes nothing."""
        checked = coalesced(check_terms(terms, len(self.groups)))
        return self._packed(checked, decay) if checked or decay != 1.0 else None

    def recorded(self) -> AbstractContextManager[None]:
        """Inside, a graph is captured that reads what is computed in it, and the live tensors."""
        return self._way.recorded()

    def stack(self, points: Sequence[Shift]) -> dict[str, Tensor]:
        """The tensors that n points move, at all of them: name -> (n, *shape).

        Row i holds the very bits that the tensor has inside ``shifted(*points[i])``. The stacks are
        those of the call before, written anew, where as many points move the same groups.

        Raises:
            TermError: A seed, coefficient or group outside its range.
        """
        kept = [point.kept if isinstance(point, KeptPlace) else None for point in points]
        return self._stacks(self.sums_of_points(points), kept, self._moving_groups)

    def sums_of_points(self, points: Sequence[Shift]) -> list[Sum]:
        """What each group adds, point by point.

        Raises:
            TermError: A seed, coefficient or group outside its range.
        """
        return [
            each
            for terms, decay in points
            for each in self._sums(coalesced(check_terms(terms, len(self.groups))), decay)
        ]

    def apply(self, update: Shift) -> None:
        """Move theta <- decay * theta + sum_k c_k z(s_k), one pass, one rounding to the dtype.

        fp16 and bf16 are rounded stochastically, by the same generator under the first seed: on
        average nothing of a step is lost, however small it is beside the weight's resolution.
        Ctrl-C in the middle is raised at the end.

        Raises:
            TermError: A seed or group outside its range.
            StepTooLargeError: The dtype cannot hold the result, or a coefficient is not finite;
                nothing is changed.
        """
        self.apply_in_order(self.checked(update), update.decay)

    def checked(self, update: Shift) -> Terms:
        """The terms that ``apply`` will apply, each direction once.

        Raises:
            TermError: A seed or group outside its range.
            StepTooLargeError: The dtype cannot hold the result, or a coefficient is not finite.
        """
        terms = coalesced(check_directions(update.terms, len(self.groups)))
        self.room.check(terms, update.decay)
        return terms

    def apply_in_order(self, terms: Sequence[Term], decay: float = 1.0) -> None:
        """Apply terms one after the other; a direction may come more than once."""
        self.usage.check_free("apply")
        check_mode(self.tensors)
        self._find_parts()
        if terms or decay != 1.0:
            self.updates(self._sums(terms, decay), terms[0].seed if terms else None)
            self.shards.forget_gathered()
            self.room.moved(terms, decay)

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Write a snapshot back into the live tensors."""
        self.usage.check_free("restore")
        with gradients_off():
            for name, tensor in self.held.items():
                tensor.copy_(local(snapshot[name]))
        self.shards.forget_gathered()
        self.room.forget()
