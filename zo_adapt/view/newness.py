"""Which weights are new: drawn at random for a task, and not made by any training.

Evidence, in this order. A copy that peft made (``modules_to_save``, LN tuning) is what its original
is. In a model that transformers loaded, each parameter that came from the checkpoint carries a
flag. In one that carries none (made from a configuration, or filled by other means), a layer is new
if it looks as initialisers leave it: its weights have the standard deviation of one, and its biases
are zero.
"""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from zo_adapt.view.adapters import originals, tuner_names
from zo_adapt.view.shards import whole

LOADED = "_is_hf_initialized"
"""What transformers sets on a parameter that it has loaded."""
TOKENS = "trainable_tokens_delta"
"""Rows of a pretrained embedding that peft has copied."""
CLOSE = 0.02
"""Relative difference of two standard deviations that are the same, in large layers."""


def new_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are new: of adapters, and of a task's head."""
    head, copies = _new_head(model), originals(model)
    old = {copy for copy, original in copies.items() if original not in head}
    tuners = {name for name in tuner_names(model) if TOKENS not in name}
    return (tuners | head) - old


def may_be_untrained(model: nn.Module | None) -> bool:
    """Whether nothing says that a model was trained before: no base model, and no adapter."""
    return model is None or not (
        tuner_names(model) or any(hasattr(part, "base_model_prefix") for part in model.modules())
    )


def has_new_head(model: nn.Module | None) -> bool:
    """Whether a model's outputs are those of weights that nobody has trained."""
    return model is not None and bool(new_names(model) - tuner_names(model))


def _new_head(model: nn.Module) -> set[str]:
    """Those outside the pretrained base model, its output embedding excepted."""
    outside = _outside_the_base(model)
    loaded = any(hasattr(parameter, LOADED) for parameter in model.parameters())
    return {
        f"{path}.{attribute}" if path else attribute
        for path, module in model.named_modules()
        if (own := _own(module)) and all(id(p) in outside for p in own.values())
        if _is_new(own, getattr(model, "config", None), loaded=loaded)
        for attribute in own
    }


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _outside_the_base(model: nn.Module) -> set[int]:
    """The parameters that may be new: none where it is not known what the base model is."""
    # Of peft's own modules, one has the name that many families give their base: "model".
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    prefix = getattr(whole, "base_model_prefix", "")
    base = getattr(whole, prefix, None) if prefix else None
    if not isinstance(base, nn.Module) or base is whole:
        return set()
    embeddings = getattr(whole, "get_output_embeddings", lambda: None)()
    pretrained = [*base.parameters()]
    if isinstance(embeddings, nn.Module):
        pretrained += embeddings.parameters()
    return {id(p) for p in model.parameters()} - {id(p) for p in pretrained}


def _is_new(own: dict[str, nn.Parameter], config: Any, *, loaded: bool) -> bool:
    """Whether a layer is as an initialiser leaves it."""
    if any(hasattr(parameter, LOADED) for parameter in own.values()):
        return False
    matrices = [whole(p).detach() for p in own.values() if p.dim() > 1]
    vectors = [whole(p).detach() for p in own.values() if p.dim() <= 1]
    if any(p.is_meta for p in own.values()):
        return False
    if matrices and all(map(_is_uniform, matrices)):  # torch's own, whose biases are not zero
        bound = max(_bound(matrix) for matrix in matrices)
        if all(vector.abs().max() <= bound for vector in vectors):
            return True
    if not all(map(_is_constant, vectors)):
        return False
    return loaded or all(_is_constant(m) or _is_drawn(m, config) for m in matrices)


def _is_constant(tensor: Tensor) -> bool:
    """Zeros, or the ones of a norm: no training leaves them."""
    return bool((tensor == tensor.flatten()[0]).all())


def _is_drawn(matrix: Tensor, config: Any) -> bool:
    """Whether it has the standard deviation of an initialiser, as far as its size tells."""
    tolerance = max(CLOSE, 4 / math.sqrt(2 * matrix.numel()))
    found = float(matrix.double().square().mean().sqrt())
    return any(abs(found - std) <= tolerance * std for std in _deviations(matrix, config))


def _is_uniform(matrix: Tensor) -> bool:
    """Whether it may come from torch's own initialiser: uniform, within 1 / sqrt(fan in)."""
    bound = _bound(matrix)
    found = float(matrix.double().square().mean().sqrt())
    tolerance = max(CLOSE, 4 / math.sqrt(2 * matrix.numel()))
    within = bool(matrix.abs().max() <= bound * (1 + 1e-3))
    return within and abs(found - bound / math.sqrt(3)) <= tolerance * bound / math.sqrt(3)


def _bound(matrix: Tensor) -> float:
    return 1 / math.sqrt(math.prod(matrix.shape[1:]))


def _deviations(matrix: Tensor, config: Any) -> Iterator[float]:
    """Of the initialisers that the transformers library has."""
    for name in ("initializer_range", "init_std"):
        if isinstance(std := getattr(config, name, None), float):
            yield std
    factor = getattr(config, "initializer_factor", 1.0)
    yield _bound(matrix) * (factor if isinstance(factor, float) else 1.0)
