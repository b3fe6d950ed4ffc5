"""Values that were wrong in silence once: each with a sibling of its kind."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas
import peft
import pytest
import sklearn.metrics as reference
import torch
import transformers as hf
from tiny_models import MASK, PAD, VOCABULARY, tiny_config, tiny_model, token_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BartConfig,
    BartForSequenceClassification,
    BertLMHeadModel,
    EvalPrediction,
    GPT2ForSequenceClassification,
    MBartConfig,
    PreTrainedTokenizerFast,
    T5Config,
    Trainer,
    TrainingArguments,
)

from objectives import (
    F1,
    MRR,
    NDCG,
    ROCAUC,
    Accuracy,
    BiEncoder,
    CallableObjective,
    CausalLMLoss,
    ClassificationLoss,
    CrossEncoder,
    ExactMatch,
    FeatureScorer,
    GenerationReward,
    MatthewsCorrelation,
    MetricObjective,
    Seq2SeqLoss,
    VerbalizerLoss,
)
from zo_adapt import AskTell, MeZO, ParameterView, StopReason, minimize
from zo_adapt.data.examples import class_labels
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import DataError, NonFiniteObjectiveError, ObjectiveError, OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.serve.peft_server import PeftServer
from zo_adapt.serve.protocol import BASE, Writing
from zo_adapt.term import HERE

QUIET: dict[str, Any] = {"progress": False}
END = 2
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w9 {% generation %}{{ m['content'] }}"
    " </s> {% endgeneration %}{% else %}w8 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


def a_tokenizer(*, appends_end: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """One word a token: "w7" is 7."""
    words = {"<s>": 0, "<pad>": PAD, "</s>": END, "<mask>": MASK}
    words |= {f"w{i}": i for i in range(4, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w4"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if appends_end:
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
        )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


class Logits(nn.Module):
    """Its input, which is then the logits: no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        return input + self.shift


def table(logits: Any, labels: Any) -> dict[str, Tensor]:
    return {"input": torch.tensor(logits), "labels": torch.tensor(labels)}


def t5(**options: Any) -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END, dropout_rate=0.0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "max_position_embeddings": 40, "pad_token_id": PAD, "bos_token_id": 0,
    "eos_token_id": END, "decoder_start_token_id": END, "forced_eos_token_id": None,
    "init_std": 0.3,
}  # fmt: skip


def bart(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(BartConfig(**BART | options)).eval()


def mbart() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(MBartConfig(**BART)).eval()


WRITERS: dict[str, Callable[[], nn.Module]] = {"t5": t5, "bart": bart, "mbart": mbart}


def poisoned(model: nn.Module) -> nn.Module:
    """One word's logit is NaN, and every largest one with it."""
    model.get_output_embeddings().weight.data[5] = torch.nan  # type: ignore[operator, union-attr]
    return model


# --- 4: what is not a number has no order --------------------------------------------------------


def one_each(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("make", [lambda: tiny_model("llama", "causal"), t5])
def test_a_model_whose_logits_are_nan_earns_no_reward(make: Any, do_sample: bool) -> None:
    model = poisoned(make())
    reward = GenerationReward(model, a_tokenizer(), one_each, max_new_tokens=3, do_sample=do_sample)
    data = [{"prompt": text(row)} for row in token_rows(8)]
    result = minimize(
        reward, ParameterView.matching(model, "layers|block"), data, MeZO(1e-3), batch_size=4,
        max_steps=2, **QUIET,
    )  # fmt: skip
    assert result.stop_reason is StopReason.NON_FINITE


def test_nor_does_a_prediction_by_a_function_of_logits() -> None:
    metric = MetricObjective(
        Logits(),
        compute_metrics=lambda p: {"a": (p.predictions == p.label_ids).mean()},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        metric_for_best_model="a",
    )
    with pytest.raises(NonFiniteObjectiveError, match="NaN"):
        metric(table([[np.nan, 0.0], [1.0, 0.0]], [0, 0]))


# --- 13: a text's value is its own ---------------------------------------------------------------

VIRTUAL = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft's word to itself
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("kind", VIRTUAL)
def test_behind_virtual_tokens_a_prompt_is_answered_as_alone(kind: str, family: str) -> None:
    torch.manual_seed(0)
    options = {"word_embed_proj_dim": 16} if family == "opt" else {}  # peft knows one width alone
    tuned = peft.get_peft_model(tiny_model(family, "causal", **options), VIRTUAL[kind]()).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.5)
    reward = GenerationReward(tuned, a_tokenizer(), one_each, max_new_tokens=6)
    prompts = [{"prompt": text(row)} for row in token_rows(5)]
    together = reward.generate(prompts).ids
    assert together == [reward.generate([one]).ids[0] for one in prompts]
    assert len({tuple(ids) for ids in together}) > 1


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_nor_does_padding_on_the_left_change_a_loss(kind: str, family: str) -> None:
    torch.manual_seed(0)
    options = {"word_embed_proj_dim": 16} if family == "opt" else {}  # peft knows one width alone
    tuned = peft.get_peft_model(tiny_model(family, "causal", **options), VIRTUAL[kind]()).eval()
    rows = token_rows(5)
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    left = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(5, dtype=torch.long)}
    loss, words = CausalLMLoss(tuned), VerbalizerLoss(tuned, [7, 9])
    alone = [loss([{"input_ids": row}]) for row in rows]
    del left["labels"]
    assert torch.allclose(loss(left), torch.cat(alone), atol=1e-5)
    single = [words.logits([{"input_ids": row}]) for row in rows]
    assert torch.allclose(words.logits(left), torch.cat(single), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen2", "bert"])
@pytest.mark.parametrize("kind", VIRTUAL)
def test_nor_does_what_a_classifier_says_of_it(kind: str, family: str) -> None:
    torch.manual_seed(0)
    options = {"word_embed_proj_dim": 16} if family == "opt" else {}  # peft knows one width alone
    config = VIRTUAL[kind]()
    config.task_type = "SEQ_CLS"
    for labels in (3, 1):
        model = tiny_model(family, num_labels=labels, **options)
        tuned = peft.get_peft_model(model, config).eval()
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 0.5)
        if labels == 3:
            loss = ClassificationLoss(tuned)
            rows = [{"input_ids": row, "label": i % 3} for i, row in enumerate(token_rows(6))]
            alone = torch.cat([loss([row]) for row in rows])
            assert torch.allclose(loss(rows), alone, atol=1e-4)
            if family == "llama":
                view = ParameterView.trainable(tuned)
                minimize(
                    loss, view, rows, MeZO(displacement=0.1), batch_size=4, max_steps=1, **QUIET
                )
        else:
            scorer = CrossEncoder(tuned, a_tokenizer())
            query = {"query": "w5", "documents": [text(row) for row in token_rows(4)]}
            found = scorer.scores(scorer.collate([query | {"relevance": [0] * 4}]))
            one = query | {"documents": query["documents"][:1], "relevance": [0]}
            assert torch.allclose(found[:1], scorer.scores(scorer.collate([one])), atol=1e-4)


# --- 14: compute_metrics sees what Trainer shows it ----------------------------------------------


def of_first(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions[0]
    return {"share": float((np.asarray(logits).argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_a_tuple_of_outputs_is_the_one_that_trainer_makes(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = BartForSequenceClassification(BartConfig(**BART, num_labels=3)).eval()
    data = [{"input_ids": [*row, END], "labels": i % 3} for i, row in enumerate(token_rows(12))]
    seen: list[Any] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return of_first(prediction)

    args = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=12,
        disable_tqdm=True,
    )  # fmt: skip
    loss = ClassificationLoss(model)
    trainer = Trainer(model, args, compute_metrics=keep, data_collator=loss.collate)
    expected = trainer.evaluate(data)["eval_share"]
    metric = MetricObjective(model, compute_metrics=keep, metric_for_best_model="share")
    assert metric(data) == pytest.approx(expected)
    for one, other in zip(*seen, strict=True):
        assert one.shape == other.shape
        assert np.allclose(one, other, atol=1e-5)
    in_parts = metric.score([metric.predict(data[:5]), metric.predict(data[5:])])
    assert in_parts == pytest.approx(expected)


def test_predictions_that_do_not_fit_together_are_named() -> None:
    model = tiny_model("bert", output_attentions=True, attn_implementation="eager")
    metric = MetricObjective(
        model, compute_metrics=lambda _: {"share": 1.0}, metric_for_best_model="share"
    )
    rows = [{"input_ids": [5] * n, "labels": 0} for n in (4, 6)]
    parts = [metric.predict([row]) for row in rows]
    with pytest.raises(ObjectiveError, match="give preprocess_logits_for_metrics"):
        metric.score(parts)
    metric.preprocess = lambda outputs, _: outputs[0]
    assert metric.score([metric.predict([row]) for row in rows]) == 1.0


def test_a_model_that_returns_a_tuple_has_its_loss_left_out() -> None:
    class Tuple(Logits):
        def forward(self, input: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            return torch.tensor(9.0), input + self.shift, input * 2

    metric = MetricObjective(Tuple(), compute_metrics=of_first, metric_for_best_model="share")
    assert metric(table([[2.0, 0.0], [0.0, 3.0]], [0, 0])) == 0.5


def test_mappings_among_outputs_and_their_dtype_are_left_as_trainer_leaves_them() -> None:
    class Nested(Logits):
        def forward(self, input: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            return {
                "heads": {"first": input.half(), "second": [input]},
                "shift": self.shift + input,
            }

    def share(prediction: EvalPrediction) -> dict[str, float]:
        heads, shifted = prediction.predictions
        assert heads["first"].dtype == np.float16
        assert heads["second"][0].shape == shifted.shape == (4, 2)
        return {"share": float((heads["first"].argmax(-1) == prediction.label_ids).mean())}

    metric = MetricObjective(Nested(), compute_metrics=share, metric_for_best_model="share")
    batch = table([[2.0, 0.0], [0.0, 3.0]], [0, 0])
    assert metric.score([metric.predict(batch), metric.predict(batch)]) == 0.5
    batch["input"][1, 0] = torch.nan
    with pytest.raises(NonFiniteObjectiveError, match="are NaN"):
        metric(batch)


# --- 15, 17: labels are what the configuration says ----------------------------------------------

METRICS = [Accuracy, F1, MatthewsCorrelation, ROCAUC, ExactMatch]


@pytest.mark.parametrize("metric", METRICS)
def test_one_hot_labels_of_a_single_label_problem_are_classes(metric: Any) -> None:
    model = tiny_model("bert", num_labels=3, problem_type="single_label_classification")
    rows = token_rows(18)
    as_class = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(rows)]
    one_hot = [one | {"labels": np.eye(3)[one["labels"]].tolist()} for one in as_class]
    objective = metric(model)
    assert np.mean(objective(one_hot)) == pytest.approx(np.mean(objective(as_class)))
    with pytest.raises(DataError, match="shares of classes"):
        objective([{"input_ids": rows[0], "labels": [0.5, 0.5, 0.0]}])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("label", [-100, 2, -1])
def test_a_label_that_is_no_class_of_the_logits_is_named(metric: Any, label: int) -> None:
    batch = table([[2.0, 0.0], [0.0, 3.0], [0.0, 3.0]], [0, 1, label])
    with pytest.raises(DataError, match=r"0..1|leave such examples out"):
        metric(Logits())(batch)
    with pytest.raises(DataError, match=r"0..1|leave such examples out"):
        ClassificationLoss(Logits())(batch)


def test_an_ignored_label_is_not_answered_by_more_classes() -> None:
    loss = ClassificationLoss(tiny_model("bert", num_labels=2))
    with pytest.raises(DataError) as error:
        loss([{"input_ids": [5, 6], "labels": -100}, {"input_ids": [5], "labels": 1}])
    assert "num_labels" not in str(error.value)
    assert "leave such examples out" in str(error.value)
    with pytest.raises(DataError, match="num_labels=6"):
        loss([{"input_ids": [5, 6], "labels": 5}])


# --- 18: a text that goes on has no end ----------------------------------------------------------


def test_an_end_token_that_the_tokenizer_appends_is_left_out_of_what_is_continued() -> None:
    model, data = tiny_model("llama", "causal"), [{"prompt": text(row)} for row in token_rows(4)]
    plain, appending = a_tokenizer(), a_tokenizer(appends_end=True)
    assert appending(data[0]["prompt"])["input_ids"][-1] == END
    written = [
        GenerationReward(model, tokenizer, one_each, max_new_tokens=5).generate(data).ids
        for tokenizer in (plain, appending)
    ]
    assert written[0] == written[1]
    rows = [{"text": one["prompt"], "label": 0} for one in data]
    asked = [
        VerbalizerLoss(model, [7, 9], tokenizer=tokenizer, template="w8 {text} w9").logits(rows)
        for tokenizer in (plain, appending)
    ]
    assert torch.equal(*asked)


@pytest.mark.parametrize("after", ["</s> </s>", "</s> <s>"])  # as XLNet's tokenizer: sep, then cls
def test_all_end_tokens_that_a_tokenizer_appends_are_left_out(after: str) -> None:
    tokenizer = a_tokenizer(sep_token="</s>", cls_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {after}", special_tokens=[("</s>", END), ("<s>", 0)]
    )
    model = tiny_model("llama", "causal")
    reward = GenerationReward(model, tokenizer, one_each, max_new_tokens=2)
    assert reward.collate([{"prompt": "w5 w6"}]).input_ids.tolist() == [[5, 6]]
    assert reward.collate([{"prompt": "w5 </s>"}]).input_ids.tolist() == [[5, END]]
    pair = CausalLMLoss(model, tokenizer=tokenizer).texts.encoded(
        {"prompt": "w5", "completion": " w7"}
    )
    assert pair["input_ids"][:2] == [5, 7]
    assert pair["input_ids"].count(END) == 1
    assert pair["labels"][0] == -100


def test_an_end_token_stays_where_the_user_wrote_it_and_where_an_encoder_reads_it() -> None:
    tokenizer = a_tokenizer(appends_end=True)
    model = tiny_model("llama", "causal")
    reward = GenerationReward(model, tokenizer, one_each, max_new_tokens=2)
    assert reward.collate([{"prompt": "w5 </s>"}]).input_ids.tolist()[0][:2] == [5, END]
    read = GenerationReward(t5(), tokenizer, one_each, max_new_tokens=2)
    assert read.collate([{"prompt": "w5"}]).input_ids.tolist() == [[5, END]]


@pytest.mark.parametrize("prompt", ["w7", "w7 </s>", ""])
@pytest.mark.parametrize("completion", ["w9", "w9 </s>", " </s> w9", ""])
def test_a_completion_ends_once_whoever_puts_the_end_there(prompt: str, completion: str) -> None:
    model, example = tiny_model("llama", "causal"), {"prompt": prompt, "completion": completion}
    if prompt and completion:
        example["completion"] = f" {completion}"
    plain, appending = (
        CausalLMLoss(model, tokenizer=a_tokenizer(appends_end=appends)).texts.encoded(example)
        for appends in (False, True)
    )
    assert plain == appending
    if completion or "</s>" not in prompt:  # a text that has ended has no completion
        assert plain["labels"][-1] == END


def test_a_target_ends_as_a_completion_does() -> None:
    example = {"prompt": "w5 w6", "completion": "w7"}
    for appends in (False, True):
        loss = Seq2SeqLoss(t5(), tokenizer=a_tokenizer(appends_end=appends))
        assert loss.collate([example])["labels"].tolist() == [[7, END]]
    cut = Seq2SeqLoss(t5(), tokenizer=a_tokenizer(), max_length=1)
    assert cut.collate([example])["labels"].tolist() == [[7]]


# --- 19: a class that occurs nowhere -------------------------------------------------------------


@pytest.mark.parametrize("average", ["macro", "weighted", "micro"])
def test_an_absent_class_does_not_count_among_several_labels(average: Any) -> None:
    labels = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    logits = [[2.0 * y - 1.0 for y in row] for row in labels]
    assert F1(Logits(), average=average)(table(logits, labels)) == 1.0
    logits[0][2] = 1.0  # now it occurs, among the predictions
    expected = reference.f1_score(labels, np.array(logits) > 0, average=average, zero_division=0)
    found = F1(Logits(), average=average)(table(logits, labels))
    assert found == pytest.approx(expected)


def test_no_class_at_all_has_the_value_zero() -> None:
    assert F1(Logits())(table([[-1.0, -1.0]], [[0.0, 0.0]])) == 0.0


# --- 21: parts are weighted by their rows --------------------------------------------------------


def test_queries_of_a_mixture_weigh_the_same_in_parts_of_any_size() -> None:
    class Same(Logits):
        def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
            return features[:, 0] + self.shift

    model = Same()
    ndcg = NDCG(model)
    sums = CallableObjective(
        lambda batch: float(np.mean([one.sum() for one in batch.relevance])),
        collate=FeatureScorer(model).collate,
        mean_over_rows=True,
    )
    data = [{"features": torch.randn(3, 1), "relevance": [float(i), 1.0, 0.0]} for i in range(1, 6)]
    mixed = sums - ndcg
    view = ParameterView.full(model)
    batch = Batch(as_source(data, mixed.collate), range(5))

    def value(rows: int | None) -> float:
        evaluator = LocalEvaluator(mixed, view, batch_size=rows)
        return evaluator.evaluate([Probe(HERE, batch)])[0].value

    assert value(None) == pytest.approx(value(4)) == pytest.approx(value(1))


# --- 22: texts that are too long -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_scorers_cut_what_the_model_cannot_read(family: str) -> None:
    query = {"query": text([7] * 30), "documents": [text([9] * 50), "w5"], "relevance": [1, 0]}
    options = {"max_position_embeddings": 20}
    cross = CrossEncoder(tiny_model(family, num_labels=1, **options), a_tokenizer())
    # RoBERTa counts positions from the padding token's id on.
    assert cross.longest == (20 if family == "bert" else 20 - PAD - 1)
    assert cross.scores(cross.collate([query])).shape == (2,)
    encoder = BiEncoder(tiny_model(family, "masked", **options), a_tokenizer())
    assert encoder.collate([query]).inputs["input_ids"].shape[1] == encoder.longest


OF_MANY_TABLES: dict[str, tuple[dict[str, Any], int]] = {
    "ibert": ({"pad_token_id": PAD}, 20 - PAD - 1),
    "gptj": ({"rotary_dim": 4}, 20),
    "ctrl": ({"dff": 16}, 20),
}
"""Positions in a table of a class of its own, or of sines."""


@pytest.mark.parametrize("family", OF_MANY_TABLES)
@pytest.mark.parametrize("virtual", [0, 3])
def test_every_kind_of_table_has_an_end(family: str, virtual: int) -> None:
    options, positions = OF_MANY_TABLES[family]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, max_position_embeddings=20, **sizes, **options
    )
    model = AutoModel.from_config(config).eval()
    if virtual and family != "ibert":  # which takes no embeddings in place of tokens
        settings = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
        model, positions = peft.get_peft_model(model, settings).eval(), positions - virtual
    loss = ClassificationLoss(model)
    with pytest.raises(DataError, match=f"{positions + 1} tokens and the model reads {positions}"):
        loss.collate([{"input_ids": [5] * (positions + 1), "labels": 0}])
    loss.outputs(loss.collate([{"input_ids": [5] * positions, "labels": 0}]))


def test_a_decoder_may_have_a_table_of_its_own() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    limits = {"max_encoder_position_embeddings": 16, "max_decoder_position_embeddings": 12}
    config = AutoConfig.for_model(
        "led", vocab_size=VOCABULARY, attention_window=4, **sizes, **heads, **limits
    )
    loss = Seq2SeqLoss(AutoModelForSeq2SeqLM.from_config(config).eval(), tokenizer=a_tokenizer())
    with pytest.raises(DataError, match="13 tokens and the model reads 12"):
        loss([{"input_ids": [5, 6], "labels": [7] * 13}])
    with pytest.raises(DataError, match="17 tokens and the model reads 16"):
        loss([{"input_ids": [5] * 17, "labels": [7]}])
    assert loss([{"prompt": text([5] * 40), "completion": text([7] * 40)}]).shape == (1,)


def test_embeddings_of_texts_are_those_after_the_virtual_tokens() -> None:
    torch.manual_seed(0)
    settings = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    base = AutoModel.from_config(tiny_config("bert", max_position_embeddings=20))
    model = peft.get_peft_model(base, settings).eval()
    query = {"query": text([7] * 30), "documents": [text([9] * 50), "w5"], "relevance": [1, 0]}
    encoder = BiEncoder(model, a_tokenizer())
    batch = encoder.collate([query]).inputs
    hidden, mask = model(**batch).last_hidden_state[:, 3:], batch["attention_mask"].bool()
    of_rows = [one[kept] for one, kept in zip(hidden, mask, strict=True)]
    torch.testing.assert_close(encoder.embeddings(batch), torch.stack([r.mean(0) for r in of_rows]))
    encoder.pooling = "first"
    torch.testing.assert_close(encoder.embeddings(batch), hidden[:, 0])
    encoder.pooling = "last"
    torch.testing.assert_close(encoder.embeddings(batch), torch.stack([r[-1] for r in of_rows]))


@pytest.mark.parametrize("make", [ClassificationLoss, Accuracy])
def test_tokens_beyond_the_last_position_are_named(make: Any) -> None:
    objective = make(tiny_model("roberta", max_position_embeddings=20))
    with pytest.raises(DataError, match="19 tokens and the model reads 18"):
        objective([{"input_ids": [5] * 19, "labels": 0}])
    objective([{"input_ids": [5] * 18, "labels": 0}])


def test_a_decoders_limit_is_named_before_it_writes() -> None:
    with pytest.raises(OptionError, match=r"choose 1\.\.40"):
        GenerationReward(bart(), a_tokenizer(), one_each, max_new_tokens=41)
    GenerationReward(t5(), a_tokenizer(), one_each, max_new_tokens=1000)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_targets_beyond_the_decoders_last_position_are_named(family: str) -> None:
    loss = Seq2SeqLoss(WRITERS[family]())
    for objective in (loss, ExactMatch(loss)):
        with pytest.raises(DataError, match="41 tokens and the model reads 40"):
            objective([{"input_ids": [5, 6], "labels": [7] * 41}])
    loss([{"input_ids": [5, 6], "labels": [7] * 40}])


# --- 23: generate may return more than ids -------------------------------------------------------


@pytest.mark.parametrize("of_the_model", [False, True])
def test_generate_may_return_a_dictionary(of_the_model: bool) -> None:
    model, data = tiny_model("llama", "causal"), [{"prompt": text(r)} for r in token_rows(3)]
    expected = GenerationReward(model, a_tokenizer(), one_each, max_new_tokens=4).generate(data)
    more = {} if of_the_model else {"return_dict_in_generate": True}
    model.generation_config.return_dict_in_generate = of_the_model
    reward = GenerationReward(
        model, a_tokenizer(), one_each, max_new_tokens=4, generation_kwargs=more
    )
    assert reward.generate(data) == expected


@pytest.mark.parametrize("form", ["ids", "a mapping", "a tuple", "an object"])
def test_a_generate_of_ones_own_may_return_any_of_them(form: str) -> None:
    model, data = tiny_model("llama", "causal"), [{"prompt": text(r)} for r in token_rows(6)]
    expected = GenerationReward(model, a_tokenizer(), one_each, max_new_tokens=4).generate(data)
    forms: dict[str, Callable[[Tensor], Any]] = {
        "ids": lambda ids: ids,
        "a mapping": lambda ids: {"sequences": ids},
        "a tuple": lambda ids: (ids, None),
        "an object": lambda ids: SimpleNamespace(sequences=ids),
    }
    generate: Any = model.generate

    def own(**options: Any) -> Any:
        return forms[form](generate(**options).sequences)

    model.generate = own
    model.generation_config.return_dict_in_generate = True
    reward = GenerationReward(model, a_tokenizer(), one_each, max_new_tokens=4)
    assert reward.generate(data) == expected
    model.generate = lambda **_: "text"
    with pytest.raises(OptionError, match="generate returned str; it must return token ids"):
        reward.generate(data)


def test_a_model_behind_a_server_may_return_a_dictionary() -> None:
    texts, model = [[5, 6, 7], [8, 9]], tiny_model("llama", "causal")
    writing = Writing(4, (END,), temperature=0.0, top_p=1.0, top_k=0, stops=(), more={})
    expected = PeftServer(model).generate([BASE] * 2, texts, writing)
    model.generation_config.return_dict_in_generate = True
    assert PeftServer(model).generate([BASE] * 2, texts, writing) == expected


def test_a_prompt_has_one_completion() -> None:
    with pytest.raises(OptionError, match="num_return_sequences=2"):
        GenerationReward(
            tiny_model("llama", "causal"), a_tokenizer(), one_each,
            generation_kwargs={"num_return_sequences": 2},
        )  # fmt: skip


# --- 24: a list is a list ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        {0: 5.0, 1: 6.0}, {1.0, 2.0}, "12", b"12", ["1", "2"], [1j, 0.0], [[1.0], [2.0]],
        torch.ones(2).to_sparse(), torch.ones(2, device="meta"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_numbers_is_no_reward(returned: Any) -> None:
    reward = GenerationReward(
        tiny_model("llama", "causal"), a_tokenizer(), lambda completions, **_: returned,
        max_new_tokens=2,
    )  # fmt: skip
    with pytest.raises(ObjectiveError, match=r"return a list|not numbers"):
        reward([{"prompt": "w5"}, {"prompt": "w6"}])


@pytest.mark.parametrize(
    "returned", [(1.0, 2), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), [np.float32(1), True]]
)
def test_lists_of_other_libraries_are_rewards(returned: Any) -> None:
    reward = GenerationReward(
        tiny_model("llama", "causal"), a_tokenizer(), lambda completions, **_: returned,
        max_new_tokens=2,
    )  # fmt: skip
    assert reward([{"prompt": "w5"}, {"prompt": "w6"}])[0] == 1.0


@pytest.mark.parametrize("documents", ["w6", "w6 w7", {"a": "w6", "b": "w7"}, ["w6", None]])
def test_documents_are_a_list_of_texts(documents: Any) -> None:
    relevance = [1.0] * 2
    query = {"query": "w5", "documents": documents, "relevance": relevance}
    for scorer in (
        CrossEncoder(tiny_model("bert", num_labels=1), a_tokenizer()),
        BiEncoder(tiny_model("bert", "masked"), a_tokenizer()),
    ):
        with pytest.raises(DataError, match=r"give a (list|text)"):
            MRR(scorer)([query])


def test_a_text_that_is_missing_is_not_the_word_none() -> None:
    loss = VerbalizerLoss(
        tiny_model("gpt2", "causal"), [7, 9], tokenizer=a_tokenizer(), template="{text} w8"
    )
    with pytest.raises(DataError, match="'text' of an example is None"):
        loss.collate([{"text": None, "label": 0}])
    assert loss.collate([{"text": 7, "label": 0}])["input_ids"].shape == (1, 2)


# --- 25: what a model takes, and what it is ------------------------------------------------------


def heads() -> dict[str, Callable[[], Any]]:
    small = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    bart = hf.BartConfig(
        vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
        decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    return {
        "AutoModelForCausalLM": lambda: CausalLMLoss(tiny_model("llama")),
        "AutoModelForSeq2SeqLM": lambda: Seq2SeqLoss(hf.BartForSequenceClassification(bart)),
        "AutoModelForMaskedLM": lambda: VerbalizerLoss(tiny_model("bert"), [5, 6], mask_token_id=3),
        "VerbalizerLoss.*AutoModelForCausalLM": lambda: VerbalizerLoss(tiny_model("llama"), [5, 6]),
        "AutoModelForSeq2SeqLM$": lambda: Seq2SeqLoss(hf.BartForQuestionAnswering(bart)),
        "choices of an example": lambda: ClassificationLoss(
            hf.BertForMultipleChoice(hf.BertConfig(**small))
        ),
    }


@pytest.mark.parametrize("words", heads())
def test_a_head_that_says_something_else_is_named(words: str) -> None:
    with pytest.raises(OptionError, match=words):
        heads()[words]()


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_the_task_of_a_row_reaches_the_tuner() -> None:
    torch.manual_seed(0)
    poly = peft.PolyConfig(
        task_type="CAUSAL_LM", n_tasks=2, r=2, n_skills=2, n_splits=1, target_modules=["q_proj"]
    )
    prompts = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_tasks=2, num_virtual_tokens=3
    )
    for config in (poly, prompts):
        tuned = peft.get_peft_model(tiny_model("llama", "causal"), config).eval()
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 1.0)
        loss = CausalLMLoss(tuned)
        values = loss([{"input_ids": [5, 6, 7], "task_ids": task} for task in (0, 1)])
        assert values[0].item() != values[1].item()
        reward = GenerationReward(
            tuned, a_tokenizer(), one_each, max_new_tokens=8,
            generation_kwargs={"min_new_tokens": 8},
        )  # fmt: skip
        # Of two lengths, which virtual tokens take one after the other.
        prompts = [{"prompt": t, "task_ids": task} for t in ("w5 w6", "w5") for task in (0, 1)]
        written = reward.generate(prompts).ids
        assert written[0] != written[1]
        assert written == [reward.generate([prompt]).ids[0] for prompt in prompts]


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "bart": (lambda: CausalLMLoss(bart()), "Seq2SeqLoss"),
    "t5": (lambda: CausalLMLoss(t5()), "Seq2SeqLoss"),
    "masked": (lambda: CausalLMLoss(tiny_model("bert", "masked")), "VerbalizerLoss"),
    "looks ahead": (lambda: CausalLMLoss(BertLMHeadModel(tiny_config("bert"))), "is_decoder"),
    "no encoder": (lambda: Seq2SeqLoss(tiny_model("gpt2", "causal")), "CausalLMLoss"),
    "no mask": (lambda: VerbalizerLoss(tiny_model("bert", "masked"), [7, 9]), "mask_token_id"),
    "lora": (
        lambda: CausalLMLoss(peft.get_peft_model(t5(), peft.LoraConfig(target_modules=["q"], r=2))),
        "Seq2SeqLoss",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_fit_is_refused_by_name(name: str) -> None:
    make, words = MISFITS[name]
    with pytest.raises(OptionError, match=words):
        make()


def test_a_decoder_of_an_encoder_family_fits() -> None:
    model = BertLMHeadModel(tiny_config("bert", is_decoder=True)).eval()
    assert CausalLMLoss(model)([{"input_ids": [5, 6, 7]}]).shape == (1,)


def test_token_logits_are_not_those_of_a_text() -> None:
    model = AutoModelForTokenClassification.from_config(tiny_config("bert", num_labels=2)).eval()
    for make in (ClassificationLoss, Accuracy):
        with pytest.raises(DataError, match=r"TokenClassificationLoss|give one label"):
            make(model)([{"input_ids": [5, 6, 7], "labels": 1}])


# --- 26: the encoder-decoders --------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_the_loss_of_an_encoder_decoder_is_the_models_own(name: str) -> None:
    model = WRITERS[name]()
    loss = Seq2SeqLoss(model)
    sources, targets = token_rows(6), token_rows(6, 5, seed=1)
    data = [{"input_ids": s, "labels": t} for s, t in zip(sources, targets, strict=True)]
    with torch.no_grad():
        own = [
            float(model(input_ids=torch.tensor([s]), labels=torch.tensor([t])).loss)
            for s, t in zip(sources, targets, strict=True)
        ]
        batch = {n: v for n, v in loss.collate(data).items() if n != "decoder_input_ids"}
        mean = float(model(**batch).loss)
    assert loss(data).tolist() == pytest.approx(own, rel=1e-4)
    by_token = Seq2SeqLoss(model, reduction="token")(data).mean().item()
    assert by_token == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])  # mBART begins with the target's last token
def test_an_exact_match_is_what_greedy_decoding_writes(name: str) -> None:
    model = WRITERS[name]()
    sources = token_rows(8)
    data, right = [], []
    for index, row in enumerate(sources):
        written = model.generate(
            input_ids=torch.tensor([row]), max_new_tokens=4, do_sample=False, num_beams=1
        )[0, 1:].tolist()
        wrong = index % 2 == 1
        if wrong:
            written[-1] = written[-1] + 1 if written[-1] + 1 < VOCABULARY else 5
        data.append({"input_ids": row, "labels": written})
        right.append(0.0 if wrong else 1.0)
    assert ExactMatch(model)(data).tolist() == right
    soft = ExactMatch(model, softness=1.0)(data)
    assert (soft > 0).all()
    assert (soft < 1).all()


@pytest.mark.parametrize("name", WRITERS)
def test_an_encoder_decoder_answers_with_its_first_word(name: str) -> None:
    model = WRITERS[name]()
    rows = token_rows(4)
    words = VerbalizerLoss(model, [7, 9])
    found = words.logits([{"input_ids": row} for row in rows])
    start = model.config.decoder_start_token_id
    for row, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            whole = model(
                input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([[start]])
            ).logits[0, -1]
        assert torch.allclose(logits, whole[[7, 9]], atol=1e-5)


def test_an_encoder_decoder_learns() -> None:
    model = t5()
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], r=4)
    ).eval()
    data = [{"input_ids": row, "labels": [7, END]} for row in token_rows(8)]
    loss = Seq2SeqLoss(tuned)
    before = loss(data).mean().item()
    minimize(
        loss, ParameterView.trainable(tuned), data, MeZO(displacement=0.5, num_directions=4),
        batch_size=8, max_steps=60, **QUIET,
    )  # fmt: skip
    assert loss(data).mean().item() < before - 0.05


def test_text_of_sources_and_targets() -> None:
    loss = Seq2SeqLoss(t5(), tokenizer=a_tokenizer(appends_end=True))
    texts = [{"prompt": "w5 w6", "completion": "w7"}]
    assert torch.equal(loss(texts), loss([{"input_ids": [5, 6, END], "labels": [7, END]}]))
    with pytest.raises(OptionError, match="tokenizer"):
        Seq2SeqLoss(t5())(texts)


def test_two_kinds_of_labels_are_one_too_many() -> None:
    loss = ClassificationLoss(tiny_model("bert"))
    row = {"input_ids": [5, 6], "label": 0}
    assert torch.equal(loss([row | {"labels": 0}]), loss([row]))
    with pytest.raises(DataError, match=r"'label' and others under 'labels'"):
        loss([row | {"labels": 1}])
    ready = {"input_ids": torch.tensor([[5]]), "label": torch.tensor([0])}
    with pytest.raises(DataError, match="leave one of them out"):
        loss(ready | {"labels": torch.tensor([1])})


def test_a_batch_of_one_class_names_what_trainer_calls_it() -> None:
    with pytest.raises(ObjectiveError, match="dataloader_drop_last"):
        ROCAUC(Logits())(table([[2.0, 0.0]], [0]))


# --- 32: what is wrong with labels and tokens ----------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["good", "bad"], "'good'; map the names to integers"),
        ([1, None], "example 1 of the batch is None; leave it out"),
        ([None, None], "no labels"),
    ],
)
def test_labels_that_are_no_numbers_are_shown(labels: list[Any], words: str) -> None:
    data = [{"input_ids": [5, 6], "label": label} for label in labels]
    for make in (ClassificationLoss, Accuracy):
        with pytest.raises(DataError, match=words):
            make(tiny_model("bert"))(data)


@pytest.mark.parametrize("make", [CausalLMLoss, ExactMatch])
def test_tokens_outside_the_vocabulary_are_named(make: Any) -> None:
    objective = make(tiny_model("gpt2", "causal"))
    with pytest.raises(DataError, match=r"0\.\.63"):
        objective([{"input_ids": [5, 64, 7]}])
    with pytest.raises(DataError, match=r"of type torch.float32; give integers"):
        objective([{"input_ids": [5.5, 6.0]}])
    with pytest.raises(DataError, match=r"64 classes"):
        objective([{"input_ids": [5, 6, 7], "labels": [-100, 6, 70]}])


def test_a_classifier_without_a_padding_token_is_told_to_have_one() -> None:
    model = GPT2ForSequenceClassification(tiny_config("gpt2", pad_token_id=None)).eval()
    loss = ClassificationLoss(model)
    with pytest.raises(DataError, match="pad_token_id"):
        loss([{"input_ids": [5, 6], "label": 0}, {"input_ids": [5, 7], "label": 1}])


class Never(ClassificationLoss):
    """Is not to be called."""

    def __call__(self, batch: object) -> Tensor:
        raise AssertionError("evaluated before all labels were looked at")


@pytest.mark.parametrize("field", ["labels", "label", "label_ids"])
@pytest.mark.parametrize("bad", [-100, 2])
def test_one_bad_label_of_many_is_found_at_the_start(bad: int, field: str) -> None:
    model = tiny_model("bert")
    rows = token_rows(64)
    data = [{"input_ids": row, field: i % 2} for i, row in enumerate(rows)]
    data[50][field] = bad  # type: ignore[assignment]
    view = ParameterView.full(model)
    options = {"batch_size": 4, "max_steps": 1} | QUIET
    for objective in (Never(model), Never(model) - 0.5 * Accuracy(model), F1(model)):
        with pytest.raises(DataError, match=r"0\.\.1|leave such examples out"):
            minimize(objective, view, data, MeZO(1e-3), **options)


def test_labels_are_read_as_they_are_stored() -> None:
    decoded: list[int] = []

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        decoded.append(1)
        return {"x": batch["x"]}

    stored = datasets.Dataset.from_dict({"x": [1, 2, 3, 4], "label": [0, 1, 0, 1]})
    stored.set_transform(decode)
    assert class_labels(stored) == [0, 1, 0, 1]
    assert not decoded
    assert class_labels(stored.with_format(None).to_iterable_dataset()) is None


def test_columns_of_a_frame_are_labels_too() -> None:
    frame = pandas.DataFrame({"x": [1, 2, 3, 4], "label": [0, 1, 0, 1]})
    assert class_labels(frame) == [0, 1, 0, 1]


@pytest.mark.parametrize("values", ["12", b"12", ["1", "2"]])
def test_text_is_told_to_no_optimizer(values: Any) -> None:
    pair = MeZO(1e-3, perturbation_scale=1e-2, num_directions=1, one_sided=False)
    asker = AskTell(pair, np.zeros(2), max_steps=1)
    assert len(asker.ask()) == 2
    with pytest.raises(ObjectiveError):
        asker.tell(values)


# --- Texts as TRL's data sets hold them ----------------------------------------------------------


def labelled(loss: CausalLMLoss, example: dict[str, Any]) -> tuple[list[int], list[int]]:
    batch = loss.collate([example])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def lm(**options: Any) -> CausalLMLoss:
    model = tiny_model("llama", "causal")
    return CausalLMLoss(model, tokenizer=a_tokenizer(chat_template=CHAT), **options)


def test_every_token_of_a_text_is_a_label_and_so_is_its_end() -> None:
    assert labelled(lm(), {"text": "w5 w6"}) == ([5, 6, END], [5, 6, END])
    assert labelled(lm(), {"text": "w5 </s>"}) == ([5, END], [5, END])
    assert labelled(lm(max_length=2), {"text": "w5 w6 w7"}) == ([5, 6], [5, 6])


def test_of_a_prompt_and_its_completion_the_completion_is_learned() -> None:
    pair = {"prompt": "w5 w6 ", "completion": "w7", "id": 3}
    assert labelled(lm(), pair) == ([5, 6, 7, END], [-100, -100, 7, END])
    assert labelled(lm(completion_only=False), pair)[1] == [5, 6, 7, END]
    chat = {
        "prompt": [{"role": "user", "content": "w5"}],
        "completion": [{"role": "assistant", "content": "w7"}],
    }
    assert labelled(lm(), chat) == ([8, 5, 9, 7, END], [-100, -100, -100, 7, END])


def test_of_messages_every_token_is_learned_or_the_assistants() -> None:
    messages = {
        "messages": [
            {"role": "user", "content": "w5"},
            {"role": "assistant", "content": "w7"},
        ]
    }
    assert labelled(lm(), messages) == ([8, 5, 9, 7, END], [8, 5, 9, 7, END])
    only = labelled(lm(assistant_only=True), messages)[1]
    assert only[:3] == [-100] * 3
    assert only[3] == 7


def test_the_loss_of_text_is_that_of_its_tokens() -> None:
    loss = lm()
    tokens = {"input_ids": [5, 6, 7, END], "labels": [-100, -100, 7, END]}
    assert torch.equal(loss([{"prompt": "w5 w6 ", "completion": "w7"}]), loss([tokens]))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"prompt": "w5"}, "together"),
        ({"text": None}, "'text' of an example is None"),
        ({"messages": "w5"}, "list of messages"),
        ({"prompt": "w5", "completion": 7}, "'completion' of an example is 7"),
    ],
)
def test_text_that_cannot_be_encoded_is_named(example: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        lm()([example])


def test_text_without_a_tokenizer_or_a_template_is_named() -> None:
    model = tiny_model("llama", "causal")
    with pytest.raises(OptionError, match="tokenizer="):
        CausalLMLoss(model)([{"text": "w5"}])
    with pytest.raises(OptionError, match="chat_template"):
        CausalLMLoss(model, tokenizer=a_tokenizer())(
            [{"messages": [{"role": "user", "content": "w5"}]}]
        )
    silent = a_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}")
    with pytest.raises(OptionError, match="generation"):
        CausalLMLoss(model, tokenizer=silent, assistant_only=True)(
            [{"messages": [{"role": "user", "content": "w5"}]}]
        )
