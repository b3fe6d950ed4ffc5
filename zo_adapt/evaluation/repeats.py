"""Whether quantised weights give the same values when a probe is asked again."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from zo_adapt.evaluation.answers import Answer
from zo_adapt.evaluation.values import on_host
from zo_adapt.view.shards import local

LARGE = 1 << 10
"""Elements of an integer buffer from which it is weights (GPTQ, AWQ), not positions or counts."""


def is_quantised(model: nn.Module | None) -> bool:
    """Whether some weights are integers, or tensors of a class of their own.

    Example:
        >>> is_quantised(nn.Linear(2, 2))
        False
        >>> layer = nn.Linear(2, 2)
        >>> layer.register_buffer("qweight", torch.zeros(64, 64, dtype=torch.int32))
        >>> is_quantised(layer)
        True
    """
    if model is None:
        return False
    kinds = (torch.Tensor, nn.Parameter)
    odd = (type(local(p)) not in kinds or not p.is_floating_point() for p in model.parameters())
    integers = (not b.is_floating_point() and b.numel() >= LARGE for b in model.buffers())
    return any(odd) or any(integers)


def why_not_the_same(first: Sequence[Answer], ask: Callable[[], Sequence[Answer]]) -> str | None:
    """How the answers to the same probe differ when it is asked again; None if they do not.

    Args:
        first: Answers that are there.
        ask: Gives them again; what it evaluates is not counted as queries.
    """
    before, after = _numbers(first), _numbers(ask())
    if np.array_equal(before, after):
        return None
    change = abs(after - before).max() / abs(before).max()
    return f"the same probe has other values when it is asked again (relatively {change:.1g})"


def _numbers(answers: Sequence[Answer]) -> np.ndarray:
    found = on_host([answer.returned for answer in answers])
    checked = [a._replace(returned=one).checked() for a, one in zip(answers, found, strict=True)]
    return np.concatenate([np.ravel(answer.returned) for answer in checked])
