"""Metrics that count right examples: softened near a tie, and exact match by teacher forcing."""

import math
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_models import DECODERS, VOCABULARY, tiny_config, tiny_model, token_rows
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, T5Config, T5ForConditionalGeneration

from objectives import (
    F1,
    Accuracy,
    CallableObjective,
    CausalLMLoss,
    ClassificationLoss,
    ExactMatch,
    VerbalizerLoss,
)
from objectives.causal_lm import LabelTokens
from zo_adapt import MeZO, MeZOSVRG, ParameterView, Shift, Term, diagnose, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import DataError, FlatObjectiveWarning, NonFiniteObjectiveError, OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Evaluation, Probe

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

COUNTING = pytest.mark.parametrize("metric", [Accuracy, ExactMatch])
QUIET: dict[str, Any] = {"progress": False}


class Table(nn.Module):
    """A model whose logits are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def table(logits: Any, labels: Any) -> dict[str, Tensor]:
    return {"x": torch.as_tensor(logits), "labels": torch.as_tensor(labels)}


def evaluate(objective: Any, data: Any, size: int | None = None, *terms: Term) -> Evaluation:
    """The value as the engine has it, in micro-batches, a metric negated as it is minimised."""
    source = as_source(data, objective.collate)
    view = ParameterView.full(objective.model)
    probe = Probe(Shift(terms), Batch(source, range(len(source))))
    return LocalEvaluator(objective, view, EvaluationOptions(micro_batch_size=size)).evaluate(
        [probe]
    )[0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- soft ---------------------------------------------------------------------------------------


@COUNTING
def test_the_formula(metric: Any) -> None:
    classes = table([[3.0, 1.0, 2.5], [0.0, 1.0, 4.0]], [0, 1])
    found = metric(Table(), softness=0.5)(classes)
    assert found == pytest.approx([sigmoid(0.5 / 0.5), sigmoid(-3.0 / 0.5)])
    one_output = table([[1.5], [1.5]], [1, 0])
    found = metric(Table(), softness=0.5)(one_output)
    assert found == pytest.approx([sigmoid(3.0), sigmoid(-3.0)])
    several = table([[1.0, -2.0, 0.5], [1.0, -2.0, 0.5]], [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    found = metric(Table(), softness=0.5)(several)
    assert found == pytest.approx([sigmoid(1.0), sigmoid(-4.0)]), "the least right label counts"


def test_with_two_classes_it_is_the_probability_of_the_label() -> None:
    logits = torch.randn(20, 2, dtype=torch.float64)
    labels = torch.arange(20) % 2
    expected = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    assert Accuracy(Table(), softness=1.0)(table(logits, labels)) == pytest.approx(expected.numpy())


@COUNTING
@settings(max_examples=30, deadline=None)
@given(
    whole=arrays(np.int64, (9, 3), elements=st.integers(-4, 4)),
    labels=arrays(np.int64, (9,), elements=st.integers(0, 2)),
)
def test_between_0_and_1_and_the_hard_metric_in_the_limit(
    metric: Any, whole: np.ndarray, labels: np.ndarray
) -> None:
    logits = whole + np.array([0.0, 0.1, 0.2])  # no ties: there it is 1/2 for every softness
    batch = table(logits, labels)
    hard = (logits.argmax(1) == labels).astype(float)
    soft = metric(Table(), softness=1.0)(batch)
    assert ((soft > 0) & (soft < 1)).all()
    assert ((soft > 0.5) == hard.astype(bool)).all()
    nearer = metric(Table(), softness=1e-2)(batch)
    assert (abs(nearer - hard) < abs(soft - hard)).all()
    assert metric(Table(), softness=1e-3)(batch) == pytest.approx(hard, abs=1e-12)
    assert np.mean(metric(Table())(batch)) == pytest.approx(hard.mean()), "hard by default"


@COUNTING
@pytest.mark.parametrize("size", [None, 1, 3, 7])
def test_the_value_is_that_of_the_whole_batch_however_it_is_cut(
    metric: Any, size: int | None
) -> None:
    data = table(torch.randn(17, 3), torch.arange(17) % 3)
    objective = metric(Table(), softness=0.3)
    expected, found = objective(data), evaluate(objective, data, size)
    assert found.per_example is not None
    assert (-found.per_example).tolist() == expected.tolist()
    assert found.value == -expected.mean()


@COUNTING
def test_it_moves_where_the_hard_one_stands_still(metric: Any) -> None:
    """16 examples, mu = 1e-3: a step-like reward and what makes it learnable."""
    model = tiny_model("bert")
    rows = [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(16))]

    def differences(softness: float | None) -> list[float]:
        objective = metric(model, softness=softness)
        pairs = [
            [evaluate(objective, rows, None, Term(k, mu)).value for mu in (1e-3, -1e-3)]
            for k in range(12)
        ]
        return [up - down for up, down in pairs]

    assert not any(differences(None)), "no example flips"
    soft = np.array(differences(1.0))
    assert (abs(soft) > 1e-6).all()
    # and it is a signal, not rounding: the same direction as the loss's
    cosine = np.corrcoef(soft, np.array(differences(2.0)))[0, 1]
    assert cosine > 0.99


def test_it_is_climbed_at_a_scale_at_which_the_hard_metric_is_flat() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 2
    x = torch.randn(96, 4, generator=generator)
    x[torch.arange(96), labels] += 2.0
    data = {"input": x, "labels": labels}
    optimizer = MeZO(displacement=1.0, perturbation_scale=1e-4)
    accuracies = []
    for softness in (None, 1.0):
        model = nn.Linear(4, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[-0.3, 0, 0, 0], [0, -0.3, 0, 0]]))
            model.bias.zero_()
        objective = Accuracy(model, softness=softness)
        options = {"batch_size": 16, "max_queries": 4_000, **QUIET}
        view = ParameterView.trainable(model)
        if softness is None:
            with pytest.warns(FlatObjectiveWarning, match=r"softness=\.\.\."):
                minimize(objective, view, data, optimizer, **options)
        else:
            minimize(objective, view, data, optimizer, **options)
        accuracies.append(Accuracy(model)(data))
    assert accuracies[0] < 0.5
    assert accuracies[1] > 0.85, accuracies


def test_diagnose_names_the_knob_where_pairs_are_equal() -> None:
    model = tiny_model("bert")
    rows = [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(32))]
    view = ParameterView.matching(model, "classifier")
    options: dict[str, Any] = {"batch_size": 8, "perturbation_scales": (1e-4, 1e-3)}
    hard = diagnose(Accuracy(model), view, rows, **options)
    assert hard.scales[-1].equal > 0.5
    assert "softness=" in hard.reasons["batch_size"]
    soft = diagnose(Accuracy(model, softness=1.0), view, rows, **options)
    assert soft.scales[-1].equal == 0.0
    assert "softness" not in str(soft)
    assert soft.noise.data > 0, "one value an example"


def test_a_prompted_classifier_can_be_softened() -> None:
    loss = VerbalizerLoss(tiny_model("gpt2", "causal"), [7, 30])
    rows = [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(9))]
    probabilities = loss.logits(rows).softmax(1).detach().double().numpy()
    expected = probabilities[np.arange(9), np.arange(9) % 2]
    assert Accuracy(loss, softness=1.0)(rows) == pytest.approx(expected, rel=1e-5)


def test_labels_of_tokens_can_be_softened() -> None:
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(tiny_config("bert", num_labels=3)).eval()
    rows = token_rows(4)
    labels = [[i % 3 for i, _ in enumerate(row)] for row in rows]
    labels[2][1] = -100
    examples = [{"input_ids": i, "labels": y} for i, y in zip(rows, labels, strict=True)]
    expected = []
    for row, wanted in zip(rows, labels, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].tolist()
        margins = [
            one[y] - max(value for c, value in enumerate(one) if c != y)
            for one, y in zip(logits, wanted, strict=True)
            if y != -100
        ]
        expected.append(sigmoid(min(margins) / 0.5))
    assert ExactMatch(model, softness=0.5)(examples) == pytest.approx(expected, rel=1e-4)


@COUNTING
@pytest.mark.parametrize("softness", [0.0, -1.0, math.nan, math.inf])
def test_a_softness_out_of_range(metric: Any, softness: float) -> None:
    with pytest.raises(OptionError, match=r"softness=.*choose a finite number > 0"):
        metric(Table(), softness=softness)


@COUNTING
@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_without_a_logit_is_named(metric: Any, label: int) -> None:
    with pytest.raises(DataError, match=f"{label}.*(model has 3 classes|no loss counts)"):
        metric(Table(), softness=1.0)(table(torch.zeros(2, 3), [0, label]))


@COUNTING
def test_soft_bad_logits_and_labels_are_named_as_hard_ones_are(metric: Any) -> None:
    objective = metric(Table(), softness=1.0)
    with pytest.raises(NonFiniteObjectiveError, match="1 of 4 outputs"):
        objective(table([[0.0, math.nan], [0.0, 1.0]], [0, 1]))
    with pytest.raises(DataError, match=r"labels of shape \(3,\) for logits of shape \(2, 2\)"):
        objective(table(torch.zeros(2, 2), torch.zeros(3)))


# --- exact match by teacher forcing -------------------------------------------------------------


def written(model: nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """What greedy decoding writes."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist()


def supervised(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def completions(model: nn.Module, rows: int = 8) -> tuple[list[dict[str, list[int]]], list[float]]:
    """Texts as greedy decoding writes them, some with one token changed, and which are right."""
    examples, right = [], []
    for i, prompt in enumerate(token_rows(rows)):
        wanted = written(model, prompt, 2 + i % 4)
        if i % 2:
            place = i % len(wanted)
            wanted[place] = (wanted[place] - 4) % (VOCABULARY - 5) + 5
        examples.append(supervised(prompt, wanted))
        right.append(float(written(model, prompt, len(wanted)) == wanted))
    return examples, right


@pytest.mark.parametrize("family", DECODERS)
def test_it_is_the_exact_match_of_greedy_generation(family: str) -> None:
    model = tiny_model(family, "causal", eos_token_id=None)
    examples, right = completions(model)
    assert 0 < sum(right) < len(right)
    for objective in (ExactMatch(model), ExactMatch(CausalLMLoss(model))):
        assert objective(examples).tolist() == right
        for size in (1, 3):
            found = evaluate(objective, examples, size).per_example
            assert found is not None
            assert (-found).tolist() == right


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("softness", [None, 1.0])
def test_on_a_gpu_it_is_what_it_is_on_a_cpu(softness: float | None) -> None:
    model = tiny_model("gpt2", "causal", eos_token_id=None)
    examples, _ = completions(model)
    expected = ExactMatch(model, softness=softness)(examples)
    found = ExactMatch(model.cuda(), softness=softness)(examples)
    assert found == pytest.approx(expected, rel=1e-3)


def test_padding_on_the_left_changes_nothing() -> None:
    model = tiny_model("llama", "causal", eos_token_id=None)
    examples, right = completions(model)
    width = max(len(one["input_ids"]) for one in examples)
    columns = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    batch = {
        name: torch.tensor(
            [
                [fill] * (width - len(one["input_ids"]))
                + one.get(name, [1] * len(one["input_ids"]))
                for one in examples
            ]
        )
        for name, fill in columns.items()
    }
    assert ExactMatch(model)(batch).tolist() == right


def test_an_adapter_is_seen_through() -> None:
    model = tiny_model("llama", "causal", eos_token_id=None)
    examples, right = completions(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert ExactMatch(adapted)(examples).tolist() == right


def test_softened_the_token_furthest_from_right_counts() -> None:
    model = tiny_model("gpt2", "causal", eos_token_id=None)
    examples, right = completions(model)
    expected = []
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        margins = []
        for place, label in enumerate(labels):
            if label != -100:
                one = logits[place - 1]
                others = torch.cat([one[:label], one[label + 1 :]])
                margins.append(float(one[label] - others.max()))
        expected.append(sigmoid(min(margins) / 0.7))
    soft = ExactMatch(model, softness=0.7)
    assert soft(examples) == pytest.approx(expected, rel=1e-4)
    assert ((soft(examples) > 0.5) == np.array(right, dtype=bool)).all()
    assert ExactMatch(model, softness=1e-6)(examples) == pytest.approx(right)
    for size in (1, 3):
        found = evaluate(soft, examples, size).per_example
        assert found is not None
        assert -found == pytest.approx(expected, rel=1e-4)


def test_only_the_logits_that_predict_a_label_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("gpt2", "causal")
    seen: list[LabelTokens] = []
    real = CausalLMLoss.label_tokens

    def kept(self: CausalLMLoss, batch: object) -> LabelTokens:
        seen.append(real(self, batch))
        return seen[-1]

    monkeypatch.setattr(CausalLMLoss, "label_tokens", kept)
    objective = ExactMatch(model, softness=1.0)
    left = objective.predict([supervised([5, 6, 7], [8, 9]), supervised([5], [6])])
    assert seen[0].logits.shape == (3, VOCABULARY)
    assert left.shape == (2,), "of a micro-batch one number an example is kept"


def test_an_exact_answer_is_learned_by_forward_passes() -> None:
    model = tiny_model("gpt2", "causal", eos_token_id=None)
    rows = [supervised([5 + i % 3, 20, 21], [30, 31]) for i in range(12)]
    assert ExactMatch(model)(rows).mean() == 0.0
    minimize(
        ExactMatch(model, softness=2.0), ParameterView.full(model), rows,
        MeZO(displacement=0.3), batch_size=12, max_queries=4_000, **QUIET,
    )  # fmt: skip
    assert ExactMatch(model)(rows).mean() == 1.0


def test_logits_that_are_not_numbers_are_named() -> None:
    model = tiny_model("gpt2", "causal")
    examples, _ = completions(model)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    for softness in (None, 1.0):
        with pytest.raises(NonFiniteObjectiveError, match="are NaN or infinite"):
            ExactMatch(model, softness=softness)(examples)


def test_a_completion_without_tokens_is_named() -> None:
    model = tiny_model("gpt2", "causal")
    rows = [supervised([5, 6], [7]), supervised([5, 6, 7], [])]
    with pytest.raises(DataError, match=r"examples \[1\] have no label token"):
        ExactMatch(model)(rows)


def test_an_encoder_decoder_is_not_taken_for_a_causal_model() -> None:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    objective = ExactMatch(T5ForConditionalGeneration(config))
    assert not isinstance(objective.classifier, CausalLMLoss)


def test_same_seed_same_run() -> None:
    values = []
    for _ in range(2):
        model = tiny_model("gpt2", "causal")
        rows = [supervised([5 + i % 3, 20, 21], [30 + i % 3]) for i in range(12)]
        result = minimize(
            ExactMatch(model, softness=1.0), ParameterView.full(model), rows, MeZO(), batch_size=4,
            max_steps=4, evaluation=EvaluationOptions(micro_batch_size=3), **QUIET,
        )  # fmt: skip
        values.append([record.value for record in result.history])
    assert values[0] == values[1]
    assert len(set(values[0])) == 4


@COUNTING
@pytest.mark.parametrize(("options", "rows"), [({}, 32), ({"softness": 1.0}, 4)])
def test_the_default_optimizer_asks_a_hard_count_on_enough_rows(
    metric: Any, options: dict[str, Any], rows: int
) -> None:
    sizes = []

    class Counted(metric):  # type: ignore[misc]
        def predict(self, batch: Any) -> Any:
            sizes.append(len(batch["labels"]))
            return super().predict(batch)

    objective = Counted(Table(), **options)
    data = table(torch.randn(64, 2), torch.arange(64) % 2)
    view = ParameterView.full(objective.model)
    minimize(
        objective,
        view,
        data,
        MeZO(),
        batch_size=64,
        max_steps=1,
        evaluation=EvaluationOptions(joint_rows="off"),
        **QUIET,
    )
    assert set(sizes[2:]) == {rows}  # the first calls are looks before the first step, at two rows


# --- the perturbation of a count ----------------------------------------------------------------


def perturbation_for(objective: Any, optimizer: Any) -> float:
    """mu in a run of one step."""
    data = table(torch.randn(8, 3), torch.arange(8) % 3)
    view = ParameterView.full(Table())
    minimize(objective, view, data, optimizer, batch_size=8, max_steps=1, progress=False)
    return float(optimizer.perturbation_scale)


@pytest.mark.parametrize("make", [MeZO, MeZOSVRG])
def test_what_changes_in_jumps_is_perturbed_further(make: Any) -> None:
    smooth = perturbation_for(Accuracy(Table(), softness=1.0), make())
    assert perturbation_for(ClassificationLoss(Table()), make()) == smooth
    for counting in (
        Accuracy(Table()),
        ExactMatch(Table()),
        F1(Table()),
        2.0 * Accuracy(Table()),
        CallableObjective(lambda batch: 0.0, maximize=True, step_like=True),
    ):
        assert perturbation_for(counting, make()) == pytest.approx(10 * smooth)
    # One smooth part shows the way to the others, too.
    mixed = 0.5 * ClassificationLoss(Table()) - 0.5 * Accuracy(Table())
    assert perturbation_for(mixed, make()) == smooth
    assert perturbation_for(Accuracy(Table()), make(perturbation_scale=0.02)) == 0.02


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_exact_matches_that_are_all_zero_are_evaluated_together_all_the_same(family: str) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(family, "causal"), lora).eval()
    metric = ExactMatch(model)
    rows = [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in token_rows(4)]
    batch = Batch(as_source(rows, metric.collate), range(4))
    probes = [Probe(Shift((Term(k, 0.01),)), batch) for k in range(4)]
    values = []
    for joint_rows, together in (("auto", 4), ("off", 1)):
        options = EvaluationOptions(joint_rows=joint_rows)  # type: ignore[arg-type]
        evaluator = LocalEvaluator(metric, ParameterView.trainable(model), options)
        values.append([found.value for found in evaluator.evaluate(probes)])
        assert evaluator.plan.candidates == together, evaluator.plan.why_not
    assert values[0] == values[1] == [0.0] * 4
