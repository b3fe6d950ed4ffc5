"""A model whose base is served: its adapter lives here, of the rest only the shapes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_adapt.errors import NotServableError, OptionError
from zo_adapt.serve.adapter import features_of


def served_lora(
    base: Any, adapter: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A peft model whose base has no weights here: for a view, for losses, and to be saved.

    ``ParameterView.trainable`` of it has the names, the default groups and the noise that a model
    with all its weights would have; losses read its configuration. Only a forward of its own is
    impossible.

    Args:
        base: A transformers configuration, or the name or folder of a model.
        adapter: A ``peft.LoraConfig``, whose A is drawn as peft draws it, or the folder of a saved
            adapter.
        seed: Of A; the global generator is not touched.
        dtype: Of the adapter's tensors.

    Returns:
        The model, in evaluation mode. ``model.save_pretrained(folder)`` saves the adapter.

    Raises:
        OptionError: The base is an encoder-decoder.
        NotServableError: The adapter is none of LoRA.

    Example:
        >>> from peft import LoraConfig
        >>> from transformers import GPT2Config
        >>> from zo_adapt import ParameterView
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        >>> ParameterView.trainable(served_lora(config, lora)).numel
        128
    """
    import peft
    from transformers import AutoModelForCausalLM

    config = _configuration(base)
    saved = isinstance(adapter, str | Path)
    lora: Any = peft.PeftConfig.from_pretrained(str(adapter)) if saved else adapter
    if not isinstance(lora, peft.LoraConfig):
        raise NotServableError(f"the adapter is a {type(lora).__name__}; servers run LoraConfig")
    if "init_lora_weights" in features_of(lora.to_dict()):
        raise NotServableError(
            f"init_lora_weights={lora.init_lora_weights!r} takes what the adapter begins with from "
            "the base's weights, which are not here; leave it out"
        )
    lora.inference_mode = False
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(config)
        model: Any = peft.get_peft_model(hollow, lora)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        _fill(model, dtype)
    if saved:
        tensors = peft.utils.save_and_load.load_peft_weights(str(adapter), device="cpu")
        peft.set_peft_model_state_dict(model, tensors)
    return _finished(model)


def served_prompt(
    base: Any, tokens: int = 8, *, start: Tensor | None = None, seed: int = 0
) -> nn.Module:
    """A peft model of prompt tuning whose base has no weights here: virtual tokens before texts.

    Args:
        base: A transformers configuration, or the name or folder of a model.
        tokens: How many.
        start: Where they begin, (tokens, width): best as the embeddings of a text, after the token
            that begins texts (``begun_with``); None: random ones of the size that embeddings begin
            with.
        seed: Of these; the global generator is not touched.

    Returns:
        The model, in evaluation mode, with one trainable tensor.

    Raises:
        OptionError: The base is an encoder-decoder, or ``start`` has another shape.

    Example:
        >>> from transformers import GPT2Config
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> sum(p.numel() for p in served_prompt(config, tokens=4).parameters() if p.requires_grad)
        64
    """
    import peft
    from transformers import AutoModelForCausalLM

    config = _configuration(base)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Any = peft.get_peft_model(AutoModelForCausalLM.from_config(config), prompt)
    embedding = model.prompt_encoder["default"].embedding
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        scale = getattr(config, "initializer_range", 0.02)
        start = scale * torch.randn(tuple(embedding.weight.shape), generator=generator)
    if start.shape != embedding.weight.shape:
        raise OptionError(
            f"start has the shape {tuple(start.shape)}; {tokens} tokens of this model are "
            f"{tuple(embedding.weight.shape)}"
        )
    embedding.weight = nn.Parameter(start.detach().clone())
    model.prompt_tokens["default"] = torch.arange(len(start))  # what saving looks up
    return _finished(model)


def _configuration(base: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base) if isinstance(base, str | Path) else base
    if getattr(config, "is_encoder_decoder", False):
        raise OptionError(
            f"{type(config).__name__} is an encoder-decoder; a served model is causal"
        )
    return config


def _finished(model: Any) -> nn.Module:
    """The model, of which what has numbers is trainable, and no forward can be made."""
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.is_meta)
    model.get_base_model().register_forward_pre_hook(_refuse_forward)
    finished: nn.Module = model.eval()
    return finished


def _refuse_forward(module: nn.Module, inputs: Any) -> None:
    """In the place of an error about devices, from somewhere inside.

    Raises:
        NotServableError: Always.
    """
    raise NotServableError(
        f"the base {type(module).__name__} is served; it has no weights in this process, and no "
        "forward. Give the run evaluation=ServedEvaluator(server) and an objective that asks: "
        "CausalLMLoss, VerbalizerLoss, ExactMatch of these, GenerationReward"
    )


def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the adapter's tensors memory and the values that peft begins with."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for module in layers:
        for name in module.adapter_layer_names:
            held: Any = getattr(module, name)
            for key in list(held.keys()):
                if isinstance(held[key], nn.Parameter):
                    held[key] = nn.Parameter(torch.empty(held[key].shape, dtype=dtype))
                else:
                    held[key].to_empty(device="cpu").to(dtype)
        for adapter in module.lora_A.keys() | module.lora_embedding_A.keys():
            module.reset_lora_parameters(adapter, init_lora_weights=True)
