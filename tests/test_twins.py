"""Reference twins: the papers' algorithm boxes on dense float64 vectors, equal at every step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from problems import Problem, dense, flat, logistic, problem
from torch import Tensor

from zo_adapt import ZOPAGE, ZOSAGA, ZOSPIDER, ZOSTORM, ZOSVRG, MeZO, MeZOSVRG
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import as_source
from zo_adapt.evaluation.local import LocalEvaluator

Loss = Callable[[Tensor, Tensor], float]
MU, SEED, BATCH, STEPS = 0.05, 42, 6, 25


class Twin:
    """The algorithms on one dense vector; ``seeds(count)`` names the next directions.

    ``rows`` are those of the step's probes, in the engine's order: the pair of each direction.
    """

    def __init__(self, p: Problem, seeds: Callable[[int], list[int]]) -> None:
        self.theta, self.data, self.seeds = flat(p.view).clone(), p.data, seeds
        self.view = p.view
        self.terms: dict[int, Tensor] = {}

    def loss(self, theta: Tensor, rows: Sequence[int]) -> float:
        return float(logistic(theta, self.data[list(rows)]).mean())

    def spsa(self, theta: Tensor, rows: Sequence[int], z: Tensor) -> Tensor:
        """Equation 1 of both papers."""
        difference = self.loss(theta + MU * z, rows) - self.loss(theta - MU * z, rows)
        return difference / (2 * MU) * z

    def forward(self, theta: Tensor, rows: Sequence[int], z: Tensor) -> Tensor:
        return (self.loss(theta + MU * z, rows) - self.loss(theta, rows)) / MU * z

    def directions(self, count: int) -> list[Tensor]:
        return [dense(self.view, seed) for seed in self.seeds(count)]

    def mezo(self, rows: Sequence[Sequence[int]], lr: float, k: int) -> None:
        """MeZO, Algorithm 1, averaged over k directions; two probes for each."""
        z = self.directions(k)
        g = sum((self.spsa(self.theta, rows[2 * i], z[i]) for i in range(k)), torch.zeros(()))
        self.theta = self.theta - lr * g / k

    def mezo_one_sided(self, rows: Sequence[Sequence[int]], lr: float) -> None:
        """The same with forward differences; the first probes are the base points."""
        parts = list(dict.fromkeys(rows))
        shares = rows[len(parts) :]
        z = self.directions(len(shares))
        g = [self.forward(self.theta, row, zi) for row, zi in zip(shares, z, strict=True)]
        self.theta = self.theta - lr * torch.stack(g).mean(0)

    def mezo_others(self, rows: Sequence[Sequence[int]], lr: float) -> None:
        """Each direction's value less the mean of the others on the same rows."""
        z = self.directions(len(rows))
        f = [self.loss(self.theta + MU * zi, row) for row, zi in zip(rows, z, strict=True)]
        g = torch.zeros_like(self.theta)
        for i, row in enumerate(rows):
            others = [f[j] for j, other in enumerate(rows) if other == row and j != i]
            g += (f[i] - sum(others) / len(others)) / MU * z[i] / len(rows)
        self.theta = self.theta - lr * g

    def mezo_svrg(
        self, t: int, rows: Sequence[Sequence[int]], q: int, etas: Any, coupling: str
    ) -> None:
        """MeZO-SVRG, Algorithm 1, with a real snapshot."""
        if t % q == 0:
            z = self.directions(len(rows) // 2)
            parts = [self.spsa(self.theta, rows[2 * i], zi) for i, zi in enumerate(z)]
            self.g = torch.stack(parts).mean(0)
            self.snapshot = self.theta.clone()
            self.theta = self.theta - etas[0] * self.g
            return
        (z1,) = self.directions(1)
        z2 = z1 if coupling == "shared" else self.directions(1)[0]
        here, there = self.spsa(self.theta, rows[0], z1), self.spsa(self.snapshot, rows[0], z2)
        self.theta = self.theta - etas[1] * (here - there + self.g)

    def zo_svrg(self, t: int, rows: Sequence[Sequence[int]], q: int, lr: float) -> None:
        """ZO-SVRG, Algorithm 2: a direction for every sample."""
        samples = [rows[i] for i in range(0, len(rows) if t % q == 0 else len(rows) // 2, 2)]
        z = self.directions(len(samples))

        def g(theta: Tensor) -> Tensor:
            each = [self.spsa(theta, row, zi) for row, zi in zip(samples, z, strict=True)]
            return torch.stack(each).mean(0)

        if t % q == 0:
            self.snapshot, self.g = self.theta.clone(), g(self.theta)
            self.theta = self.theta - lr * self.g
        else:
            self.theta = self.theta - lr * (g(self.theta) - g(self.snapshot) + self.g)

    def zo_svrg_coordinates(self, t: int, rows: Sequence[Sequence[int]], q: int, lr: float) -> None:
        """ZO-SVRG-Coord (Liu et al. 2018): all coordinates, on the rows of the batch."""
        # Lengths are fp32 in the engine.
        root = float(torch.tensor(len(self.theta)).sqrt())
        step, unit = MU * root, root**2 / len(self.theta)

        def g(theta: Tensor) -> Tensor:
            e = torch.eye(len(theta), dtype=torch.float64)
            each = [
                self.loss(theta + step * one, rows[0]) - self.loss(theta - step * one, rows[0])
                for one in e
            ]
            return unit * torch.tensor(each, dtype=torch.float64) / (2 * step)

        assert len(set(rows)) == 1
        if t % q == 0:
            self.snapshot, self.g = self.theta.clone(), g(self.theta)
            self.theta = self.theta - lr * self.g
        else:
            self.theta = self.theta - lr * (g(self.theta) - g(self.snapshot) + self.g)

    def recursive(self, rows: Sequence[Sequence[int]], lr: float, keep: float, whole: bool) -> None:
        """SPIDER, PAGE and STORM: v = g_I(theta) + keep (v - g_I(theta before))."""
        if whole:
            z = self.directions(len(rows) // 2)
            parts = [self.spsa(self.theta, rows[2 * i], zi) for i, zi in enumerate(z)]
            self.v = torch.stack(parts).mean(0)
        else:
            (z1,) = self.directions(1)
            here, there = (self.spsa(theta, rows[0], z1) for theta in (self.theta, self.before))
            self.v = here + keep * (self.v - there)
        self.before = self.theta
        self.theta = self.theta - lr * self.v

    def saga(self, rows: Sequence[Sequence[int]], lr: float) -> None:
        """SAGA with a term for every example, drawn anew at each visit."""
        samples = [row[0] for row in rows[::2]]
        new = [
            self.spsa(self.theta, [i], z)
            for i, z in zip(samples, self.directions(len(samples)), strict=True)
        ]
        if not self.terms:
            self.terms = dict(zip(samples, new, strict=True))
            v = torch.stack(new).mean(0)
        else:
            v = torch.stack([n - self.terms[i] for i, n in zip(samples, new, strict=True)]).mean(0)
            v = v + torch.stack(list(self.terms.values())).mean(0)
            self.terms |= dict(zip(samples, new, strict=True))
        self.theta = self.theta - lr * v


def side_by_side(
    make: Callable[[], Any], noise: str
) -> Iterator[tuple[int, list[tuple[int, ...]], Twin]]:
    """Engine and twin: yields (step, rows of its probes, twin), then compares the weights."""
    p = problem(logistic, noise=noise)
    engine, source_of_seeds = make(), make()
    samples = Samples(as_source(p.data), BATCH, SEED)
    evaluator = LocalEvaluator(p.objective, p.view)
    engine.start(p.view, SEED)
    source_of_seeds.start(p.view, SEED)
    twin = Twin(p, source_of_seeds.state.new_seeds)
    start = twin.theta
    for t in range(STEPS):
        probes = engine.ask(samples)
        info = engine.tell(evaluator.evaluate(probes))
        p.view.apply(info.update)
        yield t, [probe.batch.rows for probe in probes], twin
        assert torch.allclose(flat(p.view), twin.theta, rtol=1e-9, atol=1e-12), f"step {t}"
    assert float((flat(p.view) - start).norm()) > 0.1, "nothing moved, so nothing was compared"


NOISES = pytest.mark.parametrize("noise", ["gaussian", "rademacher"])


@NOISES
@pytest.mark.parametrize("k", [1, 3, 10])
def test_mezo(k: int, noise: str) -> None:
    def make() -> MeZO:
        return MeZO(0.1, perturbation_scale=MU, num_directions=k, one_sided=False, normalize=False)

    for _, rows, twin in side_by_side(make, noise):
        twin.mezo(rows, 0.1, k)


@NOISES
def test_mezo_one_sided(noise: str) -> None:
    def make() -> MeZO:
        return MeZO(
            0.1,
            perturbation_scale=MU,
            num_directions=3,
            one_sided=True,
            normalize=False,
            shaping="base",
        )

    for _, rows, twin in side_by_side(make, noise):
        assert sum(map(len, rows)) == 4 * BATCH
        twin.mezo_one_sided(rows, 0.1)


@NOISES
def test_mezo_one_sided_with_the_others_as_baseline(noise: str) -> None:
    def make() -> MeZO:
        return MeZO(0.1, perturbation_scale=MU, num_directions=3, one_sided=True, normalize=False)

    for _, rows, twin in side_by_side(make, noise):
        assert sum(map(len, rows)) == 3 * BATCH
        twin.mezo_others(rows, 0.1)


@NOISES
@pytest.mark.parametrize("coupling", ["shared", "independent"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("size", ["all", 16])
def test_mezo_svrg(size: Any, k: int, coupling: str, noise: str) -> None:
    def make() -> MeZOSVRG:
        return MeZOSVRG(
            lr=0.02,
            snapshot_lr=0.05,
            snapshot_interval=4,
            snapshot_size=size,
            num_directions=k,
            perturbation_scale=MU,
            coupling=coupling,  # type: ignore[arg-type]
            one_sided=False,
            normalize=False,
            schedule="constant",
        )

    for t, rows, twin in side_by_side(make, noise):
        assert sum(map(len, rows)) == (
            2 * (24 if size == "all" else size) if t % 4 == 0 else 4 * BATCH
        )
        twin.mezo_svrg(t, rows, 4, (0.05, 0.02), coupling)


@NOISES
@pytest.mark.parametrize("size", ["all", 8])
def test_zo_svrg(size: Any, noise: str) -> None:
    def make() -> ZOSVRG:
        return ZOSVRG(
            0.02,
            snapshot_interval=3,
            snapshot_size=size,
            perturbation_scale=MU,
            normalize=False,
            schedule="constant",
        )

    for t, rows, twin in side_by_side(make, noise):
        assert sum(map(len, rows)) == (
            2 * (24 if size == "all" else size) if t % 3 == 0 else 4 * BATCH
        )
        twin.zo_svrg(t, rows, 3, 0.02)


@pytest.mark.parametrize("size", ["all", 8])
def test_zo_svrg_by_coordinates(size: Any) -> None:
    def make() -> ZOSVRG:
        return ZOSVRG(
            0.2,
            snapshot_interval=3,
            snapshot_size=size,
            perturbation_scale=MU,
            coordinates=True,
        )

    for t, rows, twin in side_by_side(make, "coordinates"):
        assert len(rows) == (20 if t % 3 == 0 else 40)
        assert len(rows[0]) == ((24 if size == "all" else size) if t % 3 == 0 else BATCH)
        twin.zo_svrg_coordinates(t, rows, 3, 0.2)


@NOISES
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("size", ["all", 16])
def test_spider(size: Any, k: int, noise: str) -> None:
    def make() -> ZOSPIDER:
        return ZOSPIDER(
            0.02,
            snapshot_interval=4,
            snapshot_size=size,
            num_directions=k,
            perturbation_scale=MU,
        )

    for t, rows, twin in side_by_side(make, noise):
        twin.recursive(rows, 0.02, 1.0, t % 4 == 0)


@NOISES
def test_page(noise: str) -> None:
    def make() -> ZOPAGE:
        return ZOPAGE(0.02, restart_probability=0.3, perturbation_scale=MU)

    restarts = []
    for _, rows, twin in side_by_side(make, noise):
        restarts.append(sum(map(len, rows)) == 48)
        assert sum(map(len, rows)) == (48 if restarts[-1] else 4 * BATCH)
        twin.recursive(rows, 0.02, 1.0, restarts[-1])
    assert restarts[0] and 2 <= sum(restarts) < STEPS - 5


@NOISES
@pytest.mark.parametrize("momentum", [0.2, 1.0])
def test_storm(momentum: float, noise: str) -> None:
    def make() -> ZOSTORM:
        return ZOSTORM(0.02, momentum=momentum, num_directions=2, perturbation_scale=MU)

    for t, rows, twin in side_by_side(make, noise):
        twin.recursive(rows, 0.02, 1.0 - momentum, t == 0)


def test_what_storm_leaves_out_is_small() -> None:
    """With a = 0.9 three terms are left, and the fourth would be a thousandth."""

    def make() -> ZOSTORM:
        return ZOSTORM(0.02, momentum=0.9, perturbation_scale=MU)

    p = problem(logistic)
    engine, samples = make(), Samples(as_source(p.data), BATCH, SEED)
    evaluator = LocalEvaluator(p.objective, p.view)
    engine.start(p.view, SEED)
    for _ in range(STEPS):
        step = engine.tell(evaluator.evaluate(engine.ask(samples)))
        p.view.apply(step.update)
    assert len(step.update.terms) == 4


@NOISES
def test_saga(noise: str) -> None:
    def make() -> ZOSAGA:
        return ZOSAGA(0.02, perturbation_scale=MU)

    for t, rows, twin in side_by_side(make, noise):
        assert sum(map(len, rows)) == (2 * BATCH if t else 48)
        twin.saga(rows, 0.02)
