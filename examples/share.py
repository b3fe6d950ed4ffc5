"""A fine-tune sent as a file of kilobytes: written by one side, replayed by the other."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from objectives import Accuracy, ClassificationLoss
from support.topics import bbc_topics
from zo_adapt import ParameterView, minimize, replay

folder, tokenizer, names, train, test = bbc_topics()


def untuned() -> PeftModel:
    """The model as both sides have it: the same base, the same seed for what is new."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16)).eval()


file = Path("runs/share.zot")
file.parent.mkdir(exist_ok=True)
file.unlink(missing_ok=True)
sender = untuned()
print(f"held-out accuracy before: {Accuracy(sender)(test):.3f}")
view = ParameterView.trainable(sender)
minimize(ClassificationLoss(sender), view, train, batch_size=16, max_queries=6_000, trajectory=file)
print(f"held-out accuracy after: {Accuracy(sender)(test):.3f}")

receiver = untuned()
rebuilt = ParameterView.trainable(receiver)
steps = replay(rebuilt, file)  # no data, no forward pass
print(f"{steps} steps replayed from {file.stat().st_size:,} bytes")
print(f"the same bits: {rebuilt.hash() == view.hash()}; accuracy {Accuracy(receiver)(test):.3f}")
