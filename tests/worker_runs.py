"""A worker script that starts processes, run once: it leaves a JSON file for each in a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def run_worker(script: str, folder: Path) -> Path:
    """Run a script of this folder with a folder to write to, and keep what it prints there."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / script), str(folder)],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "output").write_text(ended.stdout + ended.stderr)
    return folder


def found(folder: Path, size: int, rank: int) -> dict[str, Any]:
    """What a process of so many has left; fails with the last of the output where it has not."""
    path = folder / f"{size}-{rank}.json"
    assert path.exists(), (folder / "output").read_text()[-4000:]
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
