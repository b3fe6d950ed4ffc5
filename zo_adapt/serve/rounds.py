"""Objectives that ask a served model, called in rounds: all questions of a round at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from zo_adapt.data.sources import Batch
from zo_adapt.errors import NotServableError, ServedModelError, ServerReplyError
from zo_adapt.evaluation.objective import Objective
from zo_adapt.interrupt import gradients_off
from zo_adapt.serve.asking import Answers, Question, Unanswered, answering
from zo_adapt.serve.protocol import BASE, Scores, ServedModel, Texts

ABOVE_ZERO = 2e-2
"""Up to here a log-probability above 0 is rounding (bf16)."""


class Task(NamedTuple):
    """A call of the objective for a part of a probe's batch, at the point of a candidate."""

    probe: int
    name: str
    part: Batch
    answers: Answers


def answered(
    function: Callable[[Any], Any], tasks: Sequence[Task], server: ServedModel
) -> list[Any]:
    """What the objective returned for every task: asked in rounds, all candidates in each."""
    values: dict[int, Any] = {}
    while len(values) < len(tasks):
        open_: dict[int, Question] = {}
        for index, task in enumerate(tasks):
            if index in values:
                continue
            try:
                task.answers.begin()
                with answering(task.answers):
                    values[index] = function(task.part.content)
            except Unanswered as signal:
                open_[index] = signal.question
                continue
            if not task.answers.asked:
                raise _asks_nothing(function)
        asked = [(tasks[index].name, question) for index, question in open_.items()]
        for (index, question), answer in zip(open_.items(), ask(server, asked), strict=True):
            tasks[index].answers.add(question, answer)
    return [values[index] for index in range(len(tasks))]


def ask(server: ServedModel, asked: Sequence[tuple[str, Question]]) -> list[Any]:
    """The answers to several questions, those of one kind in one call of the server."""
    answers: dict[int, Any] = {}
    kinds: dict[Any, list[int]] = {}
    for index, (_, question) in enumerate(asked):
        kinds.setdefault((question.kind, question.option), []).append(index)
    for (kind, option), indices in kinds.items():
        names = [asked[i][0] for i in indices for _ in asked[i][1].texts]
        texts = [text for i in indices for text in asked[i][1].texts]
        numbers = [number for i in indices for number in asked[i][1].numbers]
        found: Any
        if kind == "score":
            found = server.score(names, texts, starts=numbers, others=option)
            check_scores(found, texts)
        elif kind == "choose":
            found = server.choose(names, texts, option)
            check_choices(found, len(texts), option)
        else:
            found = server.generate(names, texts, option, numbers or None)
            _check_written(found, option.max_new_tokens)
        _check_count(len(found), len(texts))
        first = 0
        for index in indices:
            size = len(asked[index][1].texts)
            answers[index] = found[first : first + size]
            first += size
    return [answers[index] for index in range(len(asked))]


def _check_count(found: int, asked: int) -> None:
    if found != asked:
        raise ServedModelError(f"the server gave {found} answers to {asked} texts; ask its makers")


def check_scores(found: Sequence[Scores], texts: Texts) -> None:
    """Refuse what are no log-probabilities of these texts' tokens.

    Raises:
        ServerReplyError: Of another number of texts or tokens, or above 0.
    """
    _check_count(len(found), len(texts))
    for one, text in zip(found, texts, strict=True):
        if len(one.log_probs) != len(text):
            raise ServerReplyError(
                f"the server gave {len(one.log_probs)} scores of {len(text)} tokens; ask its makers"
            )
        if (one.log_probs > ABOVE_ZERO).any():  # never so of NaN, which a token before start has
            raise ServerReplyError(
                f"the server gave a log-probability of {np.nanmax(one.log_probs):.3g}, above 0: "
                "these are other numbers"
            )


def check_choices(found: np.ndarray, texts: int, choices: Sequence[int]) -> None:
    """Refuse what are no log-probabilities of different tokens in one place.

    Raises:
        ServerReplyError: Too few, one above 0, or more than 1 in sum; NaN is left to the run.
    """
    if np.shape(found) != (texts, len(choices)):
        raise ServerReplyError(
            f"the server gave log-probabilities of shape {np.shape(found)} for {len(choices)} next "
            f"tokens after {texts} texts"
        )
    _, different = np.unique(choices, return_index=True)
    with np.errstate(invalid="ignore"):
        whole = np.logaddexp.reduce(found[:, different], axis=1)
    if (whole > ABOVE_ZERO).any():  # never so of NaN
        raise ServerReplyError(
            "the server gave log-probabilities of next tokens above 0, or of more than 1 in sum: "
            "these are other numbers"
        )


def _check_written(found: Sequence[Sequence[int]], most: int) -> None:
    if any(token < 0 for ids in found for token in ids):
        raise ServerReplyError("the server wrote tokens below 0: these are other numbers")
    longest = max(map(len, found), default=0)
    if longest > most:
        raise ServerReplyError(
            f"the server wrote {longest} tokens where at most {most} were asked for; ask its makers"
        )


@contextmanager
def unloading(server: ServedModel, names: Sequence[str]) -> Iterator[None]:
    """Afterwards the adapters of these names are gone; names may still be added inside.

    Raises:
        ServedModelError: They are not unloaded. After another error, that one is raised.
    """
    try:
        yield
    except BaseException:
        # The server's last words are in the error; what it says on the way out hides nothing.
        with suppress(ServedModelError):
            server.unload(names)
        raise
    server.unload(names)


class AtOnce:
    """Answers every question when it is asked, for calls of an objective outside a step."""

    def __init__(self, server: ServedModel, name: str) -> None:
        self._server, self._name = server, name

    def to(self, question: Question) -> Any:
        """The answer."""
        return ask(self._server, [(self._name, question)])[0]


@contextmanager
def answered_by(server: ServedModel, name: str = BASE) -> Iterator[None]:
    """Inside, objectives of language models ask a server instead of the model that they were given.

    For values outside a run: of an adapter that is loaded there, of a prompt, of sampling options.

    Args:
        server: Who answers.
        name: Of a loaded adapter; "" is the base.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from objectives import CausalLMLoss
        >>> from zo_adapt import PeftServer
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> with answered_by(PeftServer(model)):
        ...     CausalLMLoss(model)([{"input_ids": [1, 2, 3]}]).shape
        torch.Size([1])
    """
    with gradients_off(), answering(AtOnce(server, name)):
        yield


def first_question(objective: Objective, content: Any) -> Question:
    """What an objective asks about the first examples; nothing is answered."""
    function: Any = getattr(objective, "predict", objective)
    evaluating = objective.evaluating
    try:
        with gradients_off(), answering(Answers()):
            if evaluating is None:
                function(content)
            else:
                with evaluating():
                    function(content)
    except Unanswered as signal:
        return signal.question
    raise _asks_nothing(objective)


def _asks_nothing(function: Any) -> NotServableError:
    name = type(getattr(function, "__self__", function)).__name__
    return NotServableError(
        f"{name} asked the served model nothing: it computes in this process, where the model "
        "does not move. On a server run CausalLMLoss, VerbalizerLoss, ExactMatch of these, "
        "GenerationReward, and what is made of them"
    )
