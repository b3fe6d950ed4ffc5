"""Errors that go from one rank to the others: their class by name, and their message."""

import builtins

import numpy as np

from zo_adapt import errors
from zo_adapt.errors import RankError

MOST_BYTES = 4096


class Stopped(Exception):
    """The callback has stopped the run, on this rank or on another. The loop ends the run."""


def carried(error: BaseException) -> np.ndarray:
    """An error as numbers."""
    text = f"{type(error).__name__}\n{error}".encode()[:MOST_BYTES]
    padded = text + bytes(-len(text) % 8)
    return np.concatenate([[len(text)], np.frombuffer(padded, np.int64)])


def rebuilt(payload: np.ndarray, rank: int) -> Exception:
    """The error that a rank has sent, with a note of where it was raised.

    One of a class that is neither Python's nor this package's is a ``RankError``.
    """
    text = payload[1:].tobytes()[: int(payload[0])].decode(errors="replace")
    name, _, message = text.partition("\n")
    if name == Stopped.__name__:
        return Stopped(message)
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    error: Exception = RankError(f"rank {rank} has raised {name}: {message}")
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(message)
        except TypeError:  # UnicodeError and others are made of more than a message
            return error
    error.add_note(f"raised on rank {rank}; see the output of that rank for where")
    return error
