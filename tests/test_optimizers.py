"""The contract: every optimizer of the table, in every dtype."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, bits, flat, labelled, logistic, problem, steps, vector
from table import ALL, BATCH, EXAMPLES, ZEROTH_ORDER, Row
from torch import Tensor

from zo_adapt import Adam, Group, ParameterView, Result, Shift, StopReason, minimize
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import as_source
from zo_adapt.errors import FlatObjectiveWarning, ViewError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.optimizers.schedule import Budget, Progress

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
TWO_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EVERY = pytest.mark.parametrize("row", ALL.values(), ids=ALL)
EVERY_ZEROTH = pytest.mark.parametrize("row", ZEROTH_ORDER.values(), ids=ZEROTH_ORDER)
DATA = labelled(EXAMPLES, 10)


def fresh(dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
    return problem(logistic, DATA, dtype, **options)


def run(p: Problem, optimizer: Any, **options: Any) -> Result:
    settings = {"batch_size": BATCH, "max_steps": 8, "seed": 7, "progress": False}
    return minimize(p.objective, p.view, p.data, optimizer, **(settings | options))


def steps_in(dtype: torch.dtype, optimizer: Any) -> bool:
    """Whether it does; Adam in fp16, where its eps is 0, has to be refused before any step."""
    if dtype is not torch.float16 or not isinstance(optimizer, Adam):
        return True
    with pytest.raises(ViewError, match=r"'left' is float16.*float32"):
        run(fresh(dtype), optimizer)
    return False


@EVERY
@DTYPES
def test_same_seed_same_bits_other_seed_other_bits(dtype: torch.dtype, row: Row) -> None:
    hashes, histories = [], []
    used = row.make()
    if not steps_in(dtype, used):
        return
    for optimizer, seed in ((row.make(), 7), (used, 8), (used, 7)):
        p = fresh(dtype, noise=row.noise)
        histories.append(str(run(p, optimizer, seed=seed).history))
        hashes.append(p.view.hash())
    assert hashes[0] == hashes[2] != hashes[1]
    assert histories[0] == histories[2] != histories[1]
    assert fresh(dtype).view.hash() not in hashes


@EVERY
@DTYPES
def test_without_a_rate_nothing_moves(dtype: torch.dtype, row: Row) -> None:
    p = fresh(dtype, noise=row.noise)
    before = p.view.hash()
    optimizer = row.make(schedule=lambda progress: 0.0, weight_decay=0.1)
    if steps_in(dtype, optimizer):
        run(p, optimizer)
    assert p.view.hash() == before


@EVERY_ZEROTH
@DTYPES
def test_weights_move_by_the_updates_alone(dtype: torch.dtype, row: Row) -> None:
    p, replayed = fresh(dtype, noise=row.noise), fresh(dtype, noise=row.noise)
    optimizer = row.make(weight_decay=0.1)
    for info in steps(optimizer, *p, batch_size=BATCH, seed=7, count=10):
        replayed.view.apply(info.update)
        assert replayed.view.hash() == p.view.hash()


@EVERY_ZEROTH
@DTYPES
def test_ask_and_tell_by_hand_are_minimize(dtype: torch.dtype, row: Row) -> None:
    p, by_hand = fresh(dtype, noise=row.noise), fresh(dtype, noise=row.noise)
    hashes: list[str] = []
    result = run(p, row.make(), callback=lambda record: hashes.append(p.view.hash()))
    optimizer, budget = row.make(), Budget(max_steps=8)
    samples, evaluator = Samples(as_source(DATA), BATCH, 7), LocalEvaluator(*by_hand[1::-1])
    optimizer.start(by_hand.view, 7)
    for record, expected in zip(result.history, hashes, strict=True):
        probes = optimizer.ask(samples)
        answers = evaluator.evaluate(probes)
        done = [budget.used(n, 0) for n in (record.step - 1, record.step)]
        info = optimizer.tell(answers, Progress(done[0], done[1] - done[0]))
        by_hand.view.apply(info.update)
        assert by_hand.view.hash() == expected
        assert (info.value, info.lr, info.kind) == (record.value, record.lr, record.kind)
        assert evaluator.queries == record.queries


@EVERY
def test_queries_are_exact_and_within_the_budget(row: Row) -> None:
    p = fresh(noise=row.noise)
    rows_seen = []

    def counting(batch: Tensor) -> Any:
        rows_seen.append(len(batch))
        return p.objective(batch)

    counting.mean_over_rows = True  # type: ignore[attr-defined]
    expected = [row.queries(t) for t in range(7)]
    budget = sum(expected) + row.queries(7) - 1  # one short of an eighth step
    counted = Problem(p.view, counting, DATA)
    result = run(counted, row.make(), max_steps=None, max_queries=budget)
    assert result.stop_reason is StopReason.MAX_QUERIES
    assert [r.queries for r in result.history] == [sum(expected[: t + 1]) for t in range(7)]
    assert result.queries == sum(rows_seen) == sum(expected)
    exact = run(fresh(noise=row.noise), row.make(), max_steps=None, max_queries=sum(expected))
    assert (exact.steps, exact.queries) == (7, sum(expected))


@EVERY_ZEROTH
def test_the_noise_of_the_update_is_the_noise_of_the_probes(row: Row) -> None:
    p = fresh(noise=row.noise)
    optimizer = row.make()
    optimizer.start(p.view, 7)
    samples, evaluator = Samples(as_source(DATA), BATCH, 7), LocalEvaluator(p.objective, p.view)
    probed: set[int] = set()
    for _ in range(7):
        probes = optimizer.ask(samples)
        probed |= {term.seed for probe in probes for term in probe.at.terms}
        info = optimizer.tell(evaluator.evaluate(probes))
        assert {term.seed for term in info.update.terms} <= probed
        p.view.apply(info.update)


@EVERY_ZEROTH
@DTYPES
def test_a_constant_objective_moves_nothing_and_warns(dtype: torch.dtype, row: Row) -> None:
    p = fresh(dtype, noise=row.noise)
    before = p.view.hash()
    flat_problem = Problem(p.view, lambda batch: torch.ones(len(batch)), DATA)
    with pytest.warns(FlatObjectiveWarning, match="raise perturbation_scale"):
        run(flat_problem, row.make(weight_decay=0.1), max_steps=25)
    assert p.view.hash() == before


@EVERY_ZEROTH
def test_no_warning_while_the_loss_moves_now_and_then(row: Row) -> None:
    p = fresh(noise=row.noise)
    count = [0]

    def counting(batch: Tensor) -> Any:
        count[0] += 1
        return p.objective(batch) if count[0] % 40 < 20 else torch.ones(len(batch))

    run(Problem(p.view, counting, DATA), row.make(), max_steps=30)  # warnings are errors


def keep(hashes: list[str], view: ParameterView) -> Callable[[object], None]:
    """A callback that keeps the hash of the weights after every step, and of those before."""
    hashes.append(view.hash())
    return lambda record: hashes.append(view.hash())


def failing(p: Problem, at: int, failure: Callable[[Tensor], Tensor]) -> Problem:
    """The objective fails in its call number ``at``."""
    count = [0]

    def objective(batch: Tensor) -> Any:
        count[0] += 1
        return failure(p.objective(batch)) if count[0] == at else p.objective(batch)

    objective.mean_over_rows = True  # type: ignore[attr-defined]
    return Problem(p.view, objective, DATA)


def one_bad_row(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(losses: Tensor) -> Tensor:
        scale = torch.ones_like(losses)
        scale[-1] = value
        return losses * scale

    return spoil


@EVERY
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
@TWO_DTYPES
def test_a_loss_that_is_not_finite_stops_at_the_last_good_step(
    dtype: torch.dtype, value: float, row: Row
) -> None:
    for at in (1, 2, 17):
        p = fresh(dtype, noise=row.noise)
        hashes: list[str] = []
        broken = failing(p, at, one_bad_row(value))
        result = run(broken, row.make(), max_steps=30, callback=keep(hashes, p.view))
        assert result.stop_reason is StopReason.NON_FINITE
        assert p.view.hash() == hashes[-1]
        assert result.steps == len(hashes) - 1 < 30
        p.view.norms()


def throw(error: type[BaseException]) -> Callable[[Tensor], Tensor]:
    def raising(losses: Tensor) -> Tensor:
        raise error("from the objective")

    return raising


@EVERY
@TWO_DTYPES
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_objective_leaves_the_last_good_step(
    error: type[BaseException], dtype: torch.dtype, row: Row
) -> None:
    for at in (1, 18):
        p = fresh(dtype, noise=row.noise)
        hashes: list[str] = []
        broken = failing(p, at, throw(error))
        with pytest.raises(error, match="from the objective"):
            run(broken, row.make(), max_steps=30, callback=keep(hashes, p.view))
        assert p.view.hash() == hashes[-1]


@EVERY
def test_tensors_outside_the_view_and_flags_are_untouched(row: Row) -> None:
    p = fresh(noise=row.noise)
    outside = p.view.tensors["right"]
    tensors = {n: t for n, t in p.view.tensors.items() if n != "right"}
    view = ParameterView(tensors, noise=row.noise)
    before = bits(outside).clone()
    run(Problem(view, p.objective, DATA), row.make())
    assert torch.equal(bits(outside), before)
    assert not any(tensor.requires_grad for tensor in p.view.tensors.values())


@EVERY
def test_a_group_with_another_rate(row: Row) -> None:
    still, moving = fresh(noise=row.noise, groups=[Group("bias", lr=0.0)]), fresh(noise=row.noise)
    start = flat(still.view)
    run(still, row.make())
    run(moving, row.make())
    moved = {n: not torch.equal(t, fresh().view.tensors[n]) for n, t in still.view.tensors.items()}
    assert moved == {"left": True, "right": True, "bias": False}
    assert not torch.equal(flat(moving.view), start)


@EVERY_ZEROTH
def test_the_rate_of_a_group_is_a_factor(row: Row) -> None:
    p, faster = (
        fresh(torch.float64, noise=row.noise),
        fresh(torch.float64, noise=row.noise, groups=[Group("bias", lr=3.0)]),
    )
    first = [
        vector(
            q.view, Shift(next(steps(row.make(), *q, batch_size=6, seed=7, count=1)).update.terms)
        )
        for q in (p, faster)
    ]
    factor = torch.cat([torch.ones(8), torch.full((2,), 3.0)]).double()
    assert torch.allclose(first[1], first[0] * factor, rtol=1e-6, atol=1e-12)
