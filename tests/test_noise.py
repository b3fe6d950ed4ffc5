"""The generator against published numbers, the noise against its frozen and analytic ones."""

import hashlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import bits
from scipy import stats
from scipy.special import ndtri

from zo_adapt import ParameterView, Shift, Term
from zo_adapt.errors import OptionError
from zo_adapt.noise import philox
from zo_adapt.noise.accumulate import Accumulation, Place
from zo_adapt.noise.distributions import GAUSSIAN, RADEMACHER, Noise, draw, noise_named, tensor_key
from zo_adapt.noise.sums import Sum, Sums

CPU = torch.device("cpu")
MASK = 2**64 - 1
NOISES = pytest.mark.parametrize("noise", [GAUSSIAN, RADEMACHER], ids=lambda noise: noise.name)

# Random123's kat_vectors, philox4x64-10: counter, key, words.
PI = "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89"
PUBLISHED = [
    (
        " ".join(["0"] * 4),
        "0 0",
        "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
    ),
    (
        " ".join(["f" * 16] * 4),
        " ".join(["f" * 16] * 2),
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    (
        PI,
        "452821e638d01377 be5466cf34e90c6c",
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_by_the_paper(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 in Python's integers (Salmon et al. 2011, section 3.3)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1 = (second >> 64) ^ c1 ^ k0, second & MASK
        c2, c3 = (first >> 64) ^ c3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED, ids=["zeros", "ones", "pi"])
def test_reference_gives_the_published_words(counter: str, key: str, words: str) -> None:
    assert philox_by_the_paper(hexadecimal(counter), hexadecimal(key)) == hexadecimal(words)


def test_engine_gives_the_published_words_of_counter_zero() -> None:
    # Block b is made from counter b + 1.
    words = philox.words_torch(0, torch.tensor([0]), 0, torch.tensor([-1]))
    assert [int(word) & MASK for word in words.flatten()] == hexadecimal(PUBLISHED[0][2])


word = st.integers(0, MASK)


@settings(max_examples=60, deadline=None)
@given(seed=word, key=word, stream=word, start=st.integers(0, 2**62))
def test_both_paths_are_philox(seed: int, key: int, stream: int, start: int) -> None:
    expected = [
        w for b in (1, 2) for w in philox_by_the_paper([start + b, 0, 0, stream], [seed, key])
    ]
    by_numpy = philox.words_numpy(seed, key, stream, start, 2)
    keys = torch.full((2,), philox.signed(key))
    by_torch = philox.words_torch(seed, keys, stream, torch.tensor([start, start + 1]))
    assert by_numpy.tolist() == expected
    assert [int(w) & MASK for w in by_torch.T.flatten()] == expected


FROZEN = {
    "gaussian-philox-v1": (
        ["0x1.95354p-2", "0x1.7cab64p-1", "0x1.a0a468p-1", "-0x1.c55d8p-4"],
        "289cbfda39811273185abe25e5dda99048b7928acd176445364f1737b8a96813",
    ),
    "rademacher-philox-v1": (
        ["-0x1p+0", "-0x1p+0", "0x1p+0", "-0x1p+0"],
        "b50b247489109f0c4ee29083fd6d2ce990618b79cf25ed91c8601e63037f1bae",
    ),
}


@NOISES
def test_a_versioned_name_never_changes_its_meaning(noise: Noise) -> None:
    first, digest = FROZEN[noise.name]
    z = draw(noise, 1, "weight", 10_000, CPU)
    assert z[:4].tolist() == [float.fromhex(value) for value in first]
    assert hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest() == digest
    assert tensor_key("weight") == 9574703655310946886


@NOISES
def test_names_old_and_new_find_the_noise(noise: Noise) -> None:
    assert noise_named(noise.name) is noise
    assert noise_named(noise.name.split("-")[0]) is noise
    with pytest.raises(OptionError, match="uniform"):
        noise_named("uniform")


def noise_of_view(noise: Noise, seed: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """z as the engine adds it to a tensor of zeros, in row-major order."""
    ParameterView({name: tensor}, noise=noise.name).apply(Shift((Term(seed, 1.0),)))
    return tensor.reshape(-1).float()


@NOISES
@pytest.mark.parametrize("numel", [1, 255, 257, 65_536, 65_537, 200_003])
def test_chunks_are_the_reference(noise: Noise, numel: int, seed: int) -> None:
    expected = draw(noise, seed, "weight", numel, CPU)
    assert torch.equal(noise_of_view(noise, seed, "weight", torch.zeros(numel)), expected)


@NOISES
def test_threads_give_what_one_thread_gives(
    noise: Noise, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numel = 2_500_007  # Three spans, the last one ragged.
    with ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr("zo_adapt.noise.accumulate._pool", lambda: pool)
        parallel = noise_of_view(noise, seed, "weight", torch.zeros(numel))
    assert torch.equal(parallel, draw(noise, seed, "weight", numel, CPU))


@NOISES
def test_a_prefix_is_a_prefix(noise: Noise, seed: int) -> None:
    long = draw(noise, seed, "weight", 1000, CPU)
    assert torch.equal(draw(noise, seed, "weight", 333, CPU), long[:333])


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.zeros(30, 20).T,
    "sliced": lambda: torch.zeros(40, 60)[::2, ::2],
    "channels_last": lambda: torch.zeros(2, 3, 9, 9).contiguous(memory_format=torch.channels_last),
}


@NOISES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_the_noise(noise: Noise, layout: str, seed: int) -> None:
    tensor = LAYOUTS[layout]()
    assert not tensor.is_contiguous()
    z = noise_of_view(noise, seed, "weight", tensor)
    assert torch.equal(z, draw(noise, seed, "weight", tensor.numel(), CPU))


@NOISES
def test_neighbours_and_their_order_do_not_change_the_noise(noise: Noise, seed: int) -> None:
    for names in (["a", "b", "c"], ["c", "b"], ["b"]):
        tensors = {name: torch.zeros(5, 3) for name in names}
        ParameterView(tensors, noise=noise.name).apply(Shift((Term(seed, 1.0),)))
        assert torch.equal(tensors["b"].flatten(), draw(noise, seed, "b", 15, CPU))


@NOISES
def test_tensors_of_one_shape_get_different_noise(noise: Noise, seed: int) -> None:
    a, b = (draw(noise, seed, name, 10_000, CPU).numpy() for name in ("q.lora_A", "v.lora_A"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@NOISES
def test_seeds_are_uncorrelated(noise: Noise, seed: int) -> None:
    n = 10_000
    z = np.stack([draw(noise, (seed + k) % 2**64, "w", n, CPU).numpy() for k in range(20)])
    off = np.corrcoef(z)[np.triu_indices(20, 1)]
    assert np.abs(off).max() < 6 / np.sqrt(n)
    assert abs(np.square(off).mean() * n - 1) < 0.5  # 190 values of variance 1/n


def test_gaussian_moments_and_shape() -> None:
    z = draw(GAUSSIAN, 2, "weight", 1_000_000, CPU).double().numpy()
    assert abs(z.mean()) < 5e-3
    assert abs(z.var() - 1) < 5 * np.sqrt(2e-6)
    assert abs(stats.kurtosis(z)) < 5 * np.sqrt(24e-6)
    assert abs(np.mean(z[1:] * z[:-1])) < 5e-3
    assert stats.kstest(z[:200_000], "norm").pvalue > 1e-3


def test_rademacher_is_fair_coin_flips() -> None:
    z = draw(RADEMACHER, 2, "weight", 1_000_000, CPU).double().numpy()
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean()) < 5e-3
    for lag in (1, 2, 8, 64, 256):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 5e-3


def test_gaussian_table_has_unit_variance() -> None:
    # E[z z^T] = I over the equally likely values, which the estimators need.
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).numpy()
    values = GAUSSIAN.from_numpy_words(every.view(np.uint64)).astype(np.float64)
    assert abs(values.mean()) < 1e-12
    assert abs(np.square(values).mean() - 1) < 1e-7
    assert len(np.unique(values)) == 2**16


def test_gaussian_table_holds_the_normal_quantiles() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).numpy()
    values = np.sort(GAUSSIAN.from_numpy_words(every.view(np.uint64)).astype(np.float64))
    quantiles = ndtri((np.arange(2**16) + 0.5) / 2**16)
    quantiles /= np.sqrt(np.square(quantiles).mean())
    assert np.abs(values - quantiles).max() < 2e-4


@NOISES
def test_global_generators_are_not_touched(noise: Noise) -> None:
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    view = ParameterView({"w": torch.zeros(3_000_000)}, noise=noise.name)
    with view.shifted([Term(1, 1.0)]):
        pass
    view.apply(Shift((Term(2, 1.0),)))
    draw(noise, 1, "w", 100, CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert repr(np.random.get_state()) == before[2]  # noqa: NPY002


@NOISES
def test_output_apart_from_the_source(noise: Noise, seed: int) -> None:
    source, out = torch.arange(300.0), torch.full((300,), torch.nan)
    kept = source.clone()
    Accumulation(noise, [Place(out, source, tensor_key("w"))])(Sums([Sum([(seed, 0.5)], 0.25)]))
    assert torch.equal(bits(source), bits(kept))
    assert torch.equal(out, kept * 0.25 + draw(noise, seed, "w", 300, CPU) * 0.5)


def test_sums_are_packed_as_a_kernel_reads_them() -> None:
    sums = Sums([Sum([(2**64 - 1, 0.5)], 0.9), Sum(), Sum([(3, -1.0), (4, 2.0)])], rounding=2**63)
    header, terms = sums.on(CPU)

    def of(value: float) -> int:
        return int(np.float64(value).view(np.int64))

    described = [0, 1, of(0.9), 1, 0, of(1.0), 1, 2, of(1.0)]
    assert header.tolist() == [-(2**63), *described]
    assert terms.tolist() == [-1, of(0.5), 3, of(-1.0), 4, of(2.0)]
