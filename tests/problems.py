"""Small functions of a view, dense references, and the loop taken apart: shared by the tests."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_adapt import ParameterView
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.noise.distributions import Noise, draw
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import Shift, Step, Term

Rowwise = Callable[[Tensor, Tensor], Tensor]
"""``f(theta, rows)``: the loss of every row, from the view's tensors as one float64 vector."""


class Problem(NamedTuple):
    """A function of a view and its data."""

    view: ParameterView
    objective: Callable[[Any], Any]
    data: Tensor


def flat(view: ParameterView) -> Tensor:
    """The view as one float64 vector (differentiable)."""
    return torch.cat([tensor.reshape(-1).double() for tensor in view.tensors.values()])


def dense(view: ParameterView, seed: int) -> Tensor:
    """z(seed) over the whole view as one float64 vector."""
    cpu = torch.device("cpu")
    parts = [draw(view.noise, seed, name, t.shape, cpu) for name, t in view.tensors.items()]
    return torch.cat([part.flatten() for part in parts]).double()


def shaped(noise: Noise, seed: int, name: str, like: Tensor) -> Tensor:
    """z(seed, name) in the shape of a tensor, fp32."""
    return draw(noise, seed, name, like.shape, torch.device("cpu"))


def reference(
    noise: Noise, name: str, tensor: Tensor, terms: list[Term], decay: float = 1.0
) -> Tensor:
    """decay * tensor + sum c z: fp32 arithmetic terms in order, one rounding at the end."""
    arithmetic = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    total = tensor.detach().to(arithmetic, copy=True)
    if decay != 1.0:
        total = total * torch.tensor(decay, dtype=arithmetic)
    for term in terms:
        z = shaped(noise, term.seed, name, tensor).to(arithmetic)
        total = total + z * torch.tensor(term.coefficient, dtype=arithmetic)
    return total.to(tensor.dtype)


def squares(theta: Tensor, rows: Tensor) -> Tensor:
    """(x w - y)^2 / 2, the target in the last column."""
    return (rows[:, :-1] @ theta - rows[:, -1]).square() / 2


def logistic(theta: Tensor, rows: Tensor) -> Tensor:
    """log(1 + exp(-y x w)), the label in the last column; not a quadratic."""
    return torch.nn.functional.softplus(-rows[:, -1] * (rows[:, :-1] @ theta))


def regression(n: int, d: int, noise: float = 0.001, seed: int = 0) -> Tensor:
    """Rows (x, y) of y = x w + noise, as in Appendix B.2 of the MeZO-SVRG paper."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    y = x @ w + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.cat([x, y[:, None]], dim=1)


def labelled(n: int, d: int, seed: int = 0) -> Tensor:
    """Rows (x, label) with label +-1 by the sign of a noisy x w."""
    rows = regression(n, d, noise=0.5, seed=seed)
    rows[:, -1] = rows[:, -1].sign()
    return rows


def problem(
    function: Rowwise = logistic,
    data: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    start: float = 0.3,
    **options: Any,
) -> Problem:
    """``function`` over a view of two matrices of one shape and a vector (d = 10 by default)."""
    rows = labelled(24, 10) if data is None else data
    d = rows.shape[1] - 1
    side = max((d - 2) // 4, 0)
    tensors: Mapping[str, Tensor] = {
        "left": torch.full((2, side), start, dtype=dtype),
        "right": torch.full((2, side), -start, dtype=dtype),
        "bias": torch.full((d - 4 * side,), start, dtype=dtype),
    }
    view = ParameterView({name: t for name, t in tensors.items() if t.numel()}, **options)
    return Problem(view, lambda batch: function(flat(view), batch), rows)


def steps(
    optimizer: Any,
    view: ParameterView,
    objective: Callable[[Any], Any],
    data: Any,
    *,
    batch_size: int | None,
    seed: int,
    count: int,
) -> Iterator[Step]:
    """The loop of ``minimize`` taken apart: one Step at a time."""
    evaluator, budget = LocalEvaluator(objective, view), Budget(max_steps=count)
    samples = Samples(as_source(data), batch_size, seed)
    optimizer.start(view, seed)
    for _ in range(count):
        info = optimizer.step(evaluator, samples, budget)
        view.apply(info.update)
        yield info


def vector(view: ParameterView, update: Shift) -> Tensor:
    """The terms of an update as one float64 vector (groups included, decay left out)."""
    zero = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in view.tensors.items()}
    image = ParameterView(zero, groups=view.groups[:-1], noise=view.noise.name)
    image.apply(Shift(update.terms))
    return flat(image)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
