"""What is attacked by signals: every operation that writes weights or patches a model."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from injected_signals import Subject, copies, equal
from killed_runs import tiny
from safetensors.torch import load_file
from torch import Tensor, nn

from objectives import CallableObjective, ClassificationLoss
from zo_adapt import (
    EvaluationOptions,
    MeZO,
    ParameterView,
    Replay,
    Shift,
    Term,
    ZOConfig,
    ZOTrainer,
    minimize,
    replay,
)
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.trainer.state import Checkpoint, last_whole_checkpoint

POINT = [Term(1, 0.25), Term(2, -0.5)]
UPDATE = Shift((Term(1, 0.25), Term(2, -0.5)), 0.9)


class Net(nn.Module):
    """An embedding, two blocks that repeat, a head: every kind of layer that is shifted apart."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype).eval().requires_grad_(False)


IDS = torch.arange(24).view(6, 4) % 16


def shifted(view: ParameterView, model: nn.Module) -> Subject:
    """A probe; the next one must see the same as before."""
    start = copies(view.tensors)
    with view.shifted(POINT):
        there = model(IDS)

    def work() -> None:
        with view.shifted(POINT):
            model(IDS)

    def faults() -> list[str]:
        found = [] if equal(start, view.tensors) else ["weights differ"]
        for name, tensor in view.tensors.items():
            tensor.data.copy_(start[name])
        with view.shifted(POINT):
            again = model(IDS)
        return found + ([] if torch.equal(there, again) else ["the next probe differs"])

    return Subject(lambda: None, work, faults, model)


def copied() -> Subject:
    """A view that is shifted by way of a copy."""
    model = net(torch.bfloat16)
    return shifted(ParameterView.full(model, scratch="copy"), model)


def layerwise() -> Subject:
    """A view that is shifted layer by layer."""
    model = net()
    return shifted(ParameterView.full(model, scratch="layer"), model)


def probing(model: nn.Module, view: ParameterView, **options: Any) -> Subject:
    """A step's probes, by an evaluator."""
    source = as_source(IDS)
    objective = CallableObjective(lambda ids: model(ids).square().mean(1))
    evaluator = LocalEvaluator(objective, view, EvaluationOptions(**options))
    batch = Batch(source, tuple(range(6)))
    probes = [Probe(Shift((Term(seed, 0.1),)), batch) for seed in (1, 2, 3)]
    for _ in range(3):
        values = evaluator.evaluate(probes)
    start = copies(view.tensors)

    def faults() -> list[str]:
        found = [] if equal(start, view.tensors) else ["weights differ"]
        again = evaluator.evaluate(probes)
        same = all(a.value == b.value for a, b in zip(values, again, strict=True))
        return found + ([] if same else ["the next values differ"])

    return Subject(lambda: None, lambda: evaluator.evaluate(probes), faults, model)


def joint() -> Subject:
    """Several candidates in one forward."""
    model = net()
    return probing(model, ParameterView.full(model, scratch="copy"), joint_rows=64)


def along_factors() -> Subject:
    """Several candidates along directions of low rank, for which no weight is written."""
    model = net()
    return probing(model, ParameterView.full(model, noise="lowrank"), joint_rows=64)


def trunk() -> Subject:
    """A frozen trunk that is reused."""
    model = net()
    view = ParameterView.matching(model, r"blocks\.1|norm|head")
    return probing(model, view, joint_rows="off", reuse_trunk="auto")


def applied() -> Subject:
    """An update: whole or not begun."""
    model = net(torch.bfloat16)
    view = ParameterView.full(model)
    start = copies(view.tensors)
    view.apply(UPDATE)
    there = copies(view.tensors)

    def prepare() -> None:
        view.restore(start)

    def faults() -> list[str]:
        whole = equal(start, view.tensors) or equal(there, view.tensors)
        return [] if whole else ["an update is applied in part"]

    return Subject(prepare, lambda: view.apply(UPDATE), faults, model)


def modes() -> Subject:
    """A model that is in training mode outside of its evaluations."""
    model = net().train()
    evaluating = EvaluationMode(model)

    def work() -> None:
        with evaluating():
            model(IDS)

    return Subject(lambda: None, work, list, model)


def trained(folder: Path, optimizer: Callable[[], Any]) -> Subject:
    """Some steps with a file: afterwards both are those of one step, and the run can go on."""
    model = net()
    view = ParameterView.full(model, scratch="copy")
    start, place = copies(view.tensors), folder / "run.zot"
    objective = CallableObjective(lambda ids: model(ids).square().mean(1))

    def run(path: Path, resume: bool = False) -> None:
        minimize(
            objective,
            view,
            IDS,
            optimizer(),
            batch_size=3,
            max_steps=3,
            progress=False,
            trajectory=path,
            resume=resume,
        )

    def begin(path: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        view.restore(start)

    begin(place)
    run(place)
    end, file = copies(view.tensors), place.read_bytes()

    def faults() -> list[str]:
        now, found = copies(view.tensors), []
        view.restore(start)
        if place.exists():
            replay(view, place)
        if not equal(now, view.tensors):
            found.append("the file and the weights are of two steps")
        for _ in range(2):  # what a kill leaves, too, is removed when the file is next opened
            view.restore(start)
            run(place, resume=True)
        if not equal(end, view.tensors) or place.read_bytes() != file:
            found.append("the resumed run is another")
        if extra := {path.name for path in folder.iterdir()} - {"run.zot", "run.zot.state"}:
            found.append(f"{sorted(extra)} is left in the folder")
        return found

    return Subject(lambda: begin(place), lambda: run(place), faults, model)


def replayed(folder: Path) -> Subject:
    """A replay: it knows where it is."""
    live = net()
    view = ParameterView.full(live)
    minimize(
        CallableObjective(lambda ids: live(ids).square().mean(1)),
        view,
        IDS,
        MeZO(),
        batch_size=3,
        max_steps=4,
        progress=False,
        trajectory=folder / "replayed.zot",
    )
    end, again = copies(view.tensors), net()
    other = ParameterView.full(again)
    way = Replay(other, folder / "replayed.zot")

    def faults() -> list[str]:
        way.to(4)
        return [] if equal(end, other.tensors) else ["the replay ends elsewhere"]

    return Subject(lambda: way.to(0) and None, lambda: way.to(3), faults, again)


def saved(folder: Path) -> Subject:
    """A checkpoint of ZOTrainer: whole, or passed over when training is resumed."""
    source, labels = tiny()
    view = ParameterView.full(source, scratch="copy")
    args = ZOConfig(
        str(folder),
        max_steps=2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ZOTrainer(
        source,
        args,
        train_dataset=Dataset.from_list(labels),
        data_collator=ClassificationLoss(source).collate,
        view=view,
        zo_optimizer=MeZO(),
    )
    trainer.train()
    start, place = copies(view.tensors), folder / "checkpoint-2"

    def faults() -> list[str]:
        found = [] if equal(start, view.tensors) else ["weights differ"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            whole = last_whole_checkpoint(folder)
        if whole is not None:
            Checkpoint.read(whole).fit(view)
            kept = load_file(place / "model.safetensors")
            if not equal(kept, dict(source.named_parameters())):
                found.append("a checkpoint that is taken for whole has other weights")
        return found

    def work() -> None:
        trainer._save_checkpoint(source, None)

    return Subject(lambda: shutil.rmtree(place, ignore_errors=True), work, faults, source)
