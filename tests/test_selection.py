"""Which tensors a view takes, and the named error for each that it cannot take."""

from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, Tied, tokens
from torch import Tensor, nn

from zo_adapt import Group, MeZO, ParameterView, Term, minimize
from zo_adapt.errors import (
    AdapterError,
    NoMatchingParameterError,
    OptionError,
    ViewError,
    ZOError,
)

# peft 0.21 still reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
}
HEADS = {"bert": "classifier", "roberta": "classifier", "distilbert": "classifier"}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def adapted(family: str = "bert") -> Any:
    """A model with a LoRA adapter whose two matrices are both non-zero."""
    config = peft.LoraConfig(
        r=2,
        target_modules=TARGETS[family],
        modules_to_save=[HEADS[family]] if family in HEADS else None,
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )
    return peft.get_peft_model(FAMILIES[family](), config).eval()


@FAMILY
def test_trainable_is_the_adapter_and_what_it_saves(family: str) -> None:
    model = adapted(family)
    view = ParameterView.trainable(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(view.tensors) == trained
    assert any("lora_A" in name for name in trained)
    assert any("modules_to_save" in name for name in trained) == (family in HEADS)


@pytest.mark.parametrize("scratch", ["copy", "layer"])
@FAMILY
def test_every_tensor_of_an_adapter_reaches_the_output(family: str, scratch: str) -> None:
    model = adapted(family)
    whole = ParameterView.trainable(model)
    with torch.no_grad():
        plain = model(input_ids=tokens()).logits
        for name, tensor in whole.tensors.items():
            view = ParameterView({name: tensor}, model=model, scratch=scratch)  # type: ignore[arg-type]
            with view.shifted([Term(1, 0.5)]):
                assert not torch.equal(model(input_ids=tokens()).logits, plain), name
        assert torch.equal(model(input_ids=tokens()).logits, plain)


LAST = {
    "bert": ("bert.encoder.layer.2", {"bert.pooler.dense", "classifier"}),
    "roberta": ("roberta.encoder.layer.2", {"classifier.dense", "classifier.out_proj"}),
    "distilbert": ("distilbert.transformer.layer.2", {"pre_classifier", "classifier"}),
    "gpt2": ("transformer.h.2", {"transformer.ln_f"}),
    "opt": ("model.decoder.layers.2", {"model.decoder.final_layer_norm"}),
    "llama": ("model.layers.2", {"model.norm", "lm_head"}),
}


@FAMILY
def test_last_layers_take_the_block_and_what_follows(family: str) -> None:
    model = FAMILIES[family]()
    block, after = LAST[family]
    names = set(ParameterView.last_layers(model, 1).tensors)
    inside = {n for n, _ in model.named_parameters() if n.startswith(f"{block}.")}
    assert {n.rsplit(".", 1)[0] for n in names - inside} == after
    assert inside <= names
    assert set(ParameterView.last_layers(model, 1, head=False).tensors) == inside
    without_blocks = set(ParameterView.last_layers(model, 0).tensors)
    assert {n.rsplit(".", 1)[0] for n in without_blocks} == after
    assert len(ParameterView.last_layers(model, 3).tensors) == 2 * len(inside) + len(names)


@FAMILY
def test_full_takes_every_parameter_once(family: str) -> None:
    model = FAMILIES[family]()
    assert ParameterView.full(model).numel == sum(p.numel() for p in model.parameters())
    assert set(ParameterView.matching(model, "").tensors) == set(dict(model.named_parameters()))


def test_tied_weights_are_one_tensor() -> None:
    model = Tied()
    assert list(ParameterView.full(model).tensors) == ["up.weight", "up.bias", "down.bias"]


def test_matching_searches_names() -> None:
    model = FAMILIES["bert"]()
    view = ParameterView.matching(model, r"layer\.[12]\..*LayerNorm\.bias$")
    assert len(view.tensors) == 4
    assert all(name.endswith("LayerNorm.bias") for name in view.tensors)


def test_fingerprint_tells_views_apart() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3)}
    views = [
        ParameterView(tensors),
        ParameterView({"a": torch.zeros(2)}),
        ParameterView(dict(reversed(tensors.items()))),
        ParameterView(tensors, noise="rademacher"),
        ParameterView(tensors, groups=[Group("a")]),
        ParameterView({"a": torch.zeros(2), "b": torch.zeros(3).half()}),
    ]
    assert len({view.fingerprint() for view in views}) == len(views)
    other_values = {name: tensor + 1 for name, tensor in tensors.items()}
    assert ParameterView(other_values).fingerprint() == views[0].fingerprint()
    assert ParameterView(other_values).hash() != views[0].hash()


@pytest.mark.parametrize("scratch", ["copy", "layer"])
def test_merged_and_disabled_adapters_are_refused(scratch: str) -> None:
    model = adapted()
    view = ParameterView.trainable(model, scratch=scratch)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        ParameterView.trainable(model)
    with pytest.raises(AdapterError, match="merged"):
        run(view)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(AdapterError, match="disabled"):
        run(view)
    model.base_model.disable_adapter_layers()
    with pytest.raises(AdapterError, match="enable_adapter_layers"):
        ParameterView.full(model)


def never(batch: object) -> float:
    raise AssertionError("evaluated before the input was checked")


def run(view: ParameterView) -> object:
    return minimize(never, view, None, MeZO(lr=1e-3), max_steps=1, progress=False)


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


BAD = {
    "integer": (lambda: torch.ones(4, dtype=torch.int8), "int8"),
    "boolean": (lambda: torch.ones(4, dtype=torch.bool), "bool"),
    "complex": (lambda: torch.ones(4, dtype=torch.complex64), "complex64"),
    "quantised": (quantised, "qint8"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "meta": (lambda: torch.ones(4, device="meta"), "meta device"),
    "expanded": (lambda: torch.ones(1).expand(4), "expanded"),
    "list": (lambda: [1.0, 2.0], "list"),
}


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz.*")
@pytest.mark.parametrize("kind", BAD)
def test_tensors_that_cannot_be_tuned_are_named(kind: str) -> None:
    make, words = BAD[kind]
    with pytest.raises(ViewError, match=f"(?s)'culprit'.*{words}"):
        ParameterView({"fine": torch.ones(2), "culprit": make()})


@pytest.mark.parametrize("tensors", [{}, {"empty": torch.zeros(0)}], ids=["none", "empty"])
def test_a_view_of_nothing_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ViewError, match="get_peft_model"):
        ParameterView(tensors)


def test_a_frozen_model_has_no_trainable_view() -> None:
    with pytest.raises(ViewError, match="requires_grad"):
        ParameterView.trainable(FAMILIES["bert"]().requires_grad_(False))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    view = ParameterView({"fine": torch.ones(2), "culprit": torch.tensor([1.0, value])})
    with pytest.raises(ViewError, match="'culprit'"):
        run(view)


def test_a_pattern_without_a_match_lists_near_names() -> None:
    model = FAMILIES["bert"]()
    with pytest.raises(NoMatchingParameterError, match=r"clasifier.*'classifier"):
        ParameterView.matching(model, "clasifier")
    with pytest.raises(NoMatchingParameterError, match="regular expression"):
        ParameterView.matching(model, "layer.(")
    with pytest.raises(NoMatchingParameterError, match="head"):
        ParameterView.full(model, groups=[Group("no_such_head")])


@pytest.mark.parametrize("n", [-1, 4])
def test_more_layers_than_there_are(n: int) -> None:
    with pytest.raises(OptionError, match=rf"n={n} layers of 3"):
        ParameterView.last_layers(FAMILIES["gpt2"](), n)


def test_no_layers_and_no_head_is_nothing() -> None:
    with pytest.raises(OptionError, match="n=0"):
        ParameterView.last_layers(FAMILIES["gpt2"](), 0, head=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ParameterView.last_layers(nn.Linear(2, 2), 1),
        lambda: ParameterView({"w": torch.ones(2)}, scratch="layer"),
        lambda: ParameterView({"w": torch.ones(2)}, scratch="disk"),  # type: ignore[arg-type]
        lambda: ParameterView({"w": torch.ones(2)}, noise="cauchy"),
        lambda: ParameterView({"w": torch.ones(2)}, groups=[Group("w", lr=-1.0)]),
        lambda: ParameterView({"w": torch.ones(2)}, groups=[Group("w", perturbation_scale=-1.0)]),
    ],
    ids=["no blocks", "layer without model", "scratch", "noise", "group lr", "group mu"],
)
def test_bad_options_are_named(make: Any) -> None:
    with pytest.raises(ZOError):
        make()


def parts() -> dict[str, Tensor]:
    return {name: torch.ones(2, 3) for name in ("head.weight", "head.bias", "body.weight")}


def test_groups_by_name_are_those_of_the_pattern_that_finds_just_these_names() -> None:
    by_name = ParameterView(parts(), groups=[Group(names=["head.weight", "head.bias"], lr=3.0)])
    by_pattern = ParameterView(parts(), groups=[Group(r"^(head\.bias|head\.weight)$", 3.0, 1.0)])
    assert by_name.group_of("head.bias").lr == 3.0
    assert by_name.group_of("body.weight").lr == 1.0
    assert by_name.fingerprint() == by_pattern.fingerprint()
    with pytest.raises(NoMatchingParameterError, match=r"'head\.wieght'.*near names.*head\.weight"):
        ParameterView(parts(), groups=[Group(names=["head.bias", "head.wieght"])])


def test_fingerprints_of_views_with_groups_are_those_of_the_files_that_exist() -> None:
    """Frozen: files of format 2 hold them."""
    plain = ParameterView(parts(), groups=())
    grouped = ParameterView(parts(), groups=[Group("head", lr=2.0, perturbation_scale=0.5)])
    assert plain.fingerprint().startswith("7c72cb94a71c5af9")
    assert grouped.fingerprint().startswith("42fca497afebf7fd")


def test_a_view_reads_as_a_line_and_its_summary_as_a_short_table() -> None:
    view = ParameterView(parts(), groups=[Group("head", lr=2.0, perturbation_scale=0.5)])
    line = "ParameterView(3 tensors, 18 scalars, float32 on cpu, 2 groups, gaussian-philox-v1)"
    assert repr(view) == line
    first, _, head, rest, shifted, displacement = view.summary().splitlines()
    assert first == line
    assert head.split() == ["2", "12", "48", "B", "x", "2", "x", "0.5", "'head'"]
    assert rest.split() == ["1", "6", "24", "B", "x", "1", "x", "1", "the", "rest"]
    assert "by way of a copy" in shifted
    assert displacement == "the search for a displacement begins at 0.25"
    layered = ParameterView.full(FAMILIES["bert"](), scratch="layer").summary()
    assert "layer by layer" in layered


def test_the_groups_that_suit_a_view_read_by_name() -> None:
    summary = ParameterView.trainable(adapted()).summary()
    at_rest = next(line for line in summary.splitlines() if "lora_A" in line)
    assert "x 0 " in at_rest
    assert max(map(len, summary.splitlines())) <= 100
