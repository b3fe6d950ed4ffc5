"""Adapters that are there already, added up: a few weights to tune, and no tensor."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_adapt.errors import NotServableError, OptionError
from zo_adapt.serve.adapter import FEATURES, check_fits, features_of
from zo_adapt.serve.evaluator import Names
from zo_adapt.serve.protocol import Candidate, ServedModel
from zo_adapt.serve.rounds import answered_by, unloading

_MIXABLE = frozenset({"head", "embeddings"})
"""Features of an adapter that its products alone say all of."""


class AdapterMixture:
    r"""Several LoRA adapters of one base as one, with a weight each.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

    with their scales s_i = alpha_i / r_i: exact, of the sum of their ranks. The weights are what is
    tuned, through ``AskTell``.

    Args:
        folders: Adapters as peft saves them (safetensors).

    Attributes:
        config: Of the sum, as JSON can hold it.
        rank: The sum of their ranks.
        modules: Paths of the layers that any of them adapts.

    Raises:
        NotServableError: One is no LoRA, or has what a sum of products has not (DoRA, biases,
            modules beside it, ranks or scales that differ from layer to layer).
        OptionError: No folder, or one without an adapter.

    Example:
        >>> mixture = AdapterMixture(["formal", "brief"])  # doctest: +SKIP
        >>> with mixture.answering(server, [0.7, 0.3]):  # doctest: +SKIP
        ...     value = reward(rows).mean()

    Reference: Huang et al. 2023, LoraHub (arXiv 2307.13269), eq. (1), there of equal ranks.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        if not folders or isinstance(folders, str):
            raise OptionError(f"folders={folders!r}; give a list of at least one adapter's folder")
        read = [_read(Path(folder)) for folder in folders]
        configs = [config for config, _ in read]
        self._ranks = [int(config["r"]) for config in configs]
        self._scales = [_scale(config) for config in configs]
        self._tensors = [tensors for _, tensors in read]
        names = {name: tensor for tensors in self._tensors for name, tensor in tensors.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in names.items()}
        self.rank = sum(self._ranks)
        self.modules = sorted({name.partition(".lora_")[0] for name in names})
        self.config: dict[str, Any] = configs[0] | {
            "r": self.rank,
            "lora_alpha": self.rank,  # a scale of one
            "use_rslora": False,
            "lora_dropout": 0.0,
        }
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            if any(config.get(name) != configs[0].get(name) for config in configs):
                own = [module.removeprefix("base_model.model.") for module in self.modules]
                self.config |= {"target_modules": own, "exclude_modules": None}
                self.config |= {"layers_to_transform": None, "layers_pattern": None}
        self._names = Names()

    def __len__(self) -> int:
        return len(self._tensors)

    def at(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """The tensors of the sum, by the names that peft saves them under.

        Raises:
            OptionError: Not one finite number for each adapter.
        """
        given = [float(weight) for weight in weights]
        if len(given) != len(self) or not all(map(math.isfinite, given)):
            raise OptionError(f"weights={given}; give {len(self)} finite numbers")
        return {name: self._joined(name, given) for name in self._shapes}

    @contextmanager
    def answering(self, server: ServedModel, weights: Sequence[float]) -> Iterator[None]:
        """Inside, objectives of language models ask a server under the sum; see ``answered_by``.

        Raises:
            NotServableError: The server cannot run it.
        """
        check_fits(self.config, self.modules, self.rank, server.limits)
        name = self._names.new()
        tensors = self.at(weights)
        with unloading(server, [name]):
            server.load(Candidate(name, tensors), self.config)
            with answered_by(server, name):
                yield

    def _joined(self, name: str, weights: Sequence[float]) -> Tensor:
        """One factor: those of the adapters along the rank, zeros where one is not on the layer."""
        is_b = ".lora_B" in name or ".lora_embedding_B" in name
        axis, parts = (1 if is_b else 0), []
        for tensors, rank, scale, weight in zip(
            self._tensors, self._ranks, self._scales, weights, strict=True
        ):
            shape = list(self._shapes[name])
            shape[axis] = rank
            found = tensors.get(name)
            part = torch.zeros(shape) if found is None else found.float()
            parts.append(part * (weight * scale) if is_b else part)
        return torch.cat(parts, axis).contiguous()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if not (file.is_file() and config_file.is_file()):
        raise OptionError(
            f"{folder} has no adapter_model.safetensors and adapter_config.json; save the adapter "
            "by model.save_pretrained(folder)"
        )
    config = json.loads(config_file.read_text())
    if config.get("peft_type", "LORA") != "LORA":
        raise NotServableError(f"the adapter in {folder} is of the type {config['peft_type']}")
    if refused := sorted(features_of(config) - _MIXABLE):
        raise NotServableError(
            f"the adapter in {folder} has {FEATURES[refused[0]]}, which a sum of products has not"
        )
    return config, load_file(file)


def _scale(config: dict[str, Any]) -> float:
    """Its alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA."""
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
