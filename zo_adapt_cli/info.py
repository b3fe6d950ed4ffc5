"""``zo-adapt info``: what could be tuned, its memory and its queries; no weights are read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TARGETS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from zo_adapt.errors import ViewError
from zo_adapt.view import selection
from zo_adapt.view.group import size

COPIED = 64 * 2**20
"""Views up to this size are shifted by way of a copy."""
DIRECTIONS, ROWS, BUDGET = 8, 16, 20_000
RANK = 8


def main(words: Sequence[str]) -> None:
    """Print the table of a model or an adapter."""
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: zo-adapt info MODEL_OR_ADAPTER   (a hub name or a folder)")
        return
    print(describe(words[0]))


def describe(source: str) -> str:
    """What could be tuned of a model, or what an adapter holds."""
    folder = Path(source)
    if (folder / "adapter_config.json").exists():
        return _adapter(folder)
    model = without_weights(source)
    whole = dict(model.named_parameters())
    lines = [f"{source}: {type(model).__name__}, {_count(whole)}", "", HEADER]
    lines.append(_row("LoRA, r=8", _lora(model, source)))
    for n in (1, 2):
        try:
            lines.append(_row(f"last {n} and head", selection.last_layers(model, n, head=True)))
        except (ViewError, ValueError) as error:
            lines.append(f"last {n}: {error}")
            break
    lines.append(_row("all weights", whole))
    return "\n".join([*lines, "", _queries()])


HEADER = f"{'view':<18} {'tensors':>8} {'scalars':>15} {'bytes':>10} {'beside the weights':>20}"


def without_weights(source: str) -> nn.Module:
    """The model of a folder or hub name on the meta device: shapes alone."""
    config = AutoConfig.from_pretrained(source)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next((one for one in named if one is not None), None)
    with torch.device("meta"):
        model: nn.Module = kind(config) if kind is not None else AutoModel.from_config(config)
    return model.eval()


def _lora(model: nn.Module, source: str) -> dict[str, Tensor]:
    kind = getattr(model.config, "model_type", "")
    config = LoraConfig(r=RANK, target_modules=None if kind in KNOWN_TARGETS else "all-linear")
    with torch.device("meta"):
        adapted = get_peft_model(without_weights(source), config)
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def _row(name: str, tensors: Mapping[str, Tensor]) -> str:
    count = sum(t.numel() for t in tensors.values())
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    largest = max((t.numel() * t.element_size() for t in tensors.values()), default=0)
    beside = nbytes if nbytes <= COPIED else largest
    return f"{name:<18} {len(tensors):>8} {count:>15,} {size(nbytes):>10} {size(beside):>20}"


def _count(tensors: Mapping[str, Tensor]) -> str:
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return f"{sum(t.numel() for t in tensors.values()):,} weights, {'/'.join(kinds)}"


def _queries() -> str:
    step = DIRECTIONS * ROWS
    return (
        f"A default step on {ROWS} rows makes {step} queries (forward passes of one sample); "
        f"{BUDGET:,} queries are about {BUDGET // step} steps.\n"
        "Memory: that of inference on the rows of a forward, and what is named beside the weights."
    )


def _adapter(folder: Path) -> str:
    config: Any = PeftConfig.from_pretrained(str(folder))
    tensors = _shapes(folder / "adapter_model.safetensors")
    count = sum(torch.Size(shape).numel() for shape in tensors.values())
    heads = sorted({n.split(".")[-2] for n in tensors if "lora_" not in n and n.endswith("weight")})
    kind = getattr(config.peft_type, "value", config.peft_type)
    lines = [
        f"{folder}: {kind} of {config.base_model_name_or_path}",
        f"{len(tensors)} tensors, {count:,} scalars"
        + (f"; beside it {', '.join(heads)}" if heads else ""),
    ]
    if rank := getattr(config, "r", None):
        targets = config.target_modules
        named = sorted(targets) if isinstance(targets, set | list) else targets
        lines.append(f"r={rank}, on {named}")
    lines += [
        "Tune it on: PeftModel.from_pretrained(base, folder, is_trainable=True), then "
        "ParameterView.trainable(model).",
        _queries(),
    ]
    return "\n".join(lines)


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of a safetensors file, from its header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
