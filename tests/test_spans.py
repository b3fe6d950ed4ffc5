"""Token classification and question answering: losses, entities and answers."""

from typing import Any

import datasets
import peft
import pytest
import torch
from tiny_models import tiny_config, tiny_model, token_rows
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from objectives import (
    ClassificationLoss,
    EntityF1,
    ExactMatch,
    QuestionAnsweringLoss,
    SpanExactMatch,
    SpanF1,
    TokenClassificationLoss,
)
from objectives.token_classification import entities
from zo_adapt import MeZO, ParameterView, SetObjective, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import (
    DataError,
    NonFiniteObjectiveError,
    ObjectiveError,
    OptionError,
    UndefinedMetricError,
)
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE

QUIET: dict[str, Any] = {"progress": False}
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tagger(family: str = "bert", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(family, num_labels=len(TAGS), **options)
    return AutoModelForTokenClassification.from_config(config).eval()


def reader(family: str = "bert") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForQuestionAnswering.from_config(tiny_config(family)).eval()


def tagged(rows: int = 8) -> list[dict[str, Any]]:
    return [
        {"input_ids": row, "labels": [-100, *((i + j) % len(TAGS) for j in range(len(row) - 1))]}
        for i, row in enumerate(token_rows(rows))
    ]


def asked(rows: int = 8) -> list[dict[str, Any]]:
    return [
        {"input_ids": row, "start_positions": 1, "end_positions": 1 + i % (len(row) - 1)}
        for i, row in enumerate(token_rows(rows))
    ]


# --- Tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2"])
def test_the_loss_of_tokens_is_the_models_own(family: str) -> None:
    model, data = tagger(family), tagged()
    alone = [
        model(input_ids=torch.tensor([one["input_ids"]]), labels=torch.tensor([one["labels"]])).loss
        for one in data
    ]
    loss = TokenClassificationLoss(model)
    assert torch.allclose(loss(data), torch.stack(alone), rtol=1e-4)
    own = model(**loss.collate(data)).loss
    by_token = TokenClassificationLoss(model, reduction="token")(data).mean()
    assert torch.allclose(by_token, own, rtol=1e-4)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1], "one label for every token"),
        ([0, 1, 5], "5 classes"),
        ([-100] * 3, "no label token"),
        (1, "one label for every token"),
    ],
)
def test_labels_that_are_not_those_of_tokens(labels: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        TokenClassificationLoss(tagger())([{"input_ids": [5, 6, 7], "labels": labels}])


@pytest.mark.parametrize("form", ["list", "table"])
@pytest.mark.parametrize("make", [TokenClassificationLoss, EntityF1])
def test_one_bad_label_of_all_tokens_is_found_at_the_start(make: Any, form: str) -> None:
    model, rows, calls = tagger(), tagged(16), []
    objective = make(model, **({"labels": TAGS} if make is EntityF1 else {}))
    model.register_forward_hook(lambda *_: calls.append(1))
    view = ParameterView.matching(model, "classifier")
    for bad in (len(TAGS), -1):
        rows[13]["labels"][-1] = bad
        data = rows if form == "list" else datasets.Dataset.from_list(rows)
        with pytest.raises(DataError, match="classes"):
            minimize(objective, view, data, MeZO(), batch_size=2, max_steps=1, **QUIET)
    rows[13]["labels"] = [-100] * len(rows[13]["labels"])
    with pytest.raises(DataError, match=r"\[13\] have no label token"):
        minimize(objective, view, rows, MeZO(), batch_size=2, max_steps=1, **QUIET)
    assert not calls
    rows[13] = tagged(16)[13]
    rows[13]["labels"][-1] = -100
    assert minimize(objective, view, rows, MeZO(), batch_size=8, max_steps=1, **QUIET).steps == 1


def test_a_classifier_of_texts_is_refused() -> None:
    with pytest.raises(DataError, match="AutoModelForTokenClassification"):
        TokenClassificationLoss(tiny_model("bert"))([{"input_ids": [5, 6], "labels": [0, 1]}])
    with pytest.raises(DataError, match="TokenClassificationLoss"):
        ClassificationLoss(tagger())([{"input_ids": [5, 6], "labels": 1}])


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-X I-X O", {("X", 0, 2)}),
        ("I-X I-X", {("X", 0, 2)}),
        ("B-X B-X", {("X", 0, 1), ("X", 1, 2)}),
        ("B-X I-Y", {("X", 0, 1), ("Y", 1, 2)}),
        ("O I-Y O", {("Y", 1, 2)}),
        ("S-X S-X", {("X", 0, 1), ("X", 1, 2)}),
        ("B-X E-X I-X", {("X", 0, 2), ("X", 2, 3)}),
        ("PER PER O LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags: str, expected: Any) -> None:
    assert entities(tags.split()) == expected


class Said(nn.Module):
    """Logits of the tags that are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, said: Tensor) -> Tensor:
        return nn.functional.one_hot(said, len(TAGS)).float() + self.shift


def test_entity_f1_counts_whole_entities_over_all_texts() -> None:
    f1 = EntityF1(Said(), labels=TAGS)
    meant = [[1, 2, 0, 3], [1, 2, 2, 0]]
    said = [[1, 2, 0, 3], [1, 2, 0, 0]]  # the second entity of a person is cut short
    rows = [{"said": s, "labels": m} for s, m in zip(said, meant, strict=True)]
    assert f1(rows) == pytest.approx(2 * 2 / (3 + 3))
    assert f1.score([f1.predict([row]) for row in rows]) == f1(rows)
    perfect = [{"said": m, "labels": m} for m in meant]
    assert f1(perfect) == 1.0
    with pytest.raises(UndefinedMetricError):
        f1([{"said": [0, 0], "labels": [0, 0]}])


def test_what_is_not_labelled_is_in_no_entity() -> None:
    f1 = EntityF1(Said(), labels=TAGS)
    row = {"said": [3, 1, 2, 4], "labels": [-100, 1, 2, -100]}
    assert f1([row]) == 1.0


def test_tags_come_from_the_configuration_or_the_caller() -> None:
    named = tagger(id2label=dict(enumerate(TAGS)))
    assert EntityF1(named).tags == TAGS
    with pytest.raises(OptionError, match="without 'O'"):
        EntityF1(tagger())
    with pytest.raises(OptionError, match="without 'O'"):
        EntityF1(tagger(), labels="O")


def test_logits_that_are_not_numbers_are_no_tags() -> None:
    model = Said()
    model.shift.data[:] = torch.nan
    with pytest.raises(NonFiniteObjectiveError):
        EntityF1(model, labels=TAGS)([{"said": [0, 1], "labels": [0, 1]}])


# --- Answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2"])
def test_the_loss_of_an_answer_is_the_models_own_on_the_text_alone(family: str) -> None:
    model, data = reader(family), asked()
    alone = [
        model(**{name: torch.tensor([value]) for name, value in one.items()}).loss for one in data
    ]
    assert torch.allclose(QuestionAnsweringLoss(model)(data), torch.stack(alone), rtol=1e-4)


@pytest.mark.parametrize("span", [(-1, 2), (2, 1), (0, 3), (3, 3)])
def test_a_span_outside_the_text_is_named(span: tuple[int, int]) -> None:
    row = {"input_ids": [5, 6, 7], "start_positions": span[0], "end_positions": span[1]}
    longer = {"input_ids": [5] * 9, "start_positions": 1, "end_positions": 8}
    for make in (QuestionAnsweringLoss, SpanF1, SpanExactMatch):
        with pytest.raises(DataError, match="the answer of example 0"):
            make(reader())([row, longer])


def test_positions_and_models_that_are_missing_are_named() -> None:
    with pytest.raises(DataError, match=r"of type torch.float32; give integers"):
        QuestionAnsweringLoss(reader())(
            [{"input_ids": [5, 6], "start_positions": 0.5, "end_positions": 1.0}]
        )
    with pytest.raises(DataError, match="start_positions"):
        QuestionAnsweringLoss(reader())([{"input_ids": [5, 6, 7]}])
    with pytest.raises(ObjectiveError, match="AutoModelForQuestionAnswering"):
        QuestionAnsweringLoss(tiny_model("bert"))(asked(1))


class Marks(nn.Module):
    """Marks the spans that are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, start: Tensor, end: Tensor) -> Any:
        tokens = input_ids.shape[1]
        return QuestionAnsweringModelOutput(
            start_logits=nn.functional.one_hot(start, tokens).float() + self.shift,
            end_logits=nn.functional.one_hot(end, tokens).float() + self.shift,
        )


def marked(said: tuple[int, int], meant: tuple[int, int], tokens: int = 10) -> dict[str, Any]:
    return {
        "input_ids": list(range(5, 5 + tokens)),
        "start": said[0],
        "end": said[1],
        "start_positions": meant[0],
        "end_positions": meant[1],
    }


def test_overlap_and_exact_match_of_spans() -> None:
    rows = [marked((2, 4), (2, 4)), marked((2, 4), (3, 6)), marked((0, 0), (3, 6))]
    assert SpanExactMatch(Marks())(rows).tolist() == [1.0, 0.0, 0.0]
    assert SpanF1(Marks())(rows).tolist() == pytest.approx([1.0, 2 * 2 / (3 + 4), 0.0])


def test_the_likeliest_span_begins_before_it_ends_and_is_not_too_long() -> None:
    loss, metric = QuestionAnsweringLoss(reader()), SpanF1(reader(), max_answer_length=3)
    data = asked()
    for row, (first, last) in zip(data, metric.spans(data), strict=True):
        with torch.no_grad():
            logits = loss.span_logits(loss.prepare([row]))
        tokens = len(row["input_ids"])
        best = max(
            (float(logits.start[0, a] + logits.end[0, b]), a, b)
            for a in range(tokens)
            for b in range(a, min(a + 3, tokens))
        )
        assert (first, last) == best[1:]


def test_behind_virtual_tokens_positions_are_those_of_the_text() -> None:
    config = peft.PromptTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=3)
    tuned = peft.get_peft_model(reader(), config).eval()
    loss = QuestionAnsweringLoss(tuned)
    batch = loss.prepare(asked())
    assert loss.span_logits(batch).start.shape == batch["input_ids"].shape
    assert torch.isfinite(loss(asked())).all()


# --- In a run ------------------------------------------------------------------------------------

METRICS = {
    "tokens": lambda: (TokenClassificationLoss(tagger()), tagged()),
    "exact": lambda: (ExactMatch(tagger()), tagged()),
    "entities": lambda: (EntityF1(tagger(), labels=TAGS), tagged()),
    "answers": lambda: (QuestionAnsweringLoss(reader()), asked()),
    "overlap": lambda: (SpanF1(reader()), asked()),
}


@pytest.mark.parametrize("name", METRICS)
def test_the_value_does_not_depend_on_micro_batches_nor_on_padding(name: str) -> None:
    objective, data = METRICS[name]()
    view = ParameterView.full(objective.model)
    batch = Batch(as_source(data, objective.collate), range(len(data)))
    values = [
        LocalEvaluator(objective, view, batch_size=size).evaluate([Probe(HERE, batch)])[0]
        for size in (None, 1, 3)
    ]
    assert values[1].value == pytest.approx(values[0].value, rel=1e-5)
    assert values[2].value == pytest.approx(values[0].value, rel=1e-5)


@pytest.mark.parametrize("name", ["tokens", "entities", "answers", "overlap"])
def test_a_run_improves_it_and_the_same_seed_gives_the_same(name: str) -> None:
    def run() -> tuple[float, float, list[float]]:
        objective, data = METRICS[name]()
        view = ParameterView.matching(objective.model, "classifier|qa_outputs")
        with torch.no_grad():
            before = torch.as_tensor(objective(data)).double().mean().item()
            result = minimize(
                objective, view, data, MeZO(displacement=0.5, num_directions=8), batch_size=8,
                max_steps=12, seed=1, **QUIET,
            )  # fmt: skip
            after = torch.as_tensor(objective(data)).double().mean().item()
        better = after > before if objective.maximize else after < before
        assert better, (before, after)
        return before, after, [record.value for record in result.history]

    assert run() == run()


def test_they_are_objectives_that_rise() -> None:
    for metric in (EntityF1(tagger(), labels=TAGS), SpanF1(reader()), SpanExactMatch(reader())):
        assert isinstance(metric, SetObjective)
        assert metric.maximize
        assert metric.step_like
