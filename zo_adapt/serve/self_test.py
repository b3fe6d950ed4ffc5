"""Whether a served model can be tuned by: seven questions before the first step.

An inference engine is made to serve, not to be differentiated by its values. What has gone wrong in
practice: an adapter that is ignored or applied in part, an adapter of the same name answered from a
cache, answers in another order, answers that depend on what else is in the batch, and arithmetic so
coarse that the difference of two nearby adapters is rounding.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zo_adapt.errors import SelfTestError, ServedModelError
from zo_adapt.evaluation.signal import LEAST, along, correlation, seeds
from zo_adapt.serve.asking import Question
from zo_adapt.serve.protocol import BASE, Candidate, Scores, ServedModel, Tuned, Writing
from zo_adapt.serve.report import Report
from zo_adapt.serve.rounds import check_choices, check_scores
from zo_adapt.term import Shift
from zo_adapt.view.precision import SHARE, finest_perturbation

TOKENS = 256
"""Length of the texts: prefix caches, which may answer under a stale name, begin at about 192."""
ROUNDING = 2e-2
"""Up to here two log-probabilities of a token are the same but for rounding (bf16)."""
UNMOVED = 1e-6
"""Up to here a score has not moved, in fp32."""
TRIES, SEED = 6, 7
"""eps goes up to 32 times the usual one: about as far as a whole run."""


class NewNames(Protocol):
    """Where names come from."""

    def new(self) -> str:
        """A name that was never used."""


class SelfTest:
    """Asks a server what a run depends on, each failure a named refusal.

    1. The base can be asked.
    2. An adapter with B = 0 equals the base.
    3. One candidate under two names: the noise floor.
    4. Order and company do not matter, and the adapter is applied to layers of every name.
    5. Signal: the differences at eps and 2 eps of a token's log-probability correlate by 0.9 or
       more; eps is doubled until they do.
    6. What was unloaded is gone.
    7. Only the base is left at the end.
    """

    def __init__(
        self, server: ServedModel, adapter: Tuned, question: Question, names: NewNames
    ) -> None:
        self._server, self._adapter, self._names = server, adapter, names
        self._writing = question.option if question.kind == "generate" else None
        self._texts = [_lengthened(text, self._room()) for text in question.texts[:2]]
        self._choices: Sequence[int] = question.option if question.kind == "choose" else ()
        self._loaded: list[str] = []
        self._used: set[str] = set()

    def run(self) -> Report:
        """All parts.

        Raises:
            SelfTestError: Names the part that failed and what follows from it.
        """
        try:
            asks = self._server.limits.scores or self._choices
            return self._parts() if asks else self._of_writing()
        finally:
            with suppress(ServedModelError):  # the first error is the one that says something
                self._server.unload(self._loaded)

    def _parts(self) -> Report:
        base = self._asked(1, [BASE] * len(self._texts))
        beside = self._check_zero(base)
        far = self._usual() * 2**TRIES
        here, there = self._adapter.at([Shift(()), self._shift(SEED, far)])
        shifted = self._of(first := self._load(there))
        self._unload([first])
        second = self._load(there)
        noise = self._equal(3, self._of(second), shifted, "one adapter under two names is not one")
        self._check_order(second, beside, base, shifted, noise)
        self._check_unloaded(second)
        self._check_layers(here, there, noise)
        self._unload([] if beside == BASE else [beside])
        found = self._signal(here, noise)
        self._check_left()
        return found

    def _check_zero(self, base: np.ndarray) -> str:
        """Part 2; the name of what equals the base, which stays loaded where there is room."""
        tensors = self._adapter.zero()
        if tensors is None:
            return BASE
        zero = self._load(tensors)
        self._equal(2, self._of(zero), base, "an adapter whose B is zero is not the base")
        if self._server.limits.adapters > 1:
            return zero
        self._unload([zero])
        return BASE

    def _check_order(
        self, name: str, beside: str, base: np.ndarray, shifted: np.ndarray, noise: float
    ) -> None:
        """Both adapters in one call, the texts turned round, and each of them twice."""
        if float(abs(base - shifted).max()) <= 2 * noise + UNMOVED:
            raise self._failed(
                4,
                "the server's scores do not change with the adapter: it is not applied, or not to "
                f"the layers {self._adapter.modules[:2]}; see --enable-lora and "
                "--lora-target-modules",
            )
        count = len(self._texts)
        names = [each for each in (name, beside) for _ in range(2 * count)]
        mixed = self._scores(4, names, [*self._texts[::-1]] * 4)
        turned = [*mixed[:count][::-1], *mixed[2 * count : 3 * count][::-1]]
        alone = np.concatenate([shifted, base])
        self._equal(
            4,
            np.concatenate(turned),
            alone,
            "scores depend on the order of the texts or on what else is asked at once",
        )

    def _check_layers(
        self, here: Mapping[str, Tensor], there: Mapping[str, Tensor], noise: float
    ) -> None:
        """Whether the adapter is applied to layers of every name, and not to some alone."""
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, tensor in there.items():
            if not torch.equal(tensor, here[name]):
                kinds.setdefault(_layer(name), {})[name] = tensor
        if len(kinds) < 2:
            return
        before = self._alone(here)
        for layer, moved in kinds.items():
            if float(abs(self._alone({**here, **moved}) - before).max()) <= 2 * noise + UNMOVED:
                raise self._failed(
                    4,
                    f"the server's scores do not change with the adapter of {layer}: it is not "
                    "applied there; see --lora-target-modules, or leave that layer out",
                )

    def _alone(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """The first text's scores under an adapter that is loaded for this alone."""
        name = self._load(tensors)
        (found,) = self._scores(4, [name], self._texts[:1])
        self._unload([name])
        return found

    def _check_unloaded(self, name: str) -> None:
        self._unload([name])
        try:
            self._ask([name], [self._texts[0]])
        except ServedModelError:
            return
        raise self._failed(
            6, f"{name!r} still answers after it was unloaded: candidates would be stale"
        )

    def _signal(self, here: Mapping[str, Tensor], noise: float) -> Report:
        """Doubles eps until the differences are more than rounding."""
        base = self._of(name := self._load(here))
        self._unload([name])
        eps, signal = self._usual(), 0.0
        for raised in range(TRIES):
            pairs = [self._differences(seed, eps, base) for seed in seeds()]
            once, twice = (np.concatenate(part) for part in zip(*pairs, strict=True))
            signal = correlation(once, twice)
            if signal >= LEAST:
                return Report(noise, signal, eps, raised)
            eps *= 2.0
        raise self._failed(
            5,
            f"differences at eps={eps / 2:.3g} and twice that correlate by {signal:.2f}, below "
            f"{LEAST}: they are rounding. Serve the model in float32 (--dtype float32), or "
            "quantise its weights alone",
        )

    def _differences(self, seed: int, eps: float, base: np.ndarray) -> tuple[np.ndarray, ...]:
        points = self._adapter.at([self._shift(seed, eps), self._shift(seed, 2 * eps)])
        found = []
        for tensors in points:
            found.append(self._of(name := self._load(tensors)) - base)
            self._unload([name])
        return tuple(found)

    def _check_left(self) -> None:
        left: list[str] = getattr(self._server, "loaded", list)()
        if own := sorted(set(left) & self._used):
            raise self._failed(7, f"{own} are left on the server")

    def _of_writing(self) -> Report:
        """The parts that texts alone can tell, for a server that gives no scores."""
        writing = self._writing or Writing(8)
        base = self._written(1, [BASE] * len(self._texts), writing)
        tensors = self._adapter.zero()
        zero = BASE if tensors is None else self._load(tensors)
        if self._written(2, [zero] * len(self._texts), writing) != base:
            raise self._failed(2, "an adapter whose B is zero does not write what the base does")
        self._unload([zero])
        self._check_left()
        return Report(math.nan, math.nan, 0.0)

    def _written(self, part: int, names: Sequence[str], writing: Writing) -> Any:
        try:
            return self._server.generate(names, self._texts, writing)
        except ServedModelError as error:
            raise self._failed(part, f"nothing was written ({error})") from error

    def _load(self, tensors: Mapping[str, Tensor]) -> str:
        name = self._names.new()
        self._loaded.append(name)
        self._used.add(name)
        self._server.load(Candidate(name, tensors), self._adapter.config)
        return name

    def _unload(self, names: Sequence[str]) -> None:
        try:
            self._server.unload(names)
        except ServedModelError as error:
            raise self._failed(6, f"an adapter cannot be unloaded ({error})") from error
        self._loaded = [name for name in self._loaded if name not in names]

    def _of(self, name: str) -> np.ndarray:
        return self._asked(3, [name] * len(self._texts))

    def _asked(self, part: int, names: Sequence[str]) -> np.ndarray:
        return np.concatenate(self._scores(part, names, self._texts))

    def _scores(
        self, part: int, names: Sequence[str], texts: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        try:
            found = self._ask(names, texts)
        except ServedModelError as error:
            raise self._failed(part, f"a text cannot be scored ({error})") from error
        first = 0 if self._choices else 1  # nothing is before a text's first token
        values = [one.log_probs[first:].astype(np.float64) for one in found]
        if not all(np.isfinite(each).all() for each in values):
            raise self._failed(part, "log-probabilities that are not finite")
        return values

    def _ask(self, names: Sequence[str], texts: Sequence[Sequence[int]]) -> list[Scores]:
        if self._choices:
            rows = self._server.choose(names, texts, self._choices)
            check_choices(rows, len(texts), self._choices)
            return [Scores(row) for row in rows]
        found = self._server.score(names, texts)
        check_scores(found, texts)
        return found

    def _equal(self, part: int, found: np.ndarray, wanted: np.ndarray, why: str) -> float:
        if not _same(found, wanted):
            most = float(abs(found - wanted).max())
            raise self._failed(part, f"{why}: a token's scores differ by {most:.2g}")
        return float(abs(found - wanted).max())

    def _failed(self, part: int, why: str) -> SelfTestError:
        return SelfTestError(f"self-test {part} of the served model failed: {why}")

    def _usual(self) -> float:
        view = self._adapter.view
        return max(SHARE * view.displacement, 4 * finest_perturbation(view))

    def _shift(self, seed: int, eps: float) -> Shift:
        return along(self._adapter.view, seed, eps)

    def _room(self) -> int:
        positions = self._server.limits.positions
        return TOKENS if positions is None else min(TOKENS, positions - 1)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether they differ by no more than rounding, on average."""
    return bool(abs(one - other).mean() <= ROUNDING)


def _layer(name: str) -> str:
    """The last name of the layer that a tensor of an adapter is of."""
    return name.partition(".lora_")[0].rpartition(".")[2]


def _lengthened(text: Sequence[int], length: int) -> list[int]:
    """The same tokens over and over, so that a text is long."""
    times = max(1, math.ceil(length / len(text)))
    return (list(text) * times)[: max(length, 2)]
