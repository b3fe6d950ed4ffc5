"""The six families with three layers, and modules that are hard to shift."""

from collections.abc import Callable
from functools import partial

import tiny_models
import torch
from tiny_models import ENCODERS, tiny_model
from torch import Tensor, nn

SMALL = {"vocab_size": 32, "hidden_size": 8, "num_attention_heads": 2}
ENCODER = SMALL | {"num_hidden_layers": 3, "intermediate_size": 16}


_USUAL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3}
_SIZES: dict[str, dict[str, int]] = {
    "distilbert": {"dim": 8, "hidden_dim": 16, "n_layers": 3},
    "gpt2": {"n_embd": 8, "n_layer": 3},
    "opt": {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 3},
}


def three_layers(family: str) -> nn.Module:
    """A classifier of an encoder family, a language model of a decoder's; 8 wide."""
    head = "classification" if family in ENCODERS else "causal"
    return tiny_model(family, head, **_SIZES.get(family, _USUAL))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    family: partial(three_layers, family) for family in tiny_models.FAMILIES
}


def tokens(rows: int = 2) -> Tensor:
    """Input ids that every family takes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 32, (rows, 6), generator=generator)


class Attention(nn.Module):
    """nn.MultiheadAttention reads the weight of its out_proj without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return out


class Recurrent(nn.Module):
    """nn.LSTM keeps its weights in a list beside the registered ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x)[0])
        return out


class Tied(nn.Module):
    """One parameter registered by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


class Twice(nn.Module):
    """One module called twice, with a parameter of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gain * self.inner(torch.tanh(self.inner(x)))
        return out


class Reads(nn.Module):
    """Reads a child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.inner.weight, self.inner.bias)


class ReadsAndCalls(nn.Module):
    """Calls a child and reads its weight afterwards: a tie that no registration shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) @ self.inner.weight


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "encoder_layer": encoder_layer,
    "lstm": Recurrent,
    "tied": Tied,
    "twice": Twice,
    "reads": Reads,
    "reads_and_calls": ReadsAndCalls,
    "sequential": lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
}
