"""On an NVIDIA GPU: the same numbers as on the CPU. Run with ``pytest -m cuda``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from problems import bits, flat, labelled, logistic
from tiny_models import tiny_model, token_rows
from torch import Tensor

from objectives import CausalLMLoss, ClassificationLoss
from zo_adapt import MeZO, MeZOSVRG, ParameterView, Replay, Shift, Term, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import ViewError
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.noise.distributions import GAUSSIAN, RADEMACHER, Noise, draw
from zo_adapt.trajectory.playback import apply_all

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason=f"torch.cuda.is_available() is False (torch {torch.__version__}, built for CUDA "
        f"{torch.version.cuda}, {torch.cuda.device_count()} devices)",
    ),
]
NOISES = pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER], ids=lambda noise: noise.name)
NAMES = pytest.mark.parametrize("noise", ["gaussian", "rademacher", "lowrank", "lowrank-3"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
TERMS = (Term(1, 0.37), Term(2**64 - 1, -1.1), Term(3, 1e-3))
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def same_bits(on_gpu: Tensor, on_cpu: Tensor) -> bool:
    return torch.equal(bits(on_gpu.cpu()), bits(on_cpu))


@NOISES
@pytest.mark.parametrize("numel", [1, 257, 5000, 5_000_003])
def test_noise_is_bit_identical(noise: Noise, numel: int, seed: int) -> None:
    assert same_bits(draw(noise, seed, "w", numel, GPU), draw(noise, seed, "w", numel, CPU))


def values(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Tensors of awkward sizes and layouts."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"vector": (4097,), "matrix": (300, 70), "large": (1500, 1000), "zero_dim": ()}
    shapes |= {"transposed": (40, 70), "sliced": (80, 70)}
    shapes |= {"experts": (4, 96, 64), "kernels": (6, 3, 3, 3), "blocks": (33, 272)}
    made = {n: torch.randn(s, generator=generator).to(device, dtype) for n, s in shapes.items()}
    made["transposed"], made["sliced"] = made["transposed"].T, made["sliced"][::2, ::3]
    return made


def pair(dtype: torch.dtype, noise: str) -> tuple[ParameterView, ParameterView]:
    """The same view on the CPU and on the GPU."""
    views = [ParameterView(values(dtype, device), noise=noise) for device in (CPU, GPU)]
    return views[0], views[1]


@DTYPES
@NAMES
def test_shifted_and_apply_are_bit_identical(dtype: torch.dtype, noise: str) -> None:
    on_cpu, on_gpu = pair(dtype, noise)
    start = on_gpu.hash()
    assert start == on_cpu.hash()
    with on_cpu.shifted(TERMS, 0.9), on_gpu.shifted(TERMS, 0.9):
        for name, tensor in on_gpu.tensors.items():
            assert same_bits(tensor, on_cpu.tensors[name]), name
    assert on_gpu.hash() == start
    for update in (Shift(TERMS, 0.75), Shift(TERMS[:1])):
        on_cpu.apply(update)
        on_gpu.apply(update)
        assert on_gpu.hash() == on_cpu.hash() != start


@DTYPES
def test_coordinates_are_bit_identical(dtype: torch.dtype) -> None:
    """Of small tensors; several terms move one scalar."""
    terms = (*TERMS, Term(5 * 211 + 1, 0.3), Term(200, 0.7), Term(210, -0.7))
    views = []
    for device in (CPU, GPU):
        generator = torch.Generator().manual_seed(0)
        made = {n: torch.randn(s, generator=generator) for n, s in {"v": 90, "w": (12, 10)}.items()}
        made["w"], made["x"] = made["w"].T, torch.ones(())
        tensors = {name: tensor.to(device, dtype) for name, tensor in made.items()}
        views.append(ParameterView(tensors, noise="coordinates"))
    on_cpu, on_gpu = views
    with on_cpu.shifted(terms, 0.9), on_gpu.shifted(terms, 0.9):
        assert all(same_bits(t, on_cpu.tensors[name]) for name, t in on_gpu.tensors.items())
    for update in (Shift(terms, 0.75), Shift(terms[:1])):
        on_cpu.apply(update)
        on_gpu.apply(update)
        assert on_gpu.hash() == on_cpu.hash()


@DTYPES
def test_interrupted_shifts_restore_every_bit(dtype: torch.dtype) -> None:
    _, view = pair(dtype, "gaussian")
    before = view.hash()
    with pytest.raises(KeyboardInterrupt), view.shifted(TERMS):
        raise KeyboardInterrupt
    assert view.hash() == before


def test_several_devices_and_dtypes_in_one_view() -> None:
    tensors = {str(d): torch.ones(1000, dtype=d) for d in (torch.float16, torch.float32)}
    both = {
        f"{name} {place}": tensor.to(place)
        for name, tensor in tensors.items()
        for place in ("cpu", "cuda")
    }
    reference = {name: tensor.cpu().clone() for name, tensor in both.items()}
    ParameterView(both).apply(Shift(TERMS))
    ParameterView(reference).apply(Shift(TERMS))
    assert all(same_bits(both[name], reference[name]) for name in both)


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_layer_by_layer_equals_the_copy(family: str) -> None:
    model, x = FAMILIES[family]().eval().cuda(), tokens().cuda()
    outputs = []
    for scratch in ("copy", "layer"):
        with torch.no_grad(), ParameterView.full(model, scratch=scratch).shifted(TERMS):
            outputs.append(model(input_ids=x).logits)
    assert torch.equal(outputs[0], outputs[1])


def weights_after(make: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    rows = labelled(24, 10).to(device)
    start = {"a": torch.full((2, 3), 0.3), "b": torch.full((4,), -0.3)}
    view = ParameterView({name: t.to(device, dtype) for name, t in start.items()})
    minimize(
        lambda batch: logistic(flat(view), batch), view, rows, make(),
        batch_size=6, max_steps=30, seed=3, progress=False,
    )  # fmt: skip
    return flat(view).cpu()


MAKES = {
    "mezo": lambda: MeZO(0.05, perturbation_scale=0.05, num_directions=2, normalize=False),
    "svrg": lambda: MeZOSVRG(
        0.02, snapshot_lr=0.05, snapshot_interval=3, snapshot_size=16, num_directions=4,
        one_sided=False, perturbation_scale=0.05, normalize=False, schedule="constant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_run_equals_the_run_on_the_cpu(make: Any, dtype: torch.dtype) -> None:
    on_cpu, on_gpu = (weights_after(make, device, dtype) for device in (CPU, GPU))
    assert float((on_gpu - on_cpu).abs().max()) < 1e-5
    start = torch.cat([torch.full((6,), 0.3), torch.full((4,), -0.3)]).double()
    assert float((on_cpu - start).abs().max()) > 0.05, "nothing moved, so nothing was compared"


def test_global_generators_are_not_touched() -> None:
    before = torch.cuda.get_rng_state()
    view = ParameterView({"w": torch.zeros(1000, device="cuda")})
    with view.shifted(TERMS):
        pass
    view.apply(Shift(TERMS))
    assert torch.equal(torch.cuda.get_rng_state(), before)


@DTYPES
@NAMES
def test_a_replay_is_bit_identical_on_both(tmp_path: Path, dtype: torch.dtype, noise: str) -> None:
    """Written on the GPU, rebuilt on either."""
    path = tmp_path / "run.zot"
    _, live = pair(dtype, noise)
    hashes = [live.hash()]
    minimize(
        lambda batch: float(live.tensors["vector"].double().square().mean()),
        live, None, MeZO(num_directions=3, displacement=0.5), max_steps=6, progress=False,
        trajectory=path, callback=lambda record: hashes.append(live.hash()),
    )  # fmt: skip
    for view in pair(dtype, noise):
        replayed = Replay(view, path)
        for step in (6, 2, 4, 0):
            replayed.to(step)
            assert view.hash() == hashes[step]
    assert len(set(hashes)) == 7


def test_a_fused_replay_has_the_bits_of_single_steps() -> None:
    updates = [Shift(tuple(Term(5 * i + k, 1e-3) for k in range(5))) for i in range(20)]
    on_cpu, fused = pair(torch.float32, "gaussian")
    _, single = pair(torch.float32, "gaussian")
    for update in updates:
        single.apply(update)
    for view in (on_cpu, fused):
        apply_all(view, updates)
        assert view.hash() == single.hash()


@DTYPES
@NAMES
@pytest.mark.parametrize("width", [24, 256, 300])
@torch.no_grad()
def test_rows_of_an_embedding_are_those_of_the_cpu(
    noise: str, dtype: torch.dtype, width: int
) -> None:
    """More than 4 MiB: what is looked up is shifted, not the table."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(100_000 * 24 // width, width, dtype=dtype)
    ids = torch.tensor([[0, 1, 5, table.num_embeddings - 1], [5, 5, 1, 77]])
    found = []
    for device in (CPU, GPU):
        view = ParameterView.full(table.to(device), noise=noise, scratch="layer")
        whole = ParameterView.full(table, noise=noise, scratch="copy")
        for each in (view, whole):
            with each.shifted(TERMS, 0.9):
                found += [table(ids.to(device)), table(ids.int().to(device))]
    assert all(same_bits(each, found[0].cpu()) for each in found)


def test_many_updates_in_a_row_are_those_of_the_cpu() -> None:
    """More than the pinned memory has rows, none of them waited for, with few and many terms."""
    on_cpu, on_gpu = pair(torch.float32, "gaussian")
    for number in range(300):
        terms = tuple(
            Term(number + k, 1e-3 * (k + 1))
            for k in range(40 if number % 50 == 7 else 1 + number % 4)
        )
        for view in (on_cpu, on_gpu):
            view.apply(Shift(terms))
    assert on_gpu.hash() == on_cpu.hash()


def test_a_model_converted_after_its_view_was_made_is_refused() -> None:
    model = torch.nn.Linear(64, 64).cuda()
    view = ParameterView.full(model)
    view.apply(Shift((Term(1, 0.1),)))
    model.half()
    before = model.weight.clone()
    with pytest.raises(ViewError, match=r"was torch.float32 .* is torch.float16 .* then make"):
        view.apply(Shift((Term(1, 0.1),)))
    with pytest.raises(ViewError, match="make its view"), view.shifted((Term(1, 0.1),)):
        pass
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("joint", ["auto", "off"])
def test_points_along_factors(family: str, joint: Any) -> None:
    """Captured or not, they have the values of shifted weights, step after step."""
    head = "classification" if family == "bert" else "causal"
    model = tiny_model(family, head).cuda()
    view = ParameterView.full(model, noise="lowrank")
    loss = ClassificationLoss(model) if family == "bert" else CausalLMLoss(model)
    rows = [{"input_ids": ids} | ({"label": i % 2} if family == "bert" else {}) for i, ids in
            enumerate(token_rows(8, 9))]  # fmt: skip
    source = as_source(rows, loss.collate)
    batch, before = Batch(source, range(8)), view.hash()
    evaluator = LocalEvaluator(loss, view, EvaluationOptions(joint_rows=joint))
    for step in range(6):
        probes = [Probe(Shift((Term(10 * step + k, 0.02 + 0.01 * k),)), batch) for k in range(3)]
        for answer, probe in zip(evaluator.evaluate(probes), probes, strict=True):
            with torch.no_grad(), view.shifted(probe.at.terms):
                expected = loss(batch.content).double().cpu().numpy()
            assert abs(expected - answer.per_example).max() < 1e-4
    assert "factors" not in evaluator.plan.why_not
    assert view.hash() == before
