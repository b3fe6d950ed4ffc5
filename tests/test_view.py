"""What a view promises: exact restoration, the reference's values, both ways of shifting equal."""

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, MODULES, tokens
from problems import bits, reference
from torch import Tensor, nn

from zo_adapt import Group, ParameterView, Shift, Term
from zo_adapt.errors import StepTooLargeError, TermError
from zo_adapt.noise.distributions import GAUSSIAN

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
NOISES = pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
TERMS = [Term(1, 0.37), Term(2, -1.1)]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T,
    "sliced": lambda x: x[1::2, ::3],
    "offset": lambda x: x.view(-1)[5:17],
    "channels_last": lambda x: x.view(1, 6, 4, 6).contiguous(memory_format=torch.channels_last),
    "zero_dim": lambda x: x[3, 3],
    "one_column": lambda x: x[:, :1],
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def awkward(dtype: torch.dtype) -> Tensor:
    """12 x 12 values over many magnitudes, with -0.0 and subnormal ones."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 12, generator=generator) * torch.logspace(-6, 3, 12)
    x = x.to(dtype)
    x[0, 0], x[3, 3], x[1, 0] = -0.0, 1.5, torch.finfo(dtype).smallest_normal / 4
    return x


class Interruption(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


@LAYOUT
@DTYPES
def test_shifted_restores_every_bit(dtype: torch.dtype, layout: str) -> None:
    base = awkward(dtype)
    tensor = LAYOUTS[layout](base)
    before, whole = bits(tensor).clone(), bits(base).clone()
    view = ParameterView({"w": tensor})
    for error in (None, ValueError, KeyboardInterrupt, Interruption):
        try:
            with view.shifted(TERMS, decay=0.9):
                assert not torch.equal(bits(tensor), before)
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt, Interruption):
            pass
        assert torch.equal(bits(tensor), before)
        assert torch.equal(bits(base), whole)  # what lies between the elements of a slice too


@NOISES
@LAYOUT
@DTYPES
def test_shifted_and_apply_equal_the_reference(dtype: torch.dtype, layout: str, noise: str) -> None:
    tensor = LAYOUTS[layout](awkward(dtype))
    view = ParameterView({"w": tensor}, noise=noise)
    expected = reference(view.noise, "w", tensor, TERMS, decay=0.75)
    with view.shifted(TERMS, decay=0.75):
        assert torch.equal(bits(tensor), bits(expected))
    view.apply(Shift(tuple(TERMS), 0.75))
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(bits(tensor), bits(expected))
    else:  # rounded stochastically: at most one step of the dtype away; see test_rounding.py
        resolution = torch.finfo(dtype).eps * expected.double().abs()
        assert ((tensor.double() - expected.double()).abs() <= resolution + 1e-7).all()


@DTYPES
def test_apply_to_a_slice_leaves_the_rest_of_the_storage(dtype: torch.dtype) -> None:
    base = awkward(dtype)
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[1::2, ::3] = True
    outside = base[~inside].clone()
    ParameterView({"w": base[1::2, ::3]}).apply(Shift(tuple(TERMS)))
    assert torch.equal(bits(base[~inside]), bits(outside))


@DTYPES
def test_thousands_of_shifts_do_not_drift(dtype: torch.dtype) -> None:
    tensor = (0.05 * torch.randn(64)).to(dtype)
    before, view = bits(tensor).clone(), ParameterView({"w": tensor})
    for seed in range(2_000):
        for sign in (1.0, -1.0):
            with view.shifted([Term(seed, sign * 1e-3)]):
                pass
    assert torch.equal(bits(tensor), before)


def test_interrupted_threads_do_not_write_after_the_restore(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.zeros(8 * 2**20)
    view = ParameterView({"w": tensor})
    calls = []

    def interrupt(*args: object) -> object:
        calls.append(args)
        raise KeyboardInterrupt

    # The wait for the threads is where Ctrl-C arrives.
    monkeypatch.setattr("concurrent.futures.Future.result", interrupt)
    with pytest.raises(KeyboardInterrupt), view.shifted(TERMS):
        raise AssertionError("the body must not run")
    assert calls, "a tensor of this size is shared among threads"
    monkeypatch.undo()
    assert not tensor.any()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes, and what a penalty on its parameters would."""
    with torch.no_grad():
        out = model(input_ids=x).logits if x.dtype == torch.int64 else model(x)
        return torch.cat([out.flatten(), model_penalty(model)])


def model_penalty(model: nn.Module) -> Tensor:
    """Reads the parameters as a regulariser does, after the forward."""
    return torch.stack([p.double().sum() for p in model.parameters()]).float()


@pytest.mark.parametrize("name", [*MODULES, *FAMILIES])
def test_layer_by_layer_equals_the_copy(name: str) -> None:
    model = (MODULES | FAMILIES)[name]().eval()
    x = tokens() if name in FAMILIES else torch.randn(2, 3, 8)
    copy = ParameterView.full(model, scratch="copy")
    layer = ParameterView.full(model, scratch="layer")
    plain = outputs(model, x)
    for seed in (1, 2):
        terms = [Term(seed, 0.05), Term(seed + 10, -0.02)]
        with copy.shifted(terms, decay=0.9):
            expected = outputs(model, x)
        with layer.shifted(terms, decay=0.9):
            assert torch.equal(outputs(model, x), expected)
        assert not torch.equal(expected, plain)
        assert torch.equal(outputs(model, x), plain)


@pytest.mark.parametrize("name", [*MODULES, "gpt2"])
def test_layer_by_layer_never_writes_the_weights(name: str) -> None:
    model = (MODULES | FAMILIES)[name]().eval()
    x = tokens() if name in FAMILIES else torch.randn(2, 3, 8)
    view = ParameterView.full(model, scratch="layer")
    live = dict(model.named_parameters())
    before = view.hash()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), view.shifted(TERMS):
            outputs(model, x)
            if name != "lstm":  # Its weights lie in a list of their own, so they are copied.
                assert view.hash() == before
            raise error
        assert view.hash() == before
        after = dict(model.named_parameters())
        assert all(after[key] is live[key] for key in live), (
            "the parameters are not the same objects"
        )


@pytest.mark.parametrize("scratch", ["copy", "layer"])
def test_exception_inside_a_forward(scratch: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(3, 2))  # the second one cannot run
    view = ParameterView.full(model, scratch=scratch)
    before = view.hash()
    with pytest.raises(RuntimeError, match="shape"), view.shifted(TERMS):
        model(torch.zeros(1, 8))
    assert view.hash() == before
    assert type(model[0]._parameters) is dict
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("scratch", ["copy", "layer"])
def test_frozen_tensors_never_change(scratch: str) -> None:
    model = FAMILIES["bert"]().eval()
    view = ParameterView.matching(model, r"layer\.1\.", scratch=scratch)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in view.tensors}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert 0 < len(view.tensors) < len(frozen)
    with view.shifted(TERMS):
        for name, parameter in model.named_parameters():
            if name in frozen:
                assert torch.equal(bits(parameter), bits(frozen[name]))
        outputs(model, tokens())
    view.apply(Shift(tuple(TERMS), 0.5))
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(torch.equal(bits(after[n]), bits(t)) for n, t in (frozen | buffers).items())


def test_dtypes_side_by_side() -> None:
    tensors = {str(d): awkward(d) for d in (torch.float16, torch.float32, torch.bfloat16)}
    expected = {name: reference(GAUSSIAN, name, t, TERMS) for name, t in tensors.items()}
    view = ParameterView(tensors)
    with view.shifted(TERMS):
        assert all(torch.equal(bits(tensors[name]), bits(expected[name])) for name in tensors)
    view.apply(Shift(tuple(TERMS)))
    single = str(torch.float32)
    assert torch.equal(bits(tensors[single]), bits(expected[single]))


def test_a_tied_tensor_counts_and_moves_once() -> None:
    shared = torch.zeros(4)
    view = ParameterView({"first": shared, "second": shared, "third": torch.zeros(4)})
    assert list(view.tensors) == ["first", "third"]
    assert view.numel == 8
    view.apply(Shift((Term(1, 1.0),)))
    assert torch.equal(shared, reference(GAUSSIAN, "first", torch.zeros(4), [Term(1, 1.0)]))


def test_a_term_of_a_group_moves_that_group_alone() -> None:
    tensors = {name: torch.zeros(5) for name in ("head.weight", "body.weight", "body.bias")}
    view = ParameterView(tensors, groups=[Group(r"head"), Group(r"weight")])
    index = {name: view.groups.index(view.group_of(name)) for name in tensors}
    assert index == {"head.weight": 0, "body.weight": 1, "body.bias": 2}
    view.apply(Shift((Term(1, 1.0, 0), Term(2, 2.0, 2), Term(3, 0.5))))
    both = {0: [Term(1, 1.0), Term(3, 0.5)], 1: [Term(3, 0.5)], 2: [Term(2, 2.0), Term(3, 0.5)]}
    for name, tensor in tensors.items():
        expected = reference(GAUSSIAN, name, torch.zeros(5), both[index[name]])
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("term", [Term(-1, 1.0), Term(2**64, 1.0), Term(1, 1.0, 1)], ids=str)
def test_bad_terms_are_named_and_change_nothing(term: Term) -> None:
    tensor = torch.ones(3)
    view = ParameterView({"w": tensor})
    with pytest.raises(TermError), view.shifted([Term(1, 1.0), term]):
        pass
    with pytest.raises(TermError):
        view.apply(Shift((Term(1, 1.0), term)))
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize("coefficient", [float("inf"), float("-inf"), float("nan")])
def test_a_coefficient_that_is_not_finite_is_no_place_and_too_large_a_step(
    coefficient: float,
) -> None:
    tensor = torch.ones(3)
    view = ParameterView({"w": tensor})
    terms = (Term(1, 1.0), Term(2, coefficient))
    with pytest.raises(TermError, match="is not finite"), view.shifted(terms):
        pass
    with pytest.raises(StepTooLargeError, match="use a smaller lr"):
        view.apply(Shift(terms))
    assert torch.equal(tensor, torch.ones(3))


def test_finite_coefficients_whose_sum_overflows_are_too_large_a_step() -> None:
    view = ParameterView({"w": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(StepTooLargeError):
        view.apply(Shift((Term(1, 1e308), Term(2, 1e308))))


def test_a_shift_within_a_shift_goes_back_to_the_outer_one() -> None:
    x = torch.randn(7)
    view, before = ParameterView({"x": x}), x.clone()
    for _ in range(2):
        with view.shifted([Term(1, 0.5)]):
            outer = x.clone()
            with view.shifted([Term(2, 0.5)]):
                assert not torch.equal(x, outer)
            assert torch.equal(bits(x), bits(outer))
        assert torch.equal(bits(x), bits(before))


def test_a_copy_is_of_the_tensors_as_they_are_now() -> None:
    """It is kept from shift to shift, but not for a model that was converted between them."""
    model = torch.nn.Linear(5, 3).bfloat16()
    view = ParameterView.full(model)
    with torch.inference_mode(), view.shifted([Term(1, 0.5)]):
        pass
    with view.shifted([Term(1, 0.5)]):
        pass
    with torch.no_grad():
        model.float().weight += 1e-5  # not a number of the dtype before
    before = model.weight.detach().clone()
    with view.shifted([Term(1, 0.5)]):
        assert not torch.equal(model.weight, before)
    assert torch.equal(bits(model.weight.detach()), bits(before))


def test_snapshot_holds_values_not_references() -> None:
    view = ParameterView({"w": torch.ones(3), "v": torch.ones(2, 2).T})
    kept, digest = view.snapshot(), view.hash()
    view.apply(Shift((Term(1, 1.0),)))
    assert view.hash() != digest
    assert all(bool((t == 1).all()) for t in kept.values())
    view.restore(kept)
    assert view.hash() == digest
