"""Which model families and which of peft's tuners can be tuned: ok, or the named error.

Tiny models of random weights on a CPU; "ok" means what ``tests/many_families.py`` checks: a probe
restores every bit, three steps run, what is read of the view moves and nothing else does, and the
trajectory replayed on a fresh model gives the same weights.

    python benchmarks/families.py
"""

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from many_families import FAMILIES, check
from many_views import REFUSED, TUNERS, VIEWS, mixture, tuner_of, view_of

from zo_adapt import ParameterView
from zo_adapt.errors import ZOError


def outcome(make: Callable[[], ParameterView], task: str, folder: Path) -> str:
    """What the table says of one view: ok, or the named error."""
    try:
        check(make, task, folder)
    except ZOError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def in_a_new_folder(make: Callable[[], ParameterView], task: str) -> str:
    """The same, where nothing lies as yet."""
    with TemporaryDirectory() as temporary:
        return outcome(make, task, Path(temporary))


def main() -> None:
    """Print three tables."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    print(f"{'family':<14}", *(f"{view:<6}" for view in VIEWS))
    for family, (task, _) in FAMILIES.items():
        views = {view: (lambda f=family, v=view: view_of(f, v)) for view in VIEWS}
        found = [in_a_new_folder(make, task) for make in views.values()]
        print(f"{family:<14}", *(f"{one:<6}" for one in found), flush=True)
    print(f"\n{'tuner of peft':<26} outcome")
    for tuner in TUNERS:
        print(f"{tuner:<26} {in_a_new_folder(*tuner_of(tuner))}", flush=True)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"{'XLORA':<26} {outcome(mixture(folder), 'next', folder)}")
    print(f"\n{'refused':<30} error")
    for case, (make, _, _) in REFUSED.items():
        print(f"{case:<30} {in_a_new_folder(make, 'next')}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
