"""What is found before the first write: memory, classes, buffers, tensors that nothing reads."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from families import FAMILIES, tokens
from problems import bits
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zo_adapt import MeZO, ParameterView, Shift, Term, minimize, replay
from zo_adapt.errors import (
    AdapterError,
    ChangingBufferError,
    NoisyObjectiveWarning,
    UnreadTensorWarning,
    ViewError,
)
from zo_adapt.evaluation.start_checks import warn_of_noise
from zo_adapt.evaluation.trunk.call import cut
from zo_adapt.evaluation.trunk.frozen_trunk import FrozenTrunk

# peft 0.21 still reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TERMS = [Term(1, 0.37), Term(2, -1.1)]
QUIET: dict[str, Any] = {"progress": False}


# What a restoring write would raise (fault 1), and classes that only look like floats (12).


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.ones(4)


def overlapping() -> Tensor:
    return torch.ones(6).as_strided((3, 3), (1, 1))


def without_memory() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def wrapped() -> Tensor:
    """What vmap hands over, kept beyond its end."""
    kept: list[Tensor] = []
    torch.func.vmap(lambda x: (kept.append(x), x)[1])(torch.ones(3, 2))
    return kept[0]


class Scaled(Tensor):
    """Says float32 and holds int8 and a scale, as the weights of optimum-quanto and torchao do."""

    @staticmethod
    def __new__(cls: Any, values: Tensor, scale: float) -> "Scaled":
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made.values, made.scale = values, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def dense(x: "Scaled") -> Tensor:
            return x.values * x.scale

        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        return func(*tree_map_only(cls, dense, args), **tree_map_only(cls, dense, kwargs or {}))


class Named(nn.Parameter):
    """A parameter of a class of its own."""


BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "inference mode": (inference_tensor, "inference mode"),
    "overlapping": (overlapping, "elements that share memory"),
    "without memory": (without_memory, "no memory now"),
    "negated": (lambda: torch.ones(4, dtype=torch.complex64).conj().imag, "negated"),
    "quantised": (lambda: Scaled(torch.ones(4, dtype=torch.int8), 0.1), "a Scaled.*adapter"),
    "quantised parameter": (
        lambda: nn.Parameter(Scaled(torch.ones(4, dtype=torch.int8), 0.1)),
        "a Scaled.*adapter",
    ),
    "class of its own": (lambda: Named(torch.ones(4)), "a Named"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "nested"),
    "masked": (lambda: np.ma.array([1.0, 2.0], mask=[0, 1]), "masked elements"),
    "of torch.func": (wrapped, "torch.func"),
    "lazy": (lambda: nn.LazyLinear(2).weight, "no shape yet"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_restored_is_refused_when_the_view_is_made(kind: str) -> None:
    make, words = BAD[kind]
    with pytest.raises(ViewError, match=f"(?s)'culprit'.*{words}"):
        ParameterView({"fine": torch.ones(2), "culprit": make()})


def test_a_model_made_in_inference_mode_is_refused_and_untouched() -> None:
    with torch.inference_mode():
        model = FAMILIES["llama"]().eval()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ViewError, match="inference mode"):
        minimize(lambda batch: 0.0, ParameterView.full(model), None, MeZO(), max_steps=1, **QUIET)
    with torch.inference_mode(), pytest.raises(ViewError, match="inference mode"):
        ParameterView.full(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def converted(model: nn.Module) -> None:
    with torch.inference_mode():
        model.half()


def replaced(model: nn.Module) -> None:
    with torch.inference_mode():
        model.classifier.weight.data = model.classifier.weight.clone()  # type: ignore[union-attr, operator]


def freed(model: nn.Module) -> None:
    model.classifier.weight.untyped_storage().resize_(0)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("scratch", ["copy", "layer"])
@pytest.mark.parametrize("change", [converted, replaced])
def test_what_was_made_anew_in_inference_mode_since_is_refused_before_a_write(
    change: Callable[[nn.Module], None], scratch: Any
) -> None:
    model = FAMILIES["roberta"]().eval()
    model.classifier = nn.Linear(8, 2)  # last of all: the others would be written before
    view = ParameterView.full(model, scratch=scratch)
    change(model)
    before = [bits(p).clone() for p in model.parameters()]
    for act in (
        lambda: run(model, view),
        lambda: view.apply(Shift((Term(1, 0.1),))),
        lambda: view.shifted(TERMS).__enter__(),
    ):
        with pytest.raises(ViewError, match="inference mode"):
            act()
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))


def test_memory_that_was_freed_since_is_refused_when_a_run_starts() -> None:
    model = FAMILIES["bert"]().eval()
    view = ParameterView.full(model)
    freed(model)
    with pytest.raises(ViewError, match=r"classifier\.weight.*no memory now"):
        run(model, view)


def test_a_frozen_base_may_be_of_inference_mode() -> None:
    with torch.inference_mode():
        base = FAMILIES["distilbert"]().eval()
    config = peft.LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config).eval()
    assert run(model, ParameterView.trainable(model)).steps == 4


def test_odd_strides_that_overlap_nothing_are_fine() -> None:
    tensor = torch.ones(8).as_strided((3, 2), (2, 3))  # offsets 0 3 2 5 4 7
    ParameterView({"w": tensor}).apply(Shift((Term(1, 0.1),)))
    assert not bool((tensor == 1).any())


# Parameters that share storage (fault 6).


class Transposed(nn.Module):
    """Two parameters, one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(9, 8)
        self.d = nn.Parameter(self.e.weight.data.t())

    def forward(self, ids: Tensor) -> Tensor:
        return self.e(ids) @ self.d


class Attribute(nn.Module):
    """A plain attribute that has a parameter's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(9, 8)
        self.table = self.e.weight.data

    def forward(self, ids: Tensor) -> Tensor:
        return self.e(ids) @ self.table.t()


@pytest.mark.parametrize("kind", [Transposed, Attribute])
def test_a_probed_point_is_the_applied_one_where_storage_is_shared(kind: type[nn.Module]) -> None:
    model, ids = kind(), torch.arange(6).view(2, 3)
    found = []
    for scratch in ("copy", "layer"):
        view = ParameterView.full(model, scratch=scratch)  # type: ignore[arg-type]
        assert list(view.tensors) == (["d"] if kind is Transposed else ["e.weight"])
        before, digest = model.e.weight.detach().clone(), view.hash()  # type: ignore[union-attr]
        with torch.no_grad(), view.shifted(TERMS):
            found.append(model(ids))
        assert view.hash() == digest
        view.apply(Shift(tuple(TERMS)))
        with torch.no_grad():
            assert torch.equal(model(ids), found[-1])
            model.e.weight.copy_(before)  # type: ignore[union-attr, operator]
    assert torch.equal(*found)


def test_parts_of_one_storage_are_told_apart() -> None:
    whole = torch.zeros(4, 6)
    halves = {"left": whole[:, :3], "right": whole[:, 3:]}
    assert list(ParameterView(halves).tensors) == ["left", "right"]
    with pytest.raises(ViewError, match=r"'whole' shares part of its memory with 'left'"):
        ParameterView(halves | {"whole": whole})
    with pytest.raises(ViewError, match="shares part"):
        ParameterView({"first": whole[0], "column": whole[:, 0]})


def test_a_head_that_shares_the_embeddings_storage_belongs_to_it() -> None:
    model = FAMILIES["llama"]()
    assert "lm_head.weight" in ParameterView.last_layers(model, 1).tensors
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    model.lm_head.weight = nn.Parameter(table.data)  # type: ignore[union-attr]
    assert "lm_head.weight" not in ParameterView.last_layers(model, 1).tensors


def test_a_model_that_was_converted_since_is_looked_at_where_it_lies_now() -> None:
    model = adapted("default", "old")
    view = ParameterView.matching(model, r"lora_.\.default")
    model.double()
    model.set_adapter("old")
    with pytest.raises(AdapterError, match="'default'"):
        view.check_adapters()
    bert = FAMILIES["bert"]().eval()
    view = ParameterView.last_layers(bert, 1)
    where = cut(view).path, len(cut(view).frozen)
    bert.double()
    assert (cut(view).path, len(cut(view).frozen)) == where == ("bert.encoder.layer", 2)


# Buffers that a forward changes (fault 8).


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class Caching(nn.Module):
    """Fills a table at first use: a buffer that changes once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)
        self.register_buffer("table", None)
        self.register_buffer("scale", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.fill_(2.0)
        return self.inner(x) * self.scale


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(batch).square().flatten(1).sum(1)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "buffer"), [(normed, "1.running_mean"), (Counting, "calls"), (spectral, "weight.0._u")]
)
def test_buffers_that_every_forward_changes_are_named(
    make: Callable[[], nn.Module], buffer: str
) -> None:
    model = make()
    view = ParameterView.full(model)
    before = {name: b.clone() for name, b in model.named_buffers()}, view.hash()
    with pytest.raises(ChangingBufferError, match=buffer):
        minimize(
            loss_of(model), view, torch.randn(8, 4), MeZO(), batch_size=4, max_steps=2, **QUIET
        )
    assert view.hash() == before[1]
    assert all(torch.equal(bits(b), bits(before[0][n])) for n, b in model.named_buffers())
    if make is normed:
        model.eval()
        minimize(
            loss_of(model), view, torch.randn(8, 4), MeZO(), batch_size=4, max_steps=2, **QUIET
        )


class OfLarge(nn.Module):
    """Changes a buffer on batches of more than two rows alone: the first look sees two."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 3), kind
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.arange(2.0))

    def forward(self, batch: Tensor) -> Tensor:
        found: Tensor = self.layer(batch)
        if len(batch) <= 2:
            return found
        if self.kind == "a count":
            self.calls += 1
        elif self.kind == "a new tensor":
            self.calls = self.calls + 1
        elif self.kind == "batch norm":
            found = self.norm(found)
        elif self.kind == "a kernel that does not count":
            mean, variance = self.norm.running_mean, self.norm.running_var
            found = nn.functional.batch_norm(found, mean, variance, training=True)
        elif self.kind == "a table":
            self.table = torch.arange(float(len(batch)))
        return found


WAYS: dict[str, Callable[[nn.Module], ParameterView]] = {
    "copy": lambda model: ParameterView.matching(model, "^layer"),
    "layer": lambda model: ParameterView.matching(model, "^layer", scratch="layer"),
    "one tensor": lambda model: ParameterView.matching(model, "layer.bias"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "kind", ["a count", "a new tensor", "batch norm", "a kernel that does not count"]
)
def test_a_buffer_that_large_batches_change_is_noticed(kind: str, way: str) -> None:
    model = OfLarge(kind)
    view = WAYS[way](model)
    before = {name: b.clone() for name, b in model.named_buffers()}, view.hash()
    with pytest.raises(ChangingBufferError, match="evaluation 1 changed"):
        minimize(
            loss_of(model), view, torch.randn(64, 4),
            MeZO(displacement=0.1, num_directions=2, one_sided=False),
            batch_size=16, max_steps=40, **QUIET,
        )  # fmt: skip
    assert view.hash() == before[1]
    assert all(torch.equal(bits(b), bits(before[0][n])) for n, b in model.named_buffers())


def written(tensor: nn.Parameter) -> None:
    with torch.no_grad():
        tensor.mul_(0.999)


def written_unseen(tensor: nn.Parameter) -> None:
    """Torch does not count these; and the second time nothing is changed any more."""
    tensor.data.clamp_(-0.1, 0.1)


def replaced_by(tensor: nn.Parameter) -> None:
    tensor.data = tensor.data * 0.999


@pytest.mark.parametrize("scratch", ["copy", "layer"])
@pytest.mark.parametrize("change", [written, written_unseen, replaced_by])
@pytest.mark.parametrize("frozen", [False, True], ids=["tuned", "frozen"])
def test_weights_that_an_objective_changes_in_place_are_named(
    change: Callable[[nn.Parameter], None], scratch: Any, frozen: bool
) -> None:
    """Those that are tuned, at once, and put back; frozen ones where every call changes them."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    view = ParameterView.matching(model, "^2" if frozen else "^0", scratch=scratch)
    before = view.hash()

    def loss(batch: Tensor) -> Tensor:
        change(model[0].weight)  # type: ignore[arg-type]
        return model(batch).square().sum(1)

    if frozen and change is written_unseen:
        assert run_of(loss, view).steps == 1
        return
    with pytest.raises(ChangingBufferError, match=r"'0\.weight' in place"):
        run_of(loss, view)
    assert view.hash() == before


def run_of(loss: Callable[[Tensor], Tensor], view: ParameterView) -> Any:
    return minimize(
        loss, view, torch.randn(8, 4), MeZO(displacement=0.1), batch_size=4, max_steps=1, **QUIET
    )


def test_weights_that_are_put_back_are_fine() -> None:
    """An objective may be of rounded weights, say."""
    model = nn.Linear(4, 2)
    view = ParameterView.full(model)

    def loss(batch: Tensor) -> Tensor:
        exact = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.copy_((exact * 16).round() / 16)
            found: Tensor = model(batch).square().sum(1)
            model.weight.copy_(exact)
        return found

    assert run_of(loss, view).steps == 1


def test_a_table_that_large_batches_make_longer_is_none_of_these() -> None:
    model, calls = OfLarge("a table"), []
    model.layer.register_forward_hook(lambda *_: calls.append(1))
    view = ParameterView.matching(model, "layer")
    data, optimizer = torch.randn(64, 4), MeZO(displacement=0.1, num_directions=1, one_sided=False)
    result = minimize(loss_of(model), view, data, optimizer, batch_size=16, max_steps=9, **QUIET)
    assert result.steps == 9
    assert len(calls) < 2 * 9 + 9  # asked again once, not at every step


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("pattern", ["^1", "^0"])
def test_an_embedding_that_a_forward_shortens_is_named(kind: Any, pattern: str) -> None:
    """Frozen or tuned: the forward of a probe would write to it."""
    model = nn.Sequential(kind(9, 4, max_norm=0.5), nn.Linear(4, 2))
    view, before = ParameterView.matching(model, pattern), model[0].weight.clone()
    data = torch.randint(0, 9, (8, 3))
    with pytest.raises(ChangingBufferError, match=r"'0'.*max_norm=0\.5"):
        minimize(loss_of(model), view, data, MeZO(), batch_size=4, max_steps=2, **QUIET)
    assert torch.equal(model[0].weight, before)


def test_a_buffer_that_is_filled_once_is_fine() -> None:
    model = Caching()
    result = minimize(
        loss_of(model), ParameterView.full(model), torch.randn(8, 4), MeZO(), batch_size=4,
        max_steps=2, **QUIET,
    )  # fmt: skip
    assert result.steps == 2


# Tensors that nothing reads (fault 3).


def adapted(*adapters: str) -> Any:
    config = peft.LoraConfig(
        r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(FAMILIES["bert"](), config, adapter_name=adapters[0]).eval()
    for name in adapters[1:]:
        model.add_adapter(name, config)
        for parameter_name, p in model.named_parameters():
            p.requires_grad |= f".{name}." in parameter_name
    return model


def run(model: nn.Module, view: ParameterView, loss: Any = None, **more: Any) -> Any:
    def usual(batch: Tensor) -> Tensor:
        return model(input_ids=batch).logits.square().sum(1)

    options = QUIET | {"batch_size": 4, "max_steps": 4} | more
    pair = MeZO(lr=1e-2, num_directions=1, one_sided=False)
    return minimize(loss or usual, view, tokens(8), pair, **options)


def test_an_inactive_adapter_is_refused_when_the_view_is_made_and_when_a_run_starts() -> None:
    model = adapted("default", "old")
    with pytest.raises(AdapterError, match=r"'old'.*\['default'\] is active.*set_adapter\('old'\)"):
        ParameterView.trainable(model)
    view = ParameterView.matching(model, r"lora_.\.default")
    run(model, view)
    model.set_adapter("old")
    digest = view.hash()
    with pytest.raises(AdapterError, match=r"adapter 'default', but \['old'\] is active"):
        run(model, view)
    assert view.hash() == digest


def test_a_view_that_no_value_depends_on_is_refused() -> None:
    model = adapted("default")
    with pytest.raises(ViewError, match=r"depends on no tensor.*original_module"):
        run(model, ParameterView.matching(model, r"classifier\.original_module"))


def test_prompt_tuning_inside_disable_adapter_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(FAMILIES["gpt2"](), config).eval()
    view = ParameterView.trainable(model)

    def loss(batch: Tensor) -> Tensor:
        return model(input_ids=batch).logits.square().sum((1, 2))

    with model.disable_adapter(), pytest.raises(ViewError, match="depends on no tensor"):
        run(model, view, loss)
    assert run(model, view, loss).steps == 4


def embedding(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(input_ids=batch).last_hidden_state.mean(1).square().sum(1)


def encoder() -> nn.Module:
    torch.manual_seed(3)
    return FAMILIES["bert"]().eval().bert  # type: ignore[return-value]


def test_an_unused_pooler_rests_with_a_warning_also_resumed_and_replayed(tmp_path: Path) -> None:
    results = []
    for stops in ((6,), (3, 6)):
        model, path = encoder(), tmp_path / f"{len(stops)}.zot"
        pooler = bits(model.pooler.dense.weight).clone()  # type: ignore[union-attr, arg-type]
        for stop in stops:

            def until(step: Any, stop: int = stop) -> None:
                if step.step == stop:
                    raise StopIteration

            if stop == 6 and len(stops) == 2:
                model = encoder()
            view = ParameterView.full(model)
            with pytest.warns(UnreadTensorWarning, match=r"2 of \d+ tensors.*pooler"):
                run(model, view, embedding(model), callback=until, trajectory=path, resume=True,
                    max_steps=None, max_queries=400)  # fmt: skip
        assert view.at_rest == {"pooler.dense.weight", "pooler.dense.bias"}
        assert torch.equal(bits(model.pooler.dense.weight), pooler)  # type: ignore[union-attr, arg-type]
        other = ParameterView.full(encoder())
        replay(other, path)
        assert other.hash() == view.hash()
        results.append(view.hash())
    assert results[0] == results[1]


def test_plain_tensors_that_no_value_depends_on_are_named() -> None:
    x, apart, spare, data = torch.zeros(2), np.zeros(2), torch.zeros(2), torch.ones(8, 1)

    def loss(batch: Tensor) -> Tensor:
        return (x.sum() - batch).square().sum(1) + float(apart.sum()) ** 2

    view = ParameterView({"x": x, "apart": apart})  # numpy reads it where torch does not see it
    minimize(loss, view, data, MeZO(displacement=0.1), batch_size=4, max_steps=1, **QUIET)
    view = ParameterView({"x": x, "spare": spare})
    with pytest.warns(UnreadTensorWarning, match="1 of 2 tensors.*noise alone: 'spare'"):
        minimize(loss, view, data, MeZO(displacement=0.1), batch_size=4, max_steps=1, **QUIET)


def test_a_view_moves_again_as_a_whole_where_another_objective_reads_it() -> None:
    model = encoder()
    view = ParameterView.full(model)
    with pytest.warns(UnreadTensorWarning):
        run(model, view, embedding(model))
    assert view.at_rest
    run(model, view, lambda batch: model(input_ids=batch).pooler_output.square().sum(1))
    assert not view.at_rest


class Experts(nn.Module):
    """The first token chooses an expert; a third is beyond any choice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.spare = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.experts[int(row[0] > 15)](self.table(row)) for row in ids])


def test_experts_that_the_first_examples_do_not_choose_are_not_dead() -> None:
    model = Experts()
    view = ParameterView.full(model)
    data = torch.tensor([[3, 4], [5, 6], [20, 4], [21, 7]])
    with pytest.warns(UnreadTensorWarning, match=r"2 of 7 tensors"):
        minimize(loss_of(model), view, data, MeZO(), batch_size=2, max_steps=2, **QUIET)
    assert view.at_rest == {"spare.weight", "spare.bias"}


@pytest.mark.parametrize("way", ["numpy", "tolist", "item", "data_ptr", "float"])
def test_every_way_out_of_torch_counts_as_reading(way: str) -> None:
    model = nn.Linear(3, 1)
    ways: dict[str, Callable[[Tensor], float]] = {
        "numpy": lambda t: float(t.detach().numpy().sum()),
        "tolist": lambda t: float(sum(map(sum, t.tolist()))),
        "item": lambda t: t.sum().item(),
        "float": lambda t: float(t.sum()),
        "data_ptr": lambda t: float(t.data_ptr() > 0) + float(t.detach().sum()),
    }
    view = ParameterView.matching(model, "weight")
    result = minimize(
        lambda batch: ways[way](model.weight), view, None, MeZO(), max_steps=2, **QUIET
    )
    assert result.steps == 2
    assert not view.at_rest


@pytest.mark.parametrize("draw", ["torch", "numpy", "python"])
def test_an_objective_that_draws_is_noticed(draw: str) -> None:
    model = encoder()
    plain = embedding(model)
    noise: dict[str, Callable[[], float]] = {
        "torch": lambda: float(torch.rand(())),
        "numpy": np.random.random,
        "python": random.random,
    }

    def drawing(batch: Tensor) -> Tensor:
        return plain(batch) * (1 + 0.1 * noise[draw]())

    view = ParameterView.matching(model, "encoder")
    with pytest.warns(NoisyObjectiveWarning, match=r"differ by \d+\.\d%"):
        run(model, view, drawing)
    run(model, view, plain)  # where a warning would be an error


def test_a_function_of_plain_tensors_that_draws_is_noticed() -> None:
    x, data = torch.zeros(2), torch.ones(8, 1)

    def loss(batch: Tensor) -> Tensor:
        return (x.sum() - batch).square().sum(1) * (1 + 0.1 * torch.rand(len(batch)))

    def in_batch(batch: Tensor) -> Tensor:  # no noise: a value depends on the others
        return (x.sum() - batch).square().sum(1) / len(batch)

    view, options = ParameterView({"x": x}), {"batch_size": 4, "max_steps": 1, **QUIET}
    with pytest.warns(NoisyObjectiveWarning, match=r"differ by \d+\.\d%"):
        minimize(loss, view, data, MeZO(displacement=0.1), **options)
    minimize(in_batch, view, data, MeZO(displacement=0.1), **options)


@pytest.mark.parametrize("form", ["one number", "little noise"])
def test_noise_is_noticed_whatever_an_objective_returns(form: str) -> None:
    x, data = torch.zeros(2), torch.ones(8, 1)
    random = np.random.default_rng(0)

    def loss(batch: Tensor) -> Tensor:
        size = 0.01 if form == "little noise" else 0.1
        values = (x.sum() - batch).square().sum(1) * (1 + size * random.random())
        return values.mean() if form == "one number" else values

    view, options = ParameterView({"x": x}), {"batch_size": 4, "max_steps": 1, **QUIET}
    with pytest.warns(NoisyObjectiveWarning, match=r"differ by \d+\.\d%"):
        minimize(loss, view, data, MeZO(displacement=0.1), **options)


def test_two_draws_that_are_alike_by_chance_are_not_the_last_ones() -> None:
    draws = iter([1.0, 1.0005, 1.0002, 1.05])
    calls: list[int] = []

    def drawing(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return batch * next(draws)

    batch = torch.ones(2)
    with pytest.warns(NoisyObjectiveWarning, match=r"differ by 5\.0%"):
        warn_of_noise(drawing(batch), drawing, batch)
    warn_of_noise(batch, lambda again: calls.append(0) or again, batch)
    assert calls == [2, 2, 2, 2, 0], "what has the same bits again is not called again"


def test_a_look_is_not_a_query_and_draws_no_random_number() -> None:
    model = adapted("default")
    drawn: list[float] = []

    class Loss:
        mean_over_rows = True
        independent_rows = False

        def __call__(self, batch: Tensor) -> Tensor:
            drawn.append(float(torch.rand(())))
            return model(input_ids=batch).logits.square().sum(1)  # type: ignore[no-any-return]

    torch.manual_seed(7)
    expected = float(torch.rand(()))
    torch.manual_seed(7)
    result = run(model, ParameterView.trainable(model), Loss(), max_steps=1)
    assert len(drawn) == 4
    assert result.queries == 8
    assert drawn[2] == expected, "the first evaluation that counts draws the first number"


def test_a_frozen_adapter_says_how_it_is_loaded(tmp_path: Path) -> None:
    adapted("default").save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(FAMILIES["bert"](), tmp_path)
    with pytest.raises(ViewError, match=r"\['default'\].*is_trainable=True"):
        ParameterView.trainable(model)
    model = peft.PeftModel.from_pretrained(FAMILIES["bert"](), tmp_path, is_trainable=True)
    assert ParameterView.trainable(model).tensors


# The trunk reads the inspection, and says why it is not reused (fault 9, 12).


def test_no_trunk_is_said_in_the_log_and_in_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["bert"]().eval()
    with caplog.at_level(logging.INFO, logger="zo_adapt"):
        result = run(model, ParameterView.last_layers(model, 3))
    reason = result.evaluation.why_not["trunk"]
    assert "first of 3 layers" in reason
    assert f"no trunk reused: {reason}" in caplog.text


def test_an_offloaded_model_has_no_trunk() -> None:
    model = FAMILIES["bert"]().eval()
    view = ParameterView.last_layers(model, 1)
    model.bert.embeddings.to("meta")  # type: ignore[union-attr, operator]
    assert "offloaded" in str(FrozenTrunk(view).why_not)
