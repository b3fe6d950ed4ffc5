"""zo_adapt: tune models by forward passes alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zo_adapt.data.examples import Data as Data
from zo_adapt.diagnosis.advice import Diagnosis as Diagnosis
from zo_adapt.diagnosis.survey import diagnose as diagnose
from zo_adapt.diagnosis.variance import TrackVariance as TrackVariance
from zo_adapt.errors import ZOError as ZOError
from zo_adapt.evaluation.objective import Objective as Objective
from zo_adapt.evaluation.objective import SetObjective as SetObjective
from zo_adapt.evaluation.options import EvaluationOptions as EvaluationOptions
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk as FrozenTrunk
from zo_adapt.evaluation.workers import Workers as Workers
from zo_adapt.loops.ask_tell import AskTell as AskTell
from zo_adapt.loops.for_scipy import scipy_method as scipy_method
from zo_adapt.loops.loop import minimize as minimize
from zo_adapt.loops.lora_start import initialise_lora as initialise_lora
from zo_adapt.loops.monitor import Metrics as Metrics
from zo_adapt.loops.result import Result as Result
from zo_adapt.loops.result import StopReason as StopReason
from zo_adapt.optimizers.estimator import OneSided as OneSided
from zo_adapt.optimizers.estimator import TwoSided as TwoSided
from zo_adapt.optimizers.first_order import SGD as SGD
from zo_adapt.optimizers.first_order import Adam as Adam
from zo_adapt.optimizers.mezo import MeZO as MeZO
from zo_adapt.optimizers.mezo_svrg import MeZOSVRG as MeZOSVRG
from zo_adapt.optimizers.recursive import ZOPAGE as ZOPAGE
from zo_adapt.optimizers.recursive import ZOSPIDER as ZOSPIDER
from zo_adapt.optimizers.recursive import ZOSTORM as ZOSTORM
from zo_adapt.optimizers.saga import ZOSAGA as ZOSAGA
from zo_adapt.optimizers.schedule import Annealing as Annealing
from zo_adapt.optimizers.step_size import ByDistance as ByDistance
from zo_adapt.optimizers.step_size import Rate as Rate
from zo_adapt.optimizers.zo_svrg import ZOSVRG as ZOSVRG
from zo_adapt.serve.evaluator import ServedEvaluator as ServedEvaluator
from zo_adapt.serve.mixture import AdapterMixture as AdapterMixture
from zo_adapt.serve.openai_server import OpenAIServer as OpenAIServer
from zo_adapt.serve.peft_server import PeftServer as PeftServer
from zo_adapt.serve.pool import ServerPool as ServerPool
from zo_adapt.serve.protocol import Candidate as Candidate
from zo_adapt.serve.protocol import ServedModel as ServedModel
from zo_adapt.serve.rounds import answered_by as answered_by
from zo_adapt.serve.skeleton import served_lora as served_lora
from zo_adapt.serve.skeleton import served_prompt as served_prompt
from zo_adapt.serve.vllm_server import VLLMServer as VLLMServer
from zo_adapt.term import Shift as Shift
from zo_adapt.term import Step as Step
from zo_adapt.term import Term as Term
from zo_adapt.trajectory.file import TrajectoryFile as TrajectoryFile
from zo_adapt.trajectory.playback import Replay as Replay
from zo_adapt.trajectory.playback import follow as follow
from zo_adapt.trajectory.playback import replay as replay
from zo_adapt.view.group import Group as Group
from zo_adapt.view.parameters import ParameterView as ParameterView

__all__ = [
    "SGD",
    "ZOPAGE",
    "ZOSAGA",
    "ZOSPIDER",
    "ZOSTORM",
    "ZOSVRG",
    "Adam",
    "AdapterMixture",
    "Annealing",
    "AskTell",
    "ByDistance",
    "Candidate",
    "Data",
    "Diagnosis",
    "EvaluationOptions",
    "FrozenTrunk",
    "Group",
    "MeZO",
    "MeZOSVRG",
    "Metrics",
    "Objective",
    "OneSided",
    "OpenAIServer",
    "ParameterView",
    "PeftServer",
    "Rate",
    "Replay",
    "Result",
    "ServedEvaluator",
    "ServedModel",
    "ServerPool",
    "SetObjective",
    "Shift",
    "Step",
    "StopReason",
    "Term",
    "TrackVariance",
    "TrajectoryFile",
    "TwoSided",
    "VLLMServer",
    "Workers",
    "ZOConfig",
    "ZOError",
    "ZOTrainer",
    "answered_by",
    "diagnose",
    "follow",
    "initialise_lora",
    "minimize",
    "replay",
    "scipy_method",
    "served_lora",
    "served_prompt",
]

if TYPE_CHECKING:
    from zo_adapt.trainer.config import ZOConfig as ZOConfig
    from zo_adapt.trainer.zo_trainer import ZOTrainer as ZOTrainer
else:  # a type checker would take any name from a module that has __getattr__
    _FORMER = {"Record": Step, "Update": Shift}

    def __getattr__(name: str) -> Any:
        """ZOTrainer and ZOConfig, when asked for: transformers takes seconds to import."""
        if name in _FORMER:
            renamed = import_module("zo_adapt.options").renamed
            renamed(f"zo_adapt.{name}", f"zo_adapt.{_FORMER[name].__name__}")
            return _FORMER[name]
        if name not in ("ZOConfig", "ZOTrainer"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("zo_adapt.trainer.zo_trainer"), name)
