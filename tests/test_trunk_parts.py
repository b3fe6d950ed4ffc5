"""Frozen-trunk reuse in two parts, of which one can be captured."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from trunks import assert_equal, calls_of, counted, examples, logits_of, made, padded

from objectives import ClassificationLoss
from zo_adapt import (
    FrozenTrunk,
    ParameterView,
    Term,
)
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.evaluation.trunk import keys
from zo_adapt.evaluation.trunk.call import form_of
from zo_adapt.term import Shift


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_in_the_two_parts_of_which_one_is_captured(family: str, side: str) -> None:
    model = made(family)
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view), examples()
    batch, other = padded(rows[:3], side), padded(rows[3:], side)
    form = form_of(batch, calls_of(trunk, objective, batch)[-1])
    assert form is not None
    with torch.no_grad(), view.shifted([Term(3, 0.05)]):
        for ran_before in ({0, 1}, set()):  # new rows run as far as the frozen layers
            with counted(model) as ran:
                entering = trunk.entering(objective, other, form)
            assert entering is not None
            assert set(ran) == ran_before
            with counted(model) as ran, trunk.skipping(entering):
                value = objective(other)
            assert set(ran) == {2}
            assert_equal((value, objective(other)))
    assert (trunk.why_not, trunk.rows) == (None, len(rows))
    assert trunk.entering(objective, other, form) is None, "gradients are enabled"


def test_frozen_tensors_that_never_rest_end_the_reuse_in_two_parts_too() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, batch = FrozenTrunk(view), padded(examples(), "right")
    form = form_of(batch, calls_of(trunk, objective, batch)[-1])
    assert form is not None
    with torch.no_grad():
        for _ in range(6):
            model.get_submodule("bert.embeddings.LayerNorm").weight.mul_(1.1)
            trunk.entering(objective, batch, form)
    assert trunk.why_not == "frozen tensors change from one evaluation to the next"


def test_calls_that_a_batch_does_not_tell_of_have_no_form() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    batch = padded(examples(), "right")

    def derived(batch: Any) -> Tensor:
        return objective(batch | {"input_ids": batch["input_ids"].clamp(min=2)})

    assert form_of(batch, calls_of(FrozenTrunk(view), derived, batch)[-1]) is None
    twin = batch | {"twin": batch["input_ids"]}
    plain = calls_of(FrozenTrunk(view), objective, batch)[-1]
    assert form_of(batch, plain) is not None
    assert form_of(twin, plain) is None
    assert calls_of(FrozenTrunk(view), lambda b: objective(b) + objective(b), batch) == []


def test_the_content_of_a_batch_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("bert")
    view, loss = ParameterView.last_layers(model, 1), ClassificationLoss(model)
    read, rows_of = [], keys.read_rows
    monkeypatch.setattr(keys, "read_rows", lambda *a: read.append(None) or rows_of(*a))
    evaluator = LocalEvaluator(
        loss, view, EvaluationOptions(reuse_trunk=FrozenTrunk(view), joint_rows="off")
    )
    source = as_source(examples(), loss.collate)
    for pick in ([0, 1, 2], [3, 4]):
        batch = Batch(source, pick)
        for seed in range(3):
            evaluator.evaluate([Probe(Shift((Term(seed, c),)), batch) for c in (0.1, -0.1)])
    assert len(read) == 2
