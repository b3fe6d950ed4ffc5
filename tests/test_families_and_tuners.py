"""Which model families and which of peft's tuners can be tuned, and by which error others are refused.

The two tables say what is expected: ``OK``, or the class of a named error with words of its message.
``OK`` means that three steps run, every tensor of the view that is read moves and no other does,
a probe restores every bit, and the trajectory replayed on a fresh model gives the same weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers as hf
from problems import bits
from torch import Tensor, nn

from objectives import CausalLMLoss, ClassificationLoss, Seq2SeqLoss
from zo_adapt import MeZO, ParameterView, Term, minimize, replay
from zo_adapt.errors import NoMatchingParameterError, ViewError, ZOError
from zo_adapt.loops.result import StopReason

pytestmark = [
    # peft reads an attribute of transformers by its former name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::zo_adapt.errors.UnreadTensorWarning"),
]


class Refused(NamedTuple):
    """An error of this class, with these words in its message."""

    kind: type[ZOError]
    words: str


OK = None
Expected = Refused | None
"""What is expected of a pair; ``OK`` or the error."""

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
"""Of most configurations; the others follow."""
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
TASKS: dict[str, tuple[type[Any], str]] = {
    "classes": (hf.AutoModelForSequenceClassification, "SEQ_CLS"),
    "next": (hf.AutoModelForCausalLM, "CAUSAL_LM"),
    "pairs": (hf.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "images": (hf.AutoModelForImageClassification, "FEATURE_EXTRACTION"),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("classes", SIZES),
    "roberta": ("classes", SIZES),
    "xlm-roberta": ("classes", SIZES),
    "camembert": ("classes", SIZES),
    "distilbert": (
        "classes",
        {"vocab_size": 32, "dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 32},
    ),
    "electra": ("classes", SIZES | {"embedding_size": 8}),
    "albert": ("classes", SIZES | {"embedding_size": 8}),
    "deberta-v2": ("classes", SIZES),
    "mpnet": ("classes", SIZES),
    "modernbert": ("classes", SIZES | {"cls_token_id": 0, "sep_token_id": 2}),
    "gpt2": ("next", {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}),
    "opt": ("next", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 8}),
    "gpt_neox": ("next", SIZES),
    "bloom": ("next", {"vocab_size": 32, "hidden_size": 16, "n_head": 2, "n_layer": 2}),
    "llama": ("next", SIZES | GROUPED),
    "mistral": ("next", SIZES | GROUPED),
    "qwen2": ("next", SIZES | GROUPED),
    "gemma": ("next", SIZES | GROUPED),
    "phi": ("next", SIZES),
    "mixtral": ("next", SIZES | GROUPED | {"num_local_experts": 2}),
    "t5": (
        "pairs",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
    ),
    "bart": ("pairs", SEQ2SEQ),
    "vit": ("images", {**SIZES, "image_size": 8, "patch_size": 4}),
}
VIEWS = ("lora", "last", "full")
REFUSED_FAMILIES: dict[tuple[str, str], Refused] = {}
"""Every other pair of a family and a view is OK."""


def model_of(family: str) -> Any:
    """With weights large enough for the value to depend on them in earnest."""
    task, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = TASKS[task][0].from_config(hf.AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def adapted(family: str, config: Any) -> Any:
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(model_of(family), config)
    return model.eval()


def lora_of(family: str) -> peft.PeftConfig:
    head = {"modules_to_save": ["classifier"]} if family == "vit" else {}
    kind = TASKS[FAMILIES[family][0]][1]
    return peft.LoraConfig(task_type=kind, r=2, target_modules="all-linear", **head)


def view_of(family: str, view: str) -> ParameterView:
    if view == "lora":
        return ParameterView.trainable(adapted(family, lora_of(family)))
    if view == "last":
        return ParameterView.last_layers(model_of(family), 1)
    return ParameterView.full(model_of(family))


def images_loss(model: Any) -> Callable[[Any], Tensor]:
    def loss(batch: Any) -> Tensor:
        pixels, labels = batch
        logits = model(pixel_values=pixels).logits
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    return loss


def task_of(task: str, model: Any) -> tuple[Any, Any]:
    """An objective and eight examples."""
    words = [[3 + (5 * i + j) % 28 for j in range(3 + i % 3)] for i in range(8)]
    if task == "classes":
        rows = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(words)]
        return ClassificationLoss(model), rows
    if task == "next":
        return CausalLMLoss(model), [{"input_ids": ids} for ids in words]
    if task == "pairs":
        return Seq2SeqLoss(model), [{"input_ids": ids, "labels": ids[::-1]} for ids in words]
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(8, 3, 8, 8, generator=generator)
    return images_loss(model), (pixels, torch.arange(8) % 2)


def bits_of(model: nn.Module) -> dict[str, Any]:
    return {name: bits(p).contiguous().numpy().tobytes() for name, p in model.named_parameters()}


def moving(view: ParameterView) -> set[str]:
    """Tensors that a step moves: those that are read and whose group does not rest."""
    return {
        name
        for name in view.tensors
        if name not in view.at_rest and view.groups[view._group_of[name]].perturbation_scale > 0
    }


def check(make: Callable[[], ParameterView], task: str, folder: Path) -> None:
    """What ``OK`` means."""
    view = make()
    model: Any = view.model
    before = bits_of(model)
    with torch.no_grad(), view.shifted([Term(5, 0.1)]):
        pass
    assert bits_of(model) == before
    objective, data = task_of(task, model)
    result = minimize(
        objective,
        view,
        data,
        MeZO(),
        batch_size=4,
        max_steps=3,
        progress=False,
        trajectory=folder / "run.zot",
    )
    assert result.stop_reason is StopReason.MAX_STEPS, result.message
    assert len({step.value for step in result.history}) > 1
    after = bits_of(model)
    moved = {name for name in before if before[name] != after[name]}
    assert moved == moving(view) != set()
    again = make()
    replay(again, folder / "run.zot")
    assert bits_of(again.model) == after  # type: ignore[arg-type]


def expect(expected: Expected, make: Callable[[], ParameterView], task: str, path: Path) -> None:
    if expected is None:
        check(make, task, path)
        return
    with pytest.raises(expected.kind, match=expected.words):
        check(make, task, path)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str, view: str) -> None:
    expected = REFUSED_FAMILIES.get((family, view), OK)
    expect(expected, lambda: view_of(family, view), FAMILIES[family][0], tmp_path)


LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
PLAIN: dict[str, Any] = {"task_type": "CAUSAL_LM"}
TUNERS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(r=2, **LINEAR),
    "DORA": lambda: peft.LoraConfig(r=2, use_dora=True, **LINEAR),
    "RSLORA": lambda: peft.LoraConfig(r=2, use_rslora=True, **LINEAR),
    "LORA embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"], **PLAIN),
    "LORA and head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **LINEAR),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, **LINEAR),
    "LOHA": lambda: peft.LoHaConfig(r=2, **LINEAR),
    "LOKR": lambda: peft.LoKrConfig(r=2, **LINEAR),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **LINEAR),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, **LINEAR),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **LINEAR),
    "VERA": lambda: peft.VeraConfig(r=2, **{**LINEAR, "target_modules": ["q_proj", "o_proj"]}),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=8, **LINEAR),
    "HRA": lambda: peft.HRAConfig(r=2, **LINEAR),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **PLAIN),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **PLAIN),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, **PLAIN
    ),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **PLAIN),
    "POLY": lambda: peft.PolyConfig(r=2, n_tasks=2, n_skills=2, **LINEAR),
    "RANDLORA": lambda: peft.RandLoraConfig(r=2, **LINEAR),
    "MISS": lambda: peft.MissConfig(r=2, **LINEAR),
    "SHIRA": lambda: peft.ShiraConfig(r=1, **LINEAR),
    "C3A": lambda: peft.C3AConfig(block_size=8, **LINEAR),
    "ROAD": lambda: peft.RoadConfig(group_size=4, **LINEAR),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(
        token_indices=[4, 9], target_modules=["embed_tokens"], **PLAIN
    ),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=8, **LINEAR),
    "OSF": lambda: peft.OSFConfig(effective_rank=4, **LINEAR),
    "DELORA": lambda: peft.DeloraConfig(r=2, **LINEAR),
    "GRALORA": lambda: peft.GraloraConfig(r=2, gralora_k=2, **LINEAR),
    "ADAMSS": lambda: peft.AdamssConfig(r=4, num_subspaces=2, **LINEAR),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **PLAIN),
    "BEFT": lambda: peft.BeftConfig(**LINEAR),
    "LILY": lambda: peft.LilyConfig(r=2, **LINEAR),
    "FROD": lambda: peft.FrodConfig(progressbar=False, **LINEAR),
    "PVERA": lambda: peft.PveraConfig(r=2, **{**LINEAR, "target_modules": ["q_proj", "o_proj"]}),
    "GLORA": lambda: peft.GloraConfig(r=2, **LINEAR),
    "UNILORA": lambda: peft.UniLoraConfig(r=2, theta_d_length=16, **LINEAR),
    "CPT": lambda: peft.CPTConfig(
        cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **PLAIN
    ),
    "HIRA": lambda: peft.HiraConfig(r=2, **LINEAR),
    "CARTRIDGE": lambda: peft.CartridgeConfig(num_virtual_tokens=3, **PLAIN),
    "TINYLORA": lambda: peft.TinyLoraConfig(r=2, u=4, **LINEAR),
    "PSOFT": lambda: peft.PsoftConfig(r=2, **LINEAR),
    "PEANUT": lambda: peft.PeanutConfig(r=2, **LINEAR),
    "SHADOW": lambda: peft.ShadowConfig(r=2, **LINEAR),
    "SUPERTUNING": lambda: peft.SupertuningConfig(sparsity=0.5, **LINEAR),
    "DEFT": lambda: peft.DeftConfig(r=2, **LINEAR),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, **PLAIN
    ),
    "VBLORA": lambda: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=4, topk=2, **LINEAR),
}
"""On a Llama."""
REFUSED_TUNERS: dict[str, Refused] = {}


@pytest.mark.parametrize("tuner", TUNERS)
def test_tuners(tmp_path: Path, tuner: str) -> None:
    expected = REFUSED_TUNERS.get(tuner, OK)
    make = lambda: ParameterView.trainable(adapted("llama", TUNERS[tuner]()))  # noqa: E731
    expect(expected, make, "next", tmp_path)
