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

STEPS, WARM = 8, 3
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


def work(kind: str, rows: int, length: int, device: str) -> None:
    """One process's part; rank 0 prints seconds a step."""
    from objectives import CausalLMLoss, GenerationReward
    from zo_adapt import EvaluationOptions, MeZO, ParameterView, minimize
    from zo_adapt.ranks.group import EVALUATED
    from zo_adapt.ranks.launched import find_ranks
    from zo_adapt.ranks.workers import Workers

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model = adapted(LLAMA_8B if device == "cuda" else SMALL, device)
    view = ParameterView.trainable(model)
    numbers = np.random.default_rng(0).integers(3, 2000, (4 * rows, length))
    if kind == "loss":
        objective: Any = CausalLMLoss(model)
        data = [{"input_ids": row.tolist()} for row in numbers]
    else:
        objective = GenerationReward(model, words(), reward, max_new_tokens=length)
        data = [{"prompt": " ".join(map(str, row[:32]))} for row in numbers]
    times: list[float] = []

    def stamp(_: Any) -> None:
        times.append(time.perf_counter())

    part = max(1, rows // (8 if kind == "loss" else 4))
    result = minimize(
        objective, view, data, MeZO(lr=1e-5), batch_size=rows, max_steps=STEPS, callback=stamp,
        evaluation=EvaluationOptions(micro_batch_size=part, joint_rows="off"), progress=False,
    )  # fmt: skip
    ranks, seconds = find_ranks(Workers()), 0.0
    if ranks is not None:
        payload, began = np.zeros(2 * rows, np.int64), time.perf_counter()
        for _ in range(200):
            ranks.exchange(EVALUATED, payload)
        seconds = (time.perf_counter() - began) / 200
    if ranks is None or ranks.is_first:
        step = statistics.median(np.diff(times)[WARM - 1 :])
        digest = hashlib.sha256(view.hash().encode()).hexdigest()[:12]
        found = {"seconds": step, "exchange": seconds, "weights": digest, "value": result.value}
        print("RESULT " + json.dumps(found), flush=True)


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The mean token."""
    return [sum(ids) / max(1, len(ids)) for ids in completion_ids]


def measured(processes: int, *arguments: str) -> dict[str, Any]:
    """What so many processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    if processes == 1:
        command = [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--work", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    found: dict[str, Any] = json.loads(lines[-1][7:])
    return found


def compare(gpus: int) -> None:
    """Print the table."""
    device, most = ("cuda", gpus) if gpus else ("cpu", 2)
    name = torch.cuda.get_device_name() if gpus else "CPU"
    shapes = {"loss": (32, 512), "generation": (64, 64)} if gpus else {
        "loss": (32, 64), "generation": (32, 16)
    }  # fmt: skip
    print(f"{name}, torch {torch.__version__}, {'8B bf16' if gpus else 'small fp32'} Llama, LoRA")
    print("| objective | processes | rows | s a step | speed-up | exchange | weights |")
    print("|---|---|---|---|---|---|---|")
    for kind, (rows, length) in shapes.items():
        one = None
        for way, processes, count in (
            ("strong", 1, rows), ("strong", most, rows), ("weak", most, rows * most),
        ):  # fmt: skip
            found = measured(processes, kind, str(count), str(length), device)
            one = one or found["seconds"]
            gain = one / found["seconds"] * count / rows
            print(
                f"| {kind}, {way} | {processes} | {count} | {found['seconds']:.3f} | {gain:.2f} | "
                f"{1e6 * found['exchange']:.0f} us | {found['weights']} |",
                flush=True,
            )


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
    add("--work", nargs=4, metavar=("KIND", "ROWS", "LENGTH", "DEVICE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        kind, rows, length, device = args.work
        torch.set_num_threads(1)
        work(kind, int(rows), int(length), device)
    elif args.simulate:
        simulate(args.latency, args.bandwidth, args.block)
    else:
        compare(args.gpus)


if __name__ == "__main__":
    main()
