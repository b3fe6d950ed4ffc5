"""Inputs that a transformer can be run on before there is any data, to see in which order it runs.

No model is known by its name: the arguments of its forward are, by the names and settings that are
common to the transformers library.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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
