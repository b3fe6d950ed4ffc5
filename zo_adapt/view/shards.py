"""Tensors that several processes hold parts of: DTensors of tensor parallelism and of FSDP2.

All that knows of them is here: which part of a tensor this process holds, and what the processes
must tell each other about the whole. Every process of the mesh has to call the same, in the same
order; numbers of all parts are put together in the order of the ranks, so that all get the same.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zo_adapt.errors import ViewError
from zo_adapt.interrupt import gradients_off
from zo_adapt.noise.parts import Part, slice_along

WHY_SHARDED = "the model lies in parts on several processes"


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; nothing is imported to find out."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds: of a plain tensor, the tensor."""
    if not is_sharded(tensor):
        return tensor
    with gradients_off():  # where it gives the very memory
        held: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return held


def cut_along(tensor: Any) -> int | None:
    """The axis along which a tensor is cut; None: it is not."""
    placements = tensor.placements if is_sharded(tensor) else ()
    axes = [place.dim for place in placements if type(place).__name__.endswith("Shard")]
    return axes[0] % tensor.dim() if axes else None


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from the processes that hold its parts, each of which must ask."""
    if not is_sharded(tensor):
        return tensor
    with gradients_off():
        gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def part_of(name: str, tensor: Tensor) -> Part | None:
    """Which part of a tensor is here; None: all of it.

    Raises:
        ViewError: It is spread in a way that is not known here.
    """
    if not is_sharded(tensor):
        return None
    check_mesh(name, tensor)
    mesh, (placement,) = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    shape = tuple(tensor.shape)
    kind = type(placement).__name__
    if kind == "Replicate":
        return None
    if kind != "Shard":
        raise ViewError(
            f"{name!r} is placed as {placement}; a view tunes tensors that are placed as "
            "Shard(dim) or Replicate(): leave it out, or load the model without fused or partial "
            "placements"
        )
    axis, rank = placement.dim % len(shape), mesh.get_local_rank()
    size = -(-shape[axis] // mesh.size())  # as torch.chunk cuts
    start, stop = (min(n * size, shape[axis]) for n in (rank, rank + 1))
    held = local(tensor).shape
    if list(held) != [*shape[:axis], stop - start, *shape[axis + 1 :]] and held.numel():
        raise ViewError(
            f"{name!r} of shape {shape} has {tuple(held)} here, not the usual share of {placement};"
            " distribute it by torch.distributed.tensor.distribute_tensor"
        )
    return slice_along(axis, shape, start, stop)


def check_mesh(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not spread over all processes, along one dimension.

    Raises:
        ViewError: Such a tensor.
    """
    mesh, count = tensor.device_mesh, _world_size()  # type: ignore[attr-defined]
    if mesh.ndim != 1 or mesh.size() != count:
        raise ViewError(
            f"{name!r} is spread over {mesh}, and there are {count} processes: a sharded model is "
            "tuned by the processes of one mesh of one dimension, all of which evaluate every "
            "point together; start as many processes as hold its parts, and use no data-parallel, "
            "pipeline or second sharding dimension beside them"
        )


class Shards:
    """What a view must know of a model that lies in parts on several processes.

    Args:
        tensors: The view.
        model: The model that owns them; None for plain tensors.

    Attributes:
        is_any: Whether anything of the model lies in parts, tuned or not.
        is_gathered: Whether FSDP2 puts the parts together for a forward.
        parts: Which part of a tensor is here, for those that are not here as a whole.

    Raises:
        ViewError: Parts of a kind that is not known here, or without their model.
    """

    def __init__(self, tensors: Mapping[str, Tensor], model: nn.Module | None) -> None:
        found = {name: part_of(name, tensor) for name, tensor in tensors.items()}
        self.parts = {name: part for name, part in found.items() if part is not None}
        if model is not None:
            check_parallelism(model)
        self._gathering = gathering_modules(model)
        others = {} if model is None else dict(model.named_parameters())
        spread = [tensor for tensor in (*tensors.values(), *others.values()) if is_sharded(tensor)]
        self.is_any, self.is_gathered = bool(spread or self._gathering), bool(self._gathering)
        self._was_cut_off = False
        if not self.is_any:
            return
        if model is None:
            raise ViewError(
                f"{next(iter(tensors))!r} is a DTensor; give the view the model that it belongs "
                "to, as ParameterView.trainable(model) and .full(model) do"
            )
        for name, tensor in others.items():
            if is_sharded(tensor):
                check_mesh(name, tensor)
        self._mesh = spread[0].device_mesh if spread else None  # type: ignore[attr-defined]
        for module in self._gathering:
            # What was gathered for a forward is not for the next, also of one that was cut off.
            module.set_reshard_after_forward(True, recurse=False)
            try:
                module.unshard()  # the first time, the parts may move to other memory
            except AssertionError as error:
                raise ViewError(
                    f"FSDP2 cannot gather the weights of a {type(module).__name__}: {error}. Where "
                    "it is the dtype, let all weights that train have one before fully_shard: "
                    "model.to(torch.bfloat16), as peft's own are float32"
                ) from error
            module.reshard()

    def forget_gathered(self) -> None:
        """Drop what FSDP has gathered of the weights, since they are others now."""
        for module in self._gathering:
            module.reshard()
        if self._was_cut_off and torch.cuda.is_available():
            torch.cuda.synchronize()

    @contextmanager
    def noting_failures(self) -> Iterator[None]:
        """Inside, a forward may be cut off.

        FSDP takes the next one for its continuation, and its copies do not wait for what is written
        in between: so from then on this process does.
        """
        try:
            yield
        except BaseException:
            self._was_cut_off = True
            raise

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in the order of their ranks."""
        if not self.is_any or self._mesh is None:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self._mesh.device_type)
        rows = own.new_empty((self._mesh.size(), len(numbers)))
        dist.all_gather(list(rows.unbind()), own, group=self._mesh.get_group())
        found: list[list[float]] = rows.tolist()
        return found

    def agreed(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each holds on some process."""
        return [flag > 0 for flag in self.largest(list(map(float, flags)))]

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the largest that a process has; NaN if one has it."""
        columns = zip(*self.gathered(numbers), strict=True)
        return [math.nan if any(map(math.isnan, one)) else max(one) for one in columns]


def gathering_modules(model: nn.Module | None) -> list[Any]:
    """The modules whose parameters FSDP2 gathers for a forward, each sharded now."""
    library: Any = sys.modules.get("torch.distributed.fsdp")
    if model is None or not hasattr(library, "FSDPModule"):
        return []
    found: list[Any] = [m for m in model.modules() if isinstance(m, library.FSDPModule)]
    for module in found:
        module.reshard()  # the outermost one stays as its last forward has left it
    return found


def check_parallelism(model: nn.Module) -> None:
    """Refuse layers or experts that only some processes have, and parts that do not say so.

    Raises:
        ViewError: transformers has loaded the model so, or it is a FullyShardedDataParallel.
    """
    library: Any = sys.modules.get("torch.distributed.fsdp")
    if any(isinstance(m, library.FullyShardedDataParallel) for m in model.modules() if library):
        raise ViewError(
            "the model is a FullyShardedDataParallel, whose flat parameters are no part of a named "
            "tensor; shard it by torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    planned = any(getattr(module, "_hf_tp_plan", None) for module in model.modules())
    if planned and _world_size() > 1 and not any(map(is_sharded, model.parameters())):
        raise ViewError(
            "the model is tensor-parallel, and its parts are plain tensors (transformers "
            f"{version_of('transformers')}), which do not say of what they are parts; load it by "
            "transformers 5.17 or later, whose parts are DTensors, or shard it by FSDP2"
        )
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    for setting, what in (("pp_size", "pipeline"), ("ep_size", "expert")):
        if (getattr(config, setting, None) or 1) > 1:
            raise ViewError(
                f"the model is {what}-parallel ({setting}={getattr(config, setting)}): processes "
                "hold different layers or experts, which a view cannot tell apart; load it "
                "tensor-parallel (tp_plan='auto') or shard it by FSDP2"
            )


def version_of(package: str) -> str:
    """Of a package that has been imported."""
    return str(getattr(sys.modules.get(package), "__version__", "of an unknown version"))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
