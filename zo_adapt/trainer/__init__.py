"""transformers' Trainer with a step of this package."""
