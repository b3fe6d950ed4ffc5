"""The questions that losses put to a served model, which gives numbers for tokens, not logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from objectives._model import Batch
from objectives._padding import token_mask
from zo_adapt.errors import NotServableError
from zo_adapt.serve.asking import Elsewhere
from zo_adapt.serve.protocol import Writing


class Absent(nn.Module):
    """Stands for a model of which nothing is here, not even its configuration."""

    def generate(self, **_: Any) -> Any:
        """Nothing.

        Raises:
            NotServableError: Always.
        """
        raise NotServableError(
            "this objective was given no model: it is answered by a server alone; ask it inside "
            "answered_by(server), or give it the model"
        )


def rows_of(batch: Batch) -> list[list[int]]:
    """The texts of a batch, without padding."""
    mask = token_mask(batch)
    return [row[keep].tolist() for row, keep in zip(batch["input_ids"], mask, strict=True)]


def scored(there: Elsewhere, batch: Batch, places: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of tokens, and the largest other one at each, (n,), fp32.

    Args:
        there: The model.
        batch: Padded on the right.
        places: True where the next token is asked about, (b, t - 1).
    """
    first = places.long().argmax(1) + 1
    found = there.score(rows_of(batch), first.tolist(), others=True)
    scores, others = torch.full((2, *places.shape), torch.nan)
    for row, one in enumerate(found):
        length = len(one.log_probs) - 1
        scores[row, :length] = torch.from_numpy(one.log_probs[1:])
        if one.others is not None:
            others[row, :length] = torch.from_numpy(one.others[1:])
    return scores[places], others[places]


def written(
    there: Elsewhere, ids: Tensor, mask: Tensor, writing: Writing, seeds: Sequence[int]
) -> list[list[int]]:
    """What the model goes on with after padded prompts, each drawn by its own seed."""
    texts = rows_of({"input_ids": ids, "attention_mask": mask})
    return there.generate(texts, writing, seeds if writing.temperature > 0 else None)
