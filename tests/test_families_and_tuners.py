"""Which model families and which of peft's tuners can be tuned, and what is refused by which error.

All of ``FAMILIES`` x ``VIEWS`` and of ``TUNERS`` can be: a probe restores every bit, three steps
run, every tensor of the view that is read moves and no other does, and the trajectory replayed on a
fresh model gives the same weights. ``REFUSED`` lists what cannot, with the named error.

``python benchmarks/families.py`` prints the same as a table.
"""

from pathlib import Path

import peft
import pytest
from many_families import FAMILIES, check
from many_views import REFUSED, TUNERS, VIEWS, mixture, tuner_of, view_of

pytestmark = [
    # peft reads an attribute of transformers by its former name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::zo_adapt.errors.UnreadTensorWarning"),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str, view: str) -> None:
    check(lambda: view_of(family, view), FAMILIES[family][0], tmp_path)


@pytest.mark.parametrize("tuner", TUNERS)
def test_tuners(tmp_path: Path, tuner: str) -> None:
    try:
        TUNERS[tuner]()
    except AttributeError as missing:
        if missing.obj is not peft:
            raise
        pytest.skip(f"peft {peft.__version__} has no {missing.name}")
    check(*tuner_of(tuner), tmp_path)


def test_a_mixture_of_saved_adapters(tmp_path: Path) -> None:
    check(mixture(tmp_path), "next", tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_named(tmp_path: Path, case: str) -> None:
    make, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        check(make, "next", tmp_path)
