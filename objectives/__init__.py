"""Objectives: what is minimised. They know the model; the engine knows only their values."""

from objectives.causal_lm import CausalLMLoss as CausalLMLoss
from objectives.classification import ClassificationLoss as ClassificationLoss
from objectives.function import CallableObjective as CallableObjective
from objectives.verbalizer import VerbalizerLoss as VerbalizerLoss

__all__ = ["CallableObjective", "CausalLMLoss", "ClassificationLoss", "VerbalizerLoss"]
