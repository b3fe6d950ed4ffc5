"""A model's repeated blocks, and what runs after them: observed, or guessed from registration.

They are observed on made-up inputs, before there is any data. No model is known by its name: the
arguments of its forward are, by names and settings that are common in the transformers library.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_adapt.errors import ViewError
from zo_adapt.interrupt import Guard, gradients_off, is_from_handler
from zo_adapt.view.buffers import Buffers
from zo_adapt.view.shards import gathering_modules
from zo_adapt.view.trace import DATA, Trace

logger = logging.getLogger(__name__)
TOKENS = 8
SAMPLES = 6400
"""Of a waveform: 20 frames at the usual 320 samples a frame."""
PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")

Inputs = dict[str, Tensor]


def example_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments that may suit the model, the fullest first; none where nothing is known."""
    config = getattr(model, "config", None)
    if config is None:
        return
    inner = getattr(model, "get_base_model", lambda: model)()  # an adapter takes any argument
    wanted = list(inspect.signature(inner.forward).parameters)
    made = {name: make(config) for name, make in MAKERS.items() if name in wanted}
    found = {name: tensor for name, tensor in made.items() if tensor is not None}
    main = getattr(inner, "main_input_name", "input_ids")
    yield _placed(model, found)
    if main in found:
        yield _placed(model, {main: found[main]})
    given = getattr(inner, "dummy_inputs", None)
    if isinstance(given, dict):
        rows = {name: value[:1] for name, value in given.items() if isinstance(value, Tensor)}
        yield _placed(model, rows)


def _placed(model: nn.Module, inputs: Inputs) -> Inputs:
    """On the device of the model's first parameter, in its dtype."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return {
        name: tensor.to(first.device, first.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _setting(config: Any, *names: str) -> Any:
    """The first of some settings that a configuration, or one of its parts, has."""
    parts = (config, *(getattr(config, part, None) for part in PARTS))
    values = (getattr(part, name, None) for name in names for part in parts)
    return next((value for value in values if value is not None), None)


def _token_ids(config: Any) -> Tensor | None:
    """Ordinary tokens and, at the end, the one that ends a text: some heads look for it."""
    size = _setting(config, "vocab_size")
    if not isinstance(size, int) or size < 2:
        return None
    ends = _setting(config, "eos_token_id")
    end = ends[0] if isinstance(ends, list) else ends
    special = {_setting(config, name) for name in ("pad_token_id", "bos_token_id")} | {end}
    plain = [token for token in range(min(size, 4 * TOKENS)) if token not in special] or [0]
    ids = (plain * TOKENS)[-TOKENS:]
    if isinstance(end, int) and 0 <= end < size:
        ids[-1] = end
    return torch.tensor([ids])


def _image(config: Any) -> Tensor | None:
    size = _setting(config, "image_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = _setting(config, "num_channels") or 3
    return torch.linspace(-1, 1, channels * height * width).view(1, channels, height, width)


def _sound(config: Any) -> Tensor:
    """A waveform, or frames where the configuration knows of their length."""
    frames, bins = (_setting(config, name) for name in ("max_length", "num_mel_bins"))
    if isinstance(frames, int) and isinstance(bins, int):
        return torch.linspace(-1, 1, frames * bins).view(1, frames, bins)
    return torch.linspace(-1, 1, SAMPLES)[None]


def _spectrum(config: Any) -> Tensor | None:
    bins, positions = (_setting(config, name) for name in ("num_mel_bins", "max_source_positions"))
    if bins is None or positions is None:
        return None
    return torch.linspace(-1, 1, bins * 2 * positions).view(1, bins, 2 * positions)


MAKERS: dict[str, Callable[[Any], Tensor | None]] = {
    "input_ids": _token_ids,
    "decoder_input_ids": _token_ids,
    "pixel_values": _image,
    "input_values": _sound,
    "input_features": _spectrum,
}


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of modules of one class that holds the most parameters: the transformer's blocks.

    Raises:
        ViewError: There is none.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise ViewError(
            f"{type(model).__name__} has no list of repeated layers; "
            "use ParameterView.matching(model, pattern)"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def names_after(model: nn.Module, path: str, block: nn.Module) -> set[str]:
    """Names of the parameters outside the list at ``path`` that work on a block's output alone.

    Found by a forward of an example where one can be made: a parameter is after the block where all
    the data that it meets come from there. So neither the embedding that a head is tied to, nor
    another tower of the model, nor a bias that is made for all blocks in advance belongs to it.
    Elsewhere by the order of registration.
    """
    for inputs in example_inputs(model):
        gathering = gathering_modules(model)
        registered = dict(model.named_parameters(remove_duplicate=False))
        trace = Trace(registered, model if gathering else None)
        try:
            with unchanged(model), trace.following(), trace.marking(model, block):
                trace.mark(inputs, DATA)
                model(**inputs)
        except Exception as error:
            if is_from_handler(error):
                raise
            logger.debug("%s cannot be run on an example: %r", type(model).__name__, error)
            continue
        if trace.marked:
            names = trace.names(trace.after & ~trace.before)
            return {name for name in names if not name.startswith(f"{path}.")}
    prefixes = tuple(f"{name}." for name in _registered_after(model, path))
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model can be run in evaluation mode; it and the RNG are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    buffers = Buffers(model)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    drawn = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

    def undo() -> None:
        for module in training:
            module.training = True
        buffers.restore()
        torch.set_rng_state(drawn[0])
        for device, state in drawn[1].items():
            torch.cuda.set_rng_state(state, device)

    with gradients_off(), Guard(undo) as guard:
        for module in training:
            module.training = False
        guard.open()
        yield


def _registered_after(model: nn.Module, path: str) -> list[str]:
    """Modules that are registered behind the blocks: at every level from the list up.

    A final norm may be registered before the list (OPT does so): where no later sibling holds a
    parameter, an earlier one with vectors only (a norm) counts as the final one. And beside the
    pretrained base model all is head, wherever it stands.
    """
    names: list[str] = []
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        parent = ".".join(parts[:depth])
        owner = model.get_submodule(parent)
        siblings = list(owner.named_children())
        here = [name for name, _ in siblings].index(parts[depth])
        later = [name for name, module in siblings[here + 1 :] if _holds_parameters(module)]
        if getattr(owner, "base_model_prefix", None) == parts[depth]:
            later += [name for name, module in siblings[:here] if _holds_parameters(module)]
        if not later and depth == len(parts) - 1:
            later = [name for name, module in siblings[:here] if _is_norm(module)]
        names += [f"{parent}.{name}" if parent else name for name in later]
    return names


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_norm(module: nn.Module) -> bool:
    sizes = [p.dim() for p in module.parameters()]
    return bool(sizes) and max(sizes) == 1
