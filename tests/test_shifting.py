"""Shifting layer by layer: what the blocks share, and what must not be shared."""

import pytest
import torch
from families import FAMILIES, tokens
from torch import Tensor, nn

from zo_adapt import ParameterView, Term

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
