"""Frozen-trunk reuse: models and views for which it would be wrong are refused, with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from families import ENCODER
from torch import Tensor, nn
from trunks import assert_equal, both, counted, examples, logits_of, made, padded, randomised

from zo_adapt import (
    FrozenTrunk,
    ParameterView,
)

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
