"""Sampling in which every row draws from a stream of its own, whatever rows are beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as known

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

    (Gumbel's). A row's noise is a function of its seed and of how many tokens were drawn before:
    rows of one seed, at several points of the weights, have common random numbers.

    Args:
        settings: Options of ``GenerationConfig`` that shape the distribution, those of ``SHAPING``.
        seeds: Of every row, 0 <= seed < 2**63.

    Example:
        >>> scores = torch.zeros(3, 100)
        >>> one, other, again = Draws({}, [5, 6, 5])(scores.long(), scores)
        >>> bool((one == again).all()), bool((one == other).any())
        (True, False)
    """

    def __init__(self, settings: Mapping[str, Any], seeds: Sequence[int]) -> None:
        self._settings, self._warpers = settings, None
        self._distinct = {seed: number for number, seed in enumerate(dict.fromkeys(seeds))}
        self._rows = [self._distinct[seed] for seed in seeds]
        self._streams: list[torch.Generator] = []
        self._index: Tensor | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next token, warped, with noise."""
        if self._warpers is None:
            self._begin(scores.device)
        for warp in self._warpers:
            scores = warp(ids, scores)
        noise = scores.new_empty((len(self._streams), scores.shape[1]))
        for row, stream in zip(noise, self._streams, strict=True):
            row.exponential_(generator=stream)
        return scores - noise.log_()[self._index]

    def _begin(self, device: torch.device) -> None:
        self._warpers = warpers(self._settings, device)
        self._index = torch.tensor(self._rows, device=device)
        for seed in self._distinct:
            self._streams.append(torch.Generator(device).manual_seed(seed))


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
