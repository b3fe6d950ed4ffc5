"""What is seen of a run: a line before the first step, and the bar."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from problems import problem

from zo_adapt import Adam, Metrics, MeZO, MeZOSVRG, OneSided, Result, minimize

OPTIMIZERS = {
    "pairs": MeZO(lr=0.05, num_directions=1, one_sided=False),
    "one-sided": MeZO(lr=0.05, estimate=OneSided(4)),
    "snapshots": MeZOSVRG(lr=0.05, snapshot_interval=1, snapshot_size="batch"),
}


def run(optimizer: Any = None, **options: Any) -> Result:
    p = problem()
    return minimize(p.objective, p.view, p.data, optimizer, **{"batch_size": 6} | options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_line_before_a_run_says_what_a_step_costs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def first(step: Any) -> None:
        said.append(capsys.readouterr().err)

    result = run(OPTIMIZERS[name], max_steps=1, callback=first)
    assert f"a step makes {result.queries} queries" in said[0]
    assert f"{type(OPTIMIZERS[name]).__name__} on 10 scalars in 3 tensors" in said[0]


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS.values(), None], ids=[*OPTIMIZERS, "default"])
def test_saying_it_changes_nothing(optimizer: Any) -> None:
    shown, hidden = (run(optimizer, max_queries=600, progress=p) for p in (True, False))
    assert shown.history == hidden.history


def test_it_is_logged_where_there_is_no_bar(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zo_adapt"):
        run(OPTIMIZERS["pairs"], max_steps=3, progress=False)
    assert "about 3 steps, 36 queries planned" in caplog.text


def test_a_resumed_run_says_where_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"trajectory": tmp_path / "run.zot", "resume": True}
    run(OPTIMIZERS["pairs"], max_steps=2, **options)
    capsys.readouterr()
    run(OPTIMIZERS["pairs"], max_steps=4, **options)
    assert "from step 2 on" in capsys.readouterr().err


def test_a_first_order_run_has_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    run(Adam(1e-2), max_steps=1)
    assert "Adam on 10 scalars" in capsys.readouterr().err


def test_the_bar_shows_metrics_and_queries(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics({"twice": lambda batch: 2.0}, every=2)
    run(OPTIMIZERS["pairs"], max_steps=4, metrics=metrics)
    last = capsys.readouterr().err.replace("\n", "\r").strip("\r").split("\r")[-1]
    assert re.search(r"4/4 .*value=.*twice=2.*queries=48", last)


def test_the_end_of_the_bar_is_what_the_steps_come_to(capsys: pytest.CaptureFixture[str]) -> None:
    run(OPTIMIZERS["pairs"], max_steps=4, max_queries=10_000)
    last = capsys.readouterr().err.replace("\n", "\r").strip("\r").split("\r")[-1]
    assert "48/48" in last
