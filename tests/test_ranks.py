"""Several processes that share a run make the very run that one process makes, or say why not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_cases import CASES, FEW

TESTS = Path(__file__).parent
SHARED = [(size, name) for size, cases in ((2, FEW), (3, CASES)) for name in cases]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the processes have left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "rank_worker.py"), str(folder)],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "output").write_text(ended.stdout + ended.stderr)
    return folder


def found(folder: Path, size: int, rank: int) -> dict[str, Any]:
    path = folder / f"{size}-{rank}.json"
    assert path.exists(), (folder / "output").read_text()[-4000:]
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("size, name", SHARED, ids=lambda value: str(value))
def test_several_processes_make_the_run_of_one(done: Path, size: int, name: str) -> None:
    expected = found(done, 1, 0)[name]
    assert expected
    for rank in range(size):
        own = found(done, size, rank)[name]
        assert own == {key: value for key, value in expected.items() if key in own}
        assert rank or own.keys() == expected.keys()
