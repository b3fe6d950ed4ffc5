"""LoRA that starts where the data are: A from the second moment of inputs, the model as before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from objectives import ClassificationLoss
from zo_adapt import MeZO, ParameterView, Step, initialise_lora, minimize, replay
from zo_adapt.errors import AdapterError, TrajectoryError, ViewError
from zo_adapt.loops import lora_start
from zo_adapt.loops.lora_start import Moment


class Net(nn.Module):
    """An embedding, two layers on it, and one that inputs do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.wide = nn.Linear(16, 12)
        self.last = nn.Linear(12, 3)
        self.aside = nn.Linear(5, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.wide(self.table(input_ids)))
        out: Tensor = self.last(hidden).sum(1)
        return out


def adapted(**options: Any) -> Any:
    """The net with LoRA of rank 4."""
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["wide", "last"]} | options
    return get_peft_model(Net(), LoraConfig(**config)).eval()


def rows(count: int = 96) -> Tensor:
    """Token ids, of which few are common."""
    drawn = torch.rand(count, 7, generator=torch.Generator().manual_seed(1))
    return (drawn**3 * 30).long()


def loss(model: Any) -> Callable[[Any], Tensor]:
    """One value per row."""
    return lambda ids: model(ids).square().sum(1)


def inputs_of(model: Any, layer: Any, ids: Tensor) -> Tensor:
    """What a layer is given, as rows."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen).reshape(-1, seen[0].shape[-1]).double()


def test_a_model_that_computes_nan_is_named_and_left_as_it_was() -> None:
    model = adapted()
    model.base_model.model.table.weight.data[3] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    with pytest.raises(ViewError, match=r"inputs of 'base_model\.model\.wide' hold NaN"):
        initialise_lora(model, loss(model), rows())
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_b_sees_is_uncorrelated_and_of_the_usual_size() -> None:
    model = adapted()
    before = model(rows()).detach()
    layer = model.base_model.model.wide
    x = inputs_of(model, layer, rows())
    usual = (x @ layer.lora_A["default"].weight.detach().double().T).square().mean()
    start = initialise_lora(model, loss(model), rows())
    assert start.queries == 96
    assert [name.split(".")[-1] for name in start.layers] == ["wide", "last"]
    a = layer.lora_A["default"].weight.detach().double()
    seen = x @ a.T
    second = seen.T @ seen / len(x)
    size = second.diagonal()
    assert torch.allclose(second, size.mean() * torch.eye(4, dtype=torch.float64), atol=1e-6)
    assert 0.5 < float(size.mean() / usual) < 2.0
    # ... and as much of the inputs as four numbers can hold.
    basis = torch.linalg.qr(a.T)[0]
    kept = (x @ basis).square().sum()
    best = torch.linalg.eigvalsh(x.T @ x)[-4:].sum()
    assert float(kept / best) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(model(rows()).detach(), before)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}])
def test_the_kinds_of_lora(options: dict[str, Any]) -> None:
    model = adapted(**options)
    before = model(rows()).detach()
    assert initialise_lora(model, loss(model), rows()).layers
    assert torch.allclose(model(rows()).detach(), before)


def test_the_same_seed_gives_the_same_start_and_touches_no_generator() -> None:
    one, other = adapted(), adapted()
    state = torch.random.get_rng_state()
    for model in (one, other):
        initialise_lora(model, loss(model), rows(), rows=40, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.base_model.model.wide.lora_A["default"].weight.requires_grad


def test_examples_become_batches_as_the_objective_makes_them() -> None:
    one, other = adapted(), adapted()
    examples = [{"input_ids": ids.tolist(), "labels": 0} for ids in rows()]
    start = initialise_lora(one, ClassificationLoss(one), examples)
    initialise_lora(other, loss(other), rows())
    assert start.queries == 96
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_padding_does_not_count() -> None:
    def of(masked: bool) -> Tensor:
        model, ids = adapted(), rows()
        mask = torch.ones_like(ids)
        if masked:
            ids, mask = ids.clone(), mask.clone()
            ids[:, 4:], mask[:, 4:] = 29, 0
        else:
            ids, mask = ids[:, :4], mask[:, :4]
        data = {"input_ids": ids, "attention_mask": mask}
        initialise_lora(model, lambda batch: model(**batch).sum(1), data)
        weight: Tensor = model.base_model.model.wide.lora_A["default"].weight.detach()
        return weight

    assert torch.allclose(of(masked=True), of(masked=False), atol=1e-6)


def test_what_it_cannot_set_is_left_and_named() -> None:
    model = adapted(target_modules=["wide", "table", "aside"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = initialise_lora(model, loss(model), rows())
    assert [name.split(".")[-1] for name in start.left] == ["table"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"base_model.model.wide.lora_A.default.weight"}


def test_few_inputs_span_few_directions() -> None:
    model = adapted(r=8)
    initialise_lora(model, loss(model), torch.full((5, 1), 2))
    a = model.base_model.model.wide.lora_A["default"].weight
    assert a.isfinite().all()


def test_a_tuned_adapter_and_a_model_without_one_are_refused() -> None:
    model = adapted()
    minimize(loss(model), ParameterView.trainable(model), rows(), MeZO(lr=1e-3), batch_size=8,
             max_steps=1, progress=False)  # fmt: skip
    with pytest.raises(AdapterError, match="has been tuned"):
        initialise_lora(model, loss(model), rows())
    plain = Net()
    with pytest.raises(AdapterError, match="no LoRA"):
        initialise_lora(plain, loss(plain), rows())


def test_a_sketch_finds_the_leading_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 2.0 ** -torch.arange(300.0, dtype=torch.float64)
    x = torch.randn(2000, 300, generator=generator, dtype=torch.float64) * scales
    exact = Moment(300, 4)
    monkeypatch.setattr(lora_start, "EXACT", 100)
    sketch = Moment(300, 4)
    for moment in (exact, sketch):
        moment.add(x[:900])
        moment.add(x[900:])
    values, vectors = exact.leading(4)
    near, along = sketch.leading(4)
    assert torch.allclose(near, values, rtol=1e-6)
    assert torch.allclose((along.T @ vectors).abs(), torch.eye(4, dtype=torch.float64), atol=1e-5)
    assert sketch.mean_square == exact.mean_square


def test_a_saved_start_carries_resumed_and_replayed_runs(tmp_path: Path) -> None:
    """What initialise_lora made travels as the adapter that was saved after it."""

    def run(model: Any, file: Path, stop: int | None = None, resume: bool = False) -> str:
        def callback(step: Step) -> None:
            if step.step == stop:
                raise StopIteration

        view = ParameterView.trainable(model)
        minimize(
            loss(model), view, rows(), MeZO(), batch_size=8, max_steps=6, callback=callback,
            trajectory=file, resume=resume, progress=False,
        )  # fmt: skip
        return view.hash()

    def received() -> Any:
        torch.manual_seed(0)
        return PeftModel.from_pretrained(Net(), tmp_path / "start", is_trainable=True).eval()

    model = adapted()
    initialise_lora(model, loss(model), rows())
    model.save_pretrained(tmp_path / "start")
    end = run(model, tmp_path / "whole.zot")
    run(received(), tmp_path / "part.zot", stop=3)
    assert run(received(), tmp_path / "part.zot", resume=True) == end
    view = ParameterView.trainable(received())
    assert replay(view, tmp_path / "whole.zot") == 6
    assert view.hash() == end
    # Another start is refused, and says so.
    with pytest.raises(TrajectoryError, match="adapter"):
        replay(ParameterView.trainable(adapted()), tmp_path / "whole.zot")
