"""A LoRA adapter as servers take it: peft's names, its configuration, and what cannot be served."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_adapt.errors import NotServableError
from zo_adapt.serve.protocol import Limits
from zo_adapt.term import Shift
from zo_adapt.view.parameters import ParameterView

LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
FEATURES: dict[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with biases",
    "bias": "tuned biases",
    "modules_to_save": "modules saved beside the adapter",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable tokens",
    "rank_pattern": "ranks that differ from layer to layer",
    "alpha_pattern": "scales that differ from layer to layer",
    "head": "an adapter of the output embedding (lm_head)",
    "embeddings": "an adapter of the input embedding",
    "init_lora_weights": "a start that has moved the base's weights",
    "alora_invocation_tokens": "tokens that invoke it (aLoRA)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "a router (Arrow)",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layers of the base once more",
}
"""What an adapter may have that a server may not run, and what it is called."""
REFUSED_BY_VLLM = frozenset(FEATURES)
"""What vLLM refuses, or leaves out without a word."""
REFUSED_BY_PEFT = REFUSED_BY_VLLM - {
    "rank_pattern",
    "alpha_pattern",
    "head",
    "embeddings",
    "init_lora_weights",
}
"""What peft cannot run with another adapter for each row."""
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {}, ())
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take from the base what they give to the adapter."""
_HEADS, _EMBEDDINGS = (
    ("lm_head", "embed_out", "output"),
    ("embed_tokens", "embed_in", "wte", "word_embeddings"),
)


class ServedAdapter:
    """The adapter that a view holds, at any point.

    Args:
        view: Of LoRA's matrices, all or some of them (those outside it are served as they are):
            of a peft model, or by the names that peft saves them under.
        lora_config: A ``peft.LoraConfig``, or what stands in adapter_config.json; None: that of the
            view's model.

    Raises:
        NotServableError: The view holds something else than one LoRA adapter, or there is no
            configuration.
    """

    def __init__(self, view: ParameterView, lora_config: Any = None) -> None:
        view.check_whole("a served adapter")
        self.view = view
        adapter, given = _of_model(view)
        self.config = as_mapping(given if lora_config is None else lora_config)
        if not self.config:
            raise NotServableError(
                "a served adapter needs its configuration; make the view of a peft model, or give "
                "lora_config=LoraConfig(...)"
            )
        if self.config.get("peft_type", "LORA") != "LORA":
            raise NotServableError(
                f"the adapter is of the type {self.config['peft_type']}; servers run LORA"
            )
        self._saved = {name: saved_name(name, adapter) for name in view.tensors}
        if outside := sorted(n for n in view.tensors if not _is_lora(self._saved[n])):
            found = [FEATURES[name] for name in sorted(features_of(self.config, []))]
            more = f"; the adapter has {', '.join(found)}" if found else ""
            raise NotServableError(
                f"the view holds {outside[0]!r}, which is no matrix of a LoRA adapter "
                f"({len(outside)} such tensors{more}); tune the adapter alone: "
                "ParameterView.matching(model, 'lora_')"
            )
        others = {} if view.model is None else dict(view.model.named_parameters())
        self._others = {
            saved: tensor
            for name, tensor in others.items()
            if name not in view.tensors
            and f".{adapter}." in name
            and _is_lora(saved := saved_name(name, adapter))
        }

    @property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        tensors = {self._saved[name]: tensor for name, tensor in self.view.tensors.items()}
        return max(
            (t.shape[0] for name, t in {**self._others, **tensors}.items() if "_A" in name),
            default=int(self.config.get("r", 0)),
        )

    @property
    def modules(self) -> list[str]:
        """Paths of the layers that are adapted."""
        names = (*self._saved.values(), *self._others)
        return sorted({name.partition(".lora_")[0] for name in names})

    def at(self, points: Sequence[Shift]) -> list[dict[str, Tensor]]:
        """The tensors at every point, bit for bit those of ``view.shifted``, on the CPU.

        They are copies: a view writes its stacks anew at the next call.
        """
        moving = self.view.stack(points)
        return [
            {
                saved: _copied(moving[name][index] if name in moving else self.view.tensors[name])
                for name, saved in self._saved.items()
            }
            | {saved: _copied(tensor) for saved, tensor in self._others.items()}
            for index in range(len(points))
        ]

    def zero(self) -> dict[str, Tensor]:
        """An adapter that changes nothing: the same A, and B = 0."""
        here = self.at([Shift(())])[0]
        return {
            name: torch.zeros_like(tensor) if _is_b(name) else tensor
            for name, tensor in here.items()
        }

    def check(self, limits: Limits) -> None:
        """Refuse, before any work, what a server would refuse or, worse, leave out.

        Raises:
            NotServableError: Names the feature, the rank or the layer.
        """
        check_fits(self.config, self.modules, self.rank, limits)


def check_fits(
    config: Mapping[str, Any], modules: Sequence[str], rank: int, limits: Limits
) -> None:
    """Refuse, before any work, what a server would refuse or, worse, leave out.

    Raises:
        NotServableError: Names the feature, the rank or the layer.
    """
    if limits.adapters < 1:
        raise NotServableError(
            "this server takes no adapters; only what it reads can be tuned: its prompts and the "
            "sampling, through AskTell"
        )
    for feature in sorted(features_of(config, modules) & limits.refuses):
        raise NotServableError(
            f"the adapter has {FEATURES[feature]}, which this server cannot run; make it "
            "without, or tune in this process"
        )
    if limits.rank is not None and rank > limits.rank:
        raise NotServableError(
            f"the adapter has rank {rank}, the server takes up to {limits.rank}; start it "
            f"with a larger --max-lora-rank, or choose r={limits.rank}"
        )
    allowed = limits.target_modules
    leaves = {module.rpartition(".")[2] for module in modules}
    if allowed is not None and (more := sorted(leaves - allowed)):
        raise NotServableError(
            f"the adapter is on {more}, the server adapts {sorted(allowed)}; start it with "
            f"--lora-target-modules {' '.join(sorted(leaves))}"
        )


def as_mapping(lora_config: Any) -> dict[str, Any]:
    """A configuration as JSON can hold it: what stands in adapter_config.json."""
    given = lora_config.to_dict() if hasattr(lora_config, "to_dict") else dict(lora_config or {})
    return {name: _plain(value) for name, value in given.items()}


def saved_name(name: str, adapter: str) -> str:
    """The name under which peft saves a parameter: without the adapter's own."""
    head, dot, tail = name.rpartition(f".{adapter}.")
    return f"{head}.{tail}" if dot else name.removesuffix(f".{adapter}")


def _of_model(view: ParameterView) -> tuple[str, Any]:
    """The active adapter of a view's model and its configuration."""
    configs = getattr(view.model, "peft_config", None) or {}
    active = getattr(view.model, "active_adapters", None)
    names = list(active() if callable(active) else active or [])
    if configs and len(names) != 1:
        raise NotServableError(
            f"the adapters {names} are active; a server runs one at a time: set_adapter(name)"
        )
    return (names[0], configs[names[0]]) if configs else ("default", None)


def features_of(config: Mapping[str, Any], modules: Sequence[str] = ()) -> set[str]:
    """What of FEATURES an adapter has."""
    found = {name for name in FEATURES if config.get(name) not in _OFF}
    if not str(config.get("init_lora_weights")).lower().startswith(_MOVING):
        found.discard("init_lora_weights")
    leaves = {module.rpartition(".")[2] for module in modules}
    found |= {"head"} if leaves & set(_HEADS) else set()
    return found | ({"embeddings"} if leaves & set(_EMBEDDINGS) else set())


def _is_lora(saved: str) -> bool:
    parts = saved.split(".")
    return any(part in LORA for part in parts[-2:]) and parts[-1] != "bias"


def _is_b(saved: str) -> bool:
    """Whether it is the factor that peft makes zero; of embeddings that is A."""
    return ".lora_B" in saved or ".lora_embedding_A" in saved


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    # Enumerations of strings (task and tuner types).
    return getattr(value, "value", value)
