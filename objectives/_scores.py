"""Looks at the scores of tokens while a text is written."""

import torch
from torch import Tensor

from zo_adapt.errors import NonFiniteObjectiveError

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
        """Refuse texts of NaN.

        Raises:
            NonFiniteObjectiveError: Says how many.
        """
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
