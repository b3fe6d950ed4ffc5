"""The code in the README runs as it stands, one block after the other, and does what it says."""

import re
from pathlib import Path

import pytest

import zo_adapt

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # Trainer asks for it on a CPU too
def test_the_code_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    result = names["result"]
    assert isinstance(result, zo_adapt.Result)
    assert result.stop_reason is zo_adapt.StopReason.MAX_QUERIES
    assert result.history[-1].value < 0.5 * result.history[0].value
    assert "loss" in capsys.readouterr().out
    tuned, rebuilt = (zo_adapt.ParameterView.trainable(names[n]) for n in ("model", "start"))
    assert tuned.hash() == rebuilt.hash()
    assert (names["x"] - 3).abs().max() < 0.1  # type: ignore[operator]


def test_the_first_example_is_twelve_lines() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 12


def test_every_optimizer_is_in_the_table() -> None:
    for name in ("MeZOSVRG", "MeZO", "ZOSVRG", "SGD", "Adam"):
        assert re.search(rf"^\| .*`{name}`", README, re.MULTILINE), name
