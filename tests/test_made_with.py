"""A run is not gone on with by an objective that was made with other arguments."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from objectives import (
    NDCG,
    CausalLMLoss,
    CrossEncoder,
    ExactMatch,
    GenerationReward,
    VerbalizerLoss,
)
from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.errors import TrajectoryError
from zo_adapt.evaluation.objective import as_objective
from zo_adapt.loops.objective_parts import made_with

WORDS = ["[END]", "good", "bad", "so", "so-so", "fine", "a", "b"]


def tokenizer(words: list[str] = WORDS, template: str | None = None) -> Any:
    level = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a")
    core = Tokenizer(level)
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[END]", pad_token="[END]")
    made.chat_template = template
    return made


def gpt2() -> nn.Module:
    return tiny_model("gpt2", head="causal")


def long(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def short(completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def verbalizer(model: nn.Module, **changes: Any) -> Any:
    given = {"label_words": ["good", "bad"], "tokenizer": tokenizer(), "template": "{text} so"}
    given |= changes
    return VerbalizerLoss(model, given.pop("label_words"), **given)


def reward(model: nn.Module, **changes: Any) -> Any:
    given = {"reward_funcs": long, "max_new_tokens": 4} | changes
    return GenerationReward(model, given.pop("tokenizer", tokenizer()), **given)


def causal(model: nn.Module, **changes: Any) -> Any:
    return CausalLMLoss(model, **({"tokenizer": tokenizer(), "max_length": 8} | changes))


def matched(model: nn.Module, **changes: Any) -> Any:
    return ExactMatch(verbalizer(model, **changes))


def mixed(model: nn.Module, **changes: Any) -> Any:
    return causal(model, **changes) + 0.5 * causal(model)


def ranked(model: nn.Module, **changes: Any) -> Any:
    return NDCG(CrossEncoder(model, tokenizer(), **changes))


class Own:
    """A class that is no objective."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, batch: Tensor) -> float:
        return self.weight * float(batch.sum())


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "template": (verbalizer, {"template": "{text} so-so"}),
    "label words": (verbalizer, {"label_words": ["good", "fine"]}),
    "max_length": (verbalizer, {"max_length": 5}),
    "words": (verbalizer, {"tokenizer": tokenizer([*WORDS[:3], *WORDS[:2:-1]])}),
    "reward": (reward, {"reward_funcs": short}),
    "weights": (reward, {"reward_weights": [2.0]}),
    "tokens": (reward, {"max_new_tokens": 5}),
    "sampling": (reward, {"do_sample": True}),
    "temperature": (reward, {"temperature": 0.5}),
    "generate": (reward, {"generation_kwargs": {"num_beams": 2}}),
    "completions": (causal, {"completion_only": False}),
    "chat template": (causal, {"tokenizer": tokenizer(template="{{ messages }}")}),
    "cut": (causal, {"max_length": 9}),
    "in a metric": (matched, {"template": "{text} so-so"}),
    "in a sum": (mixed, {"max_length": 9}),
    "in a ranking": (ranked, {"max_length": 9}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_argument_tells_objectives_apart(name: str) -> None:
    make, changes = CASES[name]
    model = gpt2() if make is not ranked else tiny_model("bert")
    one, same, other = make(model), make(model), make(model, **changes)
    assert json.loads(json.dumps(made_with(one))) == made_with(same)
    assert made_with(one) != made_with(other)


def test_parts_of_a_class_of_ones_own_are_seen() -> None:
    @dataclasses.dataclass
    class Weighted:
        weights: list[float]

        def __call__(self, batch: Tensor) -> float:
            return float(batch.sum()) * sum(self.weights)

    for kind, one, other in ((Own, 1.0, 2.0), (Own, "cpu", "a"), (Weighted, [1.0], [1.0, 2.0])):
        first, again, second = (as_objective(kind(each)) for each in (one, one, other))  # type: ignore[arg-type]
        assert made_with(first) == made_with(again) != made_with(second)


def test_a_run_is_not_gone_on_with_by_another_template(tmp_path: Path) -> None:
    model = gpt2().eval()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [
        {"text": word, "label": index % 2} for index, word in enumerate(["a", "b", "a b", "b a"])
    ]

    def go(steps: int, **changes: Any) -> Any:
        model.load_state_dict(start)
        view = ParameterView.last_layers(model, 1)
        options: dict[str, Any] = {"batch_size": 2, "max_steps": steps, "progress": False}
        loss = verbalizer(model, **changes)
        path = tmp_path / "run.zot"
        return minimize(
            loss, view, data, MeZO(displacement=0.1), trajectory=path, resume=True, **options
        )

    assert go(1).steps == 1
    said = r"made with='\{text\} so', not '\{text\} so-so' \(its template\)"
    with pytest.raises(TrajectoryError, match=said):
        go(2, template="{text} so-so")
    assert go(2).steps == 2


def test_a_device_is_no_difference() -> None:
    on = [made_with(as_objective(Own(device))) for device in ("cpu", "cuda:1")]  # type: ignore[arg-type]
    assert on[0] == on[1]


def test_values_around_a_reward_function_tell_it_apart() -> None:
    def longer_than(least: int) -> Callable[..., list[float]]:
        def reward_of(completions: list[str], **columns: Any) -> list[float]:
            return [float(len(text) > least) for text in completions]

        return reward_of

    model = gpt2()
    made = [made_with(reward(model, reward_funcs=longer_than(least))) for least in (3, 3, 4)]
    assert made[0] == made[1] != made[2]


def test_a_tensor_argument_is_no_part_of_the_header() -> None:
    class Near:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __call__(self, batch: Tensor) -> Tensor:
            return (batch - self.x).square().sum(1)

    said = made_with(as_objective(Near(torch.zeros(3))))
    assert said["wrapped"]["x"] == "torch.Tensor"
