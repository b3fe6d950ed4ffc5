"""What the tests of frozen-trunk reuse share: models, batches, values with it and without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from zo_adapt import (
    FrozenTrunk,
    ParameterView,
    Term,
)
from zo_adapt.evaluation.trunk.call import Call
from zo_adapt.view.blocks import block_list

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason=f"torch.cuda.is_available() is False (torch {torch.__version__})",
)


LENGTHS = (6, 3, 5, 2, 6, 4)


CLASSIFIERS = ("bert", "roberta", "distilbert")


def made(family: str) -> nn.Module:
    """A model whose hidden states differ a good deal from row to row."""
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


def examples(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, 32, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]


def logits_of(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """Logits at the positions that hold a token, and nothing else of the batch."""

    def objective(batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits
        if logits.dim() == 2:
            return logits
        kept: Tensor = (
            logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits
        )
        return kept

    return objective


def padded(rows: list[dict[str, Any]], side: str, width: int = 6) -> dict[str, Tensor]:
    ids, mask = torch.ones(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        place = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, place], mask[i, place] = torch.tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Blocks that run, by what is inside them: a replaced block's parts are not called."""
    ran: list[int] = []
    handles = []
    for index, block in enumerate(block_list(model)[1]):
        inner = next(
            m for m in block.modules() if isinstance(m, nn.LayerNorm) or "Norm" in type(m).__name__
        )
        handles.append(inner.register_forward_hook(lambda *_, index=index: ran.append(index)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def both(
    trunk: FrozenTrunk,
    view: ParameterView,
    objective: Callable[[Any], Tensor],
    batch: Any,
    seed: int = 3,
) -> tuple[Tensor, Tensor]:
    """Values at a shifted point, with the trunk and without."""
    with torch.no_grad(), view.shifted([Term(seed, 0.05)]):
        return trunk.call(objective, batch), objective(batch)


def assert_equal(values: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def calls_of(trunk: FrozenTrunk, objective: Callable[[Any], Any], batch: Any) -> list[Call]:
    """What a trunk says of the model's calls, asked until it trusts itself."""
    calls: list[Call] = []
    with torch.no_grad():
        for _ in range(4):
            trunk.call(objective, batch, calls.append)
    return calls
