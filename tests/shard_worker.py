"""``python tests/shard_worker.py FOLDER``: ``shard_cases`` by one process, then by two."""

import json
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_worker import forked
from shard_cases import everything, llama


def main(folder: Path) -> None:
    llama().save_pretrained(folder / "llama")
    (folder / "1-0.json").write_text(json.dumps(everything(folder)))

    def work(_: int) -> object:
        dist.init_process_group("gloo")
        return everything(folder)

    forked(2, work, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.alarm(300)
    main(Path(sys.argv[1]))
