"""Frozen-trunk reuse: the same values, and frozen layers run once for each example."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trunks import (
    CLASSIFIERS,
    assert_equal,
    both,
    counted,
    examples,
    logits_of,
    made,
    padded,
)

from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import (
    FrozenTrunk,
    MeZO,
    MeZOSVRG,
    ParameterView,
    SetObjective,
    Term,
    minimize,
)
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import Shift
from zo_adapt.view.blocks import block_list


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_values_for_every_family(family: str, side: str) -> None:
    model = made(family)
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view), examples()
    if side == "none":
        batch = {"input_ids": padded(examples((6,) * 6), "right")["input_ids"]}
        parts = [
            {"input_ids": batch["input_ids"][i]} for i in ([0, 1, 2], [3, 4, 5], [5, 1, 1], [0])
        ]
    else:
        picks = ([0, 1, 2], [3, 4, 5], [5, 1, 1], [1, 3], [0])
        parts = [padded([rows[i] for i in pick], side) for pick in picks]
    for seed, batch in enumerate(parts + parts):
        assert_equal(both(trunk, view, objective, batch, seed))
    assert trunk.why_not is None
    with counted(model) as ran, torch.no_grad():
        for batch in parts:
            trunk.call(objective, batch)
    assert set(ran) == {2}, "a frozen block has run"


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_of_any_width_is_reused(family: str) -> None:
    model = made(family)
    view, objective = ParameterView.last_layers(model, 2), logits_of(model)
    trunk, rows = FrozenTrunk(view), examples()
    for width in (6, 8, 7):
        assert_equal(both(trunk, view, objective, padded(rows, "right", width)))
    assert trunk.why_not is None
    with counted(model) as ran, torch.no_grad():
        trunk.call(objective, padded(rows[1:4], "right", 9))
    assert set(ran) == {1, 2}


def lora(family: str, layers: list[int], target: list[str], task: str) -> nn.Module:
    config = LoraConfig(task_type=task, r=2, target_modules=target, layers_to_transform=layers)
    return get_peft_model(made(family), config).eval()


@pytest.mark.parametrize(
    ("family", "target", "task"),
    [
        ("roberta", ["query", "value"], "SEQ_CLS"),
        ("gpt2", ["c_attn"], "CAUSAL_LM"),
        ("llama", ["q_proj"], "CAUSAL_LM"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_lora_of_the_last_layers(family: str, target: list[str], task: str) -> None:
    model = lora(family, [2], target, task)
    view, objective = ParameterView.trainable(model), logits_of(model)
    trunk, rows = FrozenTrunk(view), examples()
    for seed in range(4):
        assert_equal(both(trunk, view, objective, padded(rows, "right"), seed))
    assert (trunk.why_not, trunk.rows) == (None, len(rows))
    with counted(model) as ran, torch.no_grad():
        trunk.call(objective, padded(rows[:2], "right"))
    assert set(ran) == {2}
    values = [both(trunk, view, objective, padded(rows, "right"), seed)[0] for seed in (1, 2)]
    assert not torch.equal(*values), "the adapter does not reach the output"


def test_lora_of_the_first_layer_is_refused() -> None:
    view = ParameterView.trainable(lora("roberta", [0, 2], ["query"], "SEQ_CLS"))
    assert "first of 3 layers" in str(FrozenTrunk(view).why_not)


def run(family: str, reuse: Any, optimizer: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = made(family)
    loss = (ClassificationLoss if family in CLASSIFIERS else CausalLMLoss)(model)
    data = [e if family in CLASSIFIERS else {"input_ids": e["input_ids"]} for e in examples() * 2]
    view = ParameterView.last_layers(model, 1)
    result = minimize(
        loss,
        view,
        data,
        optimizer,
        batch_size=4,
        max_steps=6,
        progress=False,
        evaluation=EvaluationOptions(reuse_trunk=FrozenTrunk(view) if reuse == "own" else reuse),
        **options,
    )
    return result, view


@pytest.mark.parametrize("optimizer", [MeZO(lr=1e-3), MeZOSVRG(displacement=0.1)])
@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_a_run_is_the_same_run(family: str, optimizer: Any) -> None:
    plain, weights = run(family, "off", optimizer)
    for reuse in ("auto", "on", "own"):
        reused, again = run(family, reuse, optimizer)
        assert plain.queries == reused.queries
        for a, b in zip(plain.history, reused.history, strict=True):
            assert a.value == pytest.approx(b.value, rel=1e-5)
            assert a.projected_gradient == pytest.approx(b.projected_gradient, rel=1e-2)
        for name, tensor in weights.tensors.items():
            torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_runs_the_frozen_layers_once_an_example() -> None:
    model = made("bert")
    view, loss = ParameterView.last_layers(model, 1), ClassificationLoss(model)
    data, options = examples((6,) * 8), {"batch_size": 8, "max_steps": 10, "progress": False}
    with counted(model) as ran:
        alone = EvaluationOptions(joint_rows="off")
        pair = MeZO(lr=1e-3, num_directions=1, one_sided=False)
        minimize(loss, view, data, pair, evaluation=alone, **options)
    # Once for each of the 8 rows, once more in the check of the first answer of the batch, and
    # twice in the look at the view before the first step.
    assert ran.count(2) == 23
    assert ran.count(0) == 8 + 3


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(
    family: str, tmp_path: Path
) -> None:
    """Rows that were first seen in one batch are first seen in another after resuming."""

    def tuned(stop: int | None, path: Path) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = made(family)
        data = examples((6, 3, 5, 2, 6, 4, 3, 5, 2, 6, 4, 6))
        loss: Any = ClassificationLoss(model) if family == "bert" else CausalLMLoss(model)
        rows = data if family == "bert" else [{"input_ids": e["input_ids"]} for e in data]
        view = ParameterView.last_layers(model, 1)

        def stopping(step: Any) -> None:
            if step.step == stop:
                raise StopIteration

        result = minimize(
            loss, view, rows, MeZO(), batch_size=4, max_steps=9, progress=False,
            trajectory=path, resume=path.exists(), callback=stopping,
        )  # fmt: skip
        assert "trunk" not in result.evaluation.why_not
        return result, view.snapshot()

    _, whole = tuned(None, tmp_path / "whole")
    for stop in (1, 2, 4, 7):
        tuned(stop, tmp_path / f"{stop}")
        result, resumed = tuned(None, tmp_path / f"{stop}")
        assert result.steps == 9
        assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_and_set_objectives(micro: int) -> None:
    model = made("distilbert")
    loss = ClassificationLoss(model)

    class Share(SetObjective):
        def predict(self, batch: Any) -> list[int]:
            predicted: list[int] = loss.logits(batch).argmax(-1).tolist()
            return predicted

        def score(self, predictions: list[list[int]]) -> float:
            return sum(map(sum, predictions))

    for objective in (Share(), loss):
        view = ParameterView.last_layers(model, 1)
        source = as_source(examples(), loss.collate)
        trunk = FrozenTrunk(view)
        evaluators = [
            LocalEvaluator(
                objective, view, EvaluationOptions(micro_batch_size=micro, reuse_trunk=t)
            )
            for t in (trunk, "off")
        ]
        for seed in range(3):
            probe = Probe(Shift((Term(seed, 0.5),)), Batch(source, [0, 1, 2, 3, 3, 5, 0]))
            a, b = (e.evaluate([probe])[0].value for e in evaluators)
            assert a == pytest.approx(b, rel=1e-6)
        assert evaluators[0].queries == evaluators[1].queries == 21
        assert (trunk.why_not, trunk.rows) == (None, 5)


def test_a_changed_frozen_weight_is_noticed() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, batch = FrozenTrunk(view), padded(examples(), "right")
    before = [both(trunk, view, objective, batch)[0] for _ in range(3)][-1]
    with torch.no_grad():
        block_list(model)[1][0].get_submodule("output.dense").weight.mul_(2)
    after = both(trunk, view, objective, batch)
    assert_equal(after)
    assert not torch.allclose(before, after[0])
    assert_equal(both(trunk, view, objective, batch))
    assert trunk.why_not is None


def test_frozen_tensors_that_never_rest_end_the_reuse() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, batch = FrozenTrunk(view), padded(examples(), "right")
    for _ in range(6):
        with torch.no_grad():
            model.get_submodule("bert.embeddings.LayerNorm").weight.mul_(1.1)
        assert_equal(both(trunk, view, objective, batch))
    assert trunk.why_not == "frozen tensors change from one evaluation to the next"


def test_a_collator_that_draws_at_random() -> None:
    model = made("bert")
    view, loss = ParameterView.last_layers(model, 1), ClassificationLoss(model)
    trunk, generator = FrozenTrunk(view), torch.Generator().manual_seed(0)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = loss.collate(rows)
        hidden = torch.rand(batch["input_ids"].shape, generator=generator) < 0.3
        return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 1)}

    seen = []
    for _ in range(8):
        batch = collate(examples())
        served, plain = both(trunk, view, loss, batch)
        assert_equal((served, plain))
        seen.append(served)
    assert trunk.why_not is None
    assert not torch.allclose(seen[0], seen[-1])


def test_what_is_reused_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zo_adapt.evaluation.trunk.frozen_trunk"):
        run("bert", "auto", MeZO(lr=1e-3))
    assert [record.message for record in caplog.records] == [
        "the first 2 of 3 layers of 'bert.encoder.layer' run once for each example, kept on device "
        "(1024 MiB)"
    ]


def test_auto_wants_a_quarter_of_the_layers_and_true_wants_any() -> None:
    model = made("bert")
    last, all_but_one = (ParameterView.last_layers(model, n) for n in (1, 2))
    assert FrozenTrunk(all_but_one, least=0.25).why_not is None
    assert FrozenTrunk(all_but_one, least=0.5).why_not == "only 1 of 3 layers are frozen"
    options: dict[str, Any] = {"batch_size": 2, "max_steps": 1, "progress": False}
    loss, full = ClassificationLoss(model), ParameterView.full(model)
    for reuse, message in (("on", "first of 3 layers"), (FrozenTrunk(last), "another view")):
        evaluation = EvaluationOptions(reuse_trunk=reuse)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=message):
            minimize(loss, full, examples(), MeZO(lr=1e-3), evaluation=evaluation, **options)
    with pytest.raises(OptionError, match="reuse_trunk='yes'"):
        EvaluationOptions(reuse_trunk="yes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="storage='tape'"):
        FrozenTrunk(last, storage="tape")  # type: ignore[arg-type]
    assert minimize(loss, full, examples(), MeZO(lr=1e-3), **options).steps == 1
