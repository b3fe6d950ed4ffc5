"""Rewards of generated text: padding, seeds, TRL's signature, and every bad input by its name."""

import asyncio
import functools
import logging.handlers
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiny_models import DECODERS, PAD, VOCABULARY, tiny_model, token_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from objectives import CausalLMLoss, GenerationReward
from zo_adapt import MeZO, MeZOSVRG, ParameterView, SetObjective, StopReason, Term, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import DataError, NonFiniteObjectiveError, ObjectiveError, OptionError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.term import HERE, Shift

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

BOS, END = 0, 2
CHAT = (
    "{% for m in messages %}{{ m['content'] }} w6 {% endfor %}"
    "{% if add_generation_prompt %}w4{% endif %}"
)


def a_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """One word a token: "w7" is 7."""
    words = {"<s>": BOS, "<pad>": PAD, "</s>": END}
    words |= {f"w{i}": i for i in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "</s>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def prompts(rows: int = 5, **more: list[Any]) -> list[dict[str, Any]]:
    texts = [text(row) for row in token_rows(rows)]
    return [
        {"prompt": prompt} | {name: column[i] for name, column in more.items()}
        for i, prompt in enumerate(texts)
    ]


def mean_id(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) / len(ids) for ids in completion_ids]


def a_reward(
    functions: Any = mean_id, model: nn.Module | None = None, **options: Any
) -> GenerationReward:
    model = tiny_model("llama", "causal") if model is None else model
    tokenizer = options.pop("tokenizer", None) or a_tokenizer()
    return GenerationReward(model, tokenizer, functions, **{"max_new_tokens": 6} | options)


class Recorder:
    """A reward that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        self.calls.append(
            {"prompts": prompts, "completions": completions, "ids": completion_ids} | columns
        )
        return mean_id(completion_ids or [])

    def by_prompt(self, call: int) -> dict[str, str]:
        made = self.calls[call]
        return dict(zip(made["prompts"], made["completions"], strict=True))


# --- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_is_written_as_each_prompt_alone(family: str) -> None:
    reward = a_reward(model=tiny_model(family, "causal"))
    together = reward.generate(prompts())
    alone = [reward.generate([prompt]).ids[0] for prompt in prompts()]
    assert together.ids == alone
    assert len({tuple(ids) for ids in alone}) > 2
    batch = reward.collate(prompts())
    assert batch.attention_mask[:, -1].all()
    assert (batch.attention_mask.sum(1) < batch.input_ids.shape[1]).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_the_tokenizers_side_nor_its_lack_of_a_padding_token_matters(side: str) -> None:
    expected = a_reward().generate(prompts())
    assert a_reward(tokenizer=a_tokenizer(padding_side=side)).generate(prompts()) == expected
    model = tiny_model("llama", "causal", pad_token_id=None)
    without = a_reward(model=model, tokenizer=a_tokenizer(pad_token=None))
    assert without.collate(prompts()).input_ids[0, 0] == END
    assert without.generate(prompts()).ids == a_reward(model=model).generate(prompts()).ids


def test_completions_end_with_the_token_that_ends_them_and_may_be_empty() -> None:
    model = tiny_model("llama", "causal")
    first = a_reward(model=model).generate(prompts(1)).ids[0]
    model.generation_config.eos_token_id = [first[0], first[3]]
    recorder = Recorder()
    reward = a_reward(recorder, model)
    reward(prompts(2))  # the other goes on
    assert recorder.calls[0]["ids"][0] == first[:1]
    assert len(recorder.calls[0]["ids"][1]) > 1
    model.generation_config.eos_token_id = END
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[END] = 1.0
        model.model.norm.weight.zero_()  # all logits equal: the first token, which is special
    empty = a_reward(recorder, model, generation_kwargs={"suppress_tokens": [BOS, PAD]})
    empty(prompts(2))
    assert recorder.calls[1]["completions"] == ["", ""]
    assert recorder.calls[1]["ids"] == [[END], [END]]


def test_stop_strings_end_a_text_alone_as_among_others() -> None:
    plain = a_reward().generate(prompts(3)).ids
    stop = f"w{plain[0][2]}"
    assert plain[0].index(plain[0][2]) == 2
    assert all(plain[0][2] not in ids for ids in plain[1:]), "the others go on"
    tokenizer = a_tokenizer()
    tokenizer.add_tokens("abcdef")  # transformers looks at how this text goes on with each token
    for stops in (stop, [stop, "never"]):
        reward = a_reward(tokenizer=tokenizer, generation_kwargs={"stop_strings": stops})
        written = reward.generate(prompts(3))
        assert written.ids == [plain[0][:3], *plain[1:]]
        assert written.texts[0].endswith(stop)
        assert reward.generate(prompts(1)).ids == written.ids[:1]


def test_stop_strings_need_a_tokenizer_that_transformers_can_read() -> None:
    class Own:
        eos_token_id, pad_token_id, bos_token_id, model_max_length = END, PAD, BOS, 1000

        def __init__(self) -> None:
            self.inner = a_tokenizer()

        def __call__(self, *given: Any, **options: Any) -> dict[str, Any]:
            return dict(self.inner(*given, **options))

        def decode(self, *given: Any, **options: Any) -> Any:
            return self.inner.decode(*given, **options)

        def batch_decode(self, *given: Any, **options: Any) -> Any:
            return self.inner.batch_decode(*given, **options)

    assert a_reward(tokenizer=Own()).generate(prompts(2)) == a_reward().generate(prompts(2))
    reward = a_reward(tokenizer=Own(), generation_kwargs={"stop_strings": "w7"})
    with pytest.raises(OptionError, match="vocabulary of a tokenizer"):
        reward.generate(prompts(2))


def test_an_encoder_decoder_writes_from_its_start_token() -> None:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(config).eval()
    written = a_reward(model=t5).generate(prompts(2)).ids
    plain = t5.generate(input_ids=torch.tensor(token_rows(1)), max_new_tokens=6, do_sample=False)
    assert written[0] == plain[0, 1 : 1 + len(written[0])].tolist()


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft's word to itself
def test_prompt_tuning_writes_no_part_of_the_prompt() -> None:
    tuned = peft.get_peft_model(
        tiny_model("llama", "causal"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    reward = a_reward(model=tuned)
    of_one_length = [{"prompt": text(row[:3])} for row in token_rows(3)]
    together = reward.generate(of_one_length).ids
    assert together == [reward.generate([one]).ids[0] for one in of_one_length]
    assert all(1 <= len(ids) <= 6 for ids in together)


def test_messages_go_through_the_chat_template_and_come_back_as_messages() -> None:
    recorder = Recorder()
    reward = a_reward(recorder, tokenizer=a_tokenizer(chat_template=CHAT))
    chat = [{"role": "user", "content": "w9 w8"}]
    batch = reward.collate([{"prompt": chat}, {"prompt": "w9 w8 w6 w4"}])
    assert batch.input_ids[0].tolist() == batch.input_ids[1].tolist() == [9, 8, 6, 4]
    reward(batch)
    call = recorder.calls[0]
    assert call["prompts"] == [chat, "w9 w8 w6 w4"]
    assert call["completions"][0] == [{"role": "assistant", "content": call["completions"][1]}]
    begun = [*chat, {"role": "assistant", "content": "w5"}]
    assert reward.collate([{"prompt": begun}]).input_ids[0].tolist() == [9, 8, 6, 5]


def test_every_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = a_tokenizer()
    calls: list[str] = []
    real = PreTrainedTokenizerFast.__call__

    def counted(self: Any, prompt: str, **options: Any) -> Any:
        calls.append(prompt)
        return real(self, prompt, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    reward = a_reward(tokenizer=tokenizer)
    view = ParameterView.matching(reward.model, "norm")
    options = {"max_steps": 3, "progress": False, "evaluation": EvaluationOptions(2)}
    minimize(reward, view, prompts(4), MeZO(lr=1e-3), batch_size=4, **options)  # type: ignore[arg-type]
    assert sorted(calls) == sorted(example["prompt"] for example in prompts(4))


def test_the_longest_prompt_that_fits_is_taken() -> None:
    reward = a_reward(model=tiny_model("gpt2", "causal"))
    assert len(reward.generate([{"prompt": text([5] * 35)}]).ids[0]) <= 6
    with pytest.raises(DataError, match="36 tokens"):
        reward([{"prompt": text([5] * 36)}])


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
def test_same_seed_same_rewards_and_the_global_generators_are_untouched(do_sample: bool) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    reward = a_reward(do_sample=do_sample)
    first = reward(prompts())
    torch.testing.assert_close(torch.get_rng_state(), before[0], rtol=0, atol=0)
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    torch.manual_seed(99)
    assert (reward(prompts()) == first).all()
    assert (a_reward(do_sample=do_sample)(prompts()) == first).all()
    other = a_reward(do_sample=do_sample, seed=1)(prompts())
    assert (other == first).all() == (not do_sample)


def test_the_generators_are_put_back_when_generation_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reward = a_reward(do_sample=True)

    def fails(**_: Any) -> None:
        torch.rand(3)
        raise KeyError("generation")

    monkeypatch.setattr(reward.model, "generate", fails)
    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="generation"):
        reward(prompts())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_both_points_draw_the_same_numbers_and_so_does_another_order(
    micro_batch_size: int | None,
) -> None:
    recorder = Recorder()
    reward = a_reward(recorder, do_sample=True, temperature=1.5)
    batch = Batch(as_source(prompts(4), reward.collate), range(4))
    evaluator = LocalEvaluator(
        reward,
        ParameterView.full(reward.model),
        EvaluationOptions(micro_batch_size=micro_batch_size),
    )
    tiny = [Probe(Shift((Term(7, sign * 1e-9),)), batch) for sign in (1.0, -1.0)]
    plus, minus = evaluator.evaluate(tiny)
    assert plus == plus._replace(value=minus.value)
    assert np.array_equal(plus.per_example, minus.per_example)
    parts = len(recorder.calls) // 2
    for part in range(parts):
        assert recorder.by_prompt(part) == recorder.by_prompt(part + parts)
    other = Batch(as_source(prompts(4), reward.collate), [2, 0, 3, 1])
    evaluator.evaluate([Probe(HERE, other)])
    first, later = ({}, {})
    for part in range(parts):
        first |= recorder.by_prompt(part)
        later |= recorder.by_prompt(2 * parts + part)
    assert first == later


def test_where_one_prompt_is_repeated_a_column_tells_the_batches_apart() -> None:
    reward = a_reward(do_sample=True, temperature=1.5)
    same = [{"prompt": "w5 w6", "id": i, "more": (np.array([i]), object())} for i in range(4)]
    first, second = same[:2], same[2:]
    assert reward.generate(first).ids != reward.generate(second).ids
    assert reward.generate(first) == reward.generate([{**example} for example in first])
    bare = [{"prompt": "w5 w6"}] * 2
    assert reward.generate(bare) == reward.generate(bare), "nothing tells the batches apart"


def test_dropout_is_off_while_it_writes_and_each_modules_mode_restored() -> None:
    model = tiny_model("gpt2", "causal")
    expected = a_reward(model=model).generate(prompts())
    model.train()
    assert model.config.resid_pdrop > 0
    assert a_reward(model=model).generate(prompts()) == expected
    assert all(module.training for module in model.modules())


def test_a_models_own_sampling_is_not_taken_for_the_users() -> None:
    model = tiny_model("llama", "causal")
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=2, top_p=0.5)
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("transformers").addHandler(said)
    try:
        assert a_reward(model=model).generate(prompts()) == a_reward().generate(prompts())
        drawn = a_reward(model=model, do_sample=True).generate(prompts())
    finally:
        logging.getLogger("transformers").removeHandler(said)
    assert drawn == a_reward(do_sample=True).generate(prompts())
    assert [record.getMessage() for record in said.buffer] == []


def test_temperature_top_p_and_top_k_shape_the_draw() -> None:
    greedy = a_reward().generate(prompts())
    for option in ({"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-6}):
        assert a_reward(do_sample=True, **option).generate(prompts()) == greedy
    assert a_reward(do_sample=True).generate(prompts()) != greedy
    flat = a_reward(do_sample=True, temperature=1e6, max_new_tokens=30)
    # the default limit of transformers, 50 tokens, would be seen among 64
    assert len({token for ids in flat.generate(prompts(20)).ids for token in ids}) > 58


# --- the rewards --------------------------------------------------------------------------------


def test_weights_columns_and_values_per_example() -> None:
    recorder = Recorder()

    def closeness(completions: list[str], target: list[int]) -> list[float]:
        return [-float(t) for t in target]  # takes no **columns: is given what it names

    examples = prompts(4, target=[3, 1, 2, 5], note=["a", "b", "c", "d"])
    reward = a_reward([recorder, closeness], reward_weights=[2.0, 0.5])
    values = reward(examples)
    assert values.shape == (4,)
    expected = 2.0 * np.array(mean_id(recorder.calls[0]["ids"])) - [1.5, 0.5, 1.0, 2.5]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert recorder.calls[0]["target"] == [3, 1, 2, 5]
    assert recorder.calls[0]["note"] == ["a", "b", "c", "d"]
    assert not {"prompt", "completion_ids"} & recorder.calls[0].keys()
    np.testing.assert_allclose(a_reward([recorder, closeness])(examples), 0.5 * expected + [
        -2.25, -0.75, -1.5, -3.75
    ])  # fmt: skip


def test_none_leaves_a_function_out_and_an_example_that_all_leave_out_is_skipped() -> None:
    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0, None, None, 4.0]

    def others(completions: list[str], **_: Any) -> list[float | None]:
        return [None, 2.0, None, 8.0]

    values = a_reward([some, others], reward_weights=[1.0, 0.5])(prompts(4))
    np.testing.assert_allclose(values, [1, 1, 10 / 3, 8])
    assert a_reward(lambda prompts, **_: [None] * len(prompts))(prompts(2)).tolist() == [0, 0]


def scored_only(
    completion_ids: list[list[int]], counts: list[bool], **_: Any
) -> list[float | None]:
    return [
        value if one else None for value, one in zip(mean_id(completion_ids), counts, strict=True)
    ]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 4])
def test_skipped_examples_change_neither_the_value_nor_the_estimate(
    micro_batch_size: int | None,
) -> None:
    """Half of them skipped, and one micro-batch of them all: as if they were not there."""
    counts = [True, False, True, True, False, False]
    examples = prompts(6, counts=counts)
    alone = [example for example in examples if example["counts"]]

    def histories(data: list[dict[str, Any]], size: int | None) -> Any:
        reward = a_reward(scored_only)
        return minimize(
            reward, ParameterView.full(reward.model), data,
            MeZO(lr=1e-4, perturbation_scale=0.05), batch_size=len(data), max_steps=4,
            evaluation=EvaluationOptions(size), progress=False,
        ).history  # fmt: skip

    found, expected = histories(examples, micro_batch_size), histories(alone, None)
    assert any(record.projected_gradient for record in expected), "the test has no power"
    for one, other in zip(found, expected, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-12)
        assert one.projected_gradient == pytest.approx(other.projected_gradient, rel=1e-9)


def test_a_column_that_a_function_reads_and_the_data_lack_is_named() -> None:
    def reads(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(answer)) for answer in columns["answer"]]

    async def waits(completions: list[str], **columns: Any) -> list[float]:
        return reads(completions, **columns)

    for function, name in ((reads, "reads"), (waits, "waits")):
        message = f"'{name}' raised KeyError: 'answer'.*have \\['question'\\] beside the prompt"
        with pytest.raises(DataError, match=message) as caught:
            a_reward([mean_id, function])(prompts(2, question=["w5", "w6"]))
        assert isinstance(caught.value.__cause__, KeyError)

    def own_table(completions: list[str], answer: list[str]) -> list[float]:
        return [{"a": 1.0}[one] for one in answer] + [{0: 1.0}[1]]

    with pytest.raises(KeyError, match="1"):
        a_reward(own_table)(prompts(1, answer=["a"]))


def test_async_rewards_wait_together_and_keep_their_loop() -> None:
    loops: list[Any] = []
    meeting: list[asyncio.Barrier] = []

    async def slow(completion_ids: list[list[int]], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        if not meeting:
            meeting.append(asyncio.Barrier(2))
        async with asyncio.timeout(5):
            await meeting[0].wait()  # one after the other they would never meet
        return mean_id(completion_ids)

    reward = a_reward([slow, mean_id, functools.partial(slow, extra=1)])
    plain = a_reward()(prompts())
    np.testing.assert_allclose(reward(prompts()), 3 * plain)

    async def notebook() -> np.ndarray:
        return reward(prompts())  # called where a loop runs already

    np.testing.assert_allclose(asyncio.run(notebook()), 3 * plain)
    assert len(loops) == 4
    assert len(set(map(id, loops))) == 1

    async def fails(**_: Any) -> list[float]:
        raise ArithmeticError("async")

    with pytest.raises(ArithmeticError, match="async"):
        a_reward([mean_id, fails])(prompts())

    def sync_fails(**_: Any) -> list[float]:
        raise ArithmeticError("sync")

    with pytest.raises(ArithmeticError, match="sync"):
        a_reward([fails, sync_fails])(prompts())


def test_a_function_that_changes_its_lists_changes_nothing() -> None:
    def greedy(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        prompts.clear()
        completions.reverse()
        return [1.0] * 3

    recorder = Recorder()
    reward = a_reward([greedy, recorder])
    batch = reward.collate(prompts(3))
    reward(batch)
    reward(batch)
    assert recorder.calls[0] == recorder.calls[1]
    assert recorder.calls[0]["prompts"] == [example["prompt"] for example in prompts(3)]


# --- bad input ----------------------------------------------------------------------------------


def generation_forbidden(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    def forbidden(**_: Any) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr(model, "generate", forbidden)
    return model


def needs_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (prompts(2), r"'needs_answer' needs the column 'answer'.*\[\]"),
        ([{"question": "w5"}], r"no prompt under 'prompt', only \['question'\]"),
        ([{"prompt": "w5", "answer": 1}, {"prompt": "w5"}], "example 1 has the fields"),
        (["w5"], "example 0 is a str"),
        ([], "no examples"),
        ([{"prompt": "", "answer": ""}], "has no tokens"),
        ([{"prompt": 5, "answer": ""}], "a prompt is 5"),
        ([{"prompt": [], "answer": ""}], r"a prompt is \[\]"),
        (
            [{"prompt": text([5] * 50), "answer": ""}],
            "has 50 tokens.*max_new_tokens=6.* 55 positions of the model's 40",
        ),
        ([{"prompt": "w5", "answer": "", "completions": ""}], "'completions' is an argument"),
    ],
)
def test_bad_examples_are_named_before_anything_is_generated(
    examples: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = generation_forbidden(tiny_model("llama", "causal"), monkeypatch)
    with pytest.raises(DataError, match=message):
        a_reward([mean_id, needs_answer], model)(examples)


def returning(value: Any) -> Callable[..., Any]:
    def rigged(**_: Any) -> Any:
        return value

    return rigged


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0, 2.0], ObjectiveError, "'rigged' returned 2 rewards for 3 completions"),
        ([1.0] * 4, ObjectiveError, "'rigged' returned 4 rewards for 3 completions"),
        (0.5, ObjectiveError, "'rigged' returned float; return a list"),
        (None, ObjectiveError, "'rigged' returned NoneType"),
        (["a", "b", "c"], ObjectiveError, "'rigged' returned .*'a'.*not numbers"),
        ([1.0, float("nan"), 2.0], NonFiniteObjectiveError, "'rigged' returned nan for example 1"),
        ([1.0, 2.0, float("inf")], NonFiniteObjectiveError, "'rigged' returned inf for example 2"),
    ],
)
def test_what_a_reward_must_not_return(
    returned: Any, error: type[ObjectiveError], message: str
) -> None:
    with pytest.raises(error, match=message):
        a_reward([mean_id, returning(returned)])(prompts(3))


def by_position(prompts: list[str], /, completions: list[str], **_: Any) -> list[float]:
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ([], {}, r"reward_funcs=\[\]"),
        ("a-model", {}, "reward_funcs='a-model'"),
        ([mean_id], {"reward_weights": [1.0, 2.0]}, "2 reward_weights for 1 reward functions"),
        ([mean_id], {"reward_weights": [float("nan")]}, "choose finite"),
        ([mean_id, by_position], {}, r"'by_position' takes \['prompts'\] by position only"),
        (mean_id, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (mean_id, {"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
        (mean_id, {"do_sample": True, "top_p": 0.0}, "top_p=0.0"),
        (mean_id, {"do_sample": True, "top_k": -1}, "top_k=-1"),
        (mean_id, {"seed": -1}, "seed=-1"),
        (mean_id, {"model": nn.Linear(1, 1)}, r"Linear has no generate\(\)"),
    ],
)
def test_bad_options(functions: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        a_reward(functions, **options)


def test_messages_without_a_template_and_several_texts_a_prompt() -> None:
    with pytest.raises(OptionError, match="no chat_template"):
        a_reward()([{"prompt": [{"role": "user", "content": "w5"}]}])
    several = {"num_beams": 2, "num_return_sequences": 2}
    with pytest.raises(OptionError, match="num_return_sequences=2"):
        a_reward(generation_kwargs=several)(prompts(3))


# --- in the loop --------------------------------------------------------------------------------


def raises_at(call: int, error: Callable[[], BaseException]) -> Callable[..., list[float]]:
    calls: list[None] = []

    def rigged(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(None)
        if len(calls) == call:
            raise error()
        return mean_id(completion_ids)

    return rigged


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [3, 4])  # the first two are looks before the first step
def test_a_reward_that_raises_inside_a_probe_leaves_the_weights_as_they_were(
    call: int, error: type[BaseException]
) -> None:
    reward = a_reward(raises_at(call, error), tiny_model("llama", "causal").train())
    before = {name: value.clone() for name, value in reward.model.state_dict().items()}
    view = ParameterView.full(reward.model)
    with pytest.raises(error):
        minimize(reward, view, prompts(4), MeZO(), batch_size=4, max_steps=1, progress=False)
    assert all(torch.equal(before[name], v) for name, v in reward.model.state_dict().items())
    assert reward.model.training


def test_nan_stops_the_run_with_the_weights_of_the_last_good_step() -> None:
    reward = a_reward(returning([1.0, float("nan")]))
    view = ParameterView.full(reward.model)
    options = {"batch_size": 2, "max_steps": 3, "progress": False}
    result = minimize(reward, view, prompts(4), MeZO(), **options)
    assert result.stop_reason is StopReason.NON_FINITE
    assert "'rigged' returned nan" in result.message


@pytest.mark.parametrize(
    ("do_sample", "displacement", "steps"), [(False, 1.0, 40), (True, 2.0, 120)]
)
def test_minimize_raises_the_reward_and_counts_one_query_a_text(
    do_sample: bool, displacement: float, steps: int
) -> None:
    def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(i < VOCABULARY // 2 for i in ids) / len(ids) for ids in completion_ids]

    config = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["down_proj"], layers_to_transform=[1]
    )
    model = peft.get_peft_model(tiny_model("llama", "causal"), config)
    reward = a_reward(low, model, do_sample=do_sample, temperature=0.5)
    before = reward(prompts(16)).mean()
    result = minimize(
        reward,
        ParameterView.trainable(model),
        prompts(16),
        MeZO(
            displacement=displacement,
            perturbation_scale=displacement / 5,
            num_directions=1,
            one_sided=False,
        ),
        batch_size=16,
        max_steps=steps,
        progress=False,
    )
    after = reward(prompts(16)).mean()
    assert result.queries == steps * 2 * 16
    assert after > before + 0.1, (before, after)


def test_it_is_one_objective_among_others() -> None:
    reward = a_reward()
    assert reward.maximize
    assert isinstance(reward, SetObjective), "what is skipped is known of the whole batch alone"
    examples = [{"prompt": text(row), "input_ids": row} for row in token_rows(8)]
    mixed = CausalLMLoss(reward.model) - 0.01 * reward
    batch = mixed.collate(examples)
    loss = CausalLMLoss(reward.model)([{"input_ids": row} for row in token_rows(8)])
    expected = loss.detach().double().numpy() - 0.01 * reward(examples)
    np.testing.assert_allclose(mixed(batch).detach().numpy(), expected, rtol=1e-6)
    view = ParameterView.matching(reward.model, "norm")
    result = minimize(mixed, view, examples, MeZOSVRG(), batch_size=4, max_steps=2, progress=False)
    assert result.steps == 2


@pytest.mark.parametrize("name", ["eos_token_id", "max_new_tokens", "do_sample", "foo"])
def test_generation_options_that_cannot_be_are_named(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        GenerationReward(
            tiny_model("gpt2", "causal"), a_tokenizer(), mean_id, generation_kwargs={name: 1}
        )
