"""``last_layers`` takes what works on the last blocks' output, however it is registered."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from problems import bits
from torch import Tensor, nn

from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.view.blocks import block_list

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 16,
}
VISION: dict[str, Any] = {n: v for n, v in SMALL.items() if n != "vocab_size"} | {
    "image_size": 8,
    "patch_size": 4,
}
with torch.device("meta"):
    IS_FLAT = hasattr(hf.ViTModel(hf.ViTConfig(**VISION)), "layers")
VIT_BLOCKS = "vit.layers" if IS_FLAT else "vit.encoder.layer"
"""They lay in an encoder in transformers 5.0."""
BART: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
T5: dict[str, Any] = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2}
ENDS: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def clip(text_layers: int) -> nn.Module:
    text = SMALL | ENDS | {"max_position_embeddings": 16, "num_hidden_layers": text_layers}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def opt_350m() -> nn.Module:
    config = hf.OPTConfig(
        **SMALL | {"ffn_dim": 16}, word_embed_proj_dim=4, do_layer_norm_before=False
    )
    return hf.OPTForCausalLM(config)


def deberta() -> nn.Module:
    config = hf.DebertaV2Config(
        **SMALL,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="layer_norm",
        position_buckets=4,
        max_relative_positions=16,
    )
    return hf.DebertaV2ForSequenceClassification(config)


def wav2vec2(stable: bool) -> nn.Module:
    config = hf.Wav2Vec2Config(
        **SMALL | {"hidden_size": 16},
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=stable,
        feat_extract_norm="layer" if stable else "group",
    )
    return hf.Wav2Vec2ForSequenceClassification(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        **BART | ENDS | {"decoder_start_token_id": 1}, num_mel_bins=8, max_source_positions=8
    )
    return hf.WhisperForConditionalGeneration(config)


TWO = {"classifier.dense", "classifier.out_proj"}
MLM = {"cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"}
CASES: dict[str, tuple[Callable[[], nn.Module], str, set[str]]] = {
    "xlm-r": (
        lambda: hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**SMALL)),
        "roberta.encoder.layer",
        TWO,
    ),
    "camembert": (
        lambda: hf.CamembertForSequenceClassification(hf.CamembertConfig(**SMALL)),
        "roberta.encoder.layer",
        TWO,
    ),
    "opt-350m": (opt_350m, "model.decoder.layers", {"model.decoder.project_out"}),
    "deberta-v2": (deberta, "deberta.encoder.layer", {"pooler.dense", "classifier"}),
    "mpnet": (
        lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**SMALL)),
        "mpnet.encoder.layer",
        TWO,
    ),
    "bart": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        "model.decoder.layers",
        set(),
    ),
    "bart classifier": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)),
        "model.decoder.layers",
        {"classification_head.dense", "classification_head.out_proj"},
    ),
    "wav2vec2": (lambda: wav2vec2(False), "wav2vec2.encoder.layers", {"projector", "classifier"}),
    "wav2vec2 stable": (
        lambda: wav2vec2(True),
        "wav2vec2.encoder.layers",
        {"wav2vec2.encoder.layer_norm", "projector", "classifier"},
    ),
    "clip text": (
        lambda: clip(3),
        "text_model.encoder.layers",
        {"", "text_model.final_layer_norm", "text_projection"},
    ),
    "clip vision": (
        lambda: clip(1),
        "vision_model.encoder.layers",
        {"", "vision_model.post_layernorm", "visual_projection"},
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, num_heads=2)),
        "decoder.block",
        {"decoder.final_layer_norm"},
    ),
    "whisper": (whisper, "model.decoder.layers", {"model.decoder.layer_norm"}),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
        VIT_BLOCKS,
        {"vit.layernorm", "classifier"},
    ),
    "masked bert": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
        "bert.encoder.layer",
        MLM,
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)
        ),
        "model.layers",
        {"model.norm", "lm_head"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_runs_in_or_after_the_last_blocks_and_nothing_before(case: str) -> None:
    make, path, after = CASES[case]
    model = make()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    blocks = block_list(model)[1]
    assert block_list(model)[0] == path
    for n in (1, 2):
        names = set(ParameterView.last_layers(model, n).tensors)
        first = tuple(f"{path}.{i}." for i in range(len(blocks) - n, len(blocks)))
        inside = {name for name, _ in model.named_parameters() if name.startswith(first)}
        assert inside <= names
        assert {name.rpartition(".")[0] for name in names - inside} == after
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(bits(b), bits(buffers[n])) for n, b in model.named_buffers())


@pytest.mark.parametrize("case", ["xlm-r", "deberta-v2", "mpnet", "bart classifier"])
def test_the_trunk_below_the_last_layers_is_reused(case: str) -> None:
    model = CASES[case][0]().eval()
    view = ParameterView.last_layers(model, 1)
    ids = torch.randint(3, 32, (8, 6))
    ids[:, -1] = 2  # the end of a text, where BART reads
    result = minimize(
        lambda batch: model(input_ids=batch).logits.square().sum(1), view, ids, MeZO(),
        batch_size=4, max_steps=4, progress=False,
    )  # fmt: skip
    assert "trunk" not in result.evaluation.why_not
    assert result.evaluation.layers == len(block_list(model)[1]) - 1


class Registered(nn.Module):
    """No transformer, so that nothing is known of its inputs; the head is registered first."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Module()
        self.body.embed = nn.Linear(4, 4)
        self.body.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("nobody knows with what")


def test_without_an_example_the_order_of_registration_decides() -> None:
    names = list(ParameterView.last_layers(Registered(), 1).tensors)
    assert names == ["head.weight", "head.bias", "body.layers.2.weight", "body.layers.2.bias"]
    model = CASES["deberta-v2"][0]()
    model.forward = lambda *_, **__: 1 / 0  # type: ignore[assignment, return-value]
    assert "classifier.weight" in ParameterView.last_layers(model, 1).tensors
