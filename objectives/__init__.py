"""Objectives: what is minimised. They know the model; the engine knows only their values."""

from objectives.causal_lm import CausalLMLoss as CausalLMLoss
from objectives.classification import ClassificationLoss as ClassificationLoss
from objectives.function import CallableObjective as CallableObjective
from objectives.generation import GenerationReward as GenerationReward
from objectives.matches import Accuracy as Accuracy
from objectives.matches import ExactMatch as ExactMatch
from objectives.metric_objective import MetricObjective as MetricObjective
from objectives.metrics import F1 as F1
from objectives.metrics import ROCAUC as ROCAUC
from objectives.metrics import MatthewsCorrelation as MatthewsCorrelation
from objectives.mixture import Mixture as Mixture
from objectives.question_answering import QuestionAnsweringLoss as QuestionAnsweringLoss
from objectives.question_answering import SpanExactMatch as SpanExactMatch
from objectives.question_answering import SpanF1 as SpanF1
from objectives.rank_correlation import KendallTau as KendallTau
from objectives.rank_correlation import Spearman as Spearman
from objectives.ranking import MAP as MAP
from objectives.ranking import MRR as MRR
from objectives.ranking import NDCG as NDCG
from objectives.ranking import RecallAt as RecallAt
from objectives.scorers import FeatureScorer as FeatureScorer
from objectives.seq2seq import Seq2SeqLoss as Seq2SeqLoss
from objectives.text_scorers import BiEncoder as BiEncoder
from objectives.text_scorers import CrossEncoder as CrossEncoder
from objectives.token_classification import EntityF1 as EntityF1
from objectives.token_classification import TokenClassificationLoss as TokenClassificationLoss
from objectives.verbalizer import VerbalizerLoss as VerbalizerLoss

__all__ = [
    "F1",
    "MAP",
    "MRR",
    "NDCG",
    "ROCAUC",
    "Accuracy",
    "BiEncoder",
    "CallableObjective",
    "CausalLMLoss",
    "ClassificationLoss",
    "CrossEncoder",
    "EntityF1",
    "ExactMatch",
    "FeatureScorer",
    "GenerationReward",
    "KendallTau",
    "MatthewsCorrelation",
    "MetricObjective",
    "Mixture",
    "QuestionAnsweringLoss",
    "RecallAt",
    "Seq2SeqLoss",
    "SpanExactMatch",
    "SpanF1",
    "Spearman",
    "TokenClassificationLoss",
    "VerbalizerLoss",
]
