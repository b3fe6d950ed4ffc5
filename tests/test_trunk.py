"""Frozen-trunk reuse: the same values, frozen layers run once an example, refused where wrong."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from families import ENCODER, FAMILIES
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn

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
from zo_adapt.data.batches import Batch
from zo_adapt.data.sources import as_source
from zo_adapt.errors import OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.evaluation.routes import ENTERING
from zo_adapt.evaluation.trunk import keys
from zo_adapt.evaluation.trunk.calls import Call
from zo_adapt.evaluation.trunk.cut import RefusedError
from zo_adapt.evaluation.trunk.form import form_of
from zo_adapt.evaluation.trunk.store import Storage
from zo_adapt.term import HERE, Shift
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


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_storage(
    storage: Storage, dtype: torch.dtype, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = made("llama").to(dtype)
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk = FrozenTrunk(view, storage=storage, max_bytes=1 << 14)
    batch = padded(examples(), "right")
    served = []
    for _ in range(3):
        values = both(trunk, view, objective, batch)
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        served.append(values[0])
    assert torch.equal(served[0], served[1])
    assert torch.equal(served[0], served[2])
    assert (trunk.why_not, trunk.rows) == (None, len(LENGTHS))
    assert 0 < trunk.nbytes <= 1 << 14
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [1, 32 * 3, 32 * 11, 32 * 17, 32 * 26])
def test_the_byte_limit_holds_and_the_values_are_right(room: int) -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=room), examples()
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        pick = torch.randint(0, len(rows), (3,), generator=generator).tolist()
        batch = padded([rows[i] for i in pick], "right")
        for seed in (1, 2):
            assert_equal(both(trunk, view, objective, batch, seed))
        assert trunk.nbytes <= room
    assert trunk.why_not is None
    tokens = [LENGTHS[i] for i in range(6)]
    assert (trunk.rows == len(rows)) is (room >= 32 * sum(tokens))


def test_the_batch_at_hand_takes_the_place_of_older_rows() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=32 * 12), examples((6,) * 6)
    for first in (0, 2, 4):
        for _ in range(3):
            trunk_values = both(trunk, view, objective, padded(rows[first : first + 2], "right"))
            assert_equal(trunk_values)
        with counted(model) as ran, torch.no_grad():
            trunk.call(objective, padded(rows[first : first + 2], "right"))
        assert set(ran) == {2}


def test_room_that_changes_hands_is_read_anew() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=32 * 14), examples()
    for first, second in [(0, 1), (2, 3), (4, 5), (1, 2), (5, 0), (3, 4)] * 4:
        batch = padded([rows[first], rows[second]], "right")
        for seed in range(3):
            assert_equal(both(trunk, view, objective, batch, seed))
    assert trunk.why_not is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_memory_is_spent_on_padding(side: str) -> None:
    model = made("llama")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, batch = FrozenTrunk(view, max_bytes=32 * sum(LENGTHS)), padded(examples(), side, 30)
    for seed in range(3):
        assert_equal(both(trunk, view, objective, batch, seed))
    assert (trunk.why_not, trunk.rows) == (None, len(LENGTHS))


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


@pytest.mark.parametrize("reuse", ["auto", "on", "own"])
@pytest.mark.parametrize("optimizer", [MeZO(lr=1e-3), MeZOSVRG()])
@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_a_run_is_the_same_run(family: str, optimizer: Any, reuse: Any) -> None:
    (plain, weights), (reused, again) = (run(family, r, optimizer) for r in ("off", reuse))
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
        minimize(loss, view, data, MeZO(lr=1e-3), evaluation=alone, **options)
    # Once for each of the 8 rows, once more in the check of the first answer of the batch.
    assert ran.count(2) == 21
    assert ran.count(0) == 8 + 1


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


SMALL_T5 = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 16, "num_layers": 3}


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**SMALL_T5, decoder_start_token_id=0, pad_token_id=0)
    )


def bart() -> nn.Module:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=32,
            d_model=8,
            encoder_layers=2,
            decoder_layers=3,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )


def deberta() -> nn.Module:
    return hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(
            **ENCODER,
            relative_attention=True,
            position_buckets=4,
            conv_kernel_size=3,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            max_position_embeddings=16,
        )
    )


def albert() -> nn.Module:
    return hf.AlbertForSequenceClassification(
        hf.AlbertConfig(**ENCODER, embedding_size=8, inner_group_num=2, num_hidden_groups=1)
    )


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


OTHERS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "t5": (t5, "returns more than hidden states"),
    "bart": (bart, None),
    "deberta": (deberta, None),
    "albert": (albert, "first of 1 layers"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_share_more_between_layers_are_right_or_refused(name: str) -> None:
    build, reason = OTHERS[name]
    model = randomised(build())
    view, objective = ParameterView.last_layers(model, 1, head=False), logits_of(model)
    trunk, rows = FrozenTrunk(view), examples()
    for seed, pick in enumerate([(0, 1, 2), (3, 4, 5), (0, 1, 2), (1, 4), (5, 3), (3, 4, 5)]):
        batch = padded([rows[i] for i in pick], "right")
        if name in ("t5", "bart"):
            batch["decoder_input_ids"] = batch["input_ids"].flip(1)[:, : 6 - seed % 2]
            asked = lambda batch: model(**batch).logits  # noqa: E731
        else:
            asked = objective
        assert_equal(both(trunk, view, asked, batch, seed))
    if reason is None:
        assert trunk.why_not is None
        with counted(model) as ran, torch.no_grad():
            trunk.call(asked, batch)
        assert 0 not in ran and 2 in ran
    else:
        assert reason in str(trunk.why_not)


def test_a_head_alone_runs_no_layer_at_all() -> None:
    model = made("roberta")
    view, objective = ParameterView.last_layers(model, 0), logits_of(model)
    trunk, batch = FrozenTrunk(view), padded(examples(), "right")
    for seed in range(3):
        assert_equal(both(trunk, view, objective, batch, seed))
    with counted(model) as ran, torch.no_grad():
        trunk.call(objective, batch)
    assert (trunk.why_not, ran) == (None, [])


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("layer.2.*weight|word_embeddings", "runs before"),
        ("layer.0", "first of 3 layers"),
    ],
)
def test_tuned_weights_before_the_cut_are_refused(pattern: str, reason: str) -> None:
    model = made("bert")
    view, objective = ParameterView.matching(model, pattern), logits_of(model)
    trunk, batch = FrozenTrunk(view), padded(examples(), "right")
    for seed in range(5):
        assert_equal(both(trunk, view, objective, batch, seed))
    assert reason in str(trunk.why_not)


class Reading(nn.Module):
    """Reads the weight of a module after the layers before them, without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.last.bias
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x @ self.last.weight


def test_a_weight_that_is_read_and_not_called_is_refused() -> None:
    model = Reading()
    view = ParameterView.matching(model, "layers.2|last")
    trunk, x = FrozenTrunk(view), torch.randn(2, 4, 8)
    for seed in range(5):
        assert_equal(both(trunk, view, model, x, seed))
    assert "'last', which is not called" in str(trunk.why_not)


class Looping(nn.Module):
    """Runs its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *self.layers]:
            x = torch.tanh(layer(x))
        return x


def test_layers_that_run_twice_are_refused() -> None:
    model = Looping()
    view = ParameterView.last_layers(model, 1)
    trunk, x = FrozenTrunk(view), torch.randn(2, 4, 8)
    for seed in range(5):
        assert_equal(both(trunk, view, model, x, seed))
    assert "do not run once each" in str(trunk.why_not)


class Skipping(nn.Module):
    """The head reads what the first layer has put out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        first = x = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        return x + first


def test_a_skip_connection_is_refused() -> None:
    model = Skipping()
    view = ParameterView.last_layers(model, 1)
    trunk, x = FrozenTrunk(view), torch.randn(2, 4, 8)
    for seed in range(5):
        assert_equal(both(trunk, view, model, x, seed))
    assert "values differ" in str(trunk.why_not)


class Gate(nn.Module):
    """A layer that is told of the layer before, and for now does not listen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.listen = nn.Linear(8, 8), 0.0

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) + self.listen * told)


class Telling(nn.Module):
    """Every layer is told what entered the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Gate() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        told = x
        for layer in self.layers:
            told, x = x, layer(x, told)
        return x


def test_another_way_into_the_tuned_layers_is_refused_before_it_matters() -> None:
    model = Telling()
    view = ParameterView.last_layers(model, 1)
    trunk, x = FrozenTrunk(view), torch.randn(2, 4, 8)
    for seed in range(5):
        assert_equal(both(trunk, view, model, x, seed))
    assert "in another way, too" in str(trunk.why_not)


def test_hidden_states_that_are_returned_are_refused() -> None:
    model = made("llama")
    view = ParameterView.last_layers(model, 1)

    def objective(batch: Any) -> Tensor:
        out: Tensor = model(**batch, output_hidden_states=True).hidden_states[1][:, :1]
        return out

    trunk, batch = FrozenTrunk(view), padded(examples(), "right")
    for seed in range(5):
        assert_equal(both(trunk, view, objective, batch, seed))
    assert trunk.why_not == "the model returns what the frozen layers put out"


def test_generation_goes_on_from_keys_and_values_and_is_refused() -> None:
    model = made("gpt2")
    view = ParameterView.last_layers(model, 1)

    def objective(batch: Any) -> Tensor:
        out: Tensor = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=1)  # type: ignore[operator]
        return out

    trunk, batch = FrozenTrunk(view), padded(examples(), "left")
    for seed in range(5):
        served, plain = both(trunk, view, objective, batch, seed)
        assert torch.equal(served, plain)
    assert "DynamicCache" in str(trunk.why_not)


def test_an_unmasked_mean_keeps_the_padding_too() -> None:
    model = made("bert")
    view = ParameterView.last_layers(model, 1, head=False)

    def objective(batch: Any) -> Tensor:
        out: Tensor = model.bert(**batch).last_hidden_state.mean(1)  # type: ignore[union-attr,operator]
        return out

    trunk, batch = FrozenTrunk(view), padded(examples(), "right")
    for seed in range(5):
        assert_equal(both(trunk, view, objective, batch, seed))
    assert trunk.why_not is None
    with counted(model) as ran, torch.no_grad():
        trunk.call(objective, batch)
    assert set(ran) == {2}


def test_an_objective_that_raises_leaves_the_model_as_it_was() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, batch = FrozenTrunk(view), padded(examples(), "right")

    def fails(batch: Any) -> Tensor:
        objective(batch)
        raise KeyError("from the objective")

    for _ in range(3):
        with pytest.raises(KeyError, match="from the objective"), torch.no_grad():
            trunk.call(fails, batch)
        assert not [m for m in model.modules() if "forward" in m.__dict__]
    assert_equal(both(trunk, view, objective, batch))
    assert trunk.why_not is None


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


def calls_of(trunk: FrozenTrunk, objective: Callable[[Any], Any], batch: Any) -> list[Call]:
    """What a trunk says of the model's calls, asked until it trusts itself."""
    calls: list[Call] = []
    with torch.no_grad():
        for _ in range(4):
            trunk.call(objective, batch, calls.append)
    return calls


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


def test_rows_without_room_are_not_answered() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=32 * 15), examples()
    small, large = padded(rows[1:4], "right"), padded([rows[0], rows[2], rows[4]], "right")
    form = form_of(small, calls_of(trunk, objective, small)[-1])
    assert form is not None
    with torch.no_grad(), pytest.raises(RefusedError, match="no room"):
        trunk.entering(objective, large, form)


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


def test_a_batch_is_told_by_its_content_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("bert")
    view, loss = ParameterView.last_layers(model, 1), ClassificationLoss(model)
    read, rows_of = [], keys._rows
    monkeypatch.setattr(keys, "_rows", lambda *a: read.append(None) or rows_of(*a))
    evaluator = LocalEvaluator(
        loss, view, EvaluationOptions(reuse_trunk=FrozenTrunk(view), joint_rows="off")
    )
    source = as_source(examples(), loss.collate)
    for pick in ([0, 1, 2], [3, 4]):
        batch = Batch(source, pick)
        for seed in range(3):
            evaluator.evaluate([Probe(Shift((Term(seed, c),)), batch) for c in (0.1, -0.1)])
    assert len(read) == 2


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


def graphs_of(evaluator: LocalEvaluator) -> list[str]:
    assert evaluator._graphs is not None
    assert evaluator._graphs.why_not is None
    return [str(key) for key in evaluator._graphs._graphs]


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
    kept = graphs_of(pair[0])
    assert len(kept) > 1
    assert all(ENTERING in key for key in kept)
    with counted(model) as ran:
        for index, pick in enumerate(picks):
            assert_answers_equal(pair, pick, index)
    assert ran == [], "not all of it was replayed"
    assert graphs_of(pair[0]) == kept


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
    kept = graphs_of(pair[0])
    assert kept and all(ENTERING in key for key in kept)


@pytest.mark.cuda
@ON_GPU
def test_what_was_captured_with_a_trunk_is_not_replayed_without() -> None:
    pair = captured_and_plain("bert")
    pick = [0, 1, 2, 3]
    for turn in range(4):
        assert_answers_equal(pair, pick, turn)
    assert all(ENTERING in key for key in graphs_of(pair[0]))
    assert pair[0].trunk is not None
    pair[0].trunk.why_not = "refused for this test"
    change_frozen(pair)
    for turn in range(4):
        assert_answers_equal(pair, pick, turn)
    assert sum(ENTERING in key for key in graphs_of(pair[0])) < len(graphs_of(pair[0]))


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
