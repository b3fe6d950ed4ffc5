"""Seconds a step of one process and of several that share it, and what limits a thousand of them.

    python benchmarks/scaling.py                      # CPU: a small model, 1 and 2 processes, gloo
    python benchmarks/scaling.py --gpus 2             # LoRA on a model of 8B and generation, bf16
    python benchmarks/scaling.py --simulate           # up to 1,024 unequal ranks, on paper

Strong: the same step by more processes. Weak: a batch that grows with them. Weights are random and
the same on every rank; what is compared is time, and the hash of the weights after the last step.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

STEPS, WARM = 5, 2
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SMALL = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2048,
}  # fmt: skip


def adapted(size: dict[str, int], device: str) -> Any:
    """A Llama of a size, with random weights and a LoRA on its queries and values."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**size, max_position_embeddings=2048, pad_token_id=0)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(model, lora).to(dtype).eval()


def words() -> Any:
    """A tokenizer of the words "0", "1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({str(i): i for i in range(2048)}, unk_token="1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="0", eos_token="2")


def work(jobs: list[str], device: str) -> None:
    """One process's part of every job; rank 0 prints seconds a step of each.

    Args:
        jobs: Each "kind:rows:length:part", a part being the rows of a call.
        device: "cpu" or "cuda".
    """
    from zo_adapt import ParameterView
    from zo_adapt.evaluation.workers import Workers
    from zo_adapt.ranks.launched import find_ranks

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model = adapted(LLAMA_8B if device == "cuda" else SMALL, device)
    view = ParameterView.trainable(model)
    start = [tensor.detach().clone() for tensor in view.tensors.values()]
    for job in jobs:
        kind, *sizes = job.split(":")
        with torch.no_grad():
            for tensor, first in zip(view.tensors.values(), start, strict=True):
                tensor.copy_(first)
        rows, length, part = map(int, sizes)
        found = seconds_a_step(model, view, kind, rows, length, part)
        ranks = find_ranks(Workers())
        found["devices"] = [str(where(model))]
        if ranks is not None:
            found["exchange"] = exchange_seconds(ranks, 2 * rows)
            found["devices"] *= ranks.size
            torch.distributed.all_gather_object(found["devices"], str(where(model)))
        if ranks is None or ranks.is_first:
            digest = hashlib.sha256(view.hash().encode()).hexdigest()[:12]
            print("RESULT " + json.dumps({"job": job, "weights": digest, **found}), flush=True)


def seconds_a_step(
    model: Any, view: Any, kind: str, rows: int, length: int, part: int
) -> dict[str, Any]:
    """Median of the steps after the first ones.

    A loss is asked by the default step, 8 directions against the middle; texts by pairs, since a
    step of them lasts ten times as long.
    """
    from objectives import CausalLMLoss, GenerationReward
    from zo_adapt import EvaluationOptions, MeZO, minimize

    numbers = np.random.default_rng(0).integers(3, 2000, (4 * rows, max(32, length)))
    if kind == "loss":
        objective: Any = CausalLMLoss(model)
        data = [{"input_ids": row.tolist()} for row in numbers]
        optimizer = MeZO(lr=1e-5)
    else:
        objective = GenerationReward(model, words(), reward, max_new_tokens=length)
        data = [{"prompt": " ".join(map(str, row[:32]))} for row in numbers]
        optimizer = MeZO(lr=1e-5, num_directions=1, one_sided=False)
    times: list[float] = []

    def stamp(_: Any) -> None:
        times.append(time.perf_counter())

    result = minimize(
        objective, view, data, optimizer, batch_size=rows, max_steps=STEPS, callback=stamp,
        evaluation=EvaluationOptions(
            micro_batch_size=part, joint_rows="off", cuda_graphs="off", reuse_trunk="off"
        ),
        progress=False,
    )  # fmt: skip
    return {"seconds": statistics.median(np.diff(times)[WARM - 1 :]), "value": result.value}


def where(model: Any) -> torch.device:
    """The device of a model."""
    device: torch.device = next(model.parameters()).device
    return device


def exchange_seconds(ranks: Any, numbers: int) -> float:
    """Mean of 200 exchanges of so many numbers a rank."""
    from zo_adapt.ranks.group import EVALUATED

    payload, began = np.zeros(numbers, np.int64), time.perf_counter()
    for _ in range(200):
        ranks.exchange(EVALUATED, payload)
    return (time.perf_counter() - began) / 200


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The mean token."""
    return [sum(ids) / max(1, len(ids)) for ids in completion_ids]


def measured(processes: int, device: str, jobs: list[str]) -> list[dict[str, Any]]:
    """What so many processes print of the jobs."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    if processes == 1:
        command = [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--device", device, "--work", *jobs],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(lines) < len(jobs):
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return [json.loads(line[7:]) for line in lines]


def compare(gpus: int, kinds: list[str]) -> None:
    """Print the table."""
    device, most = ("cuda", gpus) if gpus else ("cpu", 2)
    name = torch.cuda.get_device_name() if gpus else "CPU"
    shapes = {"loss": (32, 256, 4), "generation": (64, 16, 16)} if gpus else {
        "loss": (32, 32, 4), "generation": (16, 8, 4)
    }  # fmt: skip

    def job(kind: str, more: int) -> str:
        rows, length, part = shapes[kind]
        return f"{kind}:{rows * more}:{length}:{part}"

    strong, weak = [job(kind, 1) for kind in kinds], [job(kind, most) for kind in kinds]
    alone = dict(zip(kinds, measured(1, device, strong), strict=True))
    shared = measured(most, device, strong + weak)
    print(f"{name}, torch {torch.__version__}, {'8B bf16' if gpus else 'small fp32'} Llama, LoRA")
    print("| objective | on | rows | s a step | speed-up | exchange | weights |")
    print("|---|---|---|---|---|---|---|")
    rows = [(kind, "alone", 1, alone[kind]) for kind in kinds]
    rows += [
        (kind, way, more, found)
        for (way, more, kind), found in zip(
            [("strong", 1, kind) for kind in kinds] + [("weak", most, kind) for kind in kinds],
            shared, strict=True,
        )
    ]  # fmt: skip
    for kind, way, more, found in sorted(rows, key=lambda row: kinds.index(row[0])):
        gain = alone[kind]["seconds"] / found["seconds"] * more
        cells = [
            f"{kind}, {way}",
            ", ".join(found["devices"]),
            str(shapes[kind][0] * more),
            f"{found['seconds']:.3f}",
            f"{gain:.2f}",
            f"{1e6 * found.get('exchange', 0):.0f} us",
            found["weights"],
        ]
        print(f"| {' | '.join(cells)} |")


def simulate(latency: float, bandwidth: float, block: float) -> None:
    """Unequal ranks: a fifth of them at half speed, the others within some percent of each other.

    An exchange is a ring: size - 1 messages of everybody's values, one after the other.

    Args:
        latency: Seconds of a message.
        bandwidth: Bytes a second.
        block: Seconds of a block on a rank of usual speed.
    """
    draw = np.random.default_rng(0)
    print(f"latency {1e6 * latency:.0f} us, {bandwidth / 1e9:.1f} GB/s, {block:.2f} s a block;")
    print("1,024 blocks of 16 rows a step (strong), or 4 blocks for every rank (weak)")
    print("| ranks | | bytes a rank | exchange | in a row | from a queue | of ideal | limit |")
    print("|---|---|---|---|---|---|---|---|")
    for size in (1, 2, 8, 64, 256, 1024):
        speeds = draw.normal(1.0, 0.05, size) * np.where(np.arange(size) % 5 == 4, 0.5, 1.0)
        for way, blocks in (("strong", 1024), ("weak", 4 * size)):
            values = 8 * (4 + 2 + -(-blocks // size) * (4 + 16))
            exchange = (size - 1) * (latency + values / bandwidth)
            lengths = block * draw.lognormal(0.0, 0.2, blocks)
            row = max(
                float(lengths[blocks * r // size : blocks * (r + 1) // size].sum() / speeds[r])
                for r in range(size)
            )
            free = np.zeros(size)
            for length in lengths:  # whoever is free first takes the next
                rank = int((free + length / speeds).argmin()) if size == 1 else int(free.argmin())
                free[rank] += latency + length / speeds[rank]
            queue, ideal = float(free.max()), float(lengths.sum() / speeds.sum())
            parts = {"the last block": queue - ideal, "the exchange": exchange}
            limit = max(parts, key=lambda name: parts[name]) if size > 1 else "the forwards"
            print(
                f"| {size} | {way} | {values:,} | {1e3 * exchange:.1f} ms | "
                f"{row + exchange:.2f} s | {queue + exchange:.2f} s | "
                f"{ideal / (queue + exchange):.0%} | {limit} |"
            )


def main() -> None:
    """Measure, simulate, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--gpus", type=int, default=0, help="GPUs to compare with one; 0: on the CPU")
    add("--simulate", action="store_true", help="unequal ranks, on paper")
    add("--latency", type=float, default=1e-4, help="of a message, for --simulate")
    add("--bandwidth", type=float, default=1e9, help="bytes a second, for --simulate")
    add("--block", type=float, default=0.5, help="seconds of a block, for --simulate")
    add("--kinds", nargs="+", choices=["loss", "generation"], default=["loss", "generation"])
    add("--work", nargs="+", metavar="KIND:ROWS:LENGTH:PART", help=argparse.SUPPRESS)
    add("--device", default="cpu", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        torch.set_num_threads(1)
        work(args.work, args.device)
    elif args.simulate:
        simulate(args.latency, args.bandwidth, args.block)
    else:
        compare(args.gpus, args.kinds)


if __name__ == "__main__":
    main()
