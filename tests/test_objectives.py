"""The losses that run a model: equal to the model's own, exact in parts, indifferent to padding."""

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    MASK,
    PAD,
    VOCABULARY,
    tiny_model,
    token_rows,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
)

from objectives import (
    F1,
    Accuracy,
    CallableObjective,
    CausalLMLoss,
    ClassificationLoss,
    VerbalizerLoss,
)
from zo_adapt import Adam, ParameterView, SetObjective, Term, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import DataError, OptionError, ZOError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.model_state import EvaluationMode
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE

# peft reads an attribute of transformers by its former name
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
)
WORDS = [7, 30]


def examples(rows: int = 7, classes: int = 2, **options: Any) -> list[dict[str, Any]]:
    ids = token_rows(rows, **options)
    return [{"input_ids": row, "label": i % classes} for i, row in enumerate(ids)]


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    tensors = [torch.tensor(row) for row in rows]
    options = {"batch_first": True, "padding_side": side}
    ids = nn.utils.rnn.pad_sequence(tensors, padding_value=PAD, **options)
    masks = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], **options)
    return {"input_ids": ids, "attention_mask": masks}


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """A LoRA adapter whose B matrices are not zero."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return adapted.eval()


def dropout_model(family: str = "bert", head: str = "classification") -> nn.Module:
    return tiny_model(family, head).train()


def an_objective(kind: str, model: nn.Module | None = None) -> Any:
    if kind == "classification":
        return ClassificationLoss(model or tiny_model("bert"))
    model = model or tiny_model("gpt2", "causal")
    return CausalLMLoss(model) if kind == "causal" else VerbalizerLoss(model, WORDS)


KINDS = ("classification", "causal", "verbalizer")


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def batch_of(objective: Any, rows: int = 7) -> dict[str, Tensor]:
    batch = objective.collate(examples(rows))
    # the label of an example is no label of its tokens
    return without_labels(batch) if isinstance(objective, CausalLMLoss) else batch


# --- what all of them promise -------------------------------------------------------------------


def test_evaluation_mode_is_enforced_and_each_modules_own_mode_restored() -> None:
    model = dropout_model()
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    objective = ClassificationLoss(model)
    batch = batch_of(objective)
    first, second = objective(batch), objective(batch)
    assert torch.equal(first, second)
    assert torch.equal(first, ClassificationLoss(model.eval())(batch))
    assert any(before)
    model.train()
    model.bert.encoder.layer[0].eval()
    with pytest.raises(KeyError), objective.evaluating():
        assert not any(module.training for module in model.modules())
        objective(batch)
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_modules_that_come_later_are_put_into_evaluation_mode_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)))
    evaluating = EvaluationMode(model)
    with evaluating():
        assert not any(module.training for module in model.modules())
    model[1].append(nn.Dropout(0.5))  # a new one
    model[0] = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))  # another in its place
    with evaluating():
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_both_points_of_an_estimate_see_the_same_network_with_dropout_on() -> None:
    model = dropout_model()
    objective = ClassificationLoss(model)
    batch = Batch(as_source(examples(), objective.collate), range(7))
    evaluator = LocalEvaluator(objective, ParameterView.full(model))
    one, two = evaluator.evaluate([Probe(HERE, batch), Probe(HERE, batch)])
    assert one.value == two.value


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_parts_weighs_every_row_the_same(kind: str) -> None:
    objective = an_objective(kind)
    rows = [{"input_ids": row} for row in token_rows(7)] if kind == "causal" else examples(7)
    batch = Batch(as_source(rows, objective.collate), range(7))
    view = ParameterView.full(objective.model)
    whole, parts = (
        LocalEvaluator(objective, view, EvaluationOptions(micro_batch_size=size)).evaluate(
            [Probe(HERE, batch)]
        )[0]
        for size in (None, 3)
    )
    assert whole.per_example is not None
    assert len(whole.per_example) == 7
    # rows of unequal loss, so that a mean of the parts' means would be seen
    assert whole.per_example.std() > 0.05
    assert parts.value == pytest.approx(whole.value, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_a_model_in_half_precision_are_in_single(kind: str, dtype: torch.dtype) -> None:
    objective = an_objective(kind)
    objective.model.to(dtype)
    batch = batch_of(objective)
    losses = objective(batch)
    assert losses.dtype == torch.float32
    # finer than the model's own dtype can say
    assert not torch.equal(losses, losses.to(dtype).float())
    if kind == "classification":
        logits = objective.model(**without_labels(batch)).logits
        assert logits.dtype == dtype
        expected = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
        torch.testing.assert_close(losses, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_where_the_caller_wants_them(kind: str) -> None:
    objective = an_objective(kind)
    loss = objective(batch_of(objective)).mean()
    (gradient,) = torch.autograd.grad(loss, [objective.model.get_input_embeddings().weight])
    assert float(gradient.norm()) > 0
    with torch.no_grad():
        assert not objective(batch_of(objective)).requires_grad


def test_they_are_values_per_example_not_objectives_of_a_set() -> None:
    assert not any(isinstance(an_objective(kind), SetObjective) for kind in KINDS)


def test_an_objective_prints_as_the_call_that_makes_it() -> None:
    model = tiny_model("bert")
    named = "ClassificationLoss(model=<BertForSequenceClassification>)"
    assert repr(ClassificationLoss(model)) == named
    loss = CausalLMLoss(tiny_model("gpt2", "causal"), reduction="token")
    assert "reduction='token'" in repr(loss) and "0x" not in repr(loss)
    assert "softness=2.0" in repr(Accuracy(model, softness=2.0))
    assert "0x" not in repr(F1(model))

    class Own(SetObjective):
        def __init__(self, scale: float, weights: Tensor) -> None:
            self._scale, self.weights = scale, weights

        def predict(self, batch: Any, /) -> Any:
            return batch

        def score(self, predictions: list[Any], /) -> Any:
            return 0.0

    assert repr(Own(2.0, torch.ones(3))) == "Own(scale=2.0, weights=<Tensor>)"


def test_a_ready_batch_may_hold_more_than_the_model_takes() -> None:
    objective = an_objective("classification")
    batch = batch_of(objective)
    more = batch | {"idx": torch.arange(7), "text": ["a"] * 7}
    assert torch.equal(objective(more), objective(batch))


# --- classification -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_classification_is_the_models_own_loss(family: str) -> None:
    model = tiny_model(family, num_labels=3)
    objective = ClassificationLoss(model)
    batch = objective.collate(examples(classes=3))
    assert batch["attention_mask"].sum(1).unique().numel() > 1
    torch.testing.assert_close(objective(batch).mean(), model(**batch).loss)
    torch.testing.assert_close(objective.logits(batch), model(**without_labels(batch)).logits)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "vector"),
        ({"num_labels": 3}, "vector"),
        ({"num_labels": 1}, "float"),
        ({"num_labels": 1}, "integer"),
        ({"num_labels": 3, "problem_type": "regression"}, "vector"),
    ],
)
def test_the_problem_is_that_of_the_configuration_or_of_the_labels(
    options: dict[str, Any], labels: str
) -> None:
    model = tiny_model("bert", **options)
    makers = {"vector": lambda i: [1.0, 0.0, i % 2.0], "float": lambda i: i / 4, "integer": int}
    rows = [{"input_ids": row, "label": makers[labels](i)} for i, row in enumerate(token_rows(5))]
    objective = ClassificationLoss(model)
    batch = objective.collate(rows)
    losses = objective(batch)
    assert losses.shape == (5,)
    assert model.config.problem_type == options.get("problem_type")
    as_float = batch | {"labels": batch["labels"].float()}
    torch.testing.assert_close(losses.mean(), model(**as_float).loss)


def test_collate_pads_marks_and_leaves_out_text() -> None:
    batch = ClassificationLoss(tiny_model("bert")).collate(
        [
            {"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1], "text": "a", "label": 1},
            {"input_ids": torch.tensor([8]), "token_type_ids": [0], "text": "b", "label": 0},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


# --- causal language models ---------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", DECODERS)
def test_causal_loss_is_that_of_each_text_alone(family: str, side: str) -> None:
    model = tiny_model(family, "causal")
    rows = token_rows(5)
    losses = CausalLMLoss(model)(padded(rows, side))
    alone = [model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows]
    torch.testing.assert_close(losses, torch.stack(alone))


def test_only_label_tokens_count_and_each_reduction_weighs_them_as_it_says() -> None:
    model = tiny_model("gpt2", "causal")
    rows = token_rows(4)
    counts = torch.tensor([1, 2, 3, 2])
    labelled = [
        {"input_ids": row, "labels": [-100] * (len(row) - n) + row[-n:]}
        for row, n in zip(rows, counts.clamp(max=2).tolist(), strict=True)
    ]
    counts = counts.clamp(max=2)
    batch = CausalLMLoss(model).collate(labelled)
    assert (batch["labels"] == -100).any()
    example, token, total = (
        CausalLMLoss(model, reduction=name)(batch) for name in ("example", "token", "sum")
    )
    torch.testing.assert_close(total, example * counts)
    # Trainer's figure: the mean over the tokens of the batch
    torch.testing.assert_close(token.mean(), model(**batch).loss)
    assert not torch.isclose(example.mean(), token.mean())


def test_only_the_logits_that_a_label_needs_are_computed() -> None:
    model = tiny_model("llama", "causal")
    batch = padded(token_rows(3), "right")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1] = 9
    with shapes_of(model.lm_head) as shapes:
        CausalLMLoss(model)(batch | {"labels": labels})
    assert shapes == [(1, 3, VOCABULARY)]


# --- verbalizer ---------------------------------------------------------------------------------


class shapes_of:
    """Records the shapes of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.shapes = module, []

    def __enter__(self) -> list[tuple[int, ...]]:
        hook = lambda _, __, output: self.shapes.append(tuple(output.shape))  # noqa: E731
        self.handle = self.module.register_forward_hook(hook)
        return self.shapes

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def last_logits(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """The definition: the whole model on each text alone, the last position, the label words."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row])).logits[0, -1, WORDS] for row in rows])


def gemma() -> nn.Module:
    """Soft-capped logits, to a cap that is felt."""
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=PAD,
        initializer_range=0.2, final_logit_softcapping=0.5,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def cohere() -> nn.Module:
    """Scaled logits."""
    config = CohereConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, logit_scale=0.3, pad_token_id=PAD, initializer_range=0.2,
    )  # fmt: skip
    return CohereForCausalLM(config).eval()


class OwnHead(nn.Module):
    """A language model that names no output embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama", "causal")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids, attention_mask=attention_mask).logits


LANGUAGE_MODELS = {
    "gpt2": lambda: tiny_model("gpt2", "causal"),
    "opt": lambda: tiny_model("opt", "causal"),
    "llama": lambda: tiny_model("llama", "causal"),
    "soft-capped": gemma,
    "scaled": cohere,
    "lora": lambda: lora(tiny_model("llama", "causal"), target_modules=["q_proj", "v_proj"]),
    "lora on the head": lambda: lora(tiny_model("llama", "causal"), target_modules=["lm_head"]),
    "head to save": lambda: lora(
        tiny_model("llama", "causal"), target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "virtual tokens": lambda: peft.get_peft_model(
        tiny_model("gpt2", "causal"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ).eval(),
}


@pytest.fixture(params=LANGUAGE_MODELS)
def language_model(request: pytest.FixtureRequest) -> nn.Module:
    return LANGUAGE_MODELS[request.param]()


# peft says that it ignores the positions we give for left padding: it makes its own
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("side", ["right", "left"])
def test_label_word_logits_are_the_whole_models(
    language_model: nn.Module, side: str, request: pytest.FixtureRequest
) -> None:
    if side == "left" and "virtual tokens" in request.node.name:
        pytest.skip("peft itself puts the virtual tokens before the padding")
    rows = token_rows(5)
    logits = VerbalizerLoss(language_model, WORDS).logits(padded(rows, side))
    torch.testing.assert_close(logits, last_logits(language_model, rows), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_named_output_embedding_computes_them_all() -> None:
    model = OwnHead().eval()
    rows = token_rows(4)
    logits = VerbalizerLoss(model, WORDS).logits(padded(rows, "right"))
    torch.testing.assert_close(logits, last_logits(model.inner, rows))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "soft-capped", "lora"])
def test_only_the_label_words_logits_are_computed(name: str) -> None:
    model = LANGUAGE_MODELS[name]()
    with shapes_of(model.get_output_embeddings()) as shapes:
        VerbalizerLoss(model, WORDS).logits(padded(token_rows(5), "right"))
    assert shapes == [(5, 1, 2)]
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("scratch", ["copy", "layer"])
@pytest.mark.parametrize("family", DECODERS)
def test_label_words_are_read_where_a_view_is_shifted_to(family: str, scratch: str) -> None:
    """Also from a head that is tied to the embedding and never written, only stood in for."""
    model = tiny_model(family, "causal")
    rows = token_rows(4)
    objective = VerbalizerLoss(model, WORDS)
    before = objective.logits(padded(rows, "right"))
    view = ParameterView.full(model, scratch=scratch)
    with torch.no_grad(), view.shifted([Term(seed=3, coefficient=0.05)]):
        shifted = objective.logits(padded(rows, "right"))
        torch.testing.assert_close(shifted, last_logits(model, rows), rtol=1e-5, atol=1e-5)
    assert (shifted - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", ENCODERS)
def test_masked_language_models_answer_at_the_mask(family: str) -> None:
    model = tiny_model(family, "masked")
    rows = [[*row[:2], MASK, *row[2:]] for row in token_rows(5)]
    logits = VerbalizerLoss(model, WORDS, mask_token_id=MASK).logits(padded(rows, "right"))
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0, 2, WORDS] for row in rows]
    torch.testing.assert_close(logits, torch.stack(alone))


def test_the_verbalizer_is_the_cross_entropy_over_its_words_and_can_be_learned() -> None:
    model = lora(tiny_model("opt", "causal"), target_modules=["q_proj", "v_proj"])
    objective = VerbalizerLoss(model, WORDS)
    batch = objective.collate(examples(8))
    expected = F.cross_entropy(objective.logits(batch), batch["labels"], reduction="none")
    torch.testing.assert_close(objective(batch), expected)
    view = ParameterView.trainable(model)
    minimize(
        objective, view, examples(8), Adam(lr=3e-2), batch_size=8, max_steps=20, progress=False
    )
    assert objective(batch).mean() < 0.8 * expected.mean()


@pytest.fixture
def tokenizer() -> Iterator[PreTrainedTokenizerFast]:
    text = "<s> <pad> </s> <mask> <unk> Review : good bad film a Sentiment great terri ble"
    words = text.split()
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("terri", "isolated"), pre_tokenizers.Whitespace()]
    )
    yield PreTrainedTokenizerFast(
        tokenizer_object=built,
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=30,
    )


TEMPLATE = "Review: {text}\nSentiment:"


def test_a_template_is_filled_and_a_long_text_cut_but_never_the_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    objective = VerbalizerLoss(
        tiny_model("gpt2", "causal"),
        ["bad", "good"],
        tokenizer=tokenizer,
        template=TEMPLATE,
        max_length=9,
    )
    assert objective.label_ids == [8, 7]
    rows = [{"text": "a good film", "label": 1}, {"text": "bad " * 50, "label": 0}]
    batch = objective.collate(rows)
    short = tokenizer("Review: a good film\nSentiment:")["input_ids"]
    assert batch["input_ids"][0, : len(short)].tolist() == short
    assert batch["attention_mask"].sum(1).tolist() == [len(short), 9]
    assert batch["input_ids"][1, :3].tolist() == tokenizer("Review: bad")["input_ids"]
    assert batch["input_ids"][1, -2:].tolist() == tokenizer("Sentiment:")["input_ids"]
    assert batch["labels"].tolist() == [1, 0]
    torch.testing.assert_close(objective(rows), objective(batch))


def test_a_template_with_a_mask_is_answered_there(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("bert", "masked")
    template = "Review: {text} Sentiment: {mask} film"
    objective = VerbalizerLoss(model, ["bad", "good"], tokenizer=tokenizer, template=template)
    batch = objective.collate([{"text": "a film", "label": 1}])
    place = batch["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    assert 0 < place < batch["input_ids"].shape[1] - 1
    with torch.no_grad():
        whole = model(**without_labels(batch)).logits[:, place, [8, 7]]
    torch.testing.assert_close(objective.logits(batch), whole)


# --- callables ----------------------------------------------------------------------------------


def test_a_callable_with_a_model_is_evaluated_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    objective = CallableObjective(lambda x: model(x).square().sum(1), model=model)
    batch = Batch(as_source(torch.ones(5, 3)), range(5))
    view = ParameterView.full(model)
    one, two = LocalEvaluator(objective, view).evaluate([Probe(HERE, batch)] * 2)
    assert one.value == two.value
    assert model[1].training
    with pytest.raises(ZOError, match="dropout"):
        LocalEvaluator(CallableObjective(objective.function), view).evaluate([Probe(HERE, batch)])


def test_a_callable_brings_its_own_collate() -> None:
    x = torch.zeros(1)
    objective = CallableObjective(
        lambda batch: (x - batch).square(),
        collate=lambda rows: torch.tensor([len(r) for r in rows]),
    )
    batch = Batch(as_source(["a", "bbb"], objective.collate), range(2))
    (evaluation,) = LocalEvaluator(objective, ParameterView({"x": x})).evaluate(
        [Probe(HERE, batch)]
    )
    assert evaluation.value == 5.0


# --- bad input ----------------------------------------------------------------------------------


def classify(rows: Any, **options: Any) -> Tensor:
    return ClassificationLoss(tiny_model("bert", **options))(rows)


BAD_BATCHES = {
    "no examples": (lambda: classify([]), "at least one"),
    "not mappings": (lambda: classify([[1, 2]]), "example 0 is a list"),
    "unequal fields": (
        lambda: classify([{"input_ids": [5], "label": 0}, {"input_ids": [5]}]),
        r"\['input_ids'\]",
    ),
    "no tokens": (lambda: classify([{"input_ids": [], "label": 0}]), "example 0 .* no tokens"),
    "text alone": (lambda: classify([{"text": "a", "label": 0}]), "Tokenise"),
    "no labels": (lambda: classify([{"input_ids": [5]}]), "no labels"),
    "a label too high": (lambda: classify([{"input_ids": [5], "label": 2}]), r"0\.\.1"),
    "a label too low": (lambda: classify([{"input_ids": [5], "label": -100}]), "-100"),
    "labels for tokens": (lambda: classify([{"input_ids": [5, 6], "label": [0, 1]}]), r"\(1, 2\)"),
    "unequal shapes": (
        lambda: classify([{"x": torch.zeros(2, 2)}, {"x": torch.zeros(2, 3)}]),
        "only lists are padded",
    ),
    "no padding token": (
        lambda: ClassificationLoss(tiny_model("opt", pad_token_id=None)).collate(examples(2)),
        "pad_token_id",
    ),
    "no label token": (
        lambda: CausalLMLoss(tiny_model("gpt2", "causal"))(
            [{"input_ids": [5, 6]}, {"input_ids": [5]}]
        ),
        r"examples \[1\]",
    ),
    "a label for the text": (
        lambda: CausalLMLoss(tiny_model("gpt2", "causal"))(examples(2)),
        "one label per token",
    ),
    "a class without a word": (
        lambda: VerbalizerLoss(tiny_model("gpt2", "causal"), WORDS)(examples(3, classes=3)),
        r"0\.\.1",
    ),
    "two masks": (
        lambda: VerbalizerLoss(tiny_model("bert", "masked"), WORDS, mask_token_id=MASK)(
            [{"input_ids": [MASK, MASK], "label": 0}]
        ),
        r"\[2\] mask tokens",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_batch_that_cannot_be_evaluated_is_a_named_error(case: str) -> None:
    call, message = BAD_BATCHES[case]
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["good", "terrible"], {}, r"\['terri', 'ble'\]"),
        (["good", "unheard"], {}, r"<unk>"),
        (["good", "good"], {}, "its own"),
        (["good"], {}, "at least two"),
        (["good", "bad"], {"tokenizer": None, "template": None}, "tokenizer"),
        ([7, 8], {"tokenizer": None}, "tokenizer"),
        ([7, 640], {}, "640"),
        ([7, 8], {"template": "Review: {}"}, "named field"),
    ],
)
def test_label_words_and_templates_that_cannot_work_are_named(
    words: list[Any], options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {"tokenizer": tokenizer, "template": TEMPLATE} | options
    with pytest.raises(OptionError, match=message):
        VerbalizerLoss(tiny_model("gpt2", "causal"), words, **settings)


def test_a_template_that_does_not_fit_or_lacks_its_field_is_named(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("gpt2", "causal")
    options = {"tokenizer": tokenizer, "template": TEMPLATE}
    with pytest.raises(DataError, match="max_length=3"):
        VerbalizerLoss(model, [7, 8], max_length=3, **options).collate([{"text": "a"}])
    with pytest.raises(DataError, match="'text'"):
        VerbalizerLoss(model, [7, 8], **options).collate([{"sentence": "a"}])


def test_unknown_reductions_and_functions_are_named() -> None:
    with pytest.raises(OptionError, match="reduction='mean'"):
        CausalLMLoss(tiny_model("gpt2", "causal"), reduction="mean")
    with pytest.raises(OptionError, match="cannot be called"):
        CallableObjective(3)


def test_padding_to_a_multiple_changes_no_value() -> None:
    model = tiny_model("bert", num_labels=3).eval()
    examples = [
        {"input_ids": list(range(2, 2 + n)), "token_type_ids": [0] * n, "label": n % 2}
        for n in (3, 7, 9)
    ]
    loss = ClassificationLoss(model)
    expected = loss(loss.collate(examples))
    loss.pad_to_multiple_of = 8
    batch = loss.collate(examples)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, 16),
        "token_type_ids": (3, 16),
        "attention_mask": (3, 16),
        "labels": (3,),
    }
    assert batch["attention_mask"].sum(1).tolist() == [3, 7, 9]
    assert torch.allclose(loss(batch), expected, atol=1e-6)
    loss.pad_to_multiple_of = 1000  # no further than the model has positions
    assert loss.collate(examples)["input_ids"].shape[1] == model.config.max_position_embeddings


def test_labels_of_several_classes_are_not_padded() -> None:
    loss = ClassificationLoss(tiny_model("bert", num_labels=3))
    loss.pad_to_multiple_of = 8
    batch = loss.collate([{"input_ids": [2, 3, 4], "labels": [0.0, 1.0, 0.0]}] * 2)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].shape == (2, 3)
