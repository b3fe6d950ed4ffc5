"""Frozen-trunk reuse: where activations are kept, and how many."""

from typing import Any

import pytest
import torch
from trunks import LENGTHS, assert_equal, both, calls_of, counted, examples, logits_of, made, padded

from zo_adapt import (
    FrozenTrunk,
    ParameterView,
)
from zo_adapt.evaluation.trunk.call import RefusedError, form_of
from zo_adapt.evaluation.trunk.store import Storage


@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_storage(
    storage: Storage, dtype: torch.dtype, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = made("llama").to(dtype)
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk = FrozenTrunk(view, storage=storage, max_bytes=1 << 14)
    batch = padded(examples(), "right")
    served = []
    for _ in range(3):
        values = both(trunk, view, objective, batch)
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        served.append(values[0])
    assert torch.equal(served[0], served[1])
    assert torch.equal(served[0], served[2])
    assert (trunk.why_not, trunk.rows) == (None, len(LENGTHS))
    assert 0 < trunk.nbytes <= 1 << 14
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [1, 32 * 3, 32 * 11, 32 * 17, 32 * 26])
def test_the_byte_limit_holds_and_the_values_are_right(room: int) -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=room), examples()
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        pick = torch.randint(0, len(rows), (3,), generator=generator).tolist()
        batch = padded([rows[i] for i in pick], "right")
        for seed in (1, 2):
            assert_equal(both(trunk, view, objective, batch, seed))
        assert trunk.nbytes <= room
    assert trunk.why_not is None
    tokens = [LENGTHS[i] for i in range(6)]
    assert (trunk.rows == len(rows)) is (room >= 32 * sum(tokens))


def test_the_batch_at_hand_takes_the_place_of_older_rows() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=32 * 12), examples((6,) * 6)
    for first in (0, 2, 4):
        for _ in range(3):
            trunk_values = both(trunk, view, objective, padded(rows[first : first + 2], "right"))
            assert_equal(trunk_values)
        with counted(model) as ran, torch.no_grad():
            trunk.call(objective, padded(rows[first : first + 2], "right"))
        assert set(ran) == {2}


def test_room_that_changes_hands_is_read_anew() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=32 * 14), examples()
    for first, second in [(0, 1), (2, 3), (4, 5), (1, 2), (5, 0), (3, 4)] * 4:
        batch = padded([rows[first], rows[second]], "right")
        for seed in range(3):
            assert_equal(both(trunk, view, objective, batch, seed))
    assert trunk.why_not is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_memory_is_spent_on_padding(side: str) -> None:
    model = made("llama")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, batch = FrozenTrunk(view, max_bytes=32 * sum(LENGTHS)), padded(examples(), side, 30)
    for seed in range(3):
        assert_equal(both(trunk, view, objective, batch, seed))
    assert (trunk.why_not, trunk.rows) == (None, len(LENGTHS))


def test_rows_without_room_are_not_answered() -> None:
    model = made("bert")
    view, objective = ParameterView.last_layers(model, 1), logits_of(model)
    trunk, rows = FrozenTrunk(view, max_bytes=32 * 15), examples()
    small, large = padded(rows[1:4], "right"), padded([rows[0], rows[2], rows[4]], "right")
    form = form_of(small, calls_of(trunk, objective, small)[-1])
    assert form is not None
    with torch.no_grad(), pytest.raises(RefusedError, match="no room"):
        trunk.entering(objective, large, form)
