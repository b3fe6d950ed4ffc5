r"""Other packages on the least squares of benchmarks/evidence.py, where they are installed.

    python -m pip install --no-deps --target FOLDER \
        mezo==0.0.1 torchzero==0.4.4 eggroll-es==0.2.0 cma==4.5.0 nevergrad==1.0.12 \
        bayesian-optimization==1.4.0 colorama directsearch typing_extensions
    PYTHONPATH=FOLDER python benchmarks/evidence.py --pieces packages
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


class Rows:
    """Minibatches of random rows until the queries are used up; every forward is counted."""

    def __init__(self, data: Tensor, loss: Loss, batch_size: int, queries: int, seed: int) -> None:
        self.data, self.loss, self.batch_size = data, loss, batch_size
        self.left, self.generator = queries, torch.Generator().manual_seed(seed)

    def batches(self, forwards: int) -> Iterator[Tensor]:
        """While so many forwards of a batch are left."""
        while self.left >= forwards * self.batch_size:
            rows = torch.randint(len(self.data), (self.batch_size,), generator=self.generator)
            yield self.data[rows]

    def value(self, x: Tensor, batch: Tensor) -> Tensor:
        """The loss of a batch at x."""
        self.left -= len(batch)
        return self.loss(x, batch).mean()


def of_mezo(x: Tensor, rows: Rows, lr: float) -> None:
    """mezo.update: a pair a step."""
    import mezo

    model = nn.ParameterList([nn.Parameter(x)])
    for seed, batch in enumerate(rows.batches(2)):
        mezo.update(model, batch, lambda m, b: rows.value(m[0], b), 1e-3, lr, seed)


def of_torchzero(x: Tensor, rows: Rows, lr: float) -> None:
    """torchzero's MeZO module with its own settings, and a rate."""
    import torchzero

    x.requires_grad_(True)
    optimizer = torchzero.Optimizer([x], torchzero.m.MeZO(), torchzero.m.LR(lr))
    for batch in rows.batches(3):  # a step may look at the unmoved point, too
        with torch.no_grad():
            optimizer.step(lambda backward=True, b=batch: rows.value(x, b))
    x.requires_grad_(False)


def of_eggroll(x: Tensor, rows: Rows, lr: float) -> None:
    """Eight antithetic pairs a generation, the package's other settings; a reward is maximised."""
    from eggroll import EggrollConfig, LowRankNoiser, evolve_step

    config = EggrollConfig(population_size=16, lr=lr, device="cpu")
    noiser = LowRankNoiser({"x": x.shape}, config)
    for batch in rows.batches(16):
        moves = noiser.sample_perturbations(8)
        fitness = torch.stack([-rows.value(x + move["x"], batch) for move in moves])
        x.copy_(evolve_step({"x": x}, moves, fitness, config)["x"])


def of_cma(x: Tensor, rows: Rows, lr: float) -> None:
    """CMA-ES with its own population; the rate is the first sigma."""
    import cma

    seed = int(rows.generator.initial_seed()) + 1
    search: Any = cma.CMAEvolutionStrategy(x.numpy(), lr, {"seed": seed, "verbose": -9})
    for batch in rows.batches(search.popsize):
        asked = search.ask()
        search.tell(asked, [float(rows.value(torch.from_numpy(one), batch)) for one in asked])
    x.copy_(torch.from_numpy(search.mean))


def of_nevergrad(x: Tensor, rows: Rows, lr: float) -> None:
    """NGOpt's own choice for so many variables and calls; the rate is the first sigma."""
    import nevergrad

    calls = rows.left // rows.batch_size
    space = nevergrad.p.Array(init=x.numpy().copy()).set_mutation(sigma=lr)
    space.random_state.seed(int(rows.generator.initial_seed()))
    search = nevergrad.optimizers.NGOpt(parametrization=space, budget=calls)
    for batch in rows.batches(1):
        asked = search.ask()
        search.tell(asked, float(rows.value(torch.from_numpy(asked.value), batch)))
    x.copy_(torch.from_numpy(search.recommend().value))


def of_cobyqa(x: Tensor, rows: Rows, lr: float) -> None:
    """SciPy's COBYQA; the rate is the first radius, and every call is on rows of its own."""
    from scipy.optimize import minimize

    batches = rows.batches(1)
    calls = rows.left // rows.batch_size
    found = minimize(
        lambda at: float(rows.value(torch.from_numpy(at), next(batches))),
        x.numpy().copy(),
        method="COBYQA",
        options={"maxfev": calls, "initial_tr_radius": lr, "final_tr_radius": 1e-8},
    )
    x.copy_(torch.from_numpy(found.x))


PACKAGES: dict[str, tuple[str, Callable[[Tensor, Rows, float], None]]] = {
    "mezo 0.0.1": ("mezo", of_mezo),
    "torchzero 0.4.4, MeZO": ("torchzero", of_torchzero),
    "eggroll-es 0.2.0": ("eggroll", of_eggroll),
    "cma 4.5.0, CMA-ES": ("cma", of_cma),
    "nevergrad 1.0.12, NGOpt": ("nevergrad", of_nevergrad),
    "SciPy 1.17, COBYQA": ("scipy", of_cobyqa),
}
GRIDS = {
    "eggroll-es 0.2.0": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    "cma 4.5.0, CMA-ES": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    "nevergrad 1.0.12, NGOpt": (3e-2, 3e-1, 3.0),
    "SciPy 1.17, COBYQA": (3e-2, 3e-1, 3.0),
}
"""Of rank-shaped steps, a first sigma and a first radius, which have other units than a rate."""


def installed() -> list[str]:
    """Methods whose packages are here."""
    return [name for name, (module, _) in PACKAGES.items() if importlib.util.find_spec(module)]


def tune(method: str, x: Tensor, rows: Rows, lr: float) -> None:
    """Tune x in place."""
    PACKAGES[method][1](x, rows, lr)
