"""Which factors rest and which weights are new: by what they hold, not by their names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from families import FAMILIES, tokens
from torch import Tensor, nn

from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.view.newness import may_be_untrained, new_names

# peft 0.21 still reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
ENCODER: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
}


def at_rest(model: nn.Module) -> set[str]:
    """Kinds of the tensors that a view leaves at rest."""
    view = ParameterView.trainable(model)
    resting = {n for n in view.tensors if view.group_of(n).perturbation_scale == 0}
    return {
        name.split("proj.")[-1].split("embed_tokens.")[-1].split(".default")[0] for name in resting
    }


Q = {"target_modules": ["q_proj"]}
TUNERS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "lora": (lambda: peft.LoraConfig(r=2, **Q), {"lora_A"}),
    "dora": (lambda: peft.LoraConfig(r=2, use_dora=True, **Q), {"lora_A"}),
    "lora of an embedding": (
        lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"]),
        {"lora_embedding_B"},
    ),
    "adalora": (lambda: peft.AdaLoraConfig(total_step=9, **Q), {"lora_A"}),
    "loha": (lambda: peft.LoHaConfig(r=2, **Q), {"hada_w1_a", "hada_w1_b", "hada_w2_a"}),
    "lokr": (lambda: peft.LoKrConfig(r=4, **Q), {"lokr_w2"}),
    "lokr of factors": (
        lambda: peft.LoKrConfig(r=1, decompose_factor=2, target_modules=["down_proj"]),
        {"lokr_w2_a", "lokr_w2_b"},
    ),
    "gralora": (lambda: peft.GraloraConfig(r=4, **Q), {"gralora_A"}),
    "glora": (lambda: peft.GloraConfig(**Q), {"glora_A", "glora_B"}),
    "hira": (lambda: peft.HiraConfig(r=2, **Q), {"hira_A"}),
    "delora": (lambda: peft.DeloraConfig(r=2, **Q), {"delora_A"}),
    "vera": (lambda: peft.VeraConfig(r=2, **Q), set()),
    "randlora": (lambda: peft.RandLoraConfig(r=2, **Q), set()),
    "ia3": (lambda: peft.IA3Config(feedforward_modules=[], **Q), set()),
    "miss": (lambda: peft.MissConfig(r=2, **Q), set()),
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_random_factors_rest_also_when_none_is_zero_any_more(tuner: str) -> None:
    config, expected = TUNERS[tuner]
    model = peft.get_peft_model(FAMILIES["llama"](), config())
    assert at_rest(model) == expected
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert at_rest(model) == expected


def test_lora_on_an_embedding_learns() -> None:
    model = peft.get_peft_model(
        FAMILIES["llama"](), peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    ).eval()

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        ).mean(1)

    view = ParameterView.trainable(model)
    view_hash = view.hash()
    result = minimize(loss, view, tokens(8), MeZO(), batch_size=8, max_steps=60, progress=False)
    assert view.hash() != view_hash
    with torch.no_grad():
        assert float(loss(tokens(8)).mean()) < result.history[0].value - 0.02


# The matrix: how a head came about, and whether it is new (fault 10).


def trained(model: nn.Module) -> nn.Module:
    """As if by a training: no bias is zero and no deviation is that of an initialiser."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
    return model


def loaded(kind: Any, base: Any, config: Any, path: Path) -> Any:
    trained(base(config)).save_pretrained(path)
    return kind.from_pretrained(path)


HEADS: dict[str, tuple[Any, Any, Any, str]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertForMaskedLM, hf.BertConfig, "classifier"),
    "roberta": (
        hf.RobertaForSequenceClassification, hf.RobertaForMaskedLM, hf.RobertaConfig, "classifier",
    ),
    "electra": (
        hf.ElectraForSequenceClassification, hf.ElectraForMaskedLM, hf.ElectraConfig, "classifier",
    ),
    "llama": (hf.LlamaForSequenceClassification, hf.LlamaForCausalLM, hf.LlamaConfig, "score"),
}  # fmt: skip
MASKED: dict[str, tuple[Any, Any]] = {
    "cls.predictions.transform": (hf.BertForMaskedLM, hf.BertConfig),
    "lm_head.dense": (hf.RobertaForMaskedLM, hf.RobertaConfig),
    "vocab_transform": (hf.DistilBertForMaskedLM, hf.DistilBertConfig),
    "generator_predictions": (hf.ElectraForMaskedLM, hf.ElectraConfig),
}


def config_of(kind: Any) -> Any:
    if kind is hf.DistilBertConfig:
        return kind(vocab_size=32, dim=16, n_heads=2, n_layers=2, hidden_dim=16)
    return kind(**ENCODER, pad_token_id=1)


@pytest.mark.parametrize("family", HEADS)
def test_a_head_that_no_checkpoint_had_is_new(family: str, tmp_path: Path) -> None:
    kind, base, config, head = HEADS[family]
    model = loaded(kind, base, config_of(config), tmp_path)
    wanted = {name for name, _ in model.named_parameters() if name.startswith(head)}
    assert new_names(model) == wanted
    # As the base was loaded, it has no part in it: saved and loaded again, the head is trained.
    trained(model).save_pretrained(tmp_path / "tuned")
    assert not new_names(kind.from_pretrained(tmp_path / "tuned"))


@pytest.mark.parametrize("head", MASKED)
def test_a_masked_lm_head_that_was_loaded_is_not_new(head: str, tmp_path: Path) -> None:
    kind, config = MASKED[head]
    model = loaded(kind, kind, config_of(config), tmp_path)
    assert any(name.startswith(head) for name, _ in model.named_parameters())
    assert not new_names(model)
    assert len(ParameterView.full(model).groups) == 1
    # Where no flag says so (weights filled by other means), the weights themselves do.
    other = kind(config_of(config))
    other.load_state_dict(model.state_dict())
    assert not new_names(other)


@pytest.mark.parametrize("family", HEADS)
def test_without_flags_a_head_is_new_that_looks_as_initialisers_leave_it(family: str) -> None:
    kind, _, config, head = HEADS[family]
    model = kind(config_of(config))
    wanted = {name for name, _ in model.named_parameters() if name.startswith(head)}
    assert new_names(model) == wanted
    assert not new_names(trained(model))


def test_a_head_of_ones_own_is_new(tmp_path: Path) -> None:
    """torch's own initialiser leaves no bias at zero."""
    model = loaded(*HEADS["bert"][:2], config_of(hf.BertConfig), tmp_path)
    model.classifier = nn.Linear(16, 5)
    assert new_names(model) == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        model.classifier.weight.mul_(1.5)
    assert not new_names(model)


def saving(model: Any, module: str) -> Any:
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=[module])
    config.modules_to_save = [module]
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("family", HEADS)
def test_a_new_head_is_new_also_under_an_adapter(family: str, tmp_path: Path) -> None:
    """Many families call their base "model", as peft calls the model that it adapts."""
    kind, base, config, _ = HEADS[family]

    def adapted(model: Any) -> Any:
        targets = ["query", "q_proj"]
        return peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS")
        )

    for checkpoint in (loaded(kind, base, config_of(config), tmp_path), kind(config_of(config))):
        model = adapted(checkpoint)
        copies = {name for name, _ in model.named_parameters() if "modules_to_save" in name}
        assert copies
        assert copies <= new_names(model)
        view = ParameterView.trainable(model)
        assert all(view.group_of(name).perturbation_scale == 1.0 for name in copies)
    old = adapted(trained(kind(config_of(config))))
    assert not {name for name in new_names(old) if "modules_to_save" in name}


def test_a_saved_copy_is_what_its_original_is(tmp_path: Path) -> None:
    kind, base, config, head = HEADS["bert"]
    fresh = saving(loaded(kind, base, config_of(config), tmp_path), head)
    copies = {n for n, _ in fresh.named_parameters() if "modules_to_save" in n}
    assert copies <= new_names(fresh)
    with torch.no_grad():  # a resumed run: the copy has been tuned since, the original has not
        fresh.get_parameter(max(copies)).add_(1.0)
    assert copies <= new_names(fresh)
    tuned = saving(trained(kind(config_of(config))), head)
    assert copies.isdisjoint(new_names(tuned))
    language = saving(
        loaded(
            hf.LlamaForCausalLM, hf.LlamaForCausalLM, config_of(hf.LlamaConfig), tmp_path / "lm"
        ),
        "lm_head",
    )
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert name not in new_names(language)
    view = ParameterView.trainable(language)
    stretched = [group for group in view.groups if group.perturbation_scale > 1]
    assert stretched
    assert view.group_of(name) not in stretched


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_copies_of_norms_and_rows_are_not_new() -> None:
    norms = peft.get_peft_model(
        FAMILIES["bert"](), peft.LNTuningConfig(target_modules=["LayerNorm"])
    )
    copies = {name for name, p in norms.named_parameters() if p.requires_grad}
    assert copies
    assert copies.isdisjoint(new_names(norms))
    rows = peft.get_peft_model(
        FAMILIES["llama"](),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    )
    tuned = {name for name, p in rows.named_parameters() if p.requires_grad}
    assert tuned - new_names(rows) == {n for n in tuned if "token_adapter" in n}


def test_a_model_that_nothing_says_was_trained_may_be_untrained() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert may_be_untrained(None)
    assert may_be_untrained(plain)
    tuned = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0"]))
    model = hf.BertModel(hf.BertConfig(**ENCODER))
    for known in (tuned, model, nn.ModuleDict({"wrapped": model})):
        assert not may_be_untrained(known)
