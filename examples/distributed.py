"""The same fine-tune by one process or by several, which exchange values alone.

    torchrun --nproc_per_node=2 --local-ranks-filter 0 examples/distributed.py
    python examples/distributed.py                       # the same weights, bit for bit

Every process has the whole model, evaluates its part of a step's points, and applies the same step.
On machines with GPUs each process takes its own.
"""

import os

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from objectives import Accuracy, ClassificationLoss
from support.topics import bbc_topics
from zo_adapt import Metrics, ParameterView, minimize

# As torchrun does: with another number of threads, sums round otherwise.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

folder, tokenizer, names, train, test = bbc_topics(train=1024)
torch.manual_seed(0)  # the new head and the adapter: the same in every process
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16))
model.to("cuda" if torch.cuda.is_available() else "cpu")
view = ParameterView.trainable(model)

result = minimize(
    ClassificationLoss(model),
    view,
    train,
    batch_size=64,
    max_queries=6_000,
    metrics=Metrics({"accuracy": Accuracy(model)}, data=test),
)
print(result)
print(f"sha256 of the weights {view.hash()[:16]}")
