"""Attack what the library promises, and count what survives.

Signals at every instruction of every operation that writes weights or patches a model, kills of
runs that evaluate in every way, damaged and contested files, a full disk. Prints a table; exits
with an error if anything did not survive. About ten minutes on two cores.

    python benchmarks/attack.py
    python benchmarks/attack.py --quick
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

import broken_files
from attacked_work import (
    along_factors,
    applied,
    copied,
    joint,
    layerwise,
    modes,
    replayed,
    saved,
    trained,
    trunk,
)
from injected_signals import Outcome, Subject, attack, attack_by_timer, handlers
from killed_runs import KillError, Life, spend, tiny, ways
from soak import quiet

from zo_adapt import MeZOSVRG

UNTOUCHED = "weights, modules and handlers as before"
ONE_STEP = "file and weights of one step; resumed to the same bits"
EVERY = 10**6
"""More than there are instructions."""


class Report:
    """The table, and the faults below it."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._began = self._last = time.perf_counter()
        print(f"{'promise':<54} {'attack':<44} {'count':>6} {'survived':>8} {'s':>5}")

    def line(self, promise: str, name: str, count: int, faults: list[str]) -> None:
        """One line of the table."""
        self.faults += [f"{name}: {fault}" for fault in faults]
        last, self._last = self._last, time.perf_counter()
        survived, took = count - len(faults), self._last - last
        print(f"{promise:<54} {name:<44} {count:>6} {survived:>8} {took:>5.0f}", flush=True)

    def end(self) -> None:
        """The time, and the faults if there are any."""
        print(f"{time.perf_counter() - self._began:.0f} s")
        if self.faults:
            sys.exit("\n".join(self.faults))


def signalled(report: Report, folder: Path, quick: bool) -> None:
    """Signals at every instruction, or at many of them, and real ones from a timer."""
    optimizer = partial(MeZOSVRG, snapshot_interval=2)
    subjects: list[tuple[str, str, Callable[[], Subject], int]] = [
        (UNTOUCHED, "a probe by a copy", copied, EVERY),
        (UNTOUCHED, "a probe layer by layer", layerwise, 3000),
        (UNTOUCHED, "probes in one forward", joint, 2000),
        (UNTOUCHED, "probes of low rank", along_factors, 1000),
        (UNTOUCHED, "probes above a trunk", trunk, 1000),
        (UNTOUCHED, "evaluation mode", modes, 1000),
        ("an update whole or not begun", "apply", applied, EVERY),
        (ONE_STEP, "three steps of minimize", partial(trained, folder / "run", optimizer), 150),
        (
            "a checkpoint is whole or passed over",
            "a checkpoint of ZOTrainer",
            partial(saved, folder / "saved"),
            250,
        ),
        ("a replay knows its step", "replay", partial(replayed, folder), 500),
    ]
    with handlers():
        for promise, name, make, most in subjects:
            subject = make()
            one: Outcome = attack(subject, 25 if quick else most)
            report.line(promise, f"{name}: a signal at an instruction", one.attacked, one.faults)
            # Of long operations fewer: each is followed by runs that must be resumed.
            two = attack_by_timer(subject, 4 if quick else 200 if most > 250 else 50, seed=0)
            report.line(promise, f"{name}: a signal from a timer", two.attacked, two.faults)


def killed(report: Report, folder: Path, kills: int) -> None:
    """SIGKILL at random moments of runs of every kind."""
    found: dict[str, Life] = ways(tiny)
    for index, (name, life) in enumerate(found.items()):
        share, faults = len(range(index, kills, len(found))), []
        if not share:
            continue
        try:
            spend(life, share, folder / str(index), random.Random(index))
        except KillError as error:
            faults = [str(error)]
        report.line("resumed to the same bits", f"{name}: SIGKILL", share, faults)


def damaged(report: Report, folder: Path, quick: bool) -> None:
    """Files that are damaged, cut, contested or on a full disk."""
    few = 20 if quick else None
    seen = "noticed, and nothing applied"
    alone = "one writes, the other is refused"
    attacks: list[tuple[str, str, Callable[[Path], Iterable[str | None]]]] = [
        (seen, "a file with one byte changed, each", broken_files.flips),
        ("what is whole is replayed", "a file cut, at every length", broken_files.cuts),
        (alone, "a second writer", partial(broken_files.second_writers, pairs=4 if quick else 20)),
        (ONE_STEP, "a full disk, every 17 bytes", broken_files.full_disks),
    ]
    for index, (promise, name, make) in enumerate(attacks):
        place = folder / f"files{index}"
        place.mkdir()
        outcomes = []
        for outcome in make(place):
            outcomes.append(outcome)
            if few is not None and len(outcomes) >= few:
                break
        report.line(promise, name, len(outcomes), [one for one in outcomes if one is not None])


def main() -> None:
    """Attack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few of each, in a minute")
    args = parser.parse_args()
    quiet()
    report = Report()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        damaged(report, folder, args.quick)
        signalled(report, folder, args.quick)
        killed(report, folder / "kills", 4 if args.quick else 200)
    report.end()


if __name__ == "__main__":
    main()
