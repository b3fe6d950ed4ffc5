"""What becomes of the scores of tokens while a text is written: looked at, and drawn from.

Every row draws from a stream of its own, whatever rows are beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as known

from zo_adapt.errors import NonFiniteObjectiveError

_WARPERS = {
    "temperature": "TemperatureLogitsWarper",
    "top_h": "TopHLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
}
"""What shapes the distribution that is drawn from, in transformers' order."""
SHAPING = tuple(_WARPERS)
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}


class Draws:
    """Adds noise to the scores whose largest then is a draw from their softmax.

    argmax_v [s_v + g_v],  g_v = -log e_v,  e_v ~ Exp(1),    is v with probability softmax(s)_v

    (Gumbel's). A row's noise is a function of its seed and of how many tokens it has written: rows
    of one seed, at several points of the weights, have common random numbers.

    Args:
        settings: Options of ``GenerationConfig`` that shape the distribution, those of ``SHAPING``.
        seeds: Of every row, 0 <= seed < 2**64.

    Example:
        >>> scores = torch.zeros(3, 100)
        >>> one, other, again = Draws({}, [5, 6, 5])(scores.long(), scores)
        >>> bool((one == again).all()), bool((one == other).any())
        (True, False)
    """

    def __init__(self, settings: Mapping[str, Any], seeds: Sequence[int]) -> None:
        self._settings, self.seeds = settings, list(seeds)
        self._warpers: list[Any] | None = None
        self._start = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next token, warped, with noise."""
        if self._warpers is None:
            self._warpers = warpers(self._settings, scores.device)
            self._start = ids.shape[1]  # of an encoder-decoder 1, whatever the prompt
        for warp in self._warpers:
            scores = warp(ids, scores)
        number = {seed: i for i, seed in enumerate(dict.fromkeys(self.seeds))}
        noise = scores.new_empty((len(number), scores.shape[1]))
        stream, place = torch.Generator(scores.device), ids.shape[1] - self._start
        for row, seed in zip(noise, number, strict=True):
            row.exponential_(generator=stream.manual_seed(mixed(seed, place)))
        which = torch.tensor([number[seed] for seed in self.seeds], device=scores.device)
        return scores - noise.log_()[which]


def mixed(seed: int, place: int) -> int:
    """A seed for each place of a text, all bits of which depend on both (SplitMix64)."""
    x = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) >> 1


def warpers(settings: Mapping[str, Any], device: torch.device) -> list[Any]:
    """What transformers applies before it draws, of the settings that say something."""
    found = []
    for name, kind in _WARPERS.items():
        value = settings.get(name)
        if value is None or value == _NEUTRAL.get(name) or (name.endswith("_cutoff") and not value):
            continue
        where = {"device": str(device)} if name == "eta_cutoff" else {}
        found.append(getattr(known, kind)(value, **where))
    return found


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the generators of the CPU and of the texts' GPU are seeded; afterwards as before."""
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it seeds every GPU, also those that are not put back.
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


_SCORES = 256
"""Most scores of a token that are kept."""


class Finite:
    """Passes scores on, and remembers rows without a largest one: any choice of NaN is as good.

    Looked at when all is written: every look waits for a GPU.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~scores.amax(-1).isfinite()
        self._bad = bad if self._bad is None else self._bad | bad
        return scores

    def check(self) -> None:
        """Refuse texts of NaN."""
        bad = 0 if self._bad is None else int(self._bad.sum())
        if bad and self._bad is not None:
            raise NonFiniteObjectiveError(
                f"the model's logits for {bad} of {len(self._bad)} texts are NaN or infinite; a "
                "smaller lr or perturbation_scale keeps them finite"
            )


class Given:
    """Has one token written always, and keeps some of the scores."""

    def __init__(self, token: int) -> None:
        self._token = token
        self.seen: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        some = scores[:, :: -(-scores.shape[1] // _SCORES)]
        self.seen.append(some.float().masked_fill(some.isinf(), 0.0))
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._token] = 0.0
        return forced
