"""Frozen-trunk reuse with CUDA graphs: the values of plain calls."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from trunks import LENGTHS, ON_GPU, both, counted, examples, logits_of, made, padded

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
from zo_adapt.evaluation.trunk.store import Storage
from zo_adapt.term import HERE, Shift
from zo_adapt.view.blocks import block_list


def captured_and_plain(
    family: str, *, scratch: Any = "copy", joint_rows: int | None = None, **options: Any
) -> tuple[LocalEvaluator, LocalEvaluator]:
    """Of two equal models on a GPU, one with a trunk and graphs, one with neither."""
    found = []
    for captured in (True, False):
        layers = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
        model = tiny_model(family, num_labels=2, **layers).cuda()
        view = ParameterView.last_layers(model, 1, scratch=scratch)
        trunk = FrozenTrunk(view, **options) if captured else None
        loss = ClassificationLoss(model)
        loss.pad_to_multiple_of = 4
        found.append(
            LocalEvaluator(
                loss,
                view,
                EvaluationOptions(
                    reuse_trunk=trunk or "off",
                    cuda_graphs="on" if captured else "off",
                    joint_rows="off" if joint_rows is None else joint_rows,
                ),
            )
        )
    return found[0], found[1]


def assert_answers_equal(
    pair: tuple[LocalEvaluator, LocalEvaluator], pick: list[int], seed: int
) -> None:
    """At three points on a batch of these rows; the weights move afterwards."""
    answers = []
    for evaluator in pair:
        batch = Batch(as_source(examples(), evaluator.objective.collate), pick)  # type: ignore[union-attr]
        probes = [Probe(Shift((Term(seed, c),)), batch) for c in (0.02, -0.02)]
        answers.append(evaluator.evaluate([Probe(HERE, batch), *probes]))
        evaluator.view.apply_in_order([Term(seed, 1e-3)])
    for captured, plain in zip(*answers, strict=True):
        assert captured.per_example is not None
        assert plain.per_example is not None
        np.testing.assert_allclose(captured.per_example, plain.per_example, rtol=1e-5, atol=1e-6)


def graphs_with_trunk(evaluator: LocalEvaluator) -> int:
    """Graphs captured so far, in an evaluator that reuses its trunk."""
    assert not evaluator.plan.why_not.keys() & {"graphs", "trunk"}
    return evaluator.plan.graphs


def change_frozen(pair: tuple[LocalEvaluator, LocalEvaluator]) -> None:
    for evaluator in pair:
        assert evaluator.view.model is not None
        first = block_list(evaluator.view.model)[1][0]
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.mul_(1.2)


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("joint_rows", [None, 64])
@pytest.mark.parametrize("scratch", ["copy", "layer"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_captured_values_are_those_of_plain_calls(
    family: str, scratch: Any, joint_rows: int | None
) -> None:
    pair = captured_and_plain(family, scratch=scratch, joint_rows=joint_rows)
    picks = [[0, 1, 2, 3, 4, 5], [3, 1, 5], [1, 3], [2, 2, 5]]
    for turn in range(12):
        if turn == 7:
            change_frozen(pair)
        for index, pick in enumerate(picks):
            assert_answers_equal(pair, pick, 10 * turn + index)
    trunk, model = pair[0].trunk, pair[0].view.model
    assert trunk is not None and model is not None
    assert (trunk.why_not, trunk.rows) == (None, len(LENGTHS))
    kept = graphs_with_trunk(pair[0])
    assert kept > 1
    with counted(model) as ran:
        for index, pick in enumerate(picks):
            assert_answers_equal(pair, pick, index)
    assert ran == [], "not all of it was replayed"
    assert graphs_with_trunk(pair[0]) == kept


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_captured_values_of_rows_that_come_and_go(family: str, storage: Storage) -> None:
    """There is room for 17 of 26 tokens, and every row is in batches with others."""
    pair = captured_and_plain(family, storage=storage, max_bytes=64 * 17)
    generator = torch.Generator().manual_seed(1)
    for turn in range(24):
        pick = torch.randint(0, len(LENGTHS), (3,), generator=generator).tolist()
        assert_answers_equal(pair, pick, turn)
    trunk = pair[0].trunk
    assert trunk is not None
    assert trunk.why_not is None
    assert 0 < trunk.rows < len(LENGTHS)
    assert graphs_with_trunk(pair[0]) > 0


@pytest.mark.cuda
@ON_GPU
def test_what_was_captured_with_a_trunk_is_not_replayed_without() -> None:
    pair = captured_and_plain("bert")
    pick = [0, 1, 2, 3]
    for turn in range(4):
        assert_answers_equal(pair, pick, turn)
    kept = graphs_with_trunk(pair[0])
    assert pair[0].trunk is not None
    pair[0].trunk.why_not = "refused for this test"
    change_frozen(pair)
    for turn in range(4):
        assert_answers_equal(pair, pick, turn)
    assert pair[0].plan.graphs > kept


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_on_a_gpu(family: str, storage: Storage) -> None:
    model = made(family).cuda()
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, storage=storage, max_bytes=32 * 17), examples()
    for seed, pick in enumerate([(0, 1, 2), (0, 1, 2), (3, 4), (4, 3), (1, 2), (1, 2), (0, 1, 2)]):
        batch = padded([rows[i] for i in pick], "right")
        values = both(trunk, view, objective, {n: t.cuda() for n, t in batch.items()}, seed)
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    assert trunk.why_not is None
    with counted(model) as ran, torch.no_grad():
        trunk.call(objective, {n: t.cuda() for n, t in batch.items()})
    assert set(ran) == {2}
