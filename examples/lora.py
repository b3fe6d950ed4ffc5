"""A LoRA adapter learns the five topics of BBC news by forward passes alone."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from objectives import Accuracy, ClassificationLoss
from support.topics import bbc_topics
from zo_adapt import Metrics, ParameterView, initialise_lora, minimize

# Your own: a model, and lists of {"input_ids": [...], "labels": 3}.
folder, tokenizer, names, train, test = bbc_topics()
torch.manual_seed(0)  # draws the new head
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16))
loss, accuracy = ClassificationLoss(model), Accuracy(model)

initialise_lora(model, loss, train)  # A sees what varies in the layers' inputs
print(f"held-out accuracy before: {accuracy(test):.3f}")
result = minimize(
    loss,
    ParameterView.trainable(model),  # the adapter and the new head
    train,
    batch_size=16,
    max_queries=16_000,  # forward passes of one text
    metrics=Metrics({"accuracy": accuracy}, data=test, every=40),
)
print(result)
print(f"held-out accuracy after: {accuracy(test):.3f}")

model.save_pretrained("runs/lora")  # an ordinary peft adapter
tokenizer.save_pretrained("runs/lora")
result.plot().savefig("runs/lora/curves.png")
