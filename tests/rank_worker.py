"""``python tests/rank_worker.py FOLDER``: the cases of ``rank_cases`` by one, two, three processes.

This process is the one; then it forks, since each process of a group would import for seconds.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from rank_cases import CASES, FEW, leave_a_training, restarted_training
from rank_faults import FAULTS, restarted
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

AGAIN = LaunchConfig(
    1, 1, 2, max_restarts=1, monitor_interval=0.05, start_method="fork",
    rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
)  # fmt: skip
"""As ``torchrun --standalone --nproc-per-node=2 --max-restarts=1`` has it."""
SIZES = {1: CASES, 2: FEW, 3: CASES}


def environment(rank: int, size: int, port: int) -> None:
    """What a launcher sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})


def forked(size: int, work: Callable[[int], Any], folder: Path) -> None:
    """Do the work in so many processes; what each returns is written beside the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                if size > 1:
                    environment(rank, size, port)
                found = work(rank)
                (folder / f"{size}-{rank}.json").write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # what the parent has to clean up is not the child's
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def run_cases(folder: Path, size: int) -> dict[str, Any]:
    found = {}
    for name, case in SIZES[size].items():
        place = folder / f"{size}" / name
        place.mkdir(parents=True, exist_ok=True)
        found[name] = case(place)
    return found


def main(folder: Path) -> None:
    for size in SIZES:
        leave_a_training(folder / f"{size}" / "resumed_training")
    (folder / "1-0.json").write_text(json.dumps(run_cases(folder, 1)))
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    for size in (2, 3):
        forked(size, lambda rank, size=size: run_cases(folder, size), folder)
    for name, fault in FAULTS.items():
        place = folder / name
        place.mkdir()
        forked(fault.size, lambda rank, fault=fault, place=place: fault.run(place, rank), place)
    for work in (restarted, restarted_training):
        place = folder / work.__name__
        place.mkdir()
        found = elastic_launch(AGAIN, work)(str(place))
        (place / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.alarm(300)
    main(Path(sys.argv[1]))
