"""The scripts behind docs/evidence.md: long runs of the theory are those of the library."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zo_adapt import Group, ParameterView
from zo_adapt.noise.distributions import GAUSSIAN, draw
from zo_adapt.term import Step

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
D = 40


@pytest.fixture
def theory(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[int]]]:
    """The module, and the first direction of every step of the library's runs that it makes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import evidence_theory

    seeds: list[int] = []
    for kind in (evidence_theory.MeZO, evidence_theory.MeZOSVRG):

        def watched(self: Any, *args: Any, advance: Any = kind.advance) -> Step:
            step: Step = advance(self, *args)
            seeds.append(step.update.terms[0].seed)
            return step

        monkeypatch.setattr(kind, "advance", watched)
    yield evidence_theory, seeds
    for name in [name for name in sys.modules if name.startswith("evidence_")]:
        monkeypatch.delitem(sys.modules, name)


def directions(seeds: list[int]) -> Iterator[Tensor]:
    """By their seeds."""
    for seed in seeds:
        yield draw(GAUSSIAN, seed, "x", torch.Size([D]), torch.device("cpu")).double()


def test_steps_by_hand_are_those_of_mezo(theory: tuple[Any, list[int]]) -> None:
    module, seeds = theory
    expected = module.gradient_floor(D, 60, 1)
    found, _ = module.by_hand(D, 60, 1, directions(seeds).__next__)
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected["of the second half"] < 0.9 * expected["mean squared gradient"]


def test_steps_by_hand_are_those_of_mezo_svrg(theory: tuple[Any, list[int]]) -> None:
    module, seeds = theory
    method = "eta = rho / L (d + 2)"
    expected = module.theorem(method, D, 30, 1)
    found, _ = module.theorem_by_hand(method, D, 30, 1, directions(seeds).__next__)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_that_of_the_function(theory: tuple[Any, list[int]]) -> None:
    f, x = theory[0].smooth(D, 0)
    x.requires_grad_(True)
    torch.testing.assert_close(torch.autograd.grad(f(x), x)[0], f.gradient(x.detach()))


def timed(method: str, seed: int, looks: list[tuple[int, int, float, float]]) -> tuple[str, Any]:
    """A run read against the clock, as it is kept."""
    run = ["time", "MNIST", method, 0.003, 32, 400_000, None, seed]
    return json.dumps(run), {"training": 1.0, "clock": looks}


def test_a_method_is_timed_until_it_is_as_good_as_mezo_at_its_best_on_the_same_seed(
    theory: tuple[Any, list[int]],
) -> None:
    from evidence_cells import Results
    from evidence_time import claims, ways

    runs = []
    for seed in range(3):
        best = 0.5 + seed / 10
        plain = [(10, 640, 1.0, 0.2), (20, 1280, 2.0 + seed, best), (30, 1920, 9.0, best - 0.1)]
        runs.append(timed("MeZO", seed, plain))
        runs.append(timed("MeZO()", seed, [(5, 160, 0.5, best - 0.1), (6, 192, 0.6, best + 0.1)]))
        short = best if seed == 1 else best - 0.01
        runs.append(timed("MeZO-SVRG as printed", seed, [(4, 9000, 1.0, short)]))
    found = Results(dict(runs))
    there = ways(found, "MNIST")
    assert there["MeZO"].mean("seconds") == 3.0  # 2, 3 and 4: not at its end, which is worse
    assert there["MeZO()"].mean("queries") == 192
    assert there["MeZO-SVRG as printed"].mean("seconds") is None
    assert [look is not None for look in there["MeZO-SVRG as printed"].reached] == [0, 1, 0]
    by_method = {row[0].split(" reaches")[0]: row for row in claims(found, "")}
    assert by_method["MeZO()"][3] == "yes"
    assert by_method["MeZO-SVRG as printed"][2:4] == (
        "MeZO 3 s; MeZO-SVRG as printed in 1 of 3 runs",
        "no",
    )


def test_a_grid_is_tried_first_and_seeds_run_at_its_best_rate(
    theory: tuple[Any, list[int]],
) -> None:
    from evidence_pieces import grid_of, open_runs
    from evidence_plan import SEEDS, TUNING

    piece = ["bf16: MNIST"]

    def missing(results: dict[str, Any]) -> list[Any]:
        return [run for run in open_runs(results, False, piece) if run.method == "MeZO"]

    first = missing({})
    rates = grid_of(first[0])
    assert [(run.lr, run.seed) for run in first] == [(lr, TUNING) for lr in rates]
    results = {run.key: {"validation": abs((run.lr or 0.0) - rates[2])} for run in first}
    results[first[-1].key] = {"validation": None}  # diverged
    then = missing(results)
    assert [(run.lr, run.seed) for run in then] == [(rates[2], seed) for seed in SEEDS]
    assert missing(results | {run.key: {} for run in then}) == []


def test_runs_of_a_default_that_is_no_more_are_made_again_and_marked_until_then(
    theory: tuple[Any, list[int]],
) -> None:
    from evidence_cells import Results, Where
    from evidence_pieces import open_runs, schedule_of
    from evidence_plan import SEEDS, Run

    piece, where = ["bf16: MNIST"], Where("bf16", "MNIST, bf16", 200_000)

    def missing(results: dict[str, Any]) -> list[Run]:
        return [run for run in open_runs(results, False, piece) if run.method == "MeZO()"]

    runs = missing({})
    assert [run.seed for run in runs] == list(SEEDS)
    results = {run.key: {"training": 1.0, "accuracy": 0.5, "schedule": "linear"} for run in runs}
    assert missing(results) == runs
    assert Results(results).cell(where, "MeZO()").text("accuracy") == "0.5 ± 0 (former default)"
    for run in runs:
        results[run.key]["schedule"] = schedule_of(run)
    assert missing(results) == []
    assert Results(results).cell(where, "MeZO()").text("accuracy") == "0.5 ± 0"


def test_figures_are_drawn_of_what_is_there(theory: tuple[Any, list[int]], tmp_path: Path) -> None:
    from evidence_cells import Results
    from evidence_figures import draw
    from evidence_plan import SEEDS, TUNING

    runs = {
        json.dumps(["methods", "least squares", "MeZO", 0.003, 32, 100_000, None, seed]): {
            "training": 1.0,
            "validation": 1.0,
            "queries": 99_968,
            "steps": 1_562,
            "curve": [[16, 1_024, 90.0]],
        }
        for seed in (*SEEDS, TUNING)
    }
    for found in ({}, runs):
        draw(Results(found), [], tmp_path)
        text = (tmp_path / "evidence-curves.svg").read_text()
        assert text.count("not run") == (3 if found else 4)


class Halves:
    """Examples are lists: collated, with one number each."""

    def __init__(self, x: Tensor, rests: Tensor) -> None:
        self.x, self.rests = x, rests

    def collate(self, rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    def __call__(self, rows: Tensor) -> Tensor:
        return 0.5 * (rows - self.x).square().sum(1) + 100 * self.rests.sum()


def test_a_step_is_compared_with_the_gradient_on_all_examples_of_what_moves(
    theory: tuple[Any, list[int]],
) -> None:
    from evidence_plan import Run
    from evidence_problems import Problem
    from evidence_variance import ROWS_AT_ONCE, Track

    rows = torch.randn(2 * ROWS_AT_ONCE + 88, 3, generator=torch.Generator().manual_seed(0))
    x, rests = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    view = ParameterView({"x": x, "rests": rests}, groups=[Group("rests", perturbation_scale=0.0)])
    problem = Problem(Halves(x, rests), view, rows.tolist(), dict)
    run = Run("variance", "encoder, LoRA", "MeZO", 0.1, 64, None, 2, 0)
    track, gradient = Track(run, problem), -rows.double().mean(0)
    track.look(Step(1, 0, 0.0, 0.1, 0.0))
    x -= 0.1 * 3 * gradient
    track.look(Step(2, 0, 0.0, 0.1, 0.0))
    history = [Step(2, 0, 0.0, 0.1, 0.0, metrics={"variance_data_noise": 1.0})]
    *_, cosine, error, square = track.rows(history)[0]
    assert (cosine, error) == (pytest.approx(1), pytest.approx(4))
    assert square == pytest.approx(float(gradient.square().sum()), rel=1e-3)
    assert not x.requires_grad


def test_a_problem_that_was_watched_is_in_the_table_the_figure_and_the_claims(
    theory: tuple[Any, list[int]], tmp_path: Path
) -> None:
    from evidence_cells import Results
    from evidence_plan import SEEDS, WATCHED, Run
    from evidence_variance import claims, draw, table

    looks = [[step, 1.0, 128.0, 0.9, 0.1, 0.01, 50.0, 2.0] for step in range(2, 22, 2)]
    of = ("variance", "encoder, LoRA")
    runs = {
        Run(*of, method, 0.1, 64, None, 150, seed).key: {"track": looks}
        for method in WATCHED
        for seed in SEEDS
    }
    found = Results(runs)
    share, *errors = claims(found, "")
    assert share[1] == "encoder, LoRA, pairs, b = 64, TrackVariance along the runs, by fifths"
    # p squared is 2 + 128 / 64, of which the gradient is 2.
    assert share[2:4] == ("share of the data 0.50 to 0.50", "in part")
    assert len(errors) == 2
    assert table(found).count("encoder, LoRA, MeZO") == 2 * len(WATCHED)
    draw(found, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text().count('id="axes_') == 4


def test_what_has_no_gradient_is_run_by_methods_there_are_and_read_by_a_table(
    theory: tuple[Any, list[int]],
) -> None:
    from evidence_cells import Where
    from evidence_claims import OBJECTIVES, PRETRAINED
    from evidence_methods import METHODS, OWN
    from evidence_plan import PLAN
    from evidence_problems import PROBLEMS

    cells = [cell for cell in PLAN if cell.piece == "objectives"]
    assert {cell.problem for cell in cells} <= set(PROBLEMS)
    assert {method for cell in cells for method in cell.methods} <= {*METHODS, *OWN}
    run = {Where(c.piece, c.problem, c.queries, c.steps, c.batch_size) for c in cells}
    assert run == {where for where, _ in (*OBJECTIVES.values(), *PRETRAINED.values())}
