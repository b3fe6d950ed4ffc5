"""A run is not gone on with where what its functions read beside their arguments has changed."""

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from objectives import CallableObjective
from zo_adapt import MeZO, MeZOSVRG, ParameterView, ZOConfig, ZOTrainer, minimize
from zo_adapt.errors import NoisyObjectiveWarning, TrajectoryError
from zo_adapt.loops.around import read_around
from zo_adapt.loops.contents import set_in_modules
from zo_adapt.loops.resume import check_settings

PROGRAM = """
import numpy as np, torch, types
from torch import nn

SCALE, TEMPLATE, PATH = {scale}, "a text", "{path}"
TARGET, WEIGHTS = torch.tensor([{target}, 0.0]), np.array([{weight}])
SIZES = ({size}, 1)
CONFIG, SPACE = {{"rate": {entry}, "seen": 0}}, types.SimpleNamespace(power={power}, calls=0)
STEPS, SEEN, DEVICE = {begun}, {{}}, "{device}"

def helper(value):
    return value {sign} 1

def count(step):
    global STEPS
    STEPS += 1

def moved_on():
    SPACE.calls += 1

def not_called():
    return "{path}"

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4, eps={eps})
        self.act, self.gain = nn.LeakyReLU({slope}), {gain}
        self.drop = nn.Dropout({rate})
        nn.init.ones_(self.first.weight), nn.init.ones_(self.last.weight)
        nn.init.zeros_(self.first.bias), nn.init.zeros_(self.last.bias)

    def forward(self, x):
        return self.out(self.act(self.norm(self.first(x) * x)))

    def out(self, x):
        return {outer}(self.last(x)) * self.gain

    def drawn(self):
        return "{path}"

model = Net().eval()

def function(batch):
    SEEN[len(SEEN)] = STEPS
    noted = SEEN[0] + SPACE.calls
    value = (helper(model(batch).to(DEVICE)) * SCALE - TARGET).square().mean(1)
    value = value * CONFIG["rate"] ** SPACE.power
    return value * float(WEIGHTS[0]) + SIZES[0]

def of_rows(batch):
    return function(batch["x"])

class Own:
    def __init__(self, weights):
        self.weights = weights

    def __call__(self, batch):
        return (model(batch) * self.weights).square().mean(1) * {factor}

own = Own(torch.tensor([{argument}, 1.0]))
"""
USUAL: dict[str, Any] = {
    "scale": 2.0, "path": "one", "target": 1.0, "weight": 0.5, "size": 1, "begun": 0, "sign": "+",
    "device": "cpu", "eps": 1e-5, "slope": 0.01, "gain": 1.0, "rate": 0.1, "outer": "torch.tanh",
    "factor": 1.0, "argument": 1.0, "entry": 2.0, "power": 1,
}  # fmt: skip
DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def program(**changes: Any) -> Any:
    """A user's program, or the same after a change."""
    made = types.ModuleType("program")
    exec(compile(PROGRAM.format(**USUAL | changes), "program.py", "exec"), made.__dict__)
    return made


def tuned(steps: int, folder: Path, objective: str = "function", **changes: Any) -> int:
    made = program(**changes)
    return minimize(
        getattr(made, objective), ParameterView.full(made.model), DATA, MeZO(displacement=0.1),
        batch_size=8, max_steps=steps, trajectory=folder / "run.zot", resume=True,
        callback=made.count, progress=False,
    ).steps  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale": 3.0}, "'SCALE of function': '2.0'"),
        ({"target": 2.0}, "TARGET of function"),
        ({"weight": 0.7}, "WEIGHTS of function"),
        ({"size": 2}, "SIZES of function"),
        ({"entry": 3.0}, r"CONFIG\['rate'\] of function"),
        ({"power": 2}, r"SPACE\.power of function"),
        ({"sign": "-"}, "helper"),
        ({"outer": "torch.relu"}, r"Net\.out"),
        ({"eps": 1e-3}, r"LayerNorm\.eps"),
        ({"slope": 0.2}, r"LeakyReLU\.negative_slope"),
        ({"gain": 2.0}, r"Net\.gain"),
    ],
)
def test_what_a_function_and_a_model_read_is_compared(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    assert tuned(2, tmp_path) == 2
    with pytest.raises(TrajectoryError, match=named):
        tuned(4, tmp_path, **change)
    assert tuned(4, tmp_path) == 4


@pytest.mark.parametrize(
    ("change", "named"), [({"factor": 2.0}, r"Own\.__call__"), ({"argument": 2.0}, "weights")]
)
def test_an_object_is_known_by_its_code_and_its_tensors(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    assert tuned(2, tmp_path, "own") == 2
    with pytest.raises(TrajectoryError, match=named):
        tuned(4, tmp_path, "own", **change)
    assert tuned(4, tmp_path, "own") == 4


def test_what_no_value_depends_on_may_be_another(tmp_path: Path) -> None:
    """Other functions, counters that the module assigns, dropout's rate, the name of a device."""
    assert tuned(2, tmp_path) == 2
    assert tuned(4, tmp_path, path="two", begun=7, rate=0.3, device="cpu:0") == 4


def test_a_run_is_gone_on_with_in_the_program_that_began_it(tmp_path: Path) -> None:
    """Where weights, counters and lists have moved on; tensors that are tuned are no globals."""
    made, x = program(), torch.zeros(3)
    made.__dict__["x"] = x
    exec(
        "def value(batch):\n    SEEN[STEPS] = 1\n    return float(((x - 1) ** 2).sum())",
        made.__dict__,
    )
    options = {"trajectory": tmp_path / "run.zot", "resume": True, "progress": False}
    for steps in (2, 4):
        x.zero_()
        optimizer = MeZOSVRG(displacement=0.5)
        result = minimize(
            made.value, ParameterView({"x": x}), None, optimizer, max_steps=steps,
            callback=made.count, **options,
        )  # fmt: skip
        assert result.steps == steps
    assert not {"SEEN[0] of function", "SPACE.calls of function"} & {
        *read_around(ParameterView.full(made.model), made.function)
    }
    assert "x of value" not in read_around(ParameterView({"x": x}), made.value)


def test_files_of_before_are_gone_on_with(tmp_path: Path) -> None:
    new = {"settings of the model's modules": {"LayerNorm.eps": [["1e-05", 1]]}}
    check_settings(tmp_path, {}, new)
    kept = {"settings of the model's modules": {"Former.eps": [["1e-05", 1]]}}
    check_settings(tmp_path, kept, new)


def test_what_is_taken_from_a_module_of_ones_own_is_a_global() -> None:
    view, found = ParameterView({"x": torch.zeros(2)}), []
    for scale in (2.0, 2.0, 3.0):
        made, settings = program(), types.ModuleType("settings")
        settings.__dict__["SCALE"] = scale
        exec("def loss(value):\n    return 2 * value", settings.__dict__)
        made.__dict__["settings"] = settings
        exec("def value(batch):\n    return settings.loss(batch) * settings.SCALE", made.__dict__)
        found.append(read_around(view, made.value))
    assert found[0] == found[1] != found[2]
    assert found[0]["settings.SCALE of value"] == "2.0"
    assert "loss" in found[0]


def test_functions_of_libraries_and_arrays_of_objects_are_left_out() -> None:
    view = ParameterView({"x": torch.zeros(2)})
    assert not read_around(view, nn.functional.cross_entropy, np.mean, None)
    found = read_around(view, lambda batch: np.pi * torch.pi * len(str(types.__doc__)))
    assert list(found) == [
        "test_functions_of_libraries_and_arrays_of_objects_are_left_out.<locals>.<lambda>"
    ]
    objects = np.array([object()])
    found = read_around(view, lambda batch: (objects, 0.0)[1])
    assert not any(name.startswith("objects of") for name in found)


class Drifting(nn.Module):
    """Keeps what it has seen in a plain attribute, which its next output depends on."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layer, self.level, self.rate = nn.Linear(4, 2), 1.0, rate

    def forward(self, batch: Tensor) -> Tensor:
        self.level += self.rate
        return self.layer(batch) * self.level


@pytest.mark.parametrize("rate", [0.01, 1e-4])
def test_an_attribute_that_every_call_changes_is_named(rate: float) -> None:
    """Also where two calls differ by less than what a draw would make of them."""
    model = Drifting(rate)
    with pytest.warns(NoisyObjectiveWarning, match=r"every call changes '.*Drifting\.level'"):
        minimize(
            lambda batch: model(batch).square().mean(1), ParameterView.full(model), DATA,
            MeZO(displacement=0.1), batch_size=8, max_steps=1, progress=False,
        )  # fmt: skip


def test_an_attribute_that_forwards_change_is_no_setting(tmp_path: Path) -> None:
    for steps in (1, 2):
        model = Drifting(0.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        model.__dict__["seen"] = float(steps)
        model.register_forward_hook(lambda module, *_: setattr(module, "seen", module.seen + 1.0))
        view = ParameterView.full(model)
        minimize(
            lambda batch, model=model: model(batch).square().mean(1), view, DATA,
            MeZO(displacement=0.1), batch_size=8, max_steps=steps, progress=False,
            trajectory=tmp_path / "run.zot", resume=True,
        )  # fmt: skip
        assert not any("seen" in name for name in set_in_modules(model, view.changing))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_training_is_compared_with_how_it_began(tmp_path: Path) -> None:
    """A global that another module moves on is in its checkpoints as it was at the start."""

    def train(steps: int, **changes: Any) -> int:
        made = program(**changes)
        args = ZOConfig(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=8,
            logging_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip

        class Moving(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                made.SCALE = 5.0

        trainer = ZOTrainer(
            made.model, args, train_dataset=list(DATA),
            data_collator=lambda rows: {"x": torch.stack(rows)},
            objective=CallableObjective(made.of_rows, model=made.model),
            zo_optimizer=MeZO(displacement=0.1), callbacks=[Moving()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=True if any(tmp_path.glob("checkpoint-*")) else None)
        return trainer.state.global_step

    assert train(2) == 2
    with pytest.raises(TrajectoryError, match="SCALE of function"):
        train(4, scale=3.0)
    assert train(4) == 4
