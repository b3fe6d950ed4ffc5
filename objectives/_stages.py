"""A generate in stages: once half of the texts have ended they are left out of the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteria

from objectives._fit import reads, virtual_tokens

_OF_THE_START = (
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "guidance_scale",
    "watermarking_config",
    "cache_implementation",
)
"""Options that count from where a generate starts, or that have another cache."""
_WHEREVER = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")
"""Options of a user that are the same when a text is gone on with."""


class HalfEnded(StoppingCriteria):
    """Stops once at most half of the texts go on, without waiting for a GPU.

    Args:
        ends: Tokens that end a text.
        width: Of the prompts.
    """

    def __init__(self, ends: Sequence[int], width: int) -> None:
        self._width, self._ends = width, torch.tensor(ends)

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether to stop here, the same for all rows."""
        return (2 * self._going(ids).sum() <= len(ids)).expand(len(ids))

    def kept(self, ids: Tensor) -> Tensor:
        """The rows to go on with; none where all have ended."""
        return self._going(ids).nonzero()[:, 0]

    def _going(self, ids: Tensor) -> Tensor:
        self._ends = self._ends.to(ids.device)
        return ~torch.isin(ids[:, self._width :], self._ends).any(1)


def can_go_on(model: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether a text that is stopped and gone on with from its cache is the same text."""
    own = getattr(model, "generation_config", None)
    if own is None or virtual_tokens(model) or reads(model).is_encoder_decoder:
        return False
    said = [name for name in _OF_THE_START if getattr(own, name, None)]
    return not said and not getattr(model, "_is_stateful", False) and set(options) <= set(_WHEREVER)


def rows_of_cache(cache: Any, rows: Tensor, length: int) -> Any:
    """The cache of some rows, of which all tokens but the last were read; None: of another kind."""
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() != length - 1:
        return None
    cache.batch_select_indices(rows)
    return cache
