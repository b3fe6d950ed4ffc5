"""CUDA graphs: off where they cannot be, and the same values where they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, token_rows
from torch import Tensor, nn

from objectives import CausalLMLoss, ClassificationLoss, VerbalizerLoss
from objectives.causal_lm import PLACES
from zo_adapt import MeZO, MeZOSVRG, ParameterView, Term, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import DataError
from zo_adapt.evaluation.graphs import CALLS_BEFORE, Graphs
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE, Shift

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason=f"torch.cuda.is_available() is False (torch {torch.__version__})",
)


def examples(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(token_rows(count, 12))]


def lora_model(device: str = "cpu") -> Any:
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    torch.manual_seed(1)
    return get_peft_model(tiny_model("bert", num_labels=3), config).to(device).eval()


class Linear8bitLt(nn.Linear):
    """Of the name by which bitsandbytes calls its LLM.int8 layers."""


def test_layers_that_wait_for_the_gpu_are_not_captured() -> None:
    model = nn.Sequential(Linear8bitLt(2, 2), nn.Linear(2, 1))
    graphs = Graphs(ParameterView.matching(model, "1"))
    assert graphs.why_not == "LLM.int8 waits for the GPU in every layer, to find its outliers"


def test_off_the_gpu_the_function_is_called() -> None:
    view = ParameterView({"x": torch.zeros(2)})
    graphs = Graphs(view)
    assert graphs.why_not == "the view is not on a GPU"
    for _ in range(CALLS_BEFORE + 2):
        assert graphs.call(lambda content: content["x"] + 1, {"x": torch.ones(1)}, None) == 2


@pytest.mark.parametrize(
    ("asked", "scratch", "capturable", "why_not"),
    [
        ("auto", "copy", True, "the view is not on a GPU"),
        ("auto", "layer", True, "the view is not on a GPU"),
        ("auto", "copy", False, "the objective does not say that it can be captured"),
        ("on", "copy", False, "the view is not on a GPU"),
        ("off", "copy", True, "they are switched off"),
    ],
)
def test_only_what_allows_it_is_captured(
    asked: Any, scratch: Any, capturable: bool, why_not: str
) -> None:
    model = lora_model()
    view = ParameterView.trainable(model, scratch=scratch)
    objective = ClassificationLoss(model) if capturable else lambda _: 0.0
    plan = LocalEvaluator(objective, view, EvaluationOptions(cuda_graphs=asked)).plan
    assert (plan.captured, plan.graphs, plan.why_not["graphs"]) == (False, 0, why_not)


def values(evaluator: LocalEvaluator, source: Any, seeds: range) -> list[Tensor]:
    """Values per example at several points, step after step with changing weights."""
    found = []
    for seed in seeds:
        batch = Batch(source, range(8))
        probes = [Probe(Shift((Term(seed, c),)), batch) for c in (0.02, -0.02)]
        answers = evaluator.evaluate([Probe(HERE, batch), *probes])
        found += [torch.tensor(answer.per_example) for answer in answers]
        evaluator.view.apply_in_order([Term(seed, 1e-3)])
    return found


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("scratch", ["copy", "layer"])
@pytest.mark.parametrize("joint_rows", [None, 64])
def test_captured_values_are_those_of_plain_calls(scratch: Any, joint_rows: int | None) -> None:
    runs = []
    for graphs in (False, True):
        model = lora_model("cuda")
        view = ParameterView.trainable(model, scratch=scratch)
        loss = ClassificationLoss(model)
        evaluator = LocalEvaluator(
            loss,
            view,
            EvaluationOptions(
                cuda_graphs="on" if graphs else "off",
                joint_rows="off" if joint_rows is None else joint_rows,
            ),
        )
        source = as_source(examples(8), loss.collate)
        runs.append(values(evaluator, source, range(6)))
        assert (evaluator.plan.graphs > 0) == graphs
        assert ("graphs" in evaluator.plan.why_not) == (not graphs)
    for plain, captured in zip(*runs, strict=True):
        assert torch.allclose(plain, captured, atol=1e-6)


@pytest.mark.cuda
@ON_GPU
@pytest.mark.filterwarnings(
    "ignore::zo_adapt.errors.UnreadTensorWarning"
)  # the saved head's original
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("make", [MeZO, MeZOSVRG])
def test_a_run_is_the_same_with_graphs(make: Any, full: bool) -> None:
    losses = []
    for graphs in (False, True):
        model = lora_model("cuda")
        view = ParameterView.full(model) if full else ParameterView.trainable(model)
        result = minimize(
            ClassificationLoss(model),
            view,
            examples(48),
            make(),
            batch_size=16,
            max_steps=12,
            progress=False,
            evaluation=EvaluationOptions(cuda_graphs="on" if graphs else "off"),
        )
        losses.append(torch.tensor([record.value for record in result.history]))
    assert torch.allclose(*losses, atol=1e-4)


@pytest.mark.cuda
@ON_GPU
def test_what_cannot_be_captured_runs_without() -> None:
    model = lora_model("cuda")
    loss = ClassificationLoss(model)

    def objective(batch: Any) -> Tensor:
        found = loss(batch)
        return found if found.max().item() > -1 else found * 0  # waits for the GPU

    evaluator = LocalEvaluator(
        objective, ParameterView.trainable(model), EvaluationOptions(cuda_graphs="on")
    )
    source = as_source(examples(8), loss.collate)
    before = evaluator.view.hash()
    batch = Batch(source, range(8))
    answers = [
        evaluator.evaluate([Probe(Shift((Term(1, 0.1),)), batch)])[0].value for _ in range(5)
    ]
    assert len(set(answers)) == 1
    assert "capturing failed" in evaluator.plan.why_not["graphs"]
    assert evaluator.view.hash() == before


@pytest.mark.cuda
@ON_GPU
def test_graphs_of_many_shapes_keep_what_they_read() -> None:
    """Layers that lie outside the scratch get other places whenever another shape runs."""
    model = lora_model("cuda")
    wide = torch.nn.Embedding(120_000, 16).cuda()  # more than is kept in the scratch
    model.get_base_model().bert.embeddings.word_embeddings = wide
    loss = ClassificationLoss(model)
    loss.pad_to_multiple_of = 1
    view = ParameterView.full(model, noise="gaussian", scratch="layer")
    source = as_source(examples(40), loss.collate)
    plain = LocalEvaluator(loss, view, EvaluationOptions(cuda_graphs="off", joint_rows="off"))
    captured = LocalEvaluator(loss, view, EvaluationOptions(cuda_graphs="on", joint_rows="off"))
    for turn in range(8):
        for first in range(0, 40, 5):  # batches of many lengths, each again and again
            batch = Batch(source, range(first, first + 3 + turn % 2))
            probe = Probe(Shift((Term(turn, 0.02),)), batch)
            expected, found = (e.evaluate([probe])[0].value for e in (plain, captured))
            assert found == pytest.approx(expected, abs=1e-6)
            torch.cuda.empty_cache()
    assert "graphs" not in captured.plan.why_not
    assert captured.plan.graphs > 1


@pytest.mark.cuda
@ON_GPU
def test_a_graph_reads_no_value_that_was_made_before_it() -> None:
    """The fourth part of a batch is captured after others have had a weight made outside."""
    model = lora_model("cuda")
    loss = ClassificationLoss(model)
    table = model.get_base_model().bert.embeddings.word_embeddings

    def objective(batch: Any) -> Tensor:
        return loss(batch) + table.weight[3:4].sum()  # read while its module does not run

    objective.mean_over_rows = True  # type: ignore[attr-defined]

    view = ParameterView.full(model, scratch="layer")
    source = as_source(examples(40), loss.collate)
    loss.pad_to_multiple_of = 64
    plain = LocalEvaluator(
        objective, view, EvaluationOptions(cuda_graphs="off", joint_rows="off", micro_batch_size=4)
    )
    captured = LocalEvaluator(
        objective, view, EvaluationOptions(cuda_graphs="on", joint_rows="off", micro_batch_size=4)
    )
    for turn in range(4):
        probe = Probe(Shift((Term(turn, 0.3),)), Batch(source, range(40)))
        expected, found = (e.evaluate([probe])[0].value for e in (plain, captured))
        assert found == pytest.approx(expected, abs=1e-5)
    assert captured.plan.graphs == 1


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("scratch", ["copy", "layer"])
def test_points_of_one_step_are_all_captured_or_none(scratch: Any) -> None:
    model = lora_model("cuda")
    loss, ran = ClassificationLoss(model), []

    def objective(batch: Any) -> Tensor:
        ran.append(torch.cuda.is_current_stream_capturing())
        return loss(batch)

    view = ParameterView.trainable(model, scratch=scratch)
    evaluator = LocalEvaluator(
        objective, view, EvaluationOptions(cuda_graphs="on", joint_rows="off")
    )
    batch = Batch(as_source(examples(8), loss.collate), range(8))
    base = Probe(HERE, batch)  # at the weights themselves, where no layer is shifted
    probes = [base] + [Probe(Shift((Term(seed, 0.02),)), batch) for seed in range(CALLS_BEFORE + 3)]
    steps = []
    for _ in range(5):
        ran.clear()
        evaluator.evaluate(probes)
        steps.append(list(ran))
    without = [step for step in steps if False in step]
    assert without == [[False] * len(probes)] * len(without)
    assert steps[0] == without[0]
    assert steps[-1] == [], "replayed from the first point on"


def completions(count: int) -> list[dict[str, Any]]:
    """Of unlike lengths, each with a prompt of one to three tokens."""
    rows = token_rows(count, 14)
    return [
        {"input_ids": ids, "labels": [-100] * (1 + i % 3) + ids[1 + i % 3 :]}
        for i, ids in enumerate(ids for ids in rows if len(ids) > 4)
    ]


LOSSES: dict[str, Callable[[nn.Module], Any]] = {
    "example": CausalLMLoss,
    "sum": partial(CausalLMLoss, reduction="sum"),
    "token": partial(CausalLMLoss, reduction="token"),
    "verbalizer": partial(VerbalizerLoss, label_words=[7, 9]),
}


def data_of(loss: Any, labelled: bool = True) -> list[dict[str, Any]]:
    found = completions(16)
    if isinstance(loss, VerbalizerLoss):
        return [{"input_ids": one["input_ids"], "label": i % 2} for i, one in enumerate(found)]
    return found if labelled else [{"input_ids": one["input_ids"]} for one in found]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["example", "sum", "token"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_at_fixed_places_are_those_of_the_label_tokens(
    family: str, reduction: Any, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, "causal")
    loss = CausalLMLoss(model, reduction=reduction)
    examples = data_of(loss, labelled)
    with torch.no_grad():
        expected = loss(examples)
    monkeypatch.setattr(CausalLMLoss, "_is_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    batch = loss.collate(examples)
    assert (PLACES in batch) == labelled
    with torch.no_grad():
        assert torch.allclose(loss(batch), expected, rtol=1e-6)
        if labelled:
            short = {"input_ids": [5, 6], "labels": [5, 6]}
            assert torch.isfinite(loss(loss.collate([*examples[:2], short]))).all()
            with pytest.raises(DataError, match="no label token"):
                loss.collate([{"input_ids": [5, 6], "labels": [-100, -100]}])


def test_fixed_places_of_several_points(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "causal")
    loss = CausalLMLoss(model)
    monkeypatch.setattr(CausalLMLoss, "_is_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    view = ParameterView.full(model, noise="lowrank")
    batch = Batch(as_source(completions(16), loss.collate), range(6))
    probes = [Probe(Shift((Term(seed, 0.02),)), batch) for seed in range(4)]
    together = LocalEvaluator(loss, view)
    alone = LocalEvaluator(loss, view, EvaluationOptions(joint_rows="off"))
    pairs = zip(together.evaluate(probes), alone.evaluate(probes), strict=True)
    for one, other in pairs:
        assert np.allclose(one.per_example, other.per_example, rtol=1e-5)
    assert together.plan.candidates == 4


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("noise", ["gaussian", "lowrank"])
@pytest.mark.parametrize("name", LOSSES)
def test_captured_decoders(name: str, noise: str) -> None:
    runs = []
    for graphs in ("off", "auto"):
        model = tiny_model("llama", "causal").cuda()
        loss = LOSSES[name](model)
        view = ParameterView.full(model, noise=noise, scratch="layer")
        evaluator = LocalEvaluator(loss, view, EvaluationOptions(cuda_graphs=graphs))
        runs.append(values(evaluator, as_source(data_of(loss), loss.collate), range(6)))
        assert (evaluator.plan.graphs > 0) == (graphs == "auto"), evaluator.plan
    for plain, captured in zip(*runs, strict=True):
        assert torch.allclose(plain, captured, rtol=1e-5)
