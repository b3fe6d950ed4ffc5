"""Which quantised bases can be tuned above, and what a run finds out about their kernels.

For every kind of base: does a run with a LoRA, and with the last norm, learn at all; is it the same
again, and when it is cut off and goes on; may points be joined, layers be reused; how far above
rounding are differences. A kind whose package is missing is said to be so.

    python benchmarks/quantised.py                      # SmolLM2-135M, on a GPU if there is one
    python benchmarks/quantised.py --kinds nf4 torchao --output quantised.json
    python benchmarks/quantised.py --kinds gptq awq --small      # a Llama of random weights
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from objectives import CausalLMLoss
from support.real_data import smollm2_folder
from zo_adapt import MeZO, ParameterView, Step, minimize
from zo_adapt.loops.result import Result

PACKAGES = {"fp32": "torch", "nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao"}
PACKAGES |= {"gptq": "gptqmodel", "awq": "gptqmodel"}
VIEWS = ["lora", "norm", "head"]
WORDS = [("stock", "rates"), ("bond", "trade"), ("oil", "supply"), ("car", "sales")]
TEXTS = [
    f"The {what} market fell on {day} after the news about {why}."
    for what, why in WORDS for day in ("Monday", "Friday")
]  # fmt: skip
STEPS = 6


def calibrated(kind: str, folder: str) -> str:
    """The folder of a checkpoint in 4 bits by GPTQ or AWQ, made once beside that of the model."""
    made = Path(f"{folder.rstrip('/')}-{kind}")
    if not (made / "config.json").exists():
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails with the one of two cores
        from gptqmodel import GPTQModel, QuantizeConfig
        from gptqmodel.quantization import FORMAT, METHOD

        awq = {"method": METHOD.AWQ, "format": FORMAT.GEMM} if kind == "awq" else {}
        whole = GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=64, **awq), device="cpu")
        whole.quantize(TEXTS * 8, batch_size=8)
        whole.save(str(made))
    return str(made)


def small_llama(folder: str, tokens_of: str) -> str:
    """Save a Llama of two layers with random weights and the tokenizer of another model."""
    tokenizer = AutoTokenizer.from_pretrained(tokens_of)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def base(kind: str, folder: str, device: str) -> Any:
    """The model with weights of a kind; fp32 stays what is not quantised."""
    options: dict[str, Any] = {}
    if kind in ("nf4", "int8"):
        from transformers import BitsAndBytesConfig

        half = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        four = {"load_in_4bit": True, **half}
        options["quantization_config"] = BitsAndBytesConfig(
            **(four if kind == "nf4" else {"load_in_8bit": True})
        )
    elif kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind in ("gptq", "awq"):
        folder = calibrated(kind, folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=device, **options
    )
    return model.eval()


def view_of(name: str, model: Any) -> ParameterView:
    """A LoRA on queries and values, the norm before the head, or the head."""
    if name == "norm":
        return ParameterView({"norm": model.model.norm.weight}, model=model)
    if name == "head":
        return ParameterView({"head": model.lm_head.weight}, model=model)
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    return ParameterView.trainable(peft.get_peft_model(model, lora).eval())


def run(kind: str, name: str, folder: str, device: str, **options: Any) -> tuple[Result, str]:
    """A run from the start, or one that goes on, of a model loaded anew; the view's hash after."""
    view = view_of(name, base(kind, folder, device))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    pairs = MeZO(num_directions=1, one_sided=False, displacement=0.25)
    result = minimize(
        CausalLMLoss(view.model), view, data, pairs, batch_size=4, seed=3, progress=False, **options
    )
    return result, view.hash()


def cut_off(step: Step) -> None:
    """Stop half way."""
    if step.step == STEPS // 2:
        raise StopIteration


def row(kind: str, name: str, folder: str, device: str) -> dict[str, Any]:
    """What was found of a kind of base and a view."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zo_adapt.evaluation.signal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, digest = run(kind, name, folder, device, max_steps=STEPS)
        seconds = time.perf_counter() - began
        _, again = run(kind, name, folder, device, max_steps=STEPS)
        with tempfile.TemporaryDirectory() as own:
            file = Path(own) / "run.zot"
            run(kind, name, folder, device, max_steps=STEPS, trajectory=file, callback=cut_off)
            _, resumed = run(
                kind, name, folder, device, max_steps=STEPS, trajectory=file, resume=True
            )
    logger.removeHandler(handler)
    plan = whole.evaluation
    return {
        "base": kind,
        "view": name,
        "same again": digest == again,
        "same resumed": digest == resumed,
        "candidates": plan.candidates,
        "layers reused": plan.layers,
        "why not": {key: why for key, why in plan.why_not.items() if key != "graphs"},
        "differences": told[0] if told else "not asked: fp32",
        "seconds": seconds,
    }


def main() -> None:
    """Print a row for every kind and view."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=VIEWS[:2])
    parser.add_argument("--model", help="a folder or a hub name; SmolLM2-135M if not given")
    parser.add_argument("--small", action="store_true", help="a Llama of two layers instead")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product
    folder, found = args.model or str(smollm2_folder()), []
    own = tempfile.TemporaryDirectory()
    if args.small:
        folder = small_llama(f"{own.name}/llama", folder)
    for kind in args.kinds:
        if find_spec(PACKAGES[kind]) is None:
            print(f"{kind}: {PACKAGES[kind]} is not installed", flush=True)
            continue
        for name in args.views:
            found.append(row(kind, name, folder, device))
            print(json.dumps(found[-1]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
