"""Models in parts on several processes: noise, weights and values against the whole; time, memory.

    torchrun --nproc_per_node=2 benchmarks/sharded.py                 # two GPUs, NCCL
    torchrun --nproc_per_node=2 benchmarks/sharded.py --device cpu    # gloo, small

For FSDP2 and for transformers' tp_plan="auto", full views and a LoRA: whether a shift of the parts
has every bit of a shift of the whole model, whether it is undone, how far the values of a run lie
from those of the whole model, and whether the trajectory replays there to the same bits. Then
seconds a step and the peak of memory, of a model of 8B on GPUs. Weights are random.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from objectives import CausalLMLoss
from zo_adapt import MeZO, ParameterView, minimize, replay
from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.distributions import noise_named
from zo_adapt.noise.parts import slice_along
from zo_adapt.noise.sums import Sum, Sums
from zo_adapt.term import Term

SIZES: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    },
    "cuda": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
TERMS = [Term(5, 0.01), Term(9, -0.02)]
Make = Callable[[bool], Any]


def say(name: str, **found: Any) -> None:
    """Print what was found, on rank 0."""
    if dist.get_rank() == 0:
        print(f"RESULT {name} {json.dumps(found)}", flush=True)


def fresh(device: str, size: str, dtype: torch.dtype) -> Any:
    """A Llama with random weights, the same on every rank."""
    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def in_parts(model: Any, device: str) -> Any:
    """By FSDP2, a block at a time."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for part in (*layers, model):
        fully_shard(part, mesh=mesh)
    return model


def with_lora(model: Any) -> Any:
    """On queries and outputs: of one the B is cut by tensor parallelism, of the other the A."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"])
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # peft draws it after it was cut
                parameter.fill_(0.01)
    return model


def check_noise(device: str) -> None:
    """Slices of tensors against the whole ones."""
    count = wrong = 0
    for name in ("gaussian", "rademacher", "lowrank", "lowrank-4"):
        noise, sums = noise_named(name), Sums([Sum([(1, 0.5), (9, -0.25)], 0.9)], rounding=4)
        for shape in ((512,), (333,), (512, 1024), (6, 64, 48), (77, 53), (4096, 2048)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                weight = torch.randn(shape, device=device).to(dtype)
                whole = weight.clone()
                Accumulation(noise, [Place(whole, whole, 7)])(sums)
                for axis, size in enumerate(shape):
                    for start, stop in ((0, size // 2), (size // 2, size)):
                        own = weight.narrow(axis, start, stop - start).clone()
                        place = Place(own, own, 7, part=slice_along(axis, shape, start, stop))
                        Accumulation(noise, [place])(sums)
                        wrong += not torch.equal(own, whole.narrow(axis, start, stop - start))
                        count += 1
    say("noise of slices", slices=count, other_bits=wrong)


def tuned(view: ParameterView, steps: int, rows: int, length: int, **options: Any) -> Any:
    """A run, and seconds a step without the first."""
    size = view.model.config.vocab_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, int(size), (4 * rows, length), generator=generator)
    data = [{"input_ids": row.tolist()} for row in drawn]
    times: list[float] = []

    def stamp(_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    result = minimize(
        CausalLMLoss(view.model), view, data, MeZO(displacement=0.01), batch_size=rows,  # type: ignore[arg-type]
        max_steps=steps, callback=stamp, progress=False, **options,
    )  # fmt: skip
    return result, (times[-1] - times[0]) / (len(times) - 1)


def compare(name: str, make: Make, look: Callable[[Any], ParameterView], folder: Path) -> None:
    """The parts against the whole."""
    parts, whole = look(make(True)), look(make(False))
    start = parts.hash()
    with parts.shifted(TERMS, 0.5):
        shifted = parts.hash()
    with whole.shifted(TERMS, 0.5):
        wanted = whole.hash()
    file = folder / f"{name.replace(' ', '-')}.zot"
    result, seconds = tuned(parts, 4, 8, 64, trajectory=file)
    tuned_to = parts.hash()
    reference, whole_seconds = tuned(whole, 4, 8, 64)
    pairs = zip(result.history, reference.history, strict=True)
    if dist.get_rank() == 0:
        again = look(make(False))
        replay(again, file)
        replayed = again.hash() == tuned_to
    say(
        name,
        same_start=start == look(make(False)).hash(),
        same_shift=shifted == wanted != start,
        values_apart=max(abs(a.value - b.value) / abs(b.value) for a, b in pairs),
        replays=replayed if dist.get_rank() == 0 else None,
        seconds=round(seconds, 4),
        seconds_of_whole_shared=round(whole_seconds, 4),
    )
    dist.barrier()


def compare_all(device: str, folder: Path) -> None:
    """FSDP2 and tensor parallel, full and LoRA, fp32 and bf16."""
    place = folder / "llama"
    if dist.get_rank() == 0:
        fresh("cpu", device, torch.float32).save_pretrained(place)
    dist.barrier()

    def fsdp(dtype: torch.dtype, lora: bool = False) -> Make:
        def make(parted: bool) -> Any:
            model = fresh(device, device, dtype)
            model = with_lora(model) if lora else model
            return in_parts(model, device) if parted else model

        return make

    def tensor_parallel(dtype: torch.dtype, lora: bool = False) -> Make:
        def make(parted: bool) -> Any:
            plan = {"tp_plan": "auto"} if parted else {}
            model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **plan).eval()
            model = model if parted else model.to(device)
            return with_lora(model) if lora else model

        return make

    def full(noise: str) -> Callable[[Any], ParameterView]:
        return lambda model: ParameterView.full(model, noise=noise)

    half = torch.bfloat16
    for name, make, look in (
        ("fsdp full gaussian fp32", fsdp(torch.float32), full("gaussian")),
        ("fsdp full lowrank bf16", fsdp(half), full("lowrank")),
        ("fsdp lora bf16", fsdp(half, True), ParameterView.trainable),
        ("tp full gaussian bf16", tensor_parallel(half), full("gaussian")),
        ("tp full lowrank fp32", tensor_parallel(torch.float32), full("lowrank")),
        ("tp lora fp32", tensor_parallel(torch.float32, True), ParameterView.trainable),
    ):
        try:
            compare(name, make, look, folder)
        except Exception as error:  # the others are worth knowing, too
            say(name, error=f"{type(error).__name__}: {error}"[:600])


def measure_large(device: str) -> None:
    """Time and memory of the default step on all weights of a model in parts."""
    model = in_parts(fresh(device, "8b" if device == "cuda" else "cpu", torch.bfloat16), device)
    view = ParameterView.full(model)
    peak = 0.0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _, seconds = tuned(view, 3, 8, 256)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    say(
        "large",
        view=repr(view),
        seconds_a_step=round(seconds, 3),
        peak_GiB_a_rank=round(peak, 2),
        GiB_of_the_weights=round(view.nbytes / 2**30, 2),
    )


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="leave the model of 8B out")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bar()
    rank = int(os.environ["LOCAL_RANK"])
    if asked.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if asked.device == "cpu" else None)
    begun = time.perf_counter()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    where = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    say("device", kind=where, ranks=dist.get_world_size(), torch=torch.__version__)
    if rank == 0:
        check_noise(asked.device)
    dist.barrier()
    compare_all(asked.device, Path(folder[0]))
    if not asked.small:
        measure_large(asked.device)
    say("all", seconds=round(time.perf_counter() - begun, 1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
