"""Models in parts on two processes: what is made of them, and the same made of the whole model."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from tiny_models import tiny_model, token_rows
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM

from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import SGD, ZOSVRG, MeZO, MeZOSVRG, ParameterView, ZOConfig, ZOTrainer, minimize
from zo_adapt.noise.entries import tensor_key
from zo_adapt.term import Term
from zo_adapt.trajectory.playback import export

TERMS = [Term(5, 0.01), Term(9, -0.02)]
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
PLAN = dict.fromkeys((*COLUMNS, "mlp.gate_proj"), ColwiseParallel()) | dict.fromkeys(
    ("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel()
)
MEZO = MeZO(num_directions=2, displacement=0.05)
SVRG = MeZOSVRG(num_directions=2, displacement=0.05)


def is_launched() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def llama(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("llama", "causal", num_key_value_heads=2).to(dtype)


def bert() -> Any:
    return tiny_model("bert", num_labels=3)  # of whose head two rows are here, and one there


def adapted(model: nn.Module, kind: str, targets: list[str], **options: Any) -> Any:
    """With a LoRA whose A is the same however it is cut."""
    config = peft.LoraConfig(task_type=kind, target_modules=targets, **{"r": 2, **options})
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(tensor_key(name) % 2**32)
            drawn = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                spread = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
                parameter.data.to_local().copy_(spread.to_local())
            else:
                parameter.data.copy_(drawn)
    return model


def fsdp(model: Any, blocks: Any, **options: Any) -> Any:
    """In parts by FSDP2, where there are several processes."""
    if is_launched():
        mesh = init_device_mesh("cpu", (2,))
        for block in blocks:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model


def tensor_parallel(folder: Path) -> Any:
    """By transformers, where there are several processes."""
    plan = {"tp_plan": "auto"} if is_launched() else {}
    return AutoModelForCausalLM.from_pretrained(folder / "llama", **plan).eval()


def fsdp_full(_: Path) -> ParameterView:
    model = llama()
    return ParameterView.full(fsdp(model, model.model.layers))


def fsdp_half(_: Path) -> ParameterView:
    model = llama(torch.bfloat16)
    return ParameterView.full(fsdp(model, model.model.layers))


def fsdp_columns(_: Path) -> ParameterView:
    model = llama()
    placed = {"shard_placement_fn": lambda p: Shard(p.dim() - 1)} if is_launched() else {}
    return ParameterView.full(fsdp(model, model.model.layers, **placed), noise="rademacher")


def fsdp_uneven(_: Path) -> ParameterView:
    model = bert()
    return ParameterView.full(fsdp(model, model.bert.encoder.layer))


def fsdp_last_layers(_: Path) -> ParameterView:
    model = bert()
    return ParameterView.last_layers(fsdp(model, model.bert.encoder.layer), 1, noise="lowrank-2")


def fsdp_lora(_: Path) -> ParameterView:
    model = adapted(bert(), "SEQ_CLS", ["query", "value"])
    return ParameterView.trainable(fsdp(model, model.base_model.model.bert.encoder.layer))


def fsdp_of_one_row(_: Path) -> ParameterView:
    model = adapted(bert(), "SEQ_CLS", ["query", "value"], r=1)  # of whose A one holds nothing
    return ParameterView.trainable(fsdp(model, model.base_model.model.bert.encoder.layer))


def fsdp_tokens(_: Path) -> ParameterView:
    model = adapted(llama(), "CAUSAL_LM", ["q_proj"], trainable_token_indices=[4, 9])
    return ParameterView.trainable(fsdp(model, model.base_model.model.model.layers))


def fsdp_below_a_whole_lora(_: Path) -> ParameterView:
    model = adapted(llama(), "CAUSAL_LM", ["q_proj", "v_proj"])
    whole = {p for p in model.parameters() if p.requires_grad}
    blocks = model.base_model.model.model.layers
    return ParameterView.trainable(fsdp(model, blocks, ignored_params=whole))


def tp_by_hand(_: Path) -> ParameterView:
    model = llama()
    if is_launched():
        for layer in model.model.layers:
            parallelize_module(layer, init_device_mesh("cpu", (2,)), PLAN)
    return ParameterView.matching(model, r"layers\.1")


def tp_full(folder: Path) -> ParameterView:
    return ParameterView.full(tensor_parallel(folder))


def tp_along_low_rank(folder: Path) -> ParameterView:
    return ParameterView.full(tensor_parallel(folder), noise="lowrank")


def tp_lora(folder: Path) -> ParameterView:
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return ParameterView.trainable(adapted(tensor_parallel(folder), "CAUSAL_LM", targets))


Make = Callable[[Path], ParameterView]
CASES: dict[str, tuple[Make, Any]] = {
    "fsdp_full": (fsdp_full, SVRG),
    "fsdp_half": (fsdp_half, MEZO),
    "fsdp_columns": (fsdp_columns, MEZO),
    "fsdp_uneven": (fsdp_uneven, MEZO),
    "fsdp_last_layers": (fsdp_last_layers, MEZO),
    "fsdp_lora": (fsdp_lora, MeZO(num_directions=2)),  # and the displacement is measured
    "fsdp_of_one_row": (fsdp_of_one_row, MEZO),
    "fsdp_tokens": (fsdp_tokens, MEZO),
    "fsdp_below_a_whole_lora": (fsdp_below_a_whole_lora, SVRG),
    "tp_by_hand": (tp_by_hand, MEZO),
    "tp_full": (tp_full, SVRG),
    "tp_along_low_rank": (tp_along_low_rank, MEZO),
    "tp_lora": (tp_lora, MEZO),
}


def tuned(view: ParameterView, optimizer: Any, objective: Any = None, **options: Any) -> Any:
    model: Any = view.model
    causal = "CausalLM" in type(getattr(model, "base_model", model)).__name__ or any(
        "CausalLM" in type(part).__name__ for part in model.modules()
    )
    rows = [{"input_ids": ids, "label": i % 3} for i, ids in enumerate(token_rows(12))]
    if causal:
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    loss: Any = objective or (CausalLMLoss if causal else ClassificationLoss)(model)
    settings: dict[str, Any] = {"batch_size": 6, "max_steps": 3, "progress": False}
    return minimize(loss, view, rows, optimizer, **{**settings, **options})


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """What is to be compared; the trajectory and the weights lie in the folder."""
    make, optimizer = CASES[name]
    view = make(folder)
    start = view.hash()
    with view.shifted(TERMS, 0.5):
        shifted = view.hash()
    found = {
        "start": start,
        "shifted": shifted,
        "restored": view.hash(),
        "fingerprint": view.fingerprint(),
        "base": view.base_hash(),
        "norms": list(view.norms().values()),
    }
    file = folder / f"{name}.zot" if is_launched() else None
    result = tuned(view, optimizer, trajectory=file)
    weights = export(view)
    if is_first():
        torch.save(weights, folder / f"{name}-{'parts' if is_launched() else 'whole'}.pt")
    return found | {
        "values": [step.value for step in result.history],
        "queries": result.queries,
        "weights": view.hash(),
        "why_not": result.evaluation.why_not,
    }


def resumed(folder: Path) -> dict[str, Any]:
    """A run in two halves, each on a model of its own."""
    for steps in (1, 3):
        run_halves(folder, steps)
    view, whole = fsdp_full(folder), fsdp_full(folder)
    tuned(whole, ZOSVRG(lr=1e-3))
    tuned(view, ZOSVRG(lr=1e-3), trajectory=folder / "resumed.zot", resume=True)
    return {"weights": view.hash(), "uninterrupted": whole.hash()}


def run_halves(folder: Path, steps: int) -> Any:
    """To a step, from where the file in the folder ends."""
    options = {"trajectory": folder / "resumed.zot", "max_steps": steps, "resume": True}
    return tuned(fsdp_full(folder), ZOSVRG(lr=1e-3), **options)


def cut_off(folder: Path) -> dict[str, Any]:
    """A forward that ends in the middle leaves no trace: not in the weights, nor in the values."""
    view = fsdp_full(folder)
    model: Any = view.model
    ids = torch.tensor([[5, 6, 7]])

    def fail(*_: Any) -> None:
        raise ArithmeticError

    with torch.no_grad():
        before = model(ids).logits
        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        try:
            with view.shifted(TERMS):
                model(ids)
        except ArithmeticError:
            hook.remove()
        after = model(ids).logits
        with view.shifted(TERMS):
            there = model(ids).logits
    return {"same": torch.equal(before, after), "moves": not torch.equal(before, there)}


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(folder: Path) -> dict[str, str]:
    """What cannot be, and what is said of it."""

    def placed(spread: Any) -> ParameterView:
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(spread(model.weight.detach()))
        return ParameterView.full(model)

    flat = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("more", "own"))["own"]
    view = fsdp_full(folder)
    free = {name: t for name, t in view.tensors.items() if "norm" in name}

    def partial(weight: Tensor) -> DTensor:
        return DTensor.from_local(weight, flat, [Partial()])

    def strided(weight: Tensor) -> DTensor:
        return DTensor.from_local(weight[:2], flat, [_StridedShard(0, split_factor=2)])

    def tuned_by(config: Any, make: Callable[[], Any] | None = None) -> ParameterView:
        model = peft.get_peft_model(make() if make else tensor_parallel(folder), config)
        return ParameterView.trainable(model.eval())

    def of_several_dtypes() -> ParameterView:
        model = llama(torch.bfloat16)
        model.model.norm.float()
        return ParameterView.full(fsdp(model, model.model.layers))

    def whole_factors() -> ParameterView:
        """As peft 0.21.0 left them."""
        model = tensor_parallel(folder)
        model.config.distributed_config, model._device_mesh = None, None
        return tuned_by(peft.LoraConfig(**on_columns), lambda: model)

    def written_to() -> Any:
        model = tensor_parallel(folder)
        loss = CausalLMLoss(model)

        def writes(batch: Any) -> Any:
            model.model.norm.weight.data.mul_(1.01)
            return loss(batch)

        loss_of_rows: Any = writes
        loss_of_rows.collate = loss.collate
        return tuned(ParameterView.matching(model, "norm"), MEZO, loss_of_rows)

    def of_plain_parts() -> ParameterView:
        model = llama()
        model.model.layers[0].self_attn.q_proj._hf_tp_plan = "colwise"
        return ParameterView.full(model)

    on_columns: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    soft = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    staged = llama()
    staged.config.distributed_config = SimpleNamespace(pp_size=2)
    config = ZOConfig(str(folder / "trainer"), use_cpu=True, max_steps=1)
    actions: dict[str, Callable[[], Any]] = {
        "two dimensions": lambda: placed(lambda w: distribute_tensor(w, square, [Shard(0)] * 2)),
        "other processes": lambda: placed(lambda w: distribute_tensor(w, alone, [Shard(0)])),
        "partial": lambda: placed(partial),
        "strided": lambda: placed(strided),
        "flat": lambda: ParameterView.full(
            FullyShardedDataParallel(bert(), use_orig_params=True, device_id=torch.device("cpu"))
        ),
        "pipeline": lambda: ParameterView.full(staged),
        "LoHa": lambda: tuned_by(peft.LoHaConfig(r=2, **on_columns)),
        "IA3": lambda: tuned_by(peft.IA3Config(feedforward_modules=[], **on_columns)),
        "VeRA": lambda: tuned_by(peft.VeraConfig(r=2, **on_columns)),
        "copy": lambda: tuned_by(peft.LoraConfig(modules_to_save=["down_proj"], **on_columns)),
        "prefix": lambda: tuned_by(peft.PrefixTuningConfig(**soft)),
        "whole factors": whole_factors,
        "plain parts": of_plain_parts,
        "written to": written_to,
        "dtypes": of_several_dtypes,
        "no model": lambda: ParameterView(free),
        "by layer": lambda: ParameterView.full(view.model, scratch="layer"),  # type: ignore[arg-type]
        "first order": lambda: tuned(view, SGD(lr=1e-3)),
        "trainer": lambda: ZOTrainer(view.model, config),
    }
    return {name: said(action) for name, action in actions.items()}


class Skewed(CausalLMLoss):
    """Other values on one rank."""

    def __call__(self, batch: Any) -> Any:
        return super().__call__(batch) * (1.0 if is_first() else 1.5)


def other_rows(folder: Path) -> dict[str, str]:
    """The ranks see other examples, and hold other weights of what each has as a whole."""
    view = fsdp_below_a_whole_lora(folder)
    found = {"values": said(lambda: tuned(view, MEZO, Skewed(view.model)))}  # type: ignore[arg-type]
    view = fsdp_below_a_whole_lora(folder)
    if not is_first():
        next(iter(view.tensors.values())).data[0] += 1.0
    return found | {"weights": said(lambda: tuned(view, MEZO))}


MORE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "resumed": resumed,
    "cut_off": cut_off,
    "refused": refused,
    "other_rows": other_rows,
}


def everything(folder: Path, *, silent: bool = True) -> dict[str, Any]:
    """All cases of this process, by name."""
    with warnings.catch_warnings():
        if silent:
            warnings.simplefilter("ignore")
        found = {name: run_case(name, folder) for name in CASES}
        if is_launched():
            found |= {name: case(folder) for name, case in MORE.items()}
    return found
