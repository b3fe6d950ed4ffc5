"""All candidates of a step written by one generate: to the token what is written one at a time."""

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import peft
import pytest
import torch
from test_generation import CHAT, END, a_reward, a_tokenizer, prompts, text
from tiny_models import PAD, VOCABULARY, tiny_model, token_rows
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from objectives import GenerationReward
from objectives._generator import Generator
from objectives._shared_text import SharedText
from zo_adapt import MeZO, OneSided, ParameterView, Term, TwoSided, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.evaluation.joint.joining import Groups
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.term import HERE, Shift

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft sees GPT-2's layers by itself
]

_T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": END,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_position_embeddings": 40, "init_std": 0.2,
    "decoder_start_token_id": END, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 0,
    "forced_eos_token_id": None,
}  # fmt: skip
_QWEN = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 40,
    "initializer_range": 0.2, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: tiny_model("gpt2", "causal"),
    "opt": lambda: tiny_model("opt", "causal"),
    "llama": lambda: tiny_model("llama", "causal"),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_QWEN)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART)),
}


def lora(family: str, **options: Any) -> nn.Module:
    """A model of a family with a LoRA adapter on every linear layer, both factors at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MODELS[family]()
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, peft.LoraConfig(**config.to_dict() | options)).eval()


def told_apart(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number that differs where one token differs."""
    return [sum(token * 0.61**place for place, token in enumerate(ids)) for ids in completion_ids]


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def reward_of(model: nn.Module, functions: Any = told_apart, **options: Any) -> GenerationReward:
    return a_reward(functions, model, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows each generate has had; what the checks at the start ask for is left out."""
    rows: list[int] = []
    real = Generator.__call__

    def counted(self: Any, ids: Any, *args: Any) -> Any:
        rows.append(len(ids))
        return real(self, ids, *args)

    monkeypatch.setattr(Generator, "__call__", counted)
    yield rows


def probes_of(
    reward: GenerationReward,
    sizes: tuple[int, ...] = (3, 3, 4),
    points: int = 4,
    scale: float = 0.3,
) -> list[Probe]:
    """Several points on each of several shares of prompts of unlike lengths."""
    source = as_source(prompts(sum(sizes), id=list(range(sum(sizes)))), reward.collate)
    ends = np.cumsum([0, *sizes]).tolist()
    shares = [Batch(source, range(a, b)) for a, b in pairwise(ends)]
    return [
        Probe(Shift((Term(10 * number + k, scale),)), share)
        for number, share in enumerate(shares)
        for k in range(points)
    ]


def evaluated(
    reward: GenerationReward, probes: list[Probe], batch_size: int | None = 16, **options: Any
) -> tuple[list[Evaluation], LocalEvaluator]:
    view = ParameterView.trainable(reward.model)
    evaluator = LocalEvaluator(reward, view, EvaluationOptions(**options), batch_size=batch_size)
    return evaluator.evaluate(probes), evaluator


def same(one: list[Evaluation], other: list[Evaluation]) -> bool:
    return all(
        a.value == b.value and np.array_equal(a.per_example, b.per_example)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", MODELS)
def test_one_call_writes_for_every_point_what_it_writes_alone(
    family: str, do_sample: bool, calls: list[int]
) -> None:
    reward = reward_of(lora(family), do_sample=do_sample)
    probes = probes_of(reward)
    alone, _ = evaluated(reward, probes, joint_rows="off")
    assert calls == [3] * 8 + [4] * 4
    calls.clear()
    joined, evaluator = evaluated(reward, probes)
    assert calls == [12 * 4], evaluator.plan.why_not
    assert evaluator.plan.candidates == 12
    assert same(joined, alone)
    assert evaluator.queries == sum(len(probe.batch) for probe in probes)
    values = [tuple(one.per_example) for one in joined[:4]]  # type: ignore[arg-type]
    assert len(set(values)) > 1, "the points differ"


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"target_modules": ["q_proj"], "use_rslora": True, "r": 4},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "r": 8, "use_dora": True},
    ],
    ids=["q,v", "last-layer", "embedding", "rslora", "dora"],
)
def test_adapters_of_other_places_and_kinds(options: dict[str, Any], calls: list[int]) -> None:
    reward = reward_of(lora("llama", **options))
    probes = probes_of(reward, (2, 2))
    alone, _ = evaluated(reward, probes, joint_rows="off")
    calls.clear()
    joined, evaluator = evaluated(reward, probes)
    assert evaluator.plan.candidates in (1, 8)
    assert ("joint" in evaluator.plan.why_not) == (evaluator.plan.candidates == 1)
    assert len(calls) == (8 if evaluator.plan.candidates == 1 else 1)
    assert same(joined, alone)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("family", "tuned"),
    [("gpt2", "c_proj"), ("opt", "fc2"), ("llama", "down_proj"), ("qwen2", "q_proj")],
)
def test_frozen_layers_compute_one_row_for_texts_that_are_the_same_so_far(
    family: str, tuned: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[SharedText] = []
    real = SharedText.__init__

    def noted(self: SharedText, *args: Any) -> None:
        real(self, *args)
        made.append(self)

    monkeypatch.setattr(SharedText, "__init__", noted)
    reward = reward_of(
        lora(family, target_modules=[tuned], layers_to_transform=[1]), do_sample=do_sample
    )
    probes = probes_of(reward, scale=0.03)
    alone, _ = evaluated(reward, probes, joint_rows="off")
    assert not made
    joined, evaluator = evaluated(reward, probes)
    assert evaluator.plan.candidates == 12, evaluator.plan.why_not
    assert same(joined, alone)
    rows = [row for row in made[-1].rows if row]
    assert rows[0] == 10 and max(rows) < 48, "a prompt is read once for all of its points"
    assert rows == sorted(rows) and rows[-1] > 10, "texts part, and never meet again"


def test_norms_are_joined_and_a_full_view_says_why_not(calls: list[int]) -> None:
    model = tiny_model("gpt2", "causal")
    reward = reward_of(model)
    probes = probes_of(reward, (2, 2))
    for view, reason in (
        (ParameterView.matching(model, "ln_"), None),
        (ParameterView.full(model), "Conv1D"),
    ):
        calls.clear()
        alone = LocalEvaluator(reward, view, EvaluationOptions(joint_rows="off")).evaluate(probes)
        joint = LocalEvaluator(reward, view)
        calls.clear()
        assert same(joint.evaluate(probes), alone)
        why = joint.plan.why_not.get("joint")
        assert (why is None) == (reason is None) and (reason or "") in (why or "")
        assert len(calls) == (1 if reason is None else len(probes))


@pytest.mark.parametrize(
    "estimator",
    [OneSided(8, perturbation_scale=0.2), TwoSided(4), OneSided(1, baseline="base")],
    ids=repr,
)
def test_a_default_step_is_one_call_and_the_same_run(estimator: Any, calls: list[int]) -> None:
    results = []
    for joint_rows in ("auto", "off"):
        reward = reward_of(lora("llama"))
        view = ParameterView.trainable(reward.model)
        calls.clear()
        result = minimize(
            reward, view, prompts(16), MeZO(1e-2, estimate=estimator),
            batch_size=16, max_steps=3, seed=4, progress=False,
            evaluation=EvaluationOptions(joint_rows=joint_rows),
        )  # fmt: skip
        results.append((result.queries, [t.clone() for t in view.tensors.values()], len(calls)))
    (queries, joined, few), (same_queries, alone, many) = results
    assert queries == same_queries
    assert all(torch.equal(a, b) for a, b in zip(joined, alone, strict=True))
    assert few < many


def test_memory_alone_cuts_a_call(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    reward = reward_of(lora("llama"))
    probes = probes_of(reward, (4, 4, 4, 4), points=8)
    expected, _ = evaluated(reward, probes)
    assert calls == [128]
    calls.clear()
    view = ParameterView.trainable(reward.model)
    of_candidate = view.nbytes + 4 * reward.row_bytes(probes[-1].batch.content)  # type: ignore[misc]
    module = "zo_adapt.evaluation.joint.joining.bytes_for_rows"
    monkeypatch.setattr(module, lambda view: int(8.5 * of_candidate))
    cut, _ = evaluated(reward, probes)
    assert calls == [32] * 4
    assert same(cut, expected)


def test_what_a_text_takes_grows_with_its_length_and_the_model() -> None:
    reward, longer = (reward_of(lora("llama"), max_new_tokens=n) for n in (6, 12))
    few, many = prompts(2), [{"prompt": text([5] * 20)}]
    assert reward.row_bytes(few) < reward.row_bytes(many)  # type: ignore[misc]
    assert reward.row_bytes(few) < longer.row_bytes(few)  # type: ignore[misc]
    groups = Groups(ParameterView.trainable(reward.model), "auto", 8, None, reward.row_bytes)
    assert max(len(g) for g in groups.of(probes_of(reward, (4,)))) == 2, "a limit of rows holds"


def test_a_draw_depends_on_the_prompt_and_the_point_alone() -> None:
    reward = reward_of(tiny_model("llama", "causal"), do_sample=True, temperature=1.5)
    examples = prompts(6)
    together = reward.generate(examples).ids
    assert together == [reward.generate([one]).ids[0] for one in examples]
    assert together[::-1] == reward.generate(examples[::-1]).ids
    repeated = reward.generate([examples[0]] * 3).ids
    assert repeated[0] == together[0] and len(set(map(tuple, repeated))) == 3


def test_a_prompt_that_recurs_in_a_batch_is_drawn_the_same_at_every_point(calls: list[int]) -> None:
    reward = reward_of(lora("llama"), do_sample=True, temperature=2.0)
    source = as_source([prompts(1)[0]] * 4, reward.collate)
    batch = Batch(source, range(4))
    probes = [Probe(at, batch) for at in (HERE, Shift((Term(3, 1e-7),)), HERE)]
    found, _ = evaluated(reward, probes)
    assert calls == [12]
    assert same(found[:1] * 2, found[1:])
    assert len(set(found[0].per_example)) == 4  # type: ignore[arg-type]


def test_sampling_shapes_what_transformers_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of tokens drawn are those of transformers' own sampling."""
    model = tiny_model("llama", "causal")
    shaping = {"min_p": 0.05, "typical_p": 0.9}
    options = {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "max_new_tokens": 1}
    reward = reward_of(model, do_sample=True, generation_kwargs=shaping, **options)
    many = [{"prompt": "w5 w6 w7", "id": i} for i in range(4000)]
    drawn = np.bincount([ids[0] for ids in reward.generate(many).ids], minlength=VOCABULARY)
    ids = torch.tensor([[5, 6, 7]] * 4000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = model.generate(  # type: ignore[operator]
            input_ids=ids, do_sample=True, pad_token_id=PAD, **options | shaping
        )[:, 3]
    expected = np.bincount(theirs.tolist(), minlength=VOCABULARY)
    assert set(np.flatnonzero(drawn)) == set(np.flatnonzero(expected))
    assert abs(drawn - expected).max() < 5 * (2 * 4000 * 0.25) ** 0.5


@pytest.mark.parametrize("do_sample", [False, True])
def test_no_global_generator_is_touched(do_sample: bool) -> None:
    before = torch.get_rng_state(), random.getstate()
    reward = reward_of(lora("llama"), do_sample=do_sample)
    evaluated(reward, probes_of(reward, (2, 2)))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_beams_and_rewards_of_steps_are_evaluated_all_the_same(calls: list[int]) -> None:
    reward = reward_of(lora("llama"), generation_kwargs={"num_beams": 2})
    probes = probes_of(reward, (2, 2))
    joined, evaluator = evaluated(reward, probes)
    assert "beams" in evaluator.plan.why_not["joint"]
    assert len(calls) == len(probes)
    assert same(joined, evaluated(reward, probes, joint_rows="off")[0])

    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    calls.clear()
    _, evaluator = evaluated(reward_of(lora("llama"), constant), probes)
    assert "joint" not in evaluator.plan.why_not, "a reward that does not move is no reason"
    assert len(calls) == 1


def test_a_joint_forward_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from zo_adapt.evaluation.joint import candidates

    def wrong(module: nn.Module, x: Any, stacks: Any, count: int) -> Any:
        return right(module, x, {name: s.flip(0) for name, s in stacks.items()}, count)

    right = candidates._linear
    reward = reward_of(lora("llama"))
    probes = probes_of(reward, (2, 2))
    monkeypatch.setitem(candidates._FORWARDS, nn.Linear, wrong)
    joined, evaluator = evaluated(reward, probes)
    assert "differ from single ones" in evaluator.plan.why_not["joint"]
    assert same(joined, evaluated(reward, probes, joint_rows="off")[0])


def test_messages_and_columns_keep_to_their_rows() -> None:
    seen: list[dict[str, Any]] = []

    def check(prompts: Any, completions: Any, target: Any, **_: Any) -> list[float]:
        rows = zip(prompts, completions, target, strict=True)
        seen.extend({"p": p, "c": c, "t": t} for p, c, t in rows)
        return [float(len(c[0]["content"])) for c in completions]

    reward = reward_of(lora("llama"), check, tokenizer=a_tokenizer(chat_template=CHAT))
    data = [
        {"prompt": [{"role": "user", "content": text(row)}] * 2, "target": [row, text(row)]}
        for row in token_rows(4)
    ]
    source = as_source(data, reward.collate)
    shares = [Batch(source, [0, 1]), Batch(source, [2, 3])]
    probes = [Probe(Shift((Term(k, 0.2),)), share) for share in shares for k in range(2)]
    joined, evaluator = evaluated(reward, probes)
    assert evaluator.plan.candidates == 4, evaluator.plan.why_not
    assert all(one["t"][1] == one["p"][0]["content"] for one in seen)
    assert same(joined, evaluated(reward, probes, joint_rows="off")[0])


def test_a_mixture_gives_the_values_of_single_ones() -> None:
    model = lora("llama")
    reward = reward_of(model)
    both = reward + 0.5 * reward_of(model, lengths)
    probes = probes_of(reward, (2, 2))
    probes = [
        Probe(at, Batch(as_source(prompts(4, id=list(range(4))), both.collate), b.rows))
        for at, b in probes
    ]
    found = [
        LocalEvaluator(
            both, ParameterView.trainable(model), EvaluationOptions(joint_rows=rows)
        ).evaluate(probes)
        for rows in ("auto", "off")
    ]
    assert same(*found)


def ending(model: nn.Module, share: float) -> nn.Module:
    """The model, a share of whose tokens end a text: texts of all lengths."""
    ends = list(range(int((1 - share) * VOCABULARY), VOCABULARY))
    model.generation_config.eos_token_id = ends  # type: ignore[union-attr, assignment]
    return model


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_texts_that_have_ended_are_left_out_and_the_others_go_on_as_they_were(
    family: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ending(lora(family), 0.25 if do_sample else 0.45)
    options: dict[str, Any] = {"do_sample": do_sample, "max_new_tokens": 16}
    probes = probes_of(reward_of(model, **options))
    written: list[list[list[int]]] = []

    def noted(completion_ids: list[list[int]], **_: Any) -> list[float]:
        written.append(completion_ids)
        return told_apart(completion_ids)

    rows: list[int] = []
    real = Generator._generate

    def counted(self: Any, ids: Any, *args: Any, **more: Any) -> Any:
        rows.append(len(ids))
        return real(self, ids, *args, **more)

    reward = reward_of(model, noted, **options)
    monkeypatch.setattr("objectives._generator.can_go_on", lambda *_: False)
    whole, _ = evaluated(reward_of(model, **options), probes, joint_rows="off")
    monkeypatch.undo()
    monkeypatch.setattr("objectives._generator.Generator._generate", counted)
    joined, evaluator = evaluated(reward, probes)
    assert evaluator.plan.candidates == 12, evaluator.plan.why_not
    assert same(joined, whole)
    assert len({len(ids) for ids in written[-1]}) > 3, "texts of all lengths"
    written_in = rows[rows.index(48) :]
    assert len(written_in) > 1 and written_in[1] <= 24


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_text_does_not_see_when_others_end(do_sample: bool) -> None:
    model = ending(tiny_model("llama", "causal"), 0.15)
    reward = reward_of(model, do_sample=do_sample, max_new_tokens=20)
    together = reward.generate(prompts(24)).ids
    assert together == [reward.generate([one]).ids[0] for one in prompts(24)]
    assert len({len(ids) for ids in together}) > 5


@pytest.mark.parametrize(
    "options",
    [{"min_new_tokens": 5}, {"repetition_penalty": 1.5}, {"suppress_tokens": [7]}],
    ids=str,
)
def test_options_hold_where_texts_end(options: dict[str, Any]) -> None:
    model = ending(tiny_model("llama", "causal"), 0.15)
    reward = reward_of(model, max_new_tokens=20, generation_kwargs=options)
    found = reward.generate(prompts(12)).ids
    for prompt, ids in zip(prompts(12), found, strict=True):
        tokens = torch.tensor([[int(word[1:]) for word in prompt["prompt"].split()]])
        plain = model.generate(  # type: ignore[operator]
            input_ids=tokens, do_sample=False, max_new_tokens=20, pad_token_id=PAD, **options
        )
        assert ids == plain[0, tokens.shape[1] :].tolist()


def test_a_cache_that_cannot_be_cut_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending(lora("llama", target_modules=["q_proj"], layers_to_transform=[1]), 0.25)
    probes = probes_of(reward_of(model, do_sample=True, max_new_tokens=16))
    found = []
    for cut in (True, False):
        if not cut:
            monkeypatch.setattr("objectives._generator.rows_of_cache", lambda *_: None)
        joined, evaluator = evaluated(reward_of(model, do_sample=True, max_new_tokens=16), probes)
        assert evaluator.plan.candidates == 12, evaluator.plan.why_not
        found.append(joined)
    assert same(*found)


def test_sampled_beams_touch_no_generator_and_recur() -> None:
    reward = reward_of(
        tiny_model("llama", "causal"), do_sample=True, generation_kwargs={"num_beams": 2}
    )
    before = torch.get_rng_state()
    assert reward.generate(prompts(4)) == reward.generate(prompts(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert not reward.independent_rows
