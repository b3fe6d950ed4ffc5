"""The scripts behind docs/evidence.md: long runs of the theory are those of the library."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
