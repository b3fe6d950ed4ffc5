"""What serves a model: it loads small adapters by name and answers questions about texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from zo_adapt.term import Shift
from zo_adapt.view.parameters import ParameterView

BASE = ""
"""The name of the model without any adapter."""
Texts = Sequence[Sequence[int]]
"""Token ids, text by text."""


class Candidate(NamedTuple):
    """An adapter at one point.

    Args:
        name: Never used before and never again: a server that keeps anything by name (its prefix
            cache, a file on its disk) cannot answer with what it remembers of another point.
        tensors: By the names that peft saves them under.

    Example:
        >>> import torch
        >>> key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        >>> Candidate("zo-1", {key: torch.zeros(16, 2)}).name
        'zo-1'
    """

    name: str
    tensors: Mapping[str, Tensor]


class Scores(NamedTuple):
    """What a model thinks of the tokens of one text.

    Args:
        log_probs: log p(x_t | x_<t), (t,), natural; NaN at the tokens that were not asked about.
        others: The largest log-probability of any other token there, (t,); None if not asked for.
    """

    log_probs: np.ndarray
    others: np.ndarray | None = None


@dataclass(frozen=True)
class Writing:
    """How texts are to be continued.

    Args:
        max_new_tokens: Longest continuation.
        ends: Tokens that end one; the token is part of it.
        temperature: 0: the likeliest token every time.
        top_p, top_k: Of sampling; 1 and 0 are no limit.
        stops: Texts that end one.
        more: Options by transformers' names.
    """

    max_new_tokens: int
    ends: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stops: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Limits:
    """What a server can do.

    Args:
        adapters: Most of them loaded at once.
        rank: Largest rank of LoRA; None: not known before one is refused.
        target_modules: Last parts of the names of the layers that may be adapted; None: any.
        positions: Longest text in tokens; None: not known.
        dtype: The base's, where it is known.
        scores, generates: Which questions it answers.
        prompts: Whether a candidate may be a soft prompt.
        refuses: Features of an adapter that it cannot run, of ``adapter.FEATURES``.
    """

    adapters: int = 1
    rank: int | None = None
    target_modules: frozenset[str] | None = None
    positions: int | None = None
    dtype: str | None = None
    scores: bool = True
    generates: bool = True
    prompts: bool = False
    refuses: frozenset[str] = frozenset()


class Tuned(Protocol):
    """What a view holds, as candidates: an adapter, or a soft prompt.

    Attributes:
        view: Where it lies.
        config: As JSON can hold it.
        modules: What is tuned, for messages.
    """

    view: ParameterView
    config: dict[str, Any]

    @property
    def modules(self) -> list[str]:
        """See the class."""

    def at(self, points: Sequence[Shift]) -> list[dict[str, Tensor]]:
        """Its tensors at every point."""

    def zero(self) -> dict[str, Tensor] | None:
        """One that changes nothing, where there is one."""

    def check(self, limits: Limits) -> None:
        """Refuse what a server cannot run."""


class ServedModel(Protocol):
    """A language model that runs somewhere, asked about texts under the adapters it has loaded.

    ``names`` and ``token_ids`` are of one length: text i is read under adapter ``names[i]``, "" is
    the base. All texts of a call may be computed in any order and at once; the answers come in the
    order of the texts.

    Attributes:
        limits: What it can do.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from zo_adapt import PeftServer
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> server: ServedModel = PeftServer(GPT2LMHeadModel(config).eval())
        >>> (scores,) = server.score([BASE], [[3, 1, 4, 1]])
        >>> scores.log_probs.shape
        (4,)
    """

    @property
    def limits(self) -> Limits:
        """See the class."""

    def load(self, candidate: Candidate, lora_config: Mapping[str, Any]) -> None:
        """Make an adapter ready.

        Args:
            candidate: Tensors and a new name.
            lora_config: What stands in peft's adapter_config.json.

        Raises:
            ServedModelError: It cannot be loaded.
        """

    def score(
        self,
        names: Sequence[str],
        token_ids: Texts,
        *,
        starts: Sequence[int] | None = None,
        others: bool = False,
    ) -> list[Scores]:
        """Log-probabilities of the tokens of every text.

        Args:
            names: The adapters.
            token_ids: The texts, of at least two tokens.
            starts: The first token of each text that is asked about, at least 1; None: 1.
            others: Also the likeliest other token's.
        """

    def choose(self, names: Sequence[str], token_ids: Texts, choices: Sequence[int]) -> np.ndarray:
        """Log-probabilities of some tokens after every text, (texts, choices)."""

    def generate(
        self,
        names: Sequence[str],
        token_ids: Texts,
        writing: Writing,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The tokens that the model goes on with after every text, up to and with the end.

        Args:
            names: The adapters.
            token_ids: The texts.
            writing: How.
            seeds: Of what is drawn, one for each text: equal ones draw the same numbers under every
                name; None: 0 for each.
        """

    def unload(self, names: Sequence[str]) -> None:
        """Forget adapters; one that is not there is no error."""

    def close(self) -> None:
        """Unload all that was loaded and give back what was taken."""
