"""Runs that one process, and several that share them, must make alike, bit for bit.

Each case returns what of its run is to be equal; files lie in the folder that it is given.
"""

import asyncio
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from least_squares import Least
from test_generation import a_reward, mean_id, prompts
from test_trainer import accuracy, lora_model, toy_rows, trainer_of
from tiny_models import tiny_model, token_rows
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from objectives import F1, CausalLMLoss, ClassificationLoss
from zo_adapt import (
    ZOSVRG,
    EvaluationOptions,
    Metrics,
    MeZO,
    MeZOSVRG,
    ParameterView,
    Result,
    TrackVariance,
    diagnose,
    minimize,
)
from zo_adapt.evaluation.options import JointRows

Case = Callable[[Path], dict[str, Any]]
ROWS = 32


def texts(rows: int = ROWS) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "label": i % 2} for i, ids in enumerate(token_rows(rows))]


def outcome(result: Result, view: ParameterView, file: Path | None = None) -> dict[str, Any]:
    """What must be the same."""
    found: dict[str, Any] = {
        "weights": view.hash(),
        "steps": result.steps,
        "queries": result.queries,
        "value": result.value,
        "values": [step.value for step in result.history],
        "message": result.message,
        "metrics": result.metrics,
        "metric_queries": result.metric_queries,
    }
    # The state of a run that is over is not gone on with by rank 0 alone: files are compared there.
    if file is not None and os.environ.get("RANK", "0") == "0":
        found["file"] = hashlib.sha256(file.read_bytes()).hexdigest()
        state = file.with_name(file.name + ".state")
        found["state"] = hashlib.sha256(state.read_bytes()).hexdigest()
    return found


def tuned(folder: Path, optimizer: Any, make: Any = ClassificationLoss, **options: Any) -> Any:
    model = lora_model()
    view, file = ParameterView.trainable(model), folder / "run.zot"
    settings: dict[str, Any] = {"batch_size": 16, "max_steps": 6, "progress": False}
    result = minimize(
        make(model), view, texts(), optimizer, trajectory=file, **{**settings, **options}
    )
    return outcome(result, view, file)


def mezo(folder: Path) -> dict[str, Any]:
    return tuned(folder, MeZO(lr=1e-2, num_directions=3))


class KnowsItsRank:
    """A loss of a class of its own, with what differs from process to process."""

    def __init__(self, loss: Any, rank: str) -> None:
        self.loss, self.rank = loss, rank
        self.collate, self.evaluating = loss.collate, loss.evaluating

    def __call__(self, batch: Any) -> Tensor:
        value: Tensor = self.loss(batch)
        return value


def an_object_that_knows_its_rank(folder: Path) -> dict[str, Any]:
    def make(model: Any) -> KnowsItsRank:
        return KnowsItsRank(ClassificationLoss(model), os.environ.get("RANK", "0"))

    return tuned(folder, MeZO(lr=1e-2), make, max_steps=3)


def svrg_1(folder: Path) -> dict[str, Any]:
    return tuned(folder, MeZOSVRG(), max_steps=None, max_queries=1500)


def svrg_4(folder: Path) -> dict[str, Any]:
    optimizer = MeZOSVRG(snapshot_interval=4, snapshot_size="all", num_directions=4, lr=1e-2)
    return tuned(folder, optimizer, max_steps=9)


def a_direction_for_every_sample(folder: Path) -> dict[str, Any]:
    return tuned(folder, ZOSVRG(lr=1e-3, snapshot_interval=2), max_steps=4)


def in_micro_batches(folder: Path) -> dict[str, Any]:
    options = EvaluationOptions(micro_batch_size=5, joint_rows="off", reuse_trunk="off")
    return tuned(folder, MeZO(lr=1e-2), evaluation=options)


def f1(folder: Path) -> dict[str, Any]:
    return tuned(folder, MeZOSVRG(num_directions=4, snapshot_interval=20), F1, max_steps=4)


def metrics_beside(folder: Path) -> dict[str, Any]:
    model = lora_model()
    view = ParameterView.trainable(model)
    watched = Metrics({"f1": F1(model), "loss": ClassificationLoss(model)}, texts(20), every=2)
    result = minimize(
        ClassificationLoss(model), view, texts(), MeZO(lr=1e-2), batch_size=8, max_steps=5,
        metrics=watched, progress=False,
    )  # fmt: skip
    return outcome(result, view)


async def awaited(completion_ids: list[list[int]], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return mean_id(completion_ids)


def _written(folder: Path, joint_rows: JointRows = "auto", **options: Any) -> dict[str, Any]:
    model = tiny_model("llama", "causal")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    view, file = ParameterView.trainable(adapted), folder / "run.zot"
    reward = a_reward(model=adapted, **options)
    result = minimize(
        reward, view, prompts(12), MeZOSVRG(num_directions=3), batch_size=6, max_steps=3,
        trajectory=file, progress=False, evaluation=EvaluationOptions(joint_rows=joint_rows),
    )  # fmt: skip
    return outcome(result, view, file)


def generation(folder: Path) -> dict[str, Any]:
    return _written(folder)


def sampled_generation(folder: Path) -> dict[str, Any]:
    return _written(folder, "off", functions=awaited, do_sample=True)


def whole_model(folder: Path) -> dict[str, Any]:
    model = tiny_model("gpt2", "causal", dtype=torch.bfloat16)
    view = ParameterView.full(model)
    rows = [{"input_ids": ids} for ids in token_rows(16)]
    result = minimize(
        CausalLMLoss(model), view, rows, MeZO(num_directions=2), batch_size=8, max_steps=3,
        progress=False,
    )  # fmt: skip
    return outcome(result, view)


def along_low_rank(folder: Path) -> dict[str, Any]:
    model = tiny_model("llama", "causal")
    view = ParameterView.full(model, noise="lowrank")
    rows = [{"input_ids": ids} for ids in token_rows(16)]
    result = minimize(
        CausalLMLoss(model), view, rows, MeZOSVRG(), batch_size=8, max_steps=3, progress=False,
        metrics={"noise": TrackVariance(every=2)}, trajectory=folder / "low.zot",
    )  # fmt: skip
    return outcome(result, view, folder / "low.zot")


def a_function(folder: Path) -> dict[str, Any]:
    x = torch.zeros(4, dtype=torch.float64)
    view = ParameterView({"x": x})
    result = minimize(
        lambda _: float((x - 3).square().sum()), view, None, MeZOSVRG(num_directions=5),
        max_steps=30, progress=False,
    )  # fmt: skip
    return outcome(result, view)


def a_budget_that_ends_within_a_step(folder: Path) -> dict[str, Any]:
    problem = Least()
    return outcome(problem.run(max_steps=None, max_queries=50), problem.view)


def a_callback_stops(folder: Path) -> dict[str, Any]:
    problem = Least()

    def stop(step: Any) -> None:
        if step.step == 5:
            raise StopIteration

    return outcome(problem.run(callback=stop), problem.view)


def a_value_that_is_not_finite(folder: Path) -> dict[str, Any]:
    problem, file = Least(), folder / "run.zot"

    def loss(batch: Tensor) -> Tensor:
        bad = (batch == problem.rows[3]).all(1) & (problem.w.abs().sum() > 0.02)
        return torch.where(bad, torch.nan, problem(batch))

    return outcome(problem.run(loss, trajectory=file), problem.view, file)


def an_error_of_the_objective(folder: Path) -> dict[str, Any]:
    problem = Least()

    def loss(batch: Tensor) -> Tensor:
        if (batch == problem.rows[3]).all(1).any() and problem.w.abs().sum() > 0.02:
            raise ValueError("row 3 has no value")
        return problem(batch)

    loss.mean_over_rows = True  # type: ignore[attr-defined]
    try:
        problem.run(loss)
    except ValueError as error:
        return {"error": str(error), "weights": problem.view.hash()}
    return {}


def resumed(folder: Path) -> dict[str, Any]:
    file = folder / "run.zot"
    first = Least()
    first.run(max_steps=5, trajectory=file)
    problem = Least()
    return outcome(problem.run(trajectory=file, resume=True), problem.view, file)


def diagnosis(folder: Path) -> dict[str, Any]:
    model = lora_model()
    loss, view = ClassificationLoss(model), ParameterView.trainable(model)
    found = diagnose(loss, view, texts(), batch_size=8, num_directions=4)
    return {"text": str(found), "queries": found.queries}


TRAINING: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_strategy": "steps",
    "logging_steps": 2,
    "use_cpu": True,
}


class _Logs(TrainerCallback):
    """The figures of a training's steps."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        names = ("loss", "queries", "learning_rate", "eval_accuracy", "total_flos")
        noise = (name for name in logs if name.startswith("noise_"))
        self.figures.append({n: logs[n] for n in (*names, *noise) if n in logs})


def _trained(trainer: Any, folder: Path, **resume: Any) -> dict[str, Any]:
    logs = _Logs()
    trainer.add_callback(logs)
    with warnings.catch_warnings(action="ignore"):
        trainer.train(**resume)
    found = {"weights": trainer.view.hash(), "queries": trainer.queries, "logs": logs.figures}
    if os.environ.get("RANK", "0") == "0":
        found["file"] = hashlib.sha256((folder / "trajectory.zot").read_bytes()).hexdigest()
        found["folders"] = sorted(path.name for path in folder.glob("checkpoint-*"))
    return found


def training(folder: Path) -> dict[str, Any]:
    data = toy_rows(16, seed=3)
    more = {"eval_dataset": data, "eval_strategy": "steps", "eval_steps": 3}
    watched = {"noise": TrackVariance(3, num_directions=4)}
    trainer = trainer_of(folder, compute_metrics=accuracy, metrics=watched, **TRAINING, **more)
    return _trained(trainer, folder) | {"metric_queries": trainer.metric_queries}


def resumed_training(folder: Path) -> dict[str, Any]:
    """Goes on from what one process has left; see ``leave_a_training``."""
    trainer = trainer_of(folder / "left", **TRAINING)
    return _trained(trainer, folder / "left", resume_from_checkpoint=True)


def leave_a_training(folder: Path) -> None:
    """Half of a training."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= 4

    _trained(trainer_of(folder / "left", callbacks=[Stop()], **TRAINING), folder / "left")


def restarted_training(folder: str) -> dict[str, Any]:
    """Of a launcher that starts the processes anew: one fails, the first time."""
    rank, is_first = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if rank == "0" and not is_first:
        time.sleep(1.0)  # so that the other looks for an address when that of before is there

    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank == "1" and is_first and state.global_step == 4:
                raise ArithmeticError

    return _trained(trainer_of(Path(folder), callbacks=[Fail()], **TRAINING), Path(folder))


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from toy_rows(64)


def training_on_a_stream(folder: Path) -> dict[str, Any]:
    trainer = trainer_of(
        folder, train_dataset=Stream(), optimizer="mezo", max_steps=4, use_cpu=True
    )
    return _trained(trainer, folder)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        mezo, an_object_that_knows_its_rank, svrg_1, svrg_4, a_direction_for_every_sample,
        in_micro_batches, f1, metrics_beside,
        generation, sampled_generation, whole_model, along_low_rank, a_function,
        a_budget_that_ends_within_a_step, a_callback_stops, a_value_that_is_not_finite,
        an_error_of_the_objective, resumed, diagnosis, training, resumed_training,
        training_on_a_stream,
    )
}  # fmt: skip
FEW = {
    name: CASES[name]
    for name in ("svrg_4", "f1", "sampled_generation", "in_micro_batches", "resumed_training")
}
"""Where all of them would take too long."""
