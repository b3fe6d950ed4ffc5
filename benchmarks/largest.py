"""The largest decoder that a GPU tunes, by method: one text of full context, all weights in bf16.

Sizes of OPT and of Llama with random weights, made on the GPU. Backpropagation is plain PyTorch at
its leanest (fused optimizers of bf16 state, attention without its matrix); peaks are the
allocator's, of two steps.

    python benchmarks/largest.py --deadline 90 --output largest.json
"""

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from objectives import CausalLMLoss
from zo_adapt import EvaluationOptions, MeZO, MeZOSVRG, ParameterView, minimize
from zo_adapt.optimizers.optimizer import Optimizer


class Size(NamedTuple):
    """Of a decoder."""

    kind: str
    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    kv_heads: int = 0
    context: int = 2048


SIZES = {
    "tiny OPT": Size("OPT", 2, 64, 4, 128, 512, context=64),
    "tiny Llama": Size("Llama", 2, 64, 4, 128, 512, context=64),
    "OPT-1.3B": Size("OPT", 24, 2048, 32, 8192, 50272),
    "OPT-2.7B": Size("OPT", 32, 2560, 32, 10240, 50272),
    "OPT-6.7B": Size("OPT", 32, 4096, 32, 16384, 50272),
    "OPT-13B": Size("OPT", 40, 5120, 40, 20480, 50272),
    "OPT-30B": Size("OPT", 48, 7168, 56, 28672, 50272),
    "Llama-1B": Size("Llama", 16, 2048, 32, 8192, 128256, 8),
    "Llama-3B": Size("Llama", 28, 3072, 24, 8192, 128256, 8),
    "Llama-7B": Size("Llama", 32, 4096, 32, 11008, 32000),
    "Llama-13B": Size("Llama", 40, 5120, 40, 13824, 32000),
    "Llama-34B": Size("Llama", 48, 8192, 64, 22016, 32000, 8),
}
FULL = {
    "MeZO": (MeZO.paper(1e-9), "gaussian"),
    "MeZO-SVRG": (MeZOSVRG.paper(1e-9, 1e-9), "gaussian"),
    "MeZO()": (MeZO(displacement=1e-3), "auto"),
}
Data = dict[str, Tensor]


def decoder(size: Size, device: str) -> Any:
    """Random weights in bf16."""
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.context,
    }
    if size.kind == "OPT":
        kind: Any = transformers.OPTForCausalLM
        config: Any = transformers.OPTConfig(
            ffn_dim=size.inner, word_embed_proj_dim=size.width, dropout=0.0, **shape
        )
    else:
        kind, shape["num_key_value_heads"] = transformers.LlamaForCausalLM, size.kv_heads or None
        config = transformers.LlamaConfig(
            intermediate_size=size.inner, tie_word_embeddings=size.vocabulary > 100_000, **shape
        )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def adapted(model: Any) -> Any:
    """The model with LoRA on queries and values; in bf16 like the rest."""
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, config).to(torch.bfloat16).eval()


def forward(model: Any, data: Data) -> None:
    """Twice the loss of one text."""
    loss = CausalLMLoss(model)
    with torch.no_grad(), loss.evaluating():
        for row in range(2):
            loss({name: rows[row : row + 1] for name, rows in data.items()})


def forward_only(
    model: Any, data: Data, optimizer: Optimizer, view: ParameterView, steps: int
) -> None:
    """Steps of a zeroth-order optimizer, one text in a forward."""
    options = EvaluationOptions(micro_batch_size=1, cuda_graphs="off")
    loss = CausalLMLoss(model)
    minimize(loss, view, data, optimizer, batch_size=1, max_steps=steps, progress=False,
             evaluation=options)  # fmt: skip


def backward(model: Any, data: Data, kind: Any, checkpoints: bool = False) -> None:
    """Two steps by backpropagation; checkpoints: activations are computed again."""
    tuned = [weight for weight in model.parameters() if weight.requires_grad]
    options = {"fused": True} if data["input_ids"].is_cuda else {}
    optimizer = kind(tuned, lr=1e-9, **options)
    model.train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    try:
        for row in range(2):
            one = {name: rows[row : row + 1] for name, rows in data.items()}
            model(**one, labels=one["input_ids"], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        model.eval()
        optimizer.zero_grad()
        if checkpoints:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def jobs(model: Any, data: Data, steps: int) -> dict[str, Callable[[], None]]:
    """By method; those of an adapter come last, as it stays in the model."""
    sgd, adam = torch.optim.SGD, torch.optim.AdamW
    found: dict[str, Callable[[], None]] = {"forward": lambda: forward(model, data)}
    for name, (optimizer, noise) in FULL.items():
        found[name] = lambda o=optimizer, n=noise: forward_only(
            model, data, o, ParameterView.full(model, noise=n), steps
        )
    found["SGD"] = lambda: backward(model, data, sgd)
    found["SGD, checkpoints"] = lambda: backward(model, data, sgd, checkpoints=True)
    found["Adam"] = lambda: backward(model, data, adam)
    found["Adam, checkpoints"] = lambda: backward(model, data, adam, checkpoints=True)
    lora: list[Any] = []

    def adapter() -> Any:
        lora.extend([] if lora else [adapted(model)])
        return lora[0]

    found["LoRA, MeZO()"] = lambda: forward_only(
        adapter(), data, MeZO(displacement=1e-3), ParameterView.trainable(adapter()), steps
    )
    found["LoRA, Adam"] = lambda: backward(adapter(), data, adam)
    found["LoRA, Adam, checkpoints"] = lambda: backward(adapter(), data, adam, checkpoints=True)
    return found


def measured(call: Callable[[], None], on_gpu: bool) -> dict[str, Any]:
    """GiB at the peak and seconds of two steps; no GiB: it does not fit."""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        call()
    except torch.OutOfMemoryError:
        return {"GiB": None}
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"GiB": round(peak, 2), "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    """Print the table, the smallest models first; a method that did not fit is not tried again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", help="all by default")
    parser.add_argument("--steps", type=int, default=2, help="of forward-only methods")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds")
    parser.add_argument(
        "--gib", type=float, help="of the GPU, where less than it has is to be used"
    )
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "`.*gradient_checkpointing", FutureWarning)
    on_gpu, began = torch.cuda.is_available(), time.monotonic()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    if given.gib:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.gib * 2**30 / whole))
    usual = [name for name in SIZES if name.startswith("tiny") != on_gpu]
    rows: list[dict[str, Any]] = []
    too_large: set[tuple[str, str]] = set()
    for name in given.sizes or usual:
        size = SIZES[name]
        count = sum(weight.numel() for weight in decoder(size, "meta").parameters())
        try:
            model = decoder(size, "cuda" if on_gpu else "cpu")
        except torch.OutOfMemoryError:
            rows.append({"model": name, "parameters": count, "method": "forward", "GiB": None})
            continue
        ids = torch.randint(3, size.vocabulary, (2, size.context), device=model.device)
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for method, call in jobs(model, data, given.steps).items():
            if given.methods and method not in given.methods:
                continue
            if time.monotonic() - began > given.deadline:
                break
            fits = (size.kind, method) not in too_large
            found = measured(call, on_gpu) if fits else {"GiB": None}
            if found["GiB"] is None:
                too_large.add((size.kind, method))
            rows.append({"model": name, "parameters": count, "method": method} | found)
            print(json.dumps(rows[-1]), flush=True)
        del model, call
        gc.collect()
    made_by = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    } | ({"GiB": given.gib} if given.gib else {})
    lines = ",\n".join(json.dumps(row) for row in rows)
    given.output.write_text(f'{{"made by": {json.dumps(made_by)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
