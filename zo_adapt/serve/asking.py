"""How an objective asks a model that is not here.

Objectives are plain functions of a batch. While ``answering`` is in force, those that know how put
their texts to ``elsewhere()`` instead of calling the model. Where the answer is not there yet, the
call ends by ``Unanswered``: the evaluator notes the question, goes on to the next candidate, has
the questions of all of them answered at once, and calls the objective again, now with the answer.
So a batch of candidates is one request, and no objective has to be written in two halves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from zo_adapt.errors import ObjectiveError
from zo_adapt.serve.protocol import Scores, Texts, Writing

Kind = Literal["score", "choose", "generate"]


class Question(NamedTuple):
    """What is asked about some texts.

    Args:
        kind: Which method of ``ServedModel``.
        texts: Token ids, text by text.
        option: Of all texts: whether others are wanted, the choices, or the ``Writing``.
        numbers: One of each text: its first token that is scored, or the seed of what is written.
    """

    kind: Kind
    texts: tuple[tuple[int, ...], ...]
    option: Any
    numbers: tuple[int, ...] = ()


class Unanswered(BaseException):
    """A signal to the evaluator, past whatever an objective catches: this has to be asked first."""

    def __init__(self, question: Question) -> None:
        super().__init__(question.kind)
        self.question = question


class Answers:
    """What was answered in former calls of an objective, in the order in which it asked."""

    def __init__(self) -> None:
        self._known: list[tuple[Question, Any]] = []
        self._next = 0

    @property
    def asked(self) -> int:
        """How many questions were answered."""
        return len(self._known)

    def begin(self) -> None:
        """The objective is about to be called, from its beginning."""
        self._next = 0

    def add(self, question: Question, answer: Any) -> None:
        """Keep an answer for the next call."""
        self._known.append((question, answer))

    def to(self, question: Question) -> Any:
        """The answer to the next question of this call.

        Raises:
            Unanswered: There is none yet.
            ObjectiveError: The call asks something else than the call before it.
        """
        if self._next == len(self._known):
            raise Unanswered(question)
        known, answer = self._known[self._next]
        self._next += 1
        if known != question:
            raise ObjectiveError(
                "the objective asked a served model two different things for one batch at one "
                "point; let what it asks depend on the batch alone"
            )
        return answer


class Answering(Protocol):
    """What answers, at once or later."""

    def to(self, question: Question) -> Any:
        """The answer."""


class Elsewhere:
    """The model, as an objective asks it; see ``ServedModel`` for the questions."""

    def __init__(self, answers: Answering) -> None:
        self._answers = answers

    def score(
        self, token_ids: Texts, starts: Sequence[int], *, others: bool = False
    ) -> list[Scores]:
        """Log-probabilities of the tokens from ``starts`` on."""
        texts = _frozen(token_ids)
        found: list[Scores] = self._answers.to(Question("score", texts, others, tuple(starts)))
        return found

    def choose(self, token_ids: Texts, choices: Sequence[int]) -> np.ndarray:
        """Log-probabilities of some tokens after every text."""
        found: np.ndarray = self._answers.to(Question("choose", _frozen(token_ids), tuple(choices)))
        return found

    def generate(
        self, token_ids: Texts, writing: Writing, seeds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """What the model goes on with after every text."""
        question = Question("generate", _frozen(token_ids), writing, tuple(seeds or ()))
        found: list[list[int]] = self._answers.to(question)
        return found


_current: ContextVar[Elsewhere | None] = ContextVar("elsewhere", default=None)


def elsewhere() -> Elsewhere | None:
    """The model to ask where it is not in this process's objective; None: it is."""
    return _current.get()


@contextmanager
def answering(answers: Answering) -> Iterator[None]:
    """Inside, objectives ask elsewhere."""
    token = _current.set(Elsewhere(answers))
    try:
        yield
    finally:
        _current.reset(token)


def _frozen(token_ids: Texts) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(text) for text in token_ids)
