"""Teach a language model to write plain words, by nothing but a rule that scores its texts.

SmolLM2-135M-Instruct writes on from BBC headlines. The reward is the share of words that are short
and new, a count that has no gradient; a LoRA adapter of its last layer is tuned by forward passes.

    python examples/generation_reward.py
"""

import argparse
import random
import re
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives import GenerationReward
from support import real_data
from support.registry import FetchError
from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.errors import ZOError

TRAIN, TEST = 64, 48  # headlines
SHOWN = 4
SHORT, LEAST = 4, 8  # letters of a plain word, at most; words of a text, at least


def plain_words(completions: list[str], **columns: Any) -> list[float]:
    """Share of a text's words that are short and not said before; a number is no such word.

    Fewer words than LEAST count as that many: to stop at once is no way to a reward.
    """
    rewards = []
    for text in completions:
        words = re.findall(r"\w+", text.lower())
        plain = {word for word in words if len(word) <= SHORT and word.isalpha()}
        rewards.append(len(plain) / max(LEAST, len(words)))
    return rewards


def headlines() -> list[dict[str, Any]]:
    """BBC headlines, shuffled; each is a prompt, with the empty line that the article follows."""
    titles = list(dict.fromkeys(text.strip().split("\n")[0] for text in real_data.bbc().texts))
    random.Random(0).shuffle(titles)
    return [{"prompt": f"{title}\n\n"} for title in titles]


def build_model(source: str, seed: int) -> Any:
    """The model with a LoRA adapter of rank 1 in its last layer.

    576 weights: few enough for some hundred directions to find the way, and right before the words
    are chosen. The policy gradient of such a reward is as long there as in LoRA r=8 on every
    query and value projection, which has 320 times as many (0.32 and 0.27).
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=1,
        lora_alpha=16,
        target_modules=["down_proj"],
        layers_to_transform=[model.config.num_hidden_layers - 1],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).eval()


def look(reward: GenerationReward, held_out: list[dict[str, Any]], when: str) -> np.ndarray:
    """Print the mean reward on held-out headlines and the first few texts; all rewards."""
    batch = reward.collate(held_out)
    written = reward.generate(batch)
    rewards = reward.rewards(batch, written)
    print(f"\n{when}: plain words {rewards.mean():.3f} on {len(rewards)} held-out headlines")
    for text in written.texts[:SHOWN]:
        print("   ", " ".join(text.split()))
    return rewards


def main() -> None:
    """Fetch, look, tune, look again."""
    parser = argparse.ArgumentParser(description="Tune a language model on a rule for its texts.")
    parser.add_argument("--model", help="folder or hub name (default: SmolLM2, fetched once)")
    parser.add_argument("--max-queries", type=int, default=1920, help="texts that are written")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and the directions")
    args = parser.parse_args()
    # peft reads an attribute of transformers by its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    source = args.model or str(real_data.smollm2_folder())
    model = build_model(source, args.seed)
    prompts = headlines()
    train, held_out = prompts[:TRAIN], prompts[TRAIN : TRAIN + TEST]

    tokenizer = AutoTokenizer.from_pretrained(source)
    reward = GenerationReward(model, tokenizer, plain_words, max_new_tokens=12)
    before = look(reward, held_out, "before")
    started = time.perf_counter()
    optimizer = MeZO(displacement=0.3, perturbation_scale=0.05, num_directions=1, one_sided=False)
    view = ParameterView.trainable(model)
    result = minimize(
        reward, view, train, optimizer, batch_size=16, max_queries=args.max_queries, seed=args.seed
    )
    seconds = time.perf_counter() - started
    gains = look(reward, held_out, "after") - before
    error = gains.std(ddof=1) / len(gains) ** 0.5
    print(f"\ngain {gains.mean():+.3f} +- {error:.3f} (standard error over headlines)")
    print(f"{result.queries} texts in {result.steps} steps, {seconds:.0f} s; {result.message}")


if __name__ == "__main__":
    try:
        main()
    except (FetchError, ZOError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
