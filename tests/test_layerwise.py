"""Shifting layer by layer: what the blocks share, and what must not be shared."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import Tensor, nn

from objectives import CallableObjective
from zo_adapt import MeZO, ParameterView, Term, minimize
from zo_adapt.noise import philox
from zo_adapt.trajectory.file import Reader

TERMS = [Term(1, 0.05), Term(9, -0.02)]


class Block(nn.Module):
    """A residual layer that may run another one in its midst."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.within: list[nn.Module] = []  # not registered here

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        for module in self.within:
            x = module(x)
        return x + self.down(hidden)


class Offset(nn.Module):
    """Returns its own parameter, as some position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, length: int) -> Tensor:
        return self.weight[:length]


class Model(nn.Module):
    """Two positions, then blocks."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.first, self.second = Offset(), Offset()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        if nested:
            self.blocks[1].within = [self.blocks[3]]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(len(x)), self.second(len(x))  # both held before either is used
        for block in self.blocks[:3]:
            x = block(x + first - second)
        return x


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_values_are_those_of_a_copy(nested: bool) -> None:
    model, x = Model(nested), torch.randn(3, 6)
    with ParameterView.full(model, scratch="copy").shifted(TERMS):
        expected = model(x)
    layer = ParameterView.full(model, scratch="layer")
    for _ in range(2):
        with layer.shifted(TERMS):
            assert torch.equal(model(x), expected)


@torch.no_grad()
def test_blocks_share_one_scratch() -> None:
    model = FAMILIES["bert"]().eval()
    view = ParameterView.full(model, scratch="layer")
    inside = []
    for block in model.bert.encoder.layer:
        linear = block.attention.self.query
        linear.register_forward_pre_hook(lambda module, _: inside.append(module.weight.data_ptr()))
    with view.shifted(TERMS):
        model(tokens())
    assert len(inside) == len(model.bert.encoder.layer) > 1
    live = {p.data_ptr() for p in model.parameters()}
    assert len(set(inside)) == 1
    assert not set(inside) & live


@torch.no_grad()
def test_a_failed_forward_leaves_the_scratch_free() -> None:
    model, x = Model(nested=False), torch.randn(3, 6)
    view = ParameterView.full(model, scratch="layer")
    with pytest.raises(RuntimeError, match="size"), view.shifted(TERMS):
        model(torch.randn(3, 7))
    with ParameterView.full(model, scratch="copy").shifted(TERMS):
        expected = model(x)
    with view.shifted(TERMS):
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_weights_that_were_replaced_are_the_ones_shifted() -> None:
    model, x = Model(nested=False), torch.randn(3, 6)
    view = ParameterView.full(model, scratch="layer")
    with view.shifted(TERMS):
        model(x)
    for parameter in model.parameters():  # as model.load_state_dict(..., assign=True) or .to() do
        parameter.data = parameter.data.clone() * 2
    with ParameterView.full(model, scratch="copy").shifted(TERMS):
        expected = model(x)
    with view.shifted(TERMS):
        assert torch.equal(model(x), expected)


class Texts(nn.Module):
    """A large embedding, read as a table as well, or looked up by keyword."""

    def __init__(self, width: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50_000, width, dtype=dtype)  # 4.8 MB in fp32
        self.head = nn.Linear(width, 3, dtype=dtype)
        self.tied = False
        self.by_keyword = False

    def forward(self, ids: Tensor) -> Tensor:
        found = self.embedding(input=ids) if self.by_keyword else self.embedding(ids)
        if self.tied:
            return found @ self.embedding.weight[:7].T
        return self.head(found).sin() + self.embedding(ids[:, :1]).sum(-1, keepdim=True)


IDS = torch.tensor([[0, 7, 49_999], [7, 7, 3]])


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("width", [24, 32, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_rows_of_an_embedding_are_those_of_the_whole(
    noise: str, width: int, dtype: torch.dtype
) -> None:
    model = Texts(width, dtype)
    copied = ParameterView.full(model, noise=noise, scratch="copy")
    layer = ParameterView.full(model, noise=noise, scratch="layer")
    for decay in (1.0, 0.9):
        with copied.shifted(TERMS, decay):
            expected = model.embedding(IDS)
        with layer.shifted(TERMS, decay):
            assert torch.equal(model.embedding(IDS), expected)
            assert torch.equal(model.embedding(IDS[0, 0]), expected[0, 0])


@pytest.mark.parametrize("way", ["tied", "by_keyword"])
@torch.no_grad()
def test_an_embedding_that_is_read_otherwise_is_made_whole(way: str) -> None:
    model = Texts()
    setattr(model, way, True)
    with ParameterView.full(model, scratch="copy").shifted(TERMS):
        expected = model(IDS)
    with ParameterView.full(model, scratch="layer").shifted(TERMS):
        assert torch.equal(model(IDS), expected)
        assert torch.equal(model(IDS), expected)


@torch.no_grad()
def test_noise_is_made_for_the_rows_that_are_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Texts()
    view = ParameterView.full(model, noise="gaussian", scratch="layer")
    made: list[int] = []

    def counting(words: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            found = words(*arguments)
            made.append(math.prod(found.shape))
            return found

        return counted

    monkeypatch.setattr(philox, "words_numpy", counting(philox.words_numpy))
    monkeypatch.setattr(philox, "words_torch", counting(philox.words_torch))
    with view.shifted(TERMS):
        model(IDS)
    assert 0 < 4 * sum(made) < model.embedding.weight.numel() / 100


@torch.no_grad()
def test_hooks_of_an_embedding_see_the_shifted_rows() -> None:
    model = Texts()
    model.embedding.register_forward_hook(lambda module, inputs, output: output * 2)
    with ParameterView.full(model, scratch="copy").shifted(TERMS):
        expected = model(IDS)
    with ParameterView.full(model, scratch="layer").shifted(TERMS):
        assert torch.equal(model(IDS), expected)


def test_a_direction_costs_its_noise_so_a_share_has_more_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun with four rows a share, as all were once, goes on with four."""
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("zo_adapt.view.tuned.SMALL_BYTES", 0)

    def run(steps: int, name: str = "whole", resume: bool = False) -> tuple[int, str]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        view = ParameterView.full(model, noise="gaussian")
        assert view.by_layer
        objective = CallableObjective(lambda x: (model(x) - 1).square().sum(1))
        path = tmp_path / name
        limits: Any = {"max_steps": steps, "progress": False, "batch_size": 32}
        minimize(objective, view, rows, MeZO(1e-2), trajectory=path, resume=resume, **limits)
        step, _ = next(Reader(path).steps())
        return len(step.update.terms), view.hash()

    assert run(2)[0] == 8 * 32 // 16
    with monkeypatch.context() as before:
        before.setattr("zo_adapt.loops.kept_run.LEAST_SHARES", (4, 4))
        former = run(4, "former")
        run(2, "resumed")
    assert former[0] == 8 * 32 // 4
    assert run(4, "resumed", resume=True) == former
