"""Processes that a run starts itself on this machine, for users without a launcher."""

import io
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zo_adapt.errors import LostRankError, OptionError
from zo_adapt.evaluation.workers import Workers
from zo_adapt.ranks.launched import end_group, is_launched

FUNCTIONS_OF_MAIN = (
    "what is pickled must be importable: define functions and classes at the top level of a "
    "module, and guard what runs with if __name__ == '__main__', or start the script with "
    "torchrun --nproc_per_node=N, which pickles nothing"
)

START = 300.0
"""Seconds at least for processes to start and to import: no evaluation takes part in that."""


def starts_workers(workers: Workers) -> bool:
    """Whether a run has to start processes: it is asked to, and nobody else has."""
    wanted = workers.count is not None and workers.count > 1
    return wanted and not is_launched() and not (dist.is_available() and dist.is_initialized())


@contextmanager
def started(
    workers: Workers, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, this process is rank 0 of several, of which the others call a function.

    As many threads compute in each as in this one: with another number, sums round otherwise.

    Args:
        workers: How many, and how long they wait for each other.
        function: Of a module; what it returns or raises is dropped.
        arguments: By name; pickled, together, so that what is one object stays one.

    Raises:
        OptionError: The arguments cannot be pickled.
        LostRankError: A process ends before it is ready.
    """
    data, count = _pickled(arguments), workers.count or 1
    # Of the start alone: the run makes a group of its own, with the timeout that is asked for.
    seconds = max(START, workers.timeout)
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, count, is_master=True, wait_for_workers=False
    )
    context = multiprocessing.get_context("spawn")
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
    processes = [
        context.Process(
            target=_work,
            args=(rank, count, store.port, limit, settings, function, data),
            daemon=True,
        )
        for rank in range(1, count)
    ]
    try:
        for process in processes:
            process.start()
        _wait(store, processes, seconds)
        dist.init_process_group("gloo", store=store, rank=0, world_size=count, timeout=limit)
        yield
    finally:
        end_group()
        # One that could not be started has an error that says so.
        for process in (process for process in processes if process.pid is not None):
            process.join(timeout=5.0)
            process.terminate()


def _pickled(arguments: Mapping[str, Any]) -> bytes:
    """The arguments, copied: pickled by multiprocessing, tensors would share the memory."""
    buffer = io.BytesIO()
    try:
        torch.save(dict(arguments), buffer)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise OptionError(
            f"workers=..., but the objective, the view or the data cannot be pickled ({error}); "
            f"{FUNCTIONS_OF_MAIN}"
        ) from error
    return buffer.getvalue()


def _wait(store: Any, processes: Sequence[Any], timeout: float) -> None:
    """Until every process has read its arguments."""
    end = time.monotonic() + timeout
    waiting = dict(enumerate(processes, 1))
    while waiting:
        for rank, process in list(waiting.items()):
            if store.check([f"ready/{rank}"]):
                said = store.get(f"ready/{rank}").decode()
                if said:
                    raise OptionError(f"worker {rank} cannot read its arguments: {said}")
                del waiting[rank]
            elif not process.is_alive() or time.monotonic() > end:
                code = process.exitcode
                found = (
                    f"was not ready after {timeout:g} s" if code is None else f"ended with {code}"
                )
                raise LostRankError(f"worker {rank} {found}; {FUNCTIONS_OF_MAIN}")
        time.sleep(0.01)


def _work(
    rank: int,
    count: int,
    port: int,
    limit: timedelta,
    settings: tuple[int, str],
    function: Callable[..., Any],
    data: bytes,
) -> None:
    threads, precision = settings
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, count, is_master=False, timeout=limit
    )
    try:
        arguments = torch.load(io.BytesIO(data), map_location=_own_gpu(rank), weights_only=False)
    except Exception as error:
        store.set(f"ready/{rank}", f"{type(error).__name__}: {error}; {FUNCTIONS_OF_MAIN}")
        return
    store.set(f"ready/{rank}", "")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
    try:
        function(**arguments)
    except Exception:
        return  # rank 0 raises it, too
    finally:
        end_group()


def _own_gpu(rank: int) -> dict[str, str]:
    """Where tensors of GPUs go: every process to one of its own, as far as there are any."""
    gpus = torch.cuda.device_count()
    return {f"cuda:{index}": f"cuda:{(index + rank) % gpus}" for index in range(gpus)}
