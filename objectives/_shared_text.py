"""What need not be computed while texts are written at several points.

Layers that are the same at all points run once for rows that are the same so far; and once half of
the texts have ended they are left out of the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteria

from objectives._fit import reads, virtual_tokens
from zo_adapt.evaluation.model_state import replaced_forwards


class SharedText(StoppingCriteria):
    """Has frozen layers compute one row for all that have the same prompt and text so far.

    At n points the texts of a prompt begin alike, and what the layers before the first tuned one
    make of them is the same: the prompt is read once, not n times, and each token until the texts
    part. Keys and values are written for every row, as ever.

    Looked at after each token as a criterion to stop, which it never is.

    Args:
        layers: Before the first tuned one, in order.
        prompts: Tokens of every row.

    Attributes:
        rows: How many rows each forward has computed in these layers.
    """

    def __init__(self, layers: Sequence[nn.Module], prompts: Sequence[Sequence[int]]) -> None:
        known = {key: number for number, key in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self._layers, self.rows = layers, list[int]()
        self._prompts = torch.tensor([known[tuple(tokens)] for tokens in prompts])
        self.begin()

    def begin(self) -> None:
        """Nothing is written yet."""
        self._set(self._prompts)

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Note which texts still are the same; all go on."""
        last = ids[:, -1]
        self._set(self._group * (int(last.max()) + 1) + last)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self._set(self._group[rows])

    def _set(self, keys: Tensor) -> None:
        distinct, self._group = keys.unique(return_inverse=True)
        self._one = torch.empty_like(distinct)
        self._one[self._group] = torch.arange(len(keys), device=keys.device)
        self._whole = len(distinct) == len(keys)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the layers compute so."""
        last = len(self._layers) - 1
        forwards = {
            layer: self._shared(layer.forward, is_last=number == last)
            for number, layer in enumerate(self._layers)
        }
        with replaced_forwards(forwards):
            yield

    def _shared(self, forward: Callable[..., Any], *, is_last: bool) -> Callable[..., Any]:
        @wraps(forward)
        def shared(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_last:
                self.rows.append(len(self._one))
            if self._whole:
                return forward(hidden, *args, **kwargs)
            given = hidden if len(hidden) == len(self._one) else hidden[self._one]
            args, kwargs = self._of_one(args), self._of_one(kwargs)
            found = forward(given, *args, **kwargs)
            if not is_last:
                return found
            if isinstance(found, Tensor):
                return found[self._group]
            return (found[0][self._group], *found[1:])

        return shared

    def _of_one(self, tree: Any) -> Any:
        """What a layer is called with, of one row for all that are the same."""
        if isinstance(tree, Tensor):
            # One dimension alone is that of positions.
            return tree[self._one] if tree.dim() > 1 and len(tree) == len(self._group) else tree
        if isinstance(tree, dict):
            return {name: self._of_one(value) for name, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(map(self._of_one, tree))
        return _OneOfRows(tree, self._one, self._group) if hasattr(tree, "update") else tree


class _OneOfRows:
    """A cache of all rows, as a layer sees it that computes one row for all that are the same."""

    def __init__(self, cache: Any, one: Tensor, group: Tensor) -> None:
        self._cache, self._one, self._group = cache, one, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Written for every row, read of one."""
        group = self._group
        found = self._cache.update(keys[group], values[group], *args, **kwargs)
        return tuple(each[self._one] for each in found)


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
    """Stops once at most half of the texts go on, without waiting for a GPU."""

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
