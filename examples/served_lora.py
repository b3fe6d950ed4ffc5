"""Tune a LoRA adapter of a language model that is served, and show what came of it.

The adapter lives here, the base where it is served: in this process by default (SmolLM2-135M,
fetched once), or behind vLLM on this machine (--url; `python -m zo_adapt.serve MODEL` prints how to
start it). What is learned is the sentiment of film reviews, read off the word that the model goes
on with.

    python examples/served_lora.py
    python examples/served_lora.py --url http://127.0.0.1:8000
"""

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from support import real_data
from support.served_task import arguments, quiet, tune
from zo_adapt import PeftServer, VLLMServer, served_lora
from zo_adapt.serve.protocol import ServedModel

TARGETS = ["q_proj", "v_proj"]


def main() -> None:
    """Fetch, serve, tune, save."""
    parser = arguments("Tune a LoRA adapter of a served language model.", "runs/served_lora")
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    quiet()
    source = args.model or str(real_data.smollm2_folder())
    lora = LoraConfig(r=args.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    server: ServedModel = (
        VLLMServer(args.url)
        if args.url
        else PeftServer(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval())
    )
    try:
        tune(served_lora(source, lora, seed=args.seed), server, source, args)
    finally:
        server.close()


if __name__ == "__main__":
    main()
