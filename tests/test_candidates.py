"""Several candidates in one forward: the same values, fewer calls, and who is refused."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from families import Reads, ReadsAndCalls, Tied
from peft import LoraConfig, get_peft_model
from problems import bits
from tiny_models import DECODERS, ENCODERS, FAMILIES, tiny_model, token_rows
from torch import Tensor, nn

from objectives import (
    F1,
    Accuracy,
    CallableObjective,
    CausalLMLoss,
    ClassificationLoss,
    GenerationReward,
    VerbalizerLoss,
)
from zo_adapt import Group, MeZO, MeZOSVRG, ParameterView, Term, diagnose, minimize
from zo_adapt.data.rows import NoRowsError
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import NonFiniteObjectiveError, ObjectiveError, OptionError
from zo_adapt.evaluation.joint.row_blocks import JointBatch
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.evaluation.values import on_host
from zo_adapt.term import HERE, Shift

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj", "fc1"],  # fc1 is called with rows and positions flattened
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
}
QUIET: dict[str, Any] = {"progress": False}


def head_of(family: str) -> str:
    return "classification" if family in ENCODERS else "causal"


def with_lora(family: str, head: str | None = None, **options: Any) -> nn.Module:
    head = head or head_of(family)
    task = "SEQ_CLS" if head == "classification" else "CAUSAL_LM"
    dtype = options.pop("dtype", torch.float32)
    options |= {"fan_in_fan_out": True} if family == "gpt2" else {}
    config = LoraConfig(r=4, target_modules=TARGETS[family], task_type=task, **options)
    model: Any = get_peft_model(tiny_model(family, head, dtype=dtype), config)
    return model.eval()  # type: ignore[no-any-return]


def loss_of(model: nn.Module, family: str) -> Any:
    return (ClassificationLoss if family in ENCODERS else CausalLMLoss)(model)


def examples(rows: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(rows, 9))]


def source_of(objective: Any, family: str = "bert", rows: int = 16) -> Any:
    labelled = examples(rows)
    if family in DECODERS:
        labelled = [{"input_ids": one["input_ids"]} for one in labelled]
    return as_source(labelled, objective.collate)


def asked(source: Any, shares: Sequence[int] = (5, 5, 6), directions: int = 4) -> list[Probe]:
    """A base point and directions on every share, some from another place."""
    ends = np.cumsum([0, *shares]).tolist()
    batches = [Batch(source, range(a, b)) for a, b in pairwise(ends)]
    probes = []
    for share, batch in enumerate(batches):
        probes.append(Probe(HERE, batch))
        for k in range(directions):
            terms = (Term(10 * share + k, 0.02), Term(99, -0.01, 0))
            probes.append(Probe(Shift(terms, 0.9 if k == 1 else 1.0), batch))
    return probes


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def far(one: Sequence[Evaluation], other: Sequence[Evaluation]) -> float:
    """The largest difference of two lists of answers, per example."""
    pairs = zip(one, other, strict=True)
    return max(float(abs(np.subtract(a.per_example, b.per_example)).max()) for a, b in pairs)


def both(
    objective: Any, view: ParameterView, probes: list[Probe]
) -> tuple[Any, Any, LocalEvaluator]:
    """Answers one at a time, answers together, and the evaluator that gave those."""
    joined = LocalEvaluator(objective, view)
    alone = LocalEvaluator(objective, view, EvaluationOptions(joint_rows="off")).evaluate(probes)
    return alone, joined.evaluate(probes), joined


def refused(objective: Any, view: ParameterView, probes: list[Probe], reason: str) -> None:
    """Joining is given up, and the answers are bit for bit those of one at a time."""
    alone, answers, evaluator = both(objective, view, probes)
    assert reason in str(evaluator.plan.why_not.get("joint"))
    assert [a.value for a in alone] == [b.value for b in answers]
    patched = [m for m in view.model.modules() if "forward" in m.__dict__] if view.model else []
    assert not patched


# --- the same values ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reused", [True, False])
def test_lora_of_every_family(family: str, reused: bool) -> None:
    model = with_lora(family)
    view = ParameterView.trainable(model, **({} if reused else {"groups": ()}))
    loss = loss_of(model, family)
    probes = asked(source_of(loss, family))
    alone, answers, evaluator = both(loss, view, probes)
    assert evaluator.plan.why_not.get("joint") is None
    assert far(alone, answers) < 1e-6
    assert far(alone[:1], alone[1:2]) > 1e-4, "a shift must show"
    assert [len(e.per_example) for e in answers] == [len(p.batch) for p in probes]
    assert evaluator.queries == sum(len(p.batch) for p in probes)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "opt"])
def test_last_layers(family: str) -> None:
    model = tiny_model(family, head_of(family))
    view = ParameterView.last_layers(model, 1)
    loss = loss_of(model, family)
    alone, answers, evaluator = both(loss, view, asked(source_of(loss, family)))
    assert evaluator.plan.why_not.get("joint") is None
    assert far(alone, answers) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    for adapter in (True, False):
        model = (
            with_lora(family, dtype=dtype)
            if adapter
            else tiny_model(family, head_of(family), dtype=dtype)
        )
        view = ParameterView.trainable(model) if adapter else ParameterView.last_layers(model, 1)
        loss = loss_of(model, family)
        alone, answers, evaluator = both(loss, view, asked(source_of(loss, family)))
        assert evaluator.plan.why_not.get("joint") is None
        assert far(alone, answers) < 4 * torch.finfo(dtype).eps


def test_embeddings_and_biases() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2), nn.LayerNorm(2))
    loss = CallableObjective(
        lambda ids: model(ids).square().sum(1).mul(0.5) + model[0](ids)[:, 0, 0]
    )
    source = as_source(torch.arange(48).view(16, 3) % 9)
    for pattern in ("", "bias", "0.weight", "2.weight|3.bias"):
        view = ParameterView.matching(model, pattern)
        alone, answers, evaluator = both(loss, view, asked(source))
        assert evaluator.plan.why_not.get("joint") is None, pattern
        assert far(alone, answers) < 2e-6


def test_groups_move_apart() -> None:
    model = with_lora("bert")
    groups = [Group("lora_B", perturbation_scale=2.0), Group("classifier", perturbation_scale=0.0)]
    view = ParameterView.trainable(model, groups=groups)
    loss = ClassificationLoss(model)
    source = source_of(loss)
    batch = Batch(source, range(5))
    probes = [Probe(Shift((Term(1, 0.05, g),), 0.8), batch) for g in (0, 1, 2)]
    alone, answers, evaluator = both(loss, view, probes)
    assert evaluator.plan.why_not.get("joint") is None
    assert far(alone, answers) < 1e-6


def test_the_stack_holds_the_bits_of_shifted() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"a": torch.randn(7, 5).T.to(dtype), "b": torch.randn(3).to(dtype)}
        view = ParameterView(tensors, groups=[Group("a")])
        points = [((), 1.0), ((Term(1, 0.3), Term(2, 0.1, 0)), 0.9), ((Term(3, 0.2, 0),), 1.0)]
        stack = view.stack(points)
        for index, point in enumerate(points):
            with view.shifted(*point):
                for name, tensor in tensors.items():
                    assert torch.equal(bits(stack[name][index]), bits(tensor))
        assert list(view.stack([((Term(3, 0.2, 1),), 1.0)])) == ["b"], "a does not move"


def test_verbaliser_and_metrics() -> None:
    model = with_lora("opt", "causal")
    view = ParameterView.trainable(model)
    loss = VerbalizerLoss(model, [7, 9])
    alone, answers, evaluator = both(loss, view, asked(source_of(loss)))
    assert evaluator.plan.why_not.get("joint") is None
    assert far(alone, answers) < 1e-6
    for metric in (F1(loss, min_rows=1), Accuracy(loss), 0.5 * Accuracy(loss) - 0.1 * loss):
        alone, answers, evaluator = both(metric, view, asked(source_of(metric)))
        assert evaluator.plan.why_not.get("joint") is None
        assert [a.value for a in answers] == pytest.approx([a.value for a in alone], abs=1e-6)


# --- fewer calls --------------------------------------------------------------------------------


def test_model_calls_fall_and_the_weights_are_not_written() -> None:
    model = with_lora("bert")
    view, loss = ParameterView.trainable(model), ClassificationLoss(model)
    probes = asked(source_of(loss), directions=8)
    evaluator = LocalEvaluator(loss, view)
    evaluator.evaluate(probes)  # the check shifts the live tensors, once
    versions = [tensor._version for tensor in view.tensors.values()]
    with calls_of(model) as calls:
        evaluator.evaluate(probes)
    assert len(calls) == 1  # one for all but the check
    assert [tensor._version for tensor in view.tensors.values()] == versions


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"joint_rows": 27 * 6}, 1),
        ({"joint_rows": 54}, 3),  # a share with its directions goes together
        ({"joint_rows": 30}, 6),  # or in parts of one share
        ({"joint_rows": 9}, 27),
        ({"joint_rows": "off"}, 27),
        ({"joint_rows": 200, "micro_batch_size": 54}, 3),
        ({"joint_rows": 200, "batch_size": 6}, 1),
        ({"joint_rows": 200, "batch_size": 5}, 1 + 18),  # the share of 6 is cut in two
        ({"micro_batch_size": 5}, 36),
    ],
)
def test_limits_on_rows(limits: dict[str, Any], expected: int) -> None:
    model = with_lora("distilbert")
    loss = ClassificationLoss(model)
    batch_size = limits.get("batch_size")
    options = EvaluationOptions(**{k: v for k, v in limits.items() if k != "batch_size"})
    view = ParameterView.trainable(model)
    evaluator = LocalEvaluator(loss, view, options, batch_size=batch_size)
    probes = asked(source_of(loss), directions=8)
    evaluator.evaluate(probes)
    joint_rows = limits.get("joint_rows", "off")
    largest = limits.get("micro_batch_size") or (6 if joint_rows == "off" else max(joint_rows, 6))
    sizes = []
    with calls_of(model) as calls:
        model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda _, args, out: sizes.append(len(out))
        )
        evaluator.evaluate(probes)
    assert len(calls) == expected
    assert max(sizes) <= largest


def test_rows_of_very_different_numbers_do_not_join() -> None:
    model = with_lora("bert")
    loss = ClassificationLoss(model)
    source = source_of(loss)
    probes = [Probe(Shift((Term(1, 0.1),)), Batch(source, range(n))) for n in (1, 2, 7, 8, 16)]
    evaluator = LocalEvaluator(
        loss, ParameterView.trainable(model), EvaluationOptions(joint_rows=100)
    )
    evaluator.evaluate(probes)
    with calls_of(model) as calls:
        evaluator.evaluate(probes)
    assert len(calls) == 3


def test_every_point_sees_one_draw_of_the_collate_function() -> None:
    model = with_lora("bert")
    loss = ClassificationLoss(model)

    def drawing(rows: list[Any]) -> Any:
        batch = loss.collate(rows)
        drawn = torch.randint(5, 60, batch["input_ids"].shape)
        return batch | {"input_ids": drawn}

    source = as_source(examples(), drawing)
    evaluator = LocalEvaluator(loss, ParameterView.trainable(model))
    answers = evaluator.evaluate(
        [Probe(Shift((Term(1, 1e-9),)), batch) for batch in [Batch(source, range(5))] * 3]
        + [Probe(Shift((Term(1, 1e-9),)), batch) for batch in [Batch(source, range(5, 10))] * 3]
    )
    assert evaluator.plan.why_not.get("joint") is None
    for share in (answers[:3], answers[3:]):
        assert far(share[:2], share[1:]) < 1e-6
    assert far(answers[:3], answers[3:]) > 1e-3


def test_a_joint_batch() -> None:
    source = as_source(torch.arange(10)[:, None].repeat(1, 3))
    first, second = Batch(source, [4, 5]), Batch(source, [7, 8, 9])
    batch = JointBatch([first, second, first])
    assert batch.rows == (4, 5, 5, 7, 8, 9, 4, 5, 5)
    assert batch.content[:, 0].tolist() == list(batch.rows)
    assert [piece.tolist() for piece in batch.read(torch.arange(9))] == [[0, 1], [3, 4, 5], [6, 7]]
    assert batch.leads == {9, 27}


def test_what_is_returned_for_several_points_is_not_read_point_by_point() -> None:
    source = as_source(torch.arange(10)[:, None].repeat(1, 3))
    batch = JointBatch([Batch(source, [4, 5]), Batch(source, [7, 8, 9])])
    values = torch.arange(6.0)
    pieces = batch.rows_of(values)
    assert all(piece.values is values for piece in pieces)
    read = on_host(pieces)
    assert [one.tolist() for one in read] == [[0, 1], [3, 4, 5]]
    with pytest.raises(NoRowsError, match="5"):
        batch.rows_of(torch.arange(5.0))


@pytest.mark.parametrize("lengths", [(3, 3), (3, 4)])
def test_examples_of_one_length_are_collated_once(lengths: tuple[int, int]) -> None:
    calls: list[int] = []

    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        calls.append(len(rows))
        return {"x": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    source = as_source([torch.full((lengths[i // 2],), i) for i in range(4)], collate)
    parts = [Batch(source, [0, 1]), Batch(source, [2, 3])]
    assert [part.width for part in parts] == list(lengths)
    content = JointBatch([*parts, parts[0]]).content["x"]
    assert content[:, 0].tolist() == [0, 1, 2, 3, 0, 1]
    assert calls == ([2, 2] if lengths == (3, 3) else [2, 2, 4])


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        # What rounding differs by grows with the way that steps go.
        lambda: MeZOSVRG(schedule="linear"),
        MeZO,
        lambda: MeZOSVRG(snapshot_interval=3, weight_decay=0.1, lr=1e-3),
        lambda: MeZOSVRG(snapshot_interval=20),
    ],
)
@pytest.mark.parametrize("adapter", [True, False])
def test_a_run_and_its_twin(optimizer: Callable[[], Any], adapter: bool) -> None:
    histories = {}
    for joint_rows in ("off", "auto"):
        torch.manual_seed(0)
        model = with_lora("bert") if adapter else tiny_model("bert")
        view = ParameterView.trainable(model) if adapter else ParameterView.last_layers(model, 1)
        with calls_of(model) as calls:
            result = minimize(
                ClassificationLoss(model),
                view,
                examples(48),
                optimizer(),
                batch_size=16,
                max_steps=8,
                evaluation=EvaluationOptions(joint_rows=joint_rows),  # type: ignore[arg-type]
                **QUIET,
            )
        histories[joint_rows] = result.history, len(calls)
    (alone, many), (joined, few) = histories["off"], histories["auto"]
    assert few < many
    assert [r.queries for r in alone] == [r.queries for r in joined]
    assert [r.value for r in joined] == pytest.approx([r.value for r in alone], rel=1e-5, abs=1e-5)


def stop_after(step: int) -> Callable[[Any], None]:
    def callback(record: Any) -> None:
        if record.step == step:
            raise StopIteration

    return callback


def test_same_seed_same_run(tmp_path: Any) -> None:
    def run(steps: int, **options: Any) -> str:
        torch.manual_seed(0)
        model = with_lora("bert")
        view = ParameterView.trainable(model)
        minimize(
            ClassificationLoss(model), view, examples(48), MeZO(), batch_size=16,
            max_steps=6, **QUIET, **options,
            callback=stop_after(steps),
        )  # fmt: skip
        return view.hash()

    whole = run(6)
    run(3, trajectory=tmp_path / "run.zot")
    assert run(6, trajectory=tmp_path / "run.zot", resume=True) == whole == run(6)


def test_diagnose_is_as_before() -> None:
    model = with_lora("bert")
    found = diagnose(
        ClassificationLoss(model), ParameterView.trainable(model), examples(), batch_size=8,
        num_directions=3,
    )  # fmt: skip
    assert found.queries == 11 * 3 * 8 + found.search_queries


def test_maximize_flips_once() -> None:
    model = with_lora("bert")
    view, loss = ParameterView.trainable(model), ClassificationLoss(model)
    probes = asked(source_of(loss))
    up = LocalEvaluator(loss, view, maximize=True).evaluate(probes)
    assert [-e.value for e in up] == [e.value for e in LocalEvaluator(loss, view).evaluate(probes)]


# --- refused ------------------------------------------------------------------------------------


def test_a_scalar_objective_is_asked_one_at_a_time() -> None:
    model = with_lora("bert")
    loss = ClassificationLoss(model)
    scalar = CallableObjective(lambda b: float(loss(b).mean()), model=model, collate=loss.collate)
    refused(scalar, ParameterView.trainable(model), asked(source_of(loss)), "has no rows")
    tensor = CallableObjective(lambda b: loss(b).mean(), model=model, collate=loss.collate)
    refused(tensor, ParameterView.trainable(model), asked(source_of(loss)), "shape ()")


def test_views_without_a_model_or_of_other_modules() -> None:
    x = torch.zeros(3)
    rows = as_source(torch.randn(16, 3))
    refused(lambda b: (b - x).square().sum(1), ParameterView({"x": x}), asked(rows), "no model")
    for family, reason in (("gpt2", "Conv1D"), ("llama", "LlamaRMSNorm")):
        model = tiny_model(family, "causal")
        loss = CausalLMLoss(model)
        view = ParameterView.last_layers(model, 1)
        refused(loss, view, asked(source_of(loss, family)), reason)


def test_dora_and_tied_weights_and_large_views() -> None:
    model = with_lora("bert", use_dora=True)
    loss = ClassificationLoss(model)
    probes = asked(source_of(loss))
    refused(loss, ParameterView.trainable(model), probes, "DoraLinearLayer")
    # without the magnitudes LoRA's weights are read past their modules
    view = ParameterView.matching(model, "lora_[AB]")
    alone, answers, _ = both(loss, view, probes)
    assert far(alone, answers) < 1e-6
    model = with_lora("bert")
    loss = ClassificationLoss(model)
    layered = ParameterView.trainable(model, scratch="layer")
    refused(loss, layered, asked(source_of(loss)), "layer by layer")


class ReadsLittle(Reads):
    """What is read without a call makes little of the output."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + 1e-3 * super().forward(x)
        return out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tied, "several modules"),
        (Reads, "differ from single"),
        (ReadsLittle, "read by another"),
        (ReadsAndCalls, "differ from single"),
    ],
)
def test_weights_that_are_read_without_a_call(
    kind: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = kind().eval()
    view = ParameterView.full(model)
    source = as_source(torch.randn(16, 3, 8))
    with caplog.at_level(logging.INFO, "zo_adapt"):
        refused(lambda x: model(x).square().sum((1, 2)), view, asked(source), reason)
    assert len([r for r in caplog.records if reason in r.message]) == (kind is not Tied)


def normed(x: Tensor, model: nn.Module) -> Tensor:
    out: Tensor = model(x).square().sum(1)
    return out / out.mean()


@pytest.mark.parametrize(
    "function",
    [
        normed,
        lambda x, model: model(x.flip(0)).flip(0).square().sum(1) * torch.arange(len(x)),
        lambda x, model: model(x[torch.randperm(len(x))]).square().sum(1),
        lambda x, model: model(x.t().reshape(-1, 8)[: len(x)]).square().sum(1),
        lambda x, model: model(x[None]).square().sum((0, 2)),
        lambda x, model: x.square().sum(1),
        lambda x, model: model(x).square().sum(1) if len(x) < 8 else 1 / 0,
    ],
)
def test_rows_that_know_of_each_other(function: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    view = ParameterView.full(model)
    evaluator = LocalEvaluator(lambda x: function(x, model), view)
    evaluator.evaluate(asked(as_source(torch.randn(16, 8))))
    assert evaluator.plan.why_not.get("joint")


def test_weights_tied_by_their_memory_are_not_joined() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    model[2].weight = nn.Parameter(model[0].weight.data.T)
    view = ParameterView.matching(model, "weight")
    probes = asked(as_source(torch.randn(16, 8)))
    refused(lambda x: model(x).square().sum(1), view, probes, "belongs to several modules")


def test_a_forward_that_stops_being_in_blocks_goes_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    view = ParameterView.full(model)
    odd = [False]

    def loss(x: Tensor) -> Tensor:
        return model(torch.cat([x, x[:1]]))[:-1].sum(1) if odd[0] else model(x).sum(1)

    probes = asked(as_source(torch.randn(16, 8)))
    evaluator = LocalEvaluator(loss, view)
    evaluator.evaluate(probes)
    odd[0] = True
    answers = evaluator.evaluate(probes)
    assert evaluator.plan.why_not.get("joint") is None
    alone = LocalEvaluator(loss, view, EvaluationOptions(joint_rows="off")).evaluate(probes)
    assert [a.value for a in alone] == [b.value for b in answers]


def test_objectives_that_say_so_are_not_joined() -> None:
    model = with_lora("opt")
    view = ParameterView.trainable(model)
    loss = CausalLMLoss(model, reduction="token")
    refused(loss, view, asked(source_of(loss, "opt")), "depends on the others")
    assert not (loss + CausalLMLoss(model)).independent_rows
    assert (CausalLMLoss(model) + CausalLMLoss(model, reduction="sum")).independent_rows
    assert GenerationReward.__init__.__kwdefaults__["do_sample"] is False


def test_a_score_that_reads_the_weights() -> None:
    model = with_lora("bert")
    view, loss = ParameterView.trainable(model), ClassificationLoss(model)

    class Penalised(Accuracy):
        def score(self, predictions: list[Any]) -> float:
            return sum(float(t.detach().square().sum()) for t in view.tensors.values())

    refused(Penalised(loss), view, asked(source_of(loss)), "predictions alone")


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_restores_everything(error: type[BaseException]) -> None:
    model = with_lora("bert")
    view, loss = ParameterView.trainable(model), ClassificationLoss(model)
    evaluator, probes = LocalEvaluator(loss, view), asked(source_of(loss))
    evaluator.evaluate(probes)
    before = view.hash()

    def fail(*_: object) -> None:
        raise error("in the middle")

    handle = model.get_submodule("base_model.model.classifier").register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        evaluator.evaluate(probes)
    handle.remove()
    assert view.hash() == before
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_nan_is_an_error() -> None:
    model = with_lora("bert")
    view, loss = ParameterView.trainable(model), ClassificationLoss(model)
    probes = asked(source_of(loss))
    evaluator = LocalEvaluator(loss, view)
    evaluator.evaluate(probes)
    probes[3] = Probe(Shift((Term(1, 3e37),)), probes[3].batch)
    with pytest.raises(NonFiniteObjectiveError, match="5 of 5 values"):
        evaluator.evaluate(probes)


@pytest.mark.parametrize("bad", [0, -3, 2.5, "all"])
def test_joint_rows_out_of_range(bad: Any) -> None:
    with pytest.raises(OptionError, match="joint_rows"):
        EvaluationOptions(joint_rows=bad)


@pytest.mark.parametrize("wrong", ["raises", "text", "shape"])
def test_what_is_wrong_with_an_objective_is_said_once(
    wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the error alone: no warning that probes are evaluated one at a time comes before it."""
    model = with_lora("bert")
    loss, view = ClassificationLoss(model), ParameterView.trainable(model)

    def objective(batch: Any) -> Any:
        values = loss(batch)
        if wrong == "raises":
            raise ZeroDivisionError("of the user")
        return "a text" if wrong == "text" else values[:, None].expand(-1, 3)

    with (
        caplog.at_level(logging.WARNING, "zo_adapt"),
        pytest.raises((ZeroDivisionError, ObjectiveError)),
    ):
        LocalEvaluator(objective, view).evaluate(asked(source_of(loss)))
    assert caplog.records == []
