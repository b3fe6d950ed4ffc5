"""A chat model learns instructions: LoRA on SmolLM2-135M, loss of the answers alone."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives import CausalLMLoss, ExactMatch
from support.reviews import review_instructions
from zo_adapt import ParameterView, initialise_lora, minimize

# Your own: lists of {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}.
folder, train, test = review_instructions()
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
torch.manual_seed(0)  # draws LoRA's A
base = AutoModelForCausalLM.from_pretrained(folder)
# LoRA in the last 8 of 30 layers: those below run once for each example, and are kept.
config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, layers_to_transform=list(range(22, 30)))
model = get_peft_model(base, config).to(device)
loss = CausalLMLoss(model, tokenizer=tokenizer, max_length=128)
exact = ExactMatch(loss)


@torch.inference_mode()
def held_out() -> str:
    """Loss of the answers, and the share of those that the model would write itself."""
    parts = [test[start : start + 16] for start in range(0, len(test), 16)]
    losses = torch.cat([loss(loss.collate(part)) for part in parts])
    match = np.concatenate([exact(loss.collate(part)) for part in parts]).mean()
    return f"loss {losses.mean():.3f}, exact match {match:.3f}"


print(f"held-out before: {held_out()}")
initialise_lora(model, loss, train, rows=64)
result = minimize(loss, ParameterView.trainable(model), train, batch_size=8, max_queries=4_000)
print(f"held-out after: {held_out()}\n{result}")
model.save_pretrained("runs/causal_lm")
tokenizer.save_pretrained("runs/causal_lm")
