"""Directions of low rank: the numbers, and forwards along factors that write no weight."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from many_families import model_of, task_of
from problems import bits, reference
from test_candidates import asked, far, head_of, loss_of, source_of
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from objectives import Accuracy, CallableObjective, CausalLMLoss, ClassificationLoss
from zo_adapt import MeZO, MeZOSVRG, ParameterView, Shift, Term, minimize, replay
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import OptionError, TrajectoryError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Evaluation, Probe
from zo_adapt.noise.accumulate import OnCPU, Place
from zo_adapt.noise.distributions import GAUSSIAN, LowRank, draw, noise_named, tensor_key
from zo_adapt.noise.entries import numpy_entries
from zo_adapt.noise.factors import Factors, Wanted, split
from zo_adapt.noise.gathered import Gathered
from zo_adapt.noise.low_rank import numpy_values
from zo_adapt.noise.sums import Sum, Sums
from zo_adapt.noise.torch_accumulate import OnAnyDevice

CPU = torch.device("cpu")
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (5, 7),
    "wide": (3, 22_000),
    "tall": (22_000, 3),
    "chunks": (70, 950),
    "experts": (4, 5, 6),
    "kernels": (8, 3, 3, 3),
    "vector": (11,),
    "scalar": (),
    "thin": (1, 9),
}
RANKS = pytest.mark.parametrize("rank", [1, 3])


# --- the numbers --------------------------------------------------------------------------------


def test_names() -> None:
    assert noise_named("lowrank") == noise_named("lowrank1-gaussian-philox-v1") == LowRank()
    assert noise_named("lowrank-4") == noise_named("lowrank4") == noise_named(LowRank(4).name)
    for wrong in ("lowrank-0", "lowrank--1", "lowrank-x", "lowrank4-philox"):
        with pytest.raises(OptionError, match="lowrank"):
            noise_named(wrong)
    with pytest.raises(OptionError, match="rank 0"):
        LowRank(0)


FROZEN = {
    1: "ea0fee67b6f51f6a20b4fe70b570ec5c7583beebe0aa06effc1a13660bc20dd3",
    3: "df21ded246d3b447b02f901a205c910c63b1ba226f8b87bf0849f4b33980b61a",
}


@RANKS
def test_a_versioned_name_never_changes_its_meaning(rank: int) -> None:
    z = draw(LowRank(rank), 1, "weight", (40, 50), CPU)
    assert hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest() == FROZEN[rank]


def test_it_is_the_product_of_the_factors_that_the_generator_draws() -> None:
    height, width, rank = 5, 7, 2
    words = numpy_entries(GAUSSIAN, 9, tensor_key("w"), 0, rank * (height + width))
    a, b = words[: rank * height].reshape(rank, -1), words[rank * height :].reshape(rank, -1)
    z = (a[0][:, None] * b[0] + a[1][:, None] * b[1]) * np.float32(1 / np.sqrt(2))
    assert np.array_equal(draw(LowRank(rank), 9, "w", (height, width), CPU).numpy(), z)


def ranks(shape: tuple[int, ...], rank: int) -> list[int]:
    """Of every matrix of a direction."""
    z = draw(LowRank(rank), 3, "w", shape, CPU)
    of_matrices = z if len(shape) == 3 else z.reshape(1, shape[0], -1)
    return [int(torch.linalg.matrix_rank(matrix, atol=1e-4)) for matrix in of_matrices]


@RANKS
@pytest.mark.parametrize("shape", ["matrix", "experts", "kernels"])
def test_rank(shape: str, rank: int) -> None:
    assert set(ranks(SHAPES[shape], rank)) == {rank}


@pytest.mark.parametrize("shape", ["vector", "scalar", "thin"])
def test_what_is_no_matrix_is_gaussian(shape: str) -> None:
    size = SHAPES[shape]
    assert torch.equal(draw(LowRank(), 3, "w", size, CPU), draw(GAUSSIAN, 3, "w", size, CPU))


def quickly(noise: LowRank, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """A direction by the CPU's own way, flattened."""
    numel = int(np.prod(shape))
    of = noise.matrices(shape)
    return numpy_values(noise.entries, seed, tensor_key("w"), of, 0, numel)


@RANKS
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (4, 2, 2)])
def test_covariance_is_the_identity(shape: tuple[int, ...], rank: int) -> None:
    n = 3000
    z = torch.from_numpy(np.stack([quickly(LowRank(rank), seed, shape) for seed in range(n)]))
    second = (z.double().T @ z.double() / n).numpy()
    # A product of two Gaussians has a fourth moment of 9: a variance of 8, of products 3 or less.
    assert np.abs(np.diag(second) - 1).max() < 6 * np.sqrt(8 / n)
    assert np.abs(second - np.diag(np.diag(second))).max() < 6 * np.sqrt(3 / n)
    assert z.mean(0).abs().max() < 6 / np.sqrt(n)


def test_an_estimate_is_unbiased() -> None:
    gradient = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    drawn = np.stack([quickly(LowRank(), seed, (2, 3)) for seed in range(8_000)])
    z = torch.from_numpy(drawn).view(-1, 2, 3)
    mean = ((gradient * z).sum((1, 2), keepdim=True) * z).mean(0)
    assert (mean - gradient).abs().max() < 0.5


@RANKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_gives_the_same_bits(shape: str, dtype: torch.dtype, rank: int) -> None:
    noise, size = LowRank(rank), SHAPES[shape]
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    terms = [Term(3, 0.3), Term(2**64 - 1, -0.1)]
    outs = []
    for runner in (OnCPU, OnAnyDevice):
        outs.append(torch.empty_like(x))
        places = [Place(outs[-1], x, tensor_key("w"))]
        pairs = [(seed, c) for seed, c, _ in terms]
        runner(noise, places)(Sums([Sum(pairs, 0.9)]), [outs[-1]])
    assert torch.equal(bits(outs[0]), bits(outs[1]))
    assert torch.equal(bits(outs[0]), bits(reference(noise, "w", x, terms, 0.9)))
    view = ParameterView({"w": x.clone(), "other": torch.ones(3, 4)}, noise=noise.name)
    with view.shifted(terms, 0.9):
        assert torch.equal(bits(view.tensors["w"]), bits(outs[0]))
    assert torch.equal(bits(view.tensors["w"]), bits(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_does_not_matter(dtype: torch.dtype) -> None:
    plain = torch.zeros(6, 8, dtype=dtype)
    turned, strided = torch.zeros(8, 6, dtype=dtype).T, torch.zeros(12, 16, dtype=dtype)[::2, ::2]
    for tensor in (plain, turned, strided):
        ParameterView({"w": tensor}, noise="lowrank").apply(Shift((Term(5, 0.3), Term(6, 0.1))))
    assert torch.equal(plain, turned)
    assert torch.equal(plain, strided)


@RANKS
def test_rows_of_a_table_are_those_of_the_whole(rank: int) -> None:
    table, ids = torch.randn(40, 17), torch.tensor([[3, 3, 39], [0, 1, 2]])
    sums, noise, out = Sums([Sum([(3, 0.3), (9, -0.1)], 0.9)]), LowRank(rank), torch.empty(40, 17)
    OnCPU(noise, [Place(out, table, 5)])(sums, [out])
    assert torch.equal(Gathered(noise, table, 5, 0)(ids, sums), out[ids])


def test_factors_give_the_direction() -> None:
    noise, shape = LowRank(2), (3, 5, 6)
    of = noise.matrices(shape)
    assert of is not None
    factors = Factors(noise, [Wanted(tensor_key("w"), of)], CPU, scaled=True)
    a, b = split(factors(Sums([Sum([(8, 0.5)])])), of)
    z = torch.einsum("tcri,tcrj->cij", a, b)
    assert torch.allclose(z, 0.5 * draw(noise, 8, "w", shape, CPU), atol=1e-6)


def test_many_terms_in_one_pass_or_in_many() -> None:
    one, other = torch.randn(9, 8), torch.empty(9, 8)
    other.copy_(one)
    terms = tuple(Term(seed, 0.01 * seed) for seed in range(1, 30))
    ParameterView({"w": one}, noise="lowrank").apply(Shift(terms))
    view = ParameterView({"w": other}, noise="lowrank")
    for term in terms:
        view.apply(Shift((term,)))
    assert torch.equal(one, other)


# --- forwards along factors -----------------------------------------------------------------------


def view_of(model: nn.Module, kind: str, noise: str = "lowrank") -> ParameterView:
    if kind == "last layers":
        return ParameterView.last_layers(model, 1, noise=noise)
    if kind == "matching":
        return ParameterView.matching(model, r"\.1\.|embed|wte", noise=noise)
    return ParameterView.full(model, noise=noise)


def without_decay(source: Any) -> list[Probe]:
    return [probe for probe in asked(source) if probe.at.decay == 1.0]


def shifted(objective: Any, view: ParameterView, probes: list[Probe]) -> list[Evaluation]:
    """Every point by weights that are written, one after the other."""
    found = []
    for at, batch in probes:
        with torch.no_grad(), view.shifted(at.terms, at.decay):
            values = objective(batch.content)
        found.append(Evaluation(0.0, np.atleast_1d(np.asarray(values, dtype=np.float64))))
    return found


@pytest.mark.parametrize("kind", ["full", "last layers", "matching"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, kind: str) -> None:
    model = tiny_model(family, head_of(family))
    view = view_of(model, kind, "lowrank" if kind == "full" else "lowrank-2")
    loss, before = loss_of(model, family), view.hash()
    probes = without_decay(source_of(loss, family))
    expected = shifted(loss, view, probes)
    together, alone = (
        LocalEvaluator(loss, view),
        LocalEvaluator(loss, view, EvaluationOptions(joint_rows="off")),
    )
    assert far(expected, together.evaluate(probes)) < 4e-6
    assert far(expected, alone.evaluate(probes)) < 4e-6
    assert far(expected[:1], expected[1:2]) > 1e-4, "a shift must show"
    assert together.plan.candidates > 1
    assert not {"joint", "factors"} & together.plan.why_not.keys()
    assert "factors" not in alone.plan.why_not
    # Once checked, nothing is written.
    written = [tensor._version for tensor in view.tensors.values()]
    together.evaluate(probes)
    alone.evaluate(probes)
    assert written == [tensor._version for tensor in view.tensors.values()]
    assert view.hash() == before
    assert not [m for m in model.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("family", ["t5", "bart", "vit", "mixtral", "gpt_neox", "bloom", "gemma"])
def test_further_families(family: str) -> None:
    model = model_of(family)
    view = ParameterView.full(model, noise="lowrank")
    from many_families import FAMILIES as TASKS

    objective, data = task_of(TASKS[family][0], model)
    objective = objective if hasattr(objective, "collate") else CallableObjective(objective)
    source = as_source(data, objective.collate)
    batches = [Batch(source, range(4)), Batch(source, range(4, 8))]
    points = [Shift((Term(seed, 0.02),)) for seed in range(3)]
    probes = [Probe(at, batch) for batch in batches for at in points]
    before, expected = view.hash(), shifted(objective, view, probes)
    for options in (EvaluationOptions(), EvaluationOptions(joint_rows="off")):
        evaluator = LocalEvaluator(objective, view, options)
        assert far(expected, evaluator.evaluate(probes)) < 2e-5
        assert "factors" not in evaluator.plan.why_not
    assert view.hash() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, head_of(family), dtype=dtype)
    view = ParameterView.full(model, noise="lowrank")
    loss = loss_of(model, family)
    probes = without_decay(source_of(loss, family))
    evaluator = LocalEvaluator(loss, view)
    # Shifted weights are rounded to the dtype, factors are not.
    assert (
        far(shifted(loss, view, probes), evaluator.evaluate(probes)) < 16 * torch.finfo(dtype).eps
    )
    assert evaluator.plan.why_not.get("joint") is None


def test_a_deep_model_in_bf16_is_computed_along_factors() -> None:
    """Chaotic where a shift doubles its loss: there two ways of rounding differ by any amount."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=16, **sizes, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    view, loss = ParameterView.full(model, noise="lowrank"), CausalLMLoss(model)
    ids = torch.randint(3, 512, (8, 24), generator=torch.Generator().manual_seed(0))
    batch = Batch(as_source({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), range(8))
    evaluator = LocalEvaluator(loss, view)
    evaluator.evaluate([Probe(Shift((Term(seed, 1e-3),)), batch) for seed in range(4)])
    evaluator.evaluate([Probe(Shift((Term(7, 1e-3),)), batch)])
    assert evaluator.plan.candidates == 4
    assert not {"joint", "factors"} & evaluator.plan.why_not.keys()


def test_a_decayed_point_and_many_directions_are_shifted_to() -> None:
    model = tiny_model("bert")
    view, loss = ParameterView.full(model, noise="lowrank"), ClassificationLoss(model)
    batch = Batch(source_of(loss), range(4))
    many = tuple(Term(seed, 1e-3) for seed in range(1, 70))
    probes = [Probe(Shift((Term(1, 0.01),), 0.9), batch), Probe(Shift(many), batch)]
    evaluator = LocalEvaluator(loss, view)
    assert far(shifted(loss, view, probes), evaluator.evaluate(probes)) == 0.0
    assert evaluator.plan.candidates == 1


class ReadsElsewhere(nn.Module):
    """A weight that another module reads: factors would be overlooked there."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x)) @ self.two.weight + self.two(x)


def test_weights_that_others_read_are_made() -> None:
    torch.manual_seed(0)
    model = ReadsElsewhere()
    view = ParameterView.full(model, noise="lowrank")
    objective = CallableObjective(lambda x: model(x).square().sum(1))
    source = as_source(torch.randn(8, 6))
    probes = [Probe(Shift((Term(s, 0.1),)), Batch(source, range(8))) for s in (1, 2)]
    evaluator = LocalEvaluator(objective, view)
    answers = evaluator.evaluate(probes)
    assert far(shifted(objective, view, probes), answers) == 0.0
    assert {"joint", "factors"} <= evaluator.plan.why_not.keys()
    assert "weights made for each point" in str(evaluator.plan)


def test_a_score_and_one_number_go_along_factors_too() -> None:
    model = tiny_model("bert")
    view = ParameterView.full(model, noise="lowrank")
    batch_of = lambda objective: Batch(source_of(objective), range(8))  # noqa: E731
    loss, accuracy = ClassificationLoss(model), Accuracy(model)
    mean = CallableObjective(lambda batch: loss(batch).mean(), collate=loss.collate)
    for objective in (accuracy, mean):
        probes = [Probe(Shift((Term(s, 0.05),)), batch_of(objective)) for s in (1, 2, 3)]
        evaluator = LocalEvaluator(objective, view)
        answers = [answer.value for answer in evaluator.evaluate(probes)]
        expected = []
        for at, batch in probes:
            with torch.no_grad(), view.shifted(at.terms):
                expected.append(float(objective(batch.content)))
        sign = evaluator.sign
        assert np.allclose(answers, sign * np.array(expected), atol=1e-5)
        assert "factors" not in evaluator.plan.why_not


# --- runs -----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "mezo": MeZO,
    "svrg": MeZOSVRG,
    "snapshots": lambda: MeZOSVRG(num_directions=2, snapshot_interval=2),
}


def run(model: nn.Module, optimizer: Any, **options: Any) -> ParameterView:
    view = ParameterView.full(model, noise="lowrank")
    data = [{"input_ids": [5 + i, 7, 9 + i % 3]} for i in range(12)]
    minimize(CausalLMLoss(model), view, data, optimizer, batch_size=4, progress=False, **options)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_and_resume(optimizer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, models = OPTIMIZERS[optimizer], [tiny_model("gpt2", "causal", dtype=dtype) for _ in "abc"]
    whole = run(models[0], make(), max_steps=6, trajectory=tmp_path / "whole")

    stopped = {"left": 3}

    def stop(_: Any) -> None:
        stopped["left"] -= 1
        if not stopped["left"]:
            raise StopIteration

    run(models[1], make(), max_steps=6, trajectory=tmp_path / "cut", callback=stop)
    again = tiny_model("gpt2", "causal", dtype=dtype)
    resumed = run(again, make(), max_steps=6, trajectory=tmp_path / "cut", resume=True)
    assert resumed.hash() == whole.hash()
    copy = ParameterView.full(models[2], noise="lowrank")
    assert replay(copy, tmp_path / "whole") == 6
    assert copy.hash() == whole.hash()


# --- the usual noise of full views ----------------------------------------------------------------


def test_it_is_usual_for_large_full_views_and_last_layers_and_what_is_chosen_counts() -> None:
    torch.manual_seed(0)
    config = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **config))
    usual = ParameterView.full(model), ParameterView.last_layers(model, 2)
    assert {view.noise.name for view in usual} == {LowRank().name}
    assert ParameterView.full(model, noise="gaussian").noise is GAUSSIAN
    assert ParameterView.trainable(model).noise is GAUSSIAN
    assert ParameterView.full(tiny_model("bert")).noise is GAUSSIAN, "where noise costs little"


@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "lowrank-2"])
def test_a_run_of_another_noise_is_replayed_and_gone_on_with(noise: str, tmp_path: Path) -> None:
    """As those that were begun when the usual noise was Gaussian."""
    path, rows = tmp_path / "run.zot", torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).state_dict()

    def run(steps: int, resume: bool, **options: str) -> ParameterView:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model.load_state_dict(start)
        view = ParameterView.full(model, **options)
        objective = CallableObjective(lambda x: (model(x) - 1).square().sum(1))
        limits: Any = {"max_steps": steps, "progress": False, "batch_size": 4}
        file = path if steps < 6 or resume else None
        minimize(objective, view, rows, MeZO(1e-2), trajectory=file, resume=resume, **limits)
        return view

    run(3, False, noise=noise)
    whole, resumed = run(6, False, noise=noise), run(6, True)
    assert resumed.noise.name == whole.noise.name
    assert resumed.hash() == whole.hash()
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model.load_state_dict(start)
    replayed = ParameterView.full(model)
    assert replay(replayed, path) == 6
    assert replayed.hash() == whole.hash()
    model.load_state_dict(start)
    other = "gaussian" if noise != "gaussian" else "rademacher"
    with pytest.raises(TrajectoryError, match="noise"):
        replay(ParameterView.full(model, noise=other), path)
