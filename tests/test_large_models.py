"""Models that are not whole in memory: what can be tuned of them, and what is refused by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from tiny_models import tiny_model, token_rows
from torch import nn

from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import EvaluationOptions, MeZO, MeZOSVRG, ParameterView, minimize
from zo_adapt.errors import ViewError

ROWS = [{"input_ids": ids, "label": i % 2} for i, ids in enumerate(token_rows(16))]


def offloaded(model: nn.Module, folder: Path, layers: str) -> nn.Module:
    """The first layer on the CPU's main memory or on a disk, the rest where it computes."""
    names = [name for name, _ in model.named_parameters()]
    places = {name.rpartition(".")[0]: "cpu" for name in names}
    places |= {path: layers for path in places if ".0." in path}
    return dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def tuned(model: nn.Module, view: ParameterView, loss: Any, optimizer: Any) -> str:
    rows = [{"input_ids": row["input_ids"]} for row in ROWS] if loss is CausalLMLoss else ROWS
    # Neither is used beside offloaded layers, and both round otherwise.
    plain = EvaluationOptions(joint_rows="off", reuse_trunk="off")
    result = minimize(
        loss(model), view, rows, optimizer, batch_size=8, max_steps=3, evaluation=plain,
        progress=False,
    )  # fmt: skip
    assert result.steps == 3
    return view.hash()


def with_lora(model: nn.Module, kind: str) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type=kind, r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("optimizer", [MeZO(lr=1e-2), MeZOSVRG()], ids=["mezo", "svrg"])
def test_a_lora_beside_layers_on_a_disk_moves_as_beside_resident_ones(
    tmp_path: Path, optimizer: Any
) -> None:
    found = []
    for away in (False, True):
        model = tiny_model("llama", "causal")
        model = offloaded(model, tmp_path, "disk") if away else model
        assert any(p.is_meta for p in model.parameters()) == away
        adapted = with_lora(model, "CAUSAL_LM")
        view = ParameterView.trainable(adapted)
        found.append(tuned(adapted, view, CausalLMLoss, optimizer))
        assert any(p.is_meta for p in model.parameters()) == away
    assert found[0] == found[1]


def test_a_head_beside_layers_on_a_disk_moves_as_beside_resident_ones(tmp_path: Path) -> None:
    found = []
    for away in (False, True):
        model = tiny_model("bert")
        model = offloaded(model, tmp_path, "disk") if away else model
        view = ParameterView.matching(model, r"^classifier\.")
        found.append(tuned(model, view, ClassificationLoss, MeZO(lr=1e-2)))
    assert found[0] == found[1]


def test_weights_that_are_offloaded_are_refused_by_name(tmp_path: Path) -> None:
    model = offloaded(tiny_model("llama", "causal"), tmp_path, "disk")
    with pytest.raises(ViewError, match=r"layers\.0.*offloaded.*LoRA"):
        ParameterView.full(model)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_model_in_a_single_part_moves_as_the_whole_one() -> None:
    from torch.distributed.fsdp import fully_shard

    found = []
    for in_parts in (False, True):
        model = tiny_model("llama", "causal")
        if in_parts:
            model = fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        found.append(tuned(model, ParameterView.full(model), CausalLMLoss, MeZO(lr=1e-2)))
    assert found[0] == found[1]


def test_a_group_of_one_process_changes_nothing(tmp_path: Path) -> None:
    found = []
    for grouped in (False, True):
        if grouped:
            place = f"file://{tmp_path}/one"
            dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
        model = with_lora(tiny_model("llama", "causal"), "CAUSAL_LM")
        found.append(tuned(model, ParameterView.trainable(model), CausalLMLoss, MeZO(lr=1e-2)))
    dist.destroy_process_group()
    assert found[0] == found[1]


class Quantised(nn.Module):
    """An int8 weight with a small one beside it that is tuned."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        codes = torch.randint(-9, 9, (4, 4), generator=torch.Generator().manual_seed(0))
        self.codes = nn.Parameter(codes.to(torch.int8), requires_grad=False)
        self.beside, self.noise = nn.Parameter(torch.zeros(4)), noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random = self.noise * torch.rand(())
        return (x @ (0.1 * self.codes.float()) @ self.beside - 1).square() + random


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_it_is_said_whether_quantised_kernels_repeat_themselves(noise: float) -> None:
    model, rows = Quantised(noise), torch.ones(8, 4)
    view = ParameterView.trainable(model)
    result = minimize(
        model,
        view,
        rows,
        MeZO(lr=1e-2, num_directions=1),
        batch_size=4,
        max_steps=2,
        progress=False,
    )
    assert ("repeats" in result.evaluation.why_not) == (noise > 0)
    assert ("asked again" in str(result)) == (noise > 0)
    assert result.queries == 16
