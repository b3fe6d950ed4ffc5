"""The last layer and the head learn; the frozen layers below run once for each text."""

import torch
from transformers import AutoModelForSequenceClassification

from objectives import Accuracy, ClassificationLoss
from support.topics import bbc_topics
from zo_adapt import ParameterView, minimize

folder, tokenizer, names, train, test = bbc_topics()
torch.manual_seed(0)  # draws the new head
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names)).eval()
view = ParameterView.last_layers(model, 1, head=True, noise="rademacher")  # the cheaper noise
print(view.summary())
accuracy = Accuracy(model)
print(f"held-out accuracy before: {accuracy(test):.3f}")
result = minimize(ClassificationLoss(model), view, train, batch_size=16, max_queries=16_000)
print(f"held-out accuracy after: {accuracy(test):.3f}\n{result}")
model.save_pretrained("runs/last_layers")
