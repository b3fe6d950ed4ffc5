"""Where the processes of a run come from: a launcher, or the user's own process group."""

import atexit
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zo_adapt.evaluation.workers import Workers
from zo_adapt.ranks.group import Ranks
from zo_adapt.view.parameters import ParameterView

RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_groups: dict[float, tuple[Any, Any]] = {}
"""By timeout the process group that was found, and the one of this package over the same ranks."""


def find_ranks(workers: Workers) -> Ranks | None:
    """The ranks that a launcher or the user has started; None where this process is alone.

    Args:
        workers: How long a rank waits for the others, and how often they are compared.
    """
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if not is_launched():
            return None
        _begin_group()
    if dist.get_world_size() < 2:
        return None
    world, own = _groups.get(workers.timeout, (None, None))
    if world is not dist.group.WORLD:
        own = dist.new_group(backend="gloo", timeout=timedelta(seconds=workers.timeout))
        _groups[workers.timeout] = dist.group.WORLD, own
    return Ranks(own, workers)


def begin_again(seconds: float) -> None:
    """Begin the group of processes that torchrun has started anew, before another library does.

    torchrun keeps its store, and in it the addresses of the processes that are gone: whoever begins
    as torch usually does may read these.

    Args:
        seconds: That a collective may take.
    """
    if dist.is_available() and is_launched() and is_restarted() and not dist.is_initialized():
        _begin_group(timeout=timedelta(seconds=seconds))


def _begin_group(**options: Any) -> None:
    """Begin the group that the launcher describes: gloo, and NCCL beside it for GPUs."""
    store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    # A launcher may keep its store when it starts the processes anew: the addresses in it are old.
    prefix = f"restart_{os.environ.get(RESTARTS, '0')}"
    again = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    dist.init_process_group(store=again, rank=rank, world_size=size, **options)
    atexit.register(end_group)


def is_launched() -> bool:
    """Whether a launcher has started several processes, of which this is one."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    return several and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def is_restarted() -> bool:
    """Whether torchrun has started the processes anew after one of them failed."""
    return os.environ.get(RESTARTS, "0") not in ("", "0")


def end_group() -> None:
    """End the process group that this package has begun."""
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def use_own_gpu() -> None:
    """Under a launcher let "cuda" mean this rank's own GPU, in a script that has used none yet."""
    index = own_gpu()
    if index is not None and torch.cuda.is_available() and not torch.cuda.is_initialized():
        torch.cuda.set_device(index)


def own_gpu() -> int | None:
    """The number of this rank's own GPU; None where no launcher says which, or there is none."""
    if not is_launched() or "LOCAL_RANK" not in os.environ:
        return None
    count = torch.cuda.device_count()
    if count == 0:
        return None
    return int(os.environ["LOCAL_RANK"]) % count


def warn_of_shared_gpu(view: ParameterView) -> None:
    """Say it where several ranks compute on the first GPU, and others have nothing to do."""
    own, used = own_gpu(), {tensor.device for tensor in view.tensors.values()}
    if own and used == {torch.device("cuda", 0)}:
        warnings.warn(
            f"rank {dist.get_rank()} computes on cuda:0, as rank 0 does, and cuda:{own} is idle; "
            "call torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before the model is "
            'put on "cuda"',
            stacklevel=3,
        )


# At the import: a script made for one process puts its model on "cuda" before any run begins, and
# should need no other line under a launcher. Without a launcher this does nothing.
use_own_gpu()
