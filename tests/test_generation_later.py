"""Rewards that wait do so while the next texts are written: same calls, values and errors."""

import asyncio
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_generation import a_reward, mean_id, prompts
from test_generation_joined import evaluated, lora, probes_of, same
from tiny_models import tiny_model, token_rows

from objectives import CausalLMLoss, GenerationReward
from objectives._generator import Generator
from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import DataError, NonFiniteObjectiveError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SHORT = 0.03  # seconds, far more than tiny texts take
APART = {"joint_rows": "off", "reuse_trunk": "off"}


class Begun:
    """Counts the calls of ``generate``, so that a reward can wait for the next one."""

    def __init__(self) -> None:
        self.count, self._changed = 0, threading.Condition()
        self.then: Callable[[int], None] = lambda count: None

    def add(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()
        self.then(self.count)

    def comes(self, number: int, seconds: float = 5.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.count >= number, seconds)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Begun]:
    found, real = Begun(), Generator.__call__

    def counted(self: Any, *args: Any) -> Any:
        found.add()
        return real(self, *args)

    monkeypatch.setattr(Generator, "__call__", counted)
    before = set(threading.enumerate())
    yield found
    names = {thread.name for thread in set(threading.enumerate()) - before}
    own = {name for name in names if name.startswith("zo_adapt")}
    assert own <= {"zo_adapt-async"}, "no thread is left but that of the loop"


class Waits:
    """A reward that waits for the next texts to be begun; it keeps what it was called with."""

    def __init__(self, begun: Begun, last: int) -> None:
        self.begun, self.last = begun, last
        self.calls: list[list[list[int]]] = []
        self.threads: list[threading.Thread] = []
        self.met: list[bool] = []
        self.now = self.most = 0
        self.gradients: set[bool] = set()

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.now += 1
        self.most = max(self.most, self.now)
        self.calls.append(completion_ids)
        self.threads.append(threading.current_thread())
        self.gradients.add(torch.is_grad_enabled())
        own = len(self.calls)
        if own in (1, self.last):
            time.sleep(SHORT)
        else:
            self.met.append(self.begun.comes(own + 1))
        self.now -= 1
        return mean_id(completion_ids)


def asked(reward: GenerationReward, **options: Any) -> Any:
    return evaluated(reward, probes_of(reward), **{**APART, **options})


def test_a_function_that_waits_does_so_while_the_next_texts_are_written(begun: Begun) -> None:
    model = lora("llama")
    expected, _ = asked(a_reward(model=model))
    calls, begun.count = begun.count, 0
    waits = Waits(begun, calls)
    found, evaluator = asked(a_reward(waits, model))
    assert same(found, expected)
    assert len(waits.calls) == calls == 12
    assert waits.met == [True] * 10, "all but the first, which is measured, and the last"
    assert waits.most == 1, "one call at a time"
    assert waits.gradients == {False}
    assert evaluator.queries == 40
    assert waits.threads[0] is threading.main_thread()
    # The texts of each call, in the order in which they are written.
    begun.count, plain = 0, Waits(begun, 0)
    plain.begun.comes = lambda number: True  # type: ignore[method-assign, misc, assignment]
    reward = a_reward(plain, model)
    reward.predict_later = None
    asked(reward)
    assert plain.calls == waits.calls
    assert set(plain.threads) == {threading.main_thread()}


def test_async_rewards_wait_from_the_first_call_on(begun: Begun) -> None:
    model, calls = lora("llama"), list[int]()
    expected, _ = asked(a_reward([mean_id, mean_id], model))
    last, begun.count = begun.count, 0

    async def served(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(len(completion_ids))
        async with asyncio.timeout(5):
            while begun.count <= len(calls) < last:
                await asyncio.sleep(0.001)
        return mean_id(completion_ids)

    found, _ = asked(a_reward([mean_id, served], model))
    assert same(found, expected)
    assert calls == [3] * 8 + [4] * 4


@pytest.mark.parametrize("options", [{}, {"joint_rows": 12}, {"micro_batch_size": 2, **APART}])
def test_however_a_step_is_cut_the_values_are_the_same(options: dict[str, Any]) -> None:
    async def served(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        found = mean_id(completion_ids)
        return [None if int(one * 6) % 2 else one for one in found]

    reward = a_reward([served, mean_id], lora("llama"))
    probes = probes_of(reward)
    found, _ = evaluated(reward, probes, **options)
    reward.predict_later = None
    assert same(found, evaluated(reward, probes, **options)[0])


def test_what_computes_stays_in_its_thread_and_so_does_what_comes_before_it() -> None:
    threads: dict[str, set[str]] = {"computes": set(), "waits": set(), "last": set()}

    def computes(completion_ids: list[list[int]], **_: Any) -> list[float]:
        threads["computes"].add(threading.current_thread().name)
        end = time.thread_time() + SHORT
        while time.thread_time() < end:
            pass
        return mean_id(completion_ids)

    def waits(completion_ids: list[list[int]], **_: Any) -> list[float]:
        threads["waits"].add(threading.current_thread().name)
        time.sleep(SHORT)
        return mean_id(completion_ids)

    def last(completion_ids: list[list[int]], **_: Any) -> list[float]:
        threads["last"].add(threading.current_thread().name)
        time.sleep(SHORT)
        return mean_id(completion_ids)

    reward = a_reward([waits, computes, last], lora("llama"))
    evaluated(reward, probes_of(reward, (2,), 3), **APART)
    main = threading.main_thread().name
    assert threads["computes"] == threads["waits"] == {main}
    assert threads["last"] == {main, "zo_adapt-background"}


def test_a_function_that_is_bound_to_its_thread_is_called_there(begun: Begun) -> None:
    calls: list[bool] = []

    def waits(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(threading.current_thread() is threading.main_thread())
        if not calls[-1]:
            raise RuntimeError("There is no current event loop in thread 'x'.")
        time.sleep(SHORT)
        return mean_id(completion_ids)

    model = lora("llama")
    reward = a_reward([waits, mean_id], model)
    reward.reward_funcs._waits[1] = True  # as if it had waited once
    found, _ = asked(reward)
    assert same(found, asked(a_reward([mean_id, mean_id], model))[0])
    assert False in calls


def fails_at(number: int, error: BaseException) -> Any:
    calls: list[int] = []

    def rigged(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(len(completion_ids))
        time.sleep(SHORT)
        if len(calls) == number:
            raise error
        return mean_id(completion_ids)

    async def awaited(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return rigged(completion_ids)

    return rigged, awaited, calls


@pytest.mark.parametrize(
    ("error", "is_async"),
    [
        (ArithmeticError("own"), False),
        (ArithmeticError("own"), True),
        (KeyError("answer"), False),
        (KeyError("answer"), True),
        (SystemExit(3), False),
    ],
)
def test_an_error_is_that_of_the_function_and_nothing_is_called_after_it(
    error: BaseException, is_async: bool, begun: Begun
) -> None:
    rigged, awaited, calls = fails_at(4, error)
    reward = a_reward(awaited if is_async else rigged, lora("llama"))
    before = {name: value.clone() for name, value in reward.model.state_dict().items()}
    kind = DataError if isinstance(error, KeyError) else type(error)
    with pytest.raises(kind) as caught:
        asked(reward)
    assert caught.value is error or isinstance(caught.value.__cause__, KeyError)
    assert len(calls) == 4
    assert all(torch.equal(before[name], v) for name, v in reward.model.state_dict().items())
    assert len(reward(prompts(2))) == 2, "and what has failed is not raised again"


def test_the_first_error_counts_also_where_the_next_texts_cannot_be_written(begun: Begun) -> None:
    def late(completion_ids: list[list[int]], **_: Any) -> list[float]:
        time.sleep(SHORT)
        return [float("nan") if begun.count >= 3 else 1.0] * len(completion_ids)

    def out_of_memory(count: int) -> None:
        if count == 4:
            time.sleep(2 * SHORT)
            raise RuntimeError("out of memory")

    begun.then = out_of_memory
    with pytest.raises(NonFiniteObjectiveError, match="'late' returned nan"):
        asked(a_reward(late, lora("llama")))


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_signal_waits_for_no_reward_and_leaves_nothing_behind(
    has_begun: bool, begun: Begun
) -> None:
    cancelled: list[bool] = []
    waiting = threading.Event()

    async def endless(**_: Any) -> list[float]:
        waiting.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append(True)
        return []

    def stop(count: int) -> None:
        if count == 2:
            assert not has_begun or waiting.wait(5)
            raise KeyboardInterrupt

    begun.then = stop
    reward = a_reward(endless, lora("llama"))
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        asked(reward)
    assert time.perf_counter() - started < 10
    assert cancelled == [True] * waiting.is_set()


def test_a_signal_ends_the_waiting_for_the_last_reward(begun: Begun) -> None:
    calls: list[None] = []

    def stopped(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3 * SHORT)
        return mean_id(completion_ids)

    model = lora("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reward = a_reward(stopped, model)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluated(reward, probes_of(reward, (2,), 3), **APART)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert len(calls) == 3
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())


def test_a_failed_step_goes_back_and_the_run_goes_on_where_it_was(begun: Begun) -> None:
    rigged, _, _ = fails_at(9, ArithmeticError("once"))
    model = lora("llama")
    reward = a_reward(rigged, model)
    view = ParameterView.trainable(model)
    before = {name: value.clone() for name, value in view.tensors.items()}
    options: dict[str, Any] = {
        "batch_size": 4,
        "max_steps": 1,
        "progress": False,
        "evaluation": EvaluationOptions(**APART),
    }
    optimizer = MeZO(displacement=0.25, num_directions=8)
    with pytest.raises(ArithmeticError, match="once"):
        minimize(reward, view, prompts(8), optimizer, **options)
    assert all(torch.equal(before[name], value) for name, value in view.tensors.items())
    again = minimize(reward, view, prompts(8), optimizer, **options)
    after = {name: value.clone() for name, value in view.tensors.items()}
    for name, value in view.tensors.items():
        value.data.copy_(before[name])
    plain = a_reward(mean_id, model)
    plain.predict_later = None
    expected = minimize(plain, view, prompts(8), optimizer, **options)
    assert again.history == expected.history
    assert all(torch.equal(after[name], value) for name, value in view.tensors.items())


def test_a_sum_waits_for_its_rewards_as_well() -> None:
    async def served(completion_ids: list[list[int]], **_: Any) -> list[float]:
        await asyncio.sleep(0.001)
        return mean_id(completion_ids)

    model = tiny_model("llama", "causal")
    examples = [p | {"input_ids": row} for p, row in zip(prompts(6), token_rows(6), strict=True)]
    mixed = CausalLMLoss(model) - 0.01 * a_reward(served, model)
    probes = [Probe(HERE, Batch(as_source(examples, mixed.collate), range(6)))]
    view = ParameterView.trainable(model)
    options = EvaluationOptions(micro_batch_size=2, **APART)  # type: ignore[arg-type]
    (found,) = LocalEvaluator(mixed, view, options).evaluate(probes)
    expected = np.asarray(mixed(mixed.collate(examples)))
    np.testing.assert_allclose(found.per_example, expected, rtol=1e-6)


def test_a_class_with_a_predict_of_its_own_is_asked_by_it() -> None:
    class Twice(GenerationReward):
        def predict(self, batch: Any) -> Any:
            found = super().predict(batch)
            return found._replace(values=2 * found.values)

    model = lora("llama")
    plain = a_reward(model=model)
    twice = Twice(model, plain.tokenizer, mean_id, max_new_tokens=6)
    for one, other in zip(asked(twice)[0], asked(plain)[0], strict=True):
        assert one.value == 2 * other.value


def test_rewards_that_have_waited_can_be_sent_to_another_process() -> None:
    reward = a_reward([sleepy, served_mean], lora("llama"))
    asked(reward)
    again = pickle.loads(pickle.dumps(reward.reward_funcs))
    given = (["a"], ["b"], [[3, 5]], {})
    assert again(*given).values == reward.reward_funcs(*given).values == [8.0]


def sleepy(completion_ids: list[list[int]], **_: Any) -> list[float]:
    time.sleep(0.01)
    return mean_id(completion_ids)


async def served_mean(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return mean_id(completion_ids)
