"""A rule scores what a language model writes, and nothing but its score is seen."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives import GenerationReward
from support import real_data
from zo_adapt import MeZO, ParameterView, minimize

NOUNS = ["rain", "bread", "trees", "cats", "ships", "stars", "bees", "rivers", "music", "chess"]
NOUNS += ["salt", "snow", "bridges", "clocks"]  # held out
examples = [{"prompt": [{"role": "user", "content": f"Tell me about {noun}."}]} for noun in NOUNS]
train, test = examples[:10], examples[10:]


def short_words(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
    """Share of the words that have at most four letters; of TRL's signature."""
    texts = [completion[0]["content"].split() for completion in completions]
    return [sum(len(word) <= 4 for word in words) / max(len(words), 1) for words in texts]


folder = str(real_data.smollm2_folder())
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
torch.manual_seed(0)  # draws LoRA's A
base = AutoModelForCausalLM.from_pretrained(folder)
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)).to(device)
reward = GenerationReward(model, tokenizer, short_words, max_new_tokens=16)

print(f"held-out reward before: {reward(test).mean():.3f}")
print("  " + reward.generate(test).texts[0].replace("\n", " "))
view = ParameterView.trainable(model)
optimizer = MeZO(displacement=0.3, one_sided=False, num_directions=1)  # pairs: many cheap steps
result = minimize(reward, view, train, optimizer, batch_size=10, max_queries=800)
print(f"held-out reward after: {reward(test).mean():.3f}")
print("  " + reward.generate(test).texts[0].replace("\n", " ") + f"\n{result}")
