"""What may change: tensors by name, the groups they form, and what tells them from others."""

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
from torch import Tensor, nn

from zo_adapt.errors import OptionError, ViewError
from zo_adapt.options import renamed
from zo_adapt.view import selection
from zo_adapt.view.adapters import adapter_names, check_adapters, is_soft_prompt
from zo_adapt.view.defaults import displacement_and_groups, noise_over
from zo_adapt.view.group import (
    Group,
    Groups,
    assign_groups,
    checked_groups,
    in_one_line,
    summary_of,
)
from zo_adapt.view.identity import Identified
from zo_adapt.view.inspection import Inspection
from zo_adapt.view.parted_adapters import check_parted
from zo_adapt.view.shards import Shards, gathering_modules, local
from zo_adapt.view.tensors import check_finite, check_tensor, norms, tunable

SMALL_BYTES, SMALL_SHARE = 64 * 2**20, 0.125
"""Up to one of these, the share of its model, a view is shifted by way of a copy; above both, layer
by layer, so that a step needs little more memory than a forward."""
MANY_SCALARS = 2**20
"""From so many on "auto" is noise of low rank: below, noise is cheap however it is made."""
Scratch = Literal["auto", "copy", "layer"]


class TunedTensors(Identified):
    """Base of ``ParameterView``: which tensors, from where, in which groups; not how they move."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor | np.ndarray],
        *,
        model: nn.Module | None = None,
        noise: str = "gaussian",
        groups: Groups = "auto",
        scratch: Scratch = "auto",
    ) -> None:
        if groups is None:
            renamed("groups=None", "groups='auto'")
            groups = "auto"
        self.tensors = tunable(tensors)
        self.model = model
        self.shards = Shards(self.tensors, model)
        """Which parts are here, where the model lies in parts on several processes."""
        self.inspection = Inspection(self.tensors, model)
        """What is known of the view's memory, for all that must know."""
        self.noise_is_open = noise == "auto"
        """Whether nobody has chosen the noise, so that a run which is gone on with says it."""
        if self.noise_is_open:
            noise = "lowrank" if self.numel >= MANY_SCALARS else "gaussian"
        self.displacement, usual = displacement_and_groups(self.tensors, model, self.shards)
        """How far noise alone may move a weight over a run, where the optimizer has no other."""
        self.is_soft_prompt = is_soft_prompt(model, self.tensors)
        """Whether it is virtual tokens before every text."""
        self.least_perturbation = 0.0
        """The smallest usual mu that was found to be more than the model's own rounding."""
        self.resolved_at_start: float | None = None
        """The smallest mu that the weights resolved as a run began which is gone on with at the
        weights that it has reached; None: they are looked at."""
        self.changing: frozenset[str] = frozenset()
        """Attributes of the model's modules, by class, that a forward was seen to change."""
        self.farthest: float | None = None
        """The largest displacement that makes sense, where the variables have bounds."""
        self.groups, self._group_of = assign_groups(
            list(self.tensors), checked_groups(groups, usual)
        )
        if scratch not in ("auto", "copy", "layer"):
            raise OptionError(f"scratch={scratch!r}; choose 'auto', 'copy' or 'layer'")
        if scratch == "layer" and model is None:
            raise OptionError("scratch='layer' needs the model that runs the tensors: model=...")
        if scratch == "layer" and self.is_sharded:
            raise OptionError(
                "scratch='layer' with a model that lies in parts on several processes, whose "
                "parameters are put together for each forward; choose 'auto' or 'copy'"
            )
        self.is_large = _is_large(self.nbytes, model)
        """Whether a copy takes more room, and a direction's noise more time, than is spared."""
        self.by_layer = scratch == "layer" or (
            scratch == "auto" and self.is_large and not self.is_sharded
        )
        """Whether it is shifted layer by layer, for want of room for a copy."""
        self._set_noise(noise)

    def _set_noise(self, name: str) -> None:
        groups = {name: self.group_of(name) for name in self.tensors}
        self.noise = noise_over(name, self.tensors, groups, copies=self.has_room_for_copies)
        self.has_factors = any(self.noise.matrices(t.shape) for t in self.tensors.values())
        """Whether some of its directions are products of low rank."""

    @classmethod
    def trainable(
        cls,
        model: nn.Module,
        *,
        noise: str = "gaussian",
        groups: Groups = "auto",
        scratch: Scratch = "auto",
    ) -> Self:
        """Every tensor with ``requires_grad``: any peft adapter with its ``modules_to_save``.

        Args:
            model: Any torch module.
            noise: As for the constructor, as are the others.
            groups: Parts with their own step.
            scratch: How it is shifted.

        Raises:
            ViewError: No parameter requires a gradient.
        """
        tensors = selection.trainable(model)
        if not tensors and (adapters := adapter_names(model)):
            raise ViewError(
                f"no parameter of the adapters {adapters} requires a gradient; load an adapter to "
                "tune it by PeftModel.from_pretrained(model, path, is_trainable=True)"
            )
        return cls(tensors, model=model, noise=noise, groups=groups, scratch=scratch)

    @classmethod
    def matching(
        cls,
        model: nn.Module,
        pattern: str,
        *,
        noise: str = "gaussian",
        groups: Groups = "auto",
        scratch: Scratch = "auto",
    ) -> Self:
        """Every parameter whose name a regular expression finds (``re.search``).

        Raises:
            NoMatchingParameterError: Nothing matches; near names are listed.
        """
        tensors = selection.matching(model, pattern)
        return cls(tensors, model=model, noise=noise, groups=groups, scratch=scratch)

    @classmethod
    def last_layers(
        cls,
        model: nn.Module,
        n: int,
        head: bool = True,
        *,
        noise: str = "auto",
        groups: Groups = "auto",
        scratch: Scratch = "auto",
    ) -> Self:
        """The last ``n`` transformer blocks and, with ``head``, all that works on their output.

        Found by one forward of a made-up example, of which nothing is kept; for a model that none
        can be made for, by the order in which its modules are registered. A head that is tied to
        the input embedding belongs to the embedding and is left out.

        Raises:
            OptionError: ``n`` is larger than the number of blocks, or nothing is selected.
            ViewError: The model has no list of repeated blocks.
        """
        tensors = selection.last_layers(model, n, head)
        return cls(tensors, model=model, noise=noise, groups=groups, scratch=scratch)

    @classmethod
    def full(
        cls,
        model: nn.Module,
        *,
        noise: str = "auto",
        groups: Groups = "auto",
        scratch: Scratch = "auto",
    ) -> Self:
        """Every parameter of the model, tied ones once."""
        tensors = selection.full(model)
        return cls(tensors, model=model, noise=noise, groups=groups, scratch=scratch)

    @property
    def numel(self) -> int:
        """Number of scalars d."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the live tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def has_room_for_copies(self) -> bool:
        """Whether copies of the view are small beside its model, and wholly here."""
        return not (self.by_layer or self.is_sharded)

    @property
    def is_sharded(self) -> bool:
        """Whether the model lies in parts on several processes."""
        return self.shards.is_any

    @property
    def held(self) -> dict[str, Tensor]:
        """What this process holds of each tensor: all, but of one that is sharded."""
        if not self.is_sharded:
            return self.tensors
        return {name: local(tensor) for name, tensor in self.tensors.items()}

    def group_of(self, name: str) -> Group:
        """The group that a tensor of the view belongs to."""
        return self.groups[self._group_of[name]]

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the tensors (never references); costs the view's bytes."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def check_whole(self, what: str) -> None:
        """Refuse what cannot be done with parts of a model.

        Raises:
            OptionError: The model lies in parts on several processes.
        """
        if self.is_sharded:
            raise OptionError(
                f"{what} with a model that lies in parts on several processes (tensor parallel, "
                "FSDP2); tune it by minimize with MeZO or another zeroth-order optimizer, or load "
                "the model whole"
            )

    def check_adapters(self) -> None:
        """Refuse a merged or disabled peft adapter, and a tensor of an inactive one.

        Raises:
            AdapterError: Names the module and the call that mends it.
        """
        if self.model is not None:
            check_adapters(self.model, self.inspection.holding())
            if self.is_sharded and not self.shards.is_gathered:
                check_parted(self.model)

    def check_ready(self) -> None:
        """Refuse what no run can begin with: the model may have been changed since.

        Raises:
            ViewError: A tensor that cannot be tuned any more.
            AdapterError: As for ``check_adapters``.
        """
        gathering_modules(self.model)
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor)
        self.check_adapters()

    def norms(self) -> dict[str, float]:
        """The Euclidean norm of every tensor, from one look at the weights.

        Raises:
            ViewError: A tensor holds NaN or infinity; names the first.
        """
        found = norms(self.tensors, self.shards)
        check_finite(self.tensors, found, self.shards)
        return found

    def check_finite(self) -> None:
        """The former name of ``norms``, for the sake of its error."""
        renamed("ParameterView.check_finite()", "ParameterView.norms()")
        self.norms()

    @property
    def reach(self) -> float:
        """The former name of ``displacement``."""
        renamed("ParameterView.reach", "ParameterView.displacement")
        return self.displacement

    def __repr__(self) -> str:
        return in_one_line(self.tensors, self.groups, self.noise.name)

    def summary(self) -> str:
        """A short table: tensors, scalars and bytes of each group, how they move. ``print`` it."""
        return summary_of(
            self.tensors,
            self.groups,
            self._group_of,
            noise=self.noise.name,
            by_layer=self.by_layer,
            displacement=self.displacement,
        )


def _is_large(nbytes: int, model: nn.Module | None) -> bool:
    if model is None or nbytes <= SMALL_BYTES:
        return False
    return nbytes > SMALL_SHARE * sum(parameter.nbytes for parameter in model.parameters())
