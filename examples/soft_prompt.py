"""Tune a soft prompt of a language model that is served: 16 x width numbers before every text.

They begin as an instruction; learned is the sentiment of film reviews. The base is served here
(SmolLM2-135M), or by a vLLM with --enable-prompt-embeds (--url http://127.0.0.1:8000).
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support import real_data
from support.served_task import arguments, quiet, tune
from zo_adapt import PeftServer, VLLMServer, served_prompt
from zo_adapt.serve.protocol import ServedModel
from zo_adapt.serve.soft_prompt import begun_with, embedding_table

INSTRUCTION = "Say whether this film review is great or terrible:"


def main() -> None:
    """Fetch, serve, tune, save."""
    usual = {"max_length": 24, "max_queries": 1200}
    parser = arguments("Tune a served soft prompt.", "runs/soft_prompt", **usual)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    quiet()
    source = args.model or str(real_data.smollm2_folder())
    table = embedding_table(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(INSTRUCTION)["input_ids"]
    start = begun_with(ids, table, args.tokens, first=tokenizer.bos_token_id)
    model = served_prompt(source, args.tokens, start=start)
    server: ServedModel
    if args.url:
        server = VLLMServer(args.url, embeddings=table)
    else:
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        server = PeftServer(base.eval())
    try:
        tune(model, server, source, args)
    finally:
        server.close()


if __name__ == "__main__":
    main()
