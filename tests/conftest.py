"""Fixtures of all tests: a printed seed, one thread, and nothing global left changed."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny problems, several test workers: threads would only fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same global generators, and the session's own are put back."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
    assert torch.is_grad_enabled(), "a test left gradients disabled"
    assert torch.get_default_dtype() is torch.float32, "a test left another default dtype"


@pytest.fixture
def seed() -> int:
    """A fresh seed for claims that hold for every seed; ZO_TEST_SEED=... repeats a failure."""
    chosen = int(os.environ.get("ZO_TEST_SEED", str(random.SystemRandom().getrandbits(48))))
    print(f"ZO_TEST_SEED={chosen}")
    return chosen
