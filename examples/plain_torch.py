"""No transformers: any torch module, any function of a batch."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from zo_adapt import ParameterView, minimize

digits = load_digits()
images = torch.from_numpy(digits.data).float() / 16
labels = torch.from_numpy(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]

torch.manual_seed(0)  # draws the weights
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One value for every example."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def accuracy() -> float:
    """Of the held-out digits."""
    return float((model(images[test]).argmax(-1) == labels[test]).float().mean())


print(f"held-out accuracy before: {accuracy():.3f}")
result = minimize(
    loss,
    ParameterView.full(model),
    (images[train], labels[train]),
    batch_size=64,
    max_queries=10**6,
)
print(f"held-out accuracy after: {accuracy():.3f}\n{result}")
