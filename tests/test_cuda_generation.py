"""On an NVIDIA GPU: the candidates of a step are written by one generate. ``pytest -m cuda``."""

import numpy as np
import pytest
import torch
from test_generation_joined import MODELS, evaluated, lora, probes_of, reward_of, same

from objectives import GenerationReward
from zo_adapt.evaluation.joint.joining import bytes_for_rows

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]


def reward_on_gpu(family: str, dtype: torch.dtype, *, do_sample: bool = False) -> GenerationReward:
    return reward_of(lora(family).to("cuda", dtype), do_sample=do_sample)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", MODELS)
def test_joined_texts_are_those_of_single_points_in_float64(family: str, do_sample: bool) -> None:
    reward = reward_on_gpu(family, torch.float64, do_sample=do_sample)
    probes = probes_of(reward)
    before = torch.cuda.get_rng_state()
    alone, _ = evaluated(reward, probes, joint_rows="off")
    joined, evaluator = evaluated(reward, probes)
    assert evaluator.plan.candidates == 12, evaluator.plan.why_not
    assert same(joined, alone)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rounding_does_not_keep_points_from_being_joined(family: str, dtype: torch.dtype) -> None:
    reward = reward_on_gpu(family, dtype)
    probes = probes_of(reward, (4, 4), points=8)
    alone, _ = evaluated(reward, probes, joint_rows="off")
    joined, evaluator = evaluated(reward, probes)
    assert evaluator.plan.candidates == 16, evaluator.plan.why_not
    one, other = (np.concatenate([e.per_example for e in way]) for way in (alone, joined))
    assert (one == other).mean() > (0.9 if dtype == torch.float32 else 0.5)


def test_a_draw_depends_on_the_prompt_alone() -> None:
    reward = reward_on_gpu("llama", torch.float64, do_sample=True)
    batch = reward.collate([{"prompt": f"w{i} w{i + 1}"} for i in range(5, 13)])
    together = reward.generate(batch).ids
    assert together == [reward.generate(batch.select_rows([i])).ids[0] for i in range(8)]


def test_the_memory_that_texts_are_given_is_there() -> None:
    reward = reward_on_gpu("llama", torch.bfloat16)
    view = evaluated(reward, probes_of(reward, (2,)))[1].view
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0.3 * total < bytes_for_rows(view) < 0.8 * total


def test_a_call_takes_no_more_memory_than_was_counted() -> None:
    reward = reward_on_gpu("llama", torch.float32)
    batch = reward.collate([{"prompt": "w5 " * 20, "id": i} for i in range(4096)])
    # What cuBLAS sets aside once a process, at its first product, is no call's.
    reward.generate(batch.select_rows([0]))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    reward.generate(batch)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 4096 * reward.row_bytes(batch)  # type: ignore[misc]
