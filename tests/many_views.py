"""The views of ``many_families`` that are tuned, and those that are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from many_families import FAMILIES, TASKS, adapted, model_of
from torch import nn

from zo_adapt import ParameterView
from zo_adapt.errors import AdapterError, ViewError, ZOError

TARGETS = {"distilbert": ["q_lin", "v_lin"], "mixtral": ["q_proj", "v_proj"]}
"""Where peft cannot adapt all linear layers: a head that is saved as well, fused experts."""
VIEWS = ("lora", "last", "full")


def lora_of(family: str) -> peft.PeftConfig:
    head = {"modules_to_save": ["classifier"]} if family == "vit" else {}
    kind, targets = TASKS[FAMILIES[family][0]][1], TARGETS.get(family, "all-linear")
    return peft.LoraConfig(task_type=kind, r=2, target_modules=targets, **head)


def view_of(family: str, view: str) -> ParameterView:
    if view == "lora":
        return ParameterView.trainable(adapted(family, lora_of(family)))
    if view == "last":
        return ParameterView.last_layers(model_of(family), 1)
    return ParameterView.full(model_of(family))


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
    "SHADOW": lambda: peft.ShadowConfig(r=2, shadow_dropout=0.0, **PLAIN),
    "SUPERTUNING": lambda: peft.SupertuningConfig(sparsity=0.5, **LINEAR),
    "DEFT": lambda: peft.DeftConfig(r=2, **LINEAR),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, **PLAIN
    ),
    "VBLORA": lambda: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=4, topk=2, **LINEAR),
}
"""On a Llama."""
OF_SEVERAL_TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")
"""Their examples say which task they are of."""


def tuner_of(tuner: str) -> tuple[Callable[[], ParameterView], str]:
    """What makes the view, and the task that it is tuned on."""
    task = "next of two tasks" if tuner in OF_SEVERAL_TASKS else "next"
    return lambda: ParameterView.trainable(adapted("llama", TUNERS[tuner]())), task


def mixture(folder: Path) -> Callable[[], ParameterView]:
    """Of adapters that were saved."""
    adapters = {name: str(folder / name) for name in ("0", "1")}
    for name, path in adapters.items():
        alpha = 1 + 7 * int(name)  # unlike each other, or nothing would depend on their shares
        config = peft.LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, **LINEAR)
        adapted("llama", config).save_pretrained(path)

    def make() -> ParameterView:
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=16, xlora_depth=1, adapters=adapters
        )
        return ParameterView.trainable(adapted("llama", config))

    return make


def merged() -> Any:
    model = adapted("llama", TUNERS["LORA"]())
    model.merge_adapter()
    return ParameterView.trainable(model)


def disabled() -> Any:
    model = adapted("llama", TUNERS["LORA"]())
    model.base_model.disable_adapter_layers()
    return ParameterView.matching(model, "lora_")


def inactive() -> Any:
    model = adapted("llama", TUNERS["LORA"]())
    view = ParameterView.trainable(model)
    model.add_adapter("other", TUNERS["LORA"]())
    model.set_adapter("other")
    return view


def frozen() -> Any:
    return ParameterView.trainable(model_of("llama").requires_grad_(False))


def without_layers() -> Any:
    return ParameterView.last_layers(nn.Sequential(nn.Linear(2, 2)), 1)


def integers() -> Any:
    return ParameterView({"w": torch.ones(2, dtype=torch.int8)})


def on_meta() -> Any:
    with torch.device("meta"):
        return ParameterView.full(nn.Linear(2, 2))


REFUSED: dict[str, tuple[Callable[[], ParameterView], type[ZOError], str]] = {
    "a merged adapter": (merged, AdapterError, "unmerge_adapter"),
    "a disabled adapter": (disabled, AdapterError, "enable_adapter_layers"),
    "an inactive adapter": (inactive, AdapterError, "set_adapter"),
    "nothing requires a gradient": (frozen, ViewError, "no tensors"),
    "a model without layers": (without_layers, ViewError, "no list of repeated layers"),
    "integers": (integers, ViewError, "int8"),
    "no weights as yet": (on_meta, ViewError, "meta"),
}
