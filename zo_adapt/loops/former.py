"""Keywords of the version before, said in today's way."""

from dataclasses import replace
from typing import Any

from zo_adapt.data.examples import as_data
from zo_adapt.evaluation.objective import as_objective, with_attributes
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.loops.arguments import as_evaluation
from zo_adapt.loops.monitor import Metrics, as_metrics

DATA = {
    "collate": "data=Data(examples, collate=...)",
    "stratify": "data=Data(examples, stratify=...)",
}
EVALUATION = {
    "micro_batch_size": "evaluation=EvaluationOptions(micro_batch_size=...)",
    "joint_rows": "evaluation=EvaluationOptions(joint_rows=...), 'off' for None",
    "reuse_trunk": "evaluation=EvaluationOptions(reuse_trunk=...), 'on' for True, 'off' for False",
    "cuda_graphs": "evaluation=EvaluationOptions(cuda_graphs=...), 'on' for True, 'off' for False",
}
PROCESSES = {
    "workers": "evaluation=EvaluationOptions(workers=...)",
    "evaluator": "evaluation=ServedEvaluator(server), or EvaluationOptions(evaluator=...)",
}
METRICS = {
    "metrics_data": "metrics=Metrics(objectives, data=...)",
    "metrics_every": "metrics=Metrics(objectives, every=...)",
}
MAXIMIZE = {
    "maximize": "the objective's own word: objectives.CallableObjective(function, maximize=True)",
}


def translate(arguments: dict[str, Any], former: dict[str, Any]) -> None:
    """Put former keywords into the arguments of ``minimize``, ``diagnose`` or ``ZOTrainer``."""
    of_data = {name: former[name] for name in DATA if name in former}
    if of_data:
        arguments["data"] = replace(as_data(arguments.get("data")), **of_data)
    names = EVALUATION | PROCESSES
    of_evaluation = {n: switched(n, former[n]) for n in names if n in former}
    if of_evaluation:
        options = as_evaluation(arguments.get("evaluation", EvaluationOptions()))
        arguments["evaluation"] = replace(options, **of_evaluation)
    if former.keys() & METRICS.keys():
        arguments["metrics"] = _metrics(arguments.get("metrics"), former)
    if former.get("maximize") is not None:
        objective = as_objective(arguments["objective"])
        arguments["objective"] = with_attributes(objective, maximize=bool(former["maximize"]))


def switched(name: str, value: Any) -> Any:
    """The word for a former True, False or None.

    Example:
        >>> switched("joint_rows", None), switched("cuda_graphs", True), switched("x", 3)
        ('off', 'on', 3)
    """
    if name == "joint_rows":
        return "off" if value is None else value
    if name in PROCESSES:
        return value
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _metrics(given: Any, former: dict[str, Any]) -> Metrics:
    """The watched metrics; a former ``collate`` made their batches too."""
    metrics = as_metrics(given)
    if former.get("metrics_data") is not None:
        data = as_data(former["metrics_data"])
        metrics = replace(metrics, data=replace(data, collate=former.get("collate", data.collate)))
    return replace(metrics, every=former.get("metrics_every", metrics.every))
