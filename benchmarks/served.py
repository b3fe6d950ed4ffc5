"""Candidates a second where a model is served: in this process, and behind a server.

    python benchmarks/served.py                               # in this process
    python benchmarks/served.py --url http://127.0.0.1:8000   # and behind vLLM

A candidate is loaded, scored on texts of 48 tokens (--texts, 16) and unloaded, eight of them
together. The limit of each place is its own forwards of the base on as many texts, with nothing to
load.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from objectives import CausalLMLoss
from support import real_data
from zo_adapt import Data, EvaluationOptions, ParameterView, PeftServer, VLLMServer, served_lora
from zo_adapt.data.sources import Batch
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.serve.evaluator import ServedEvaluator
from zo_adapt.term import Shift, Term

CANDIDATES, LENGTH = 8, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="scored by each candidate")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    folder = str(real_data.smollm2_folder())
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lora = LoraConfig(r=given.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = served_lora(folder, lora)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(5, 40_000, (LENGTH,), generator=generator).tolist()}
        for _ in range(given.texts)
    ]
    places: dict[str, Any] = {"this process (peft)": PeftServer(base)}
    if given.url:
        places["vLLM"] = VLLMServer(given.url)
    what = f"SmolLM2-135M fp32, LoRA r={given.rank} q,v, {given.texts} texts"
    print(f"{what}, {torch.get_num_threads()} threads")
    for title, server in places.items():
        measure(title, server, model, rows, given.repeats)
    local(folder, lora, rows, given.repeats)


def probes(source: Any) -> list[Probe]:
    batch = Batch(source, range(len(source)))
    return [Probe(Shift((Term(seed, 0.01),)), batch) for seed in range(CANDIDATES)]


def seconds(call: Any, repeats: int) -> float:
    """The median of a few, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(title: str, server: Any, model: Any, rows: Any, repeats: int) -> None:
    loss = CausalLMLoss(model)
    source = Data(rows).source(loss.collate)
    evaluator = ServedEvaluator(server, self_test=False).bound_to(
        loss, ParameterView.trainable(model), EvaluationOptions()
    )
    asked = probes(source)
    texts = [row["input_ids"] for row in rows] * CANDIDATES
    limit = seconds(lambda: server.score([""] * len(texts), texts), repeats)
    whole = seconds(lambda: evaluator.evaluate(asked), repeats)
    print(
        f"{title:22} {CANDIDATES / whole:6.2f} candidates/s ({whole / CANDIDATES:.2f} s each), "
        f"limit {CANDIDATES / limit:6.2f} (the base alone): {limit / whole:.0%} of it"
    )


def local(folder: str, lora: LoraConfig, rows: Any, repeats: int) -> None:
    """The same values by the package's own joint forwards, without any server."""
    from peft import get_peft_model

    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = get_peft_model(base, lora).eval()
    loss = CausalLMLoss(model)
    source = Data(rows).source(loss.collate)
    evaluator = LocalEvaluator(loss, ParameterView.trainable(model), EvaluationOptions())
    whole = seconds(lambda: evaluator.evaluate(probes(source)), repeats)
    print(f"{'LocalEvaluator':22} {CANDIDATES / whole:6.2f} candidates/s")


if __name__ == "__main__":
    main()
