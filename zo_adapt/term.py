"""What a run is made of: directions with coefficients, shifts of weights, steps."""

import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

from zo_adapt.errors import TermError

SEED_LIMIT = 2**64


class Term(NamedTuple):
    """``coefficient * z(seed)``, over the whole view or over one group of it.

    Args:
        seed: Names the direction z(seed); 0 <= seed < 2**64.
        coefficient: What the direction is multiplied by, in the parameters' units.
        group: Restricts the direction to one group of the view (its index); None is the whole view.

    Example:
        >>> Term(seed=1, coefficient=1e-3)
        Term(seed=1, coefficient=0.001, group=None)
    """

    seed: int
    coefficient: float
    group: int | None = None


Terms = tuple[Term, ...]


def scaled(terms: Iterable[Term], factor: float) -> Terms:
    """Multiply every coefficient by ``factor``."""
    return tuple(term._replace(coefficient=term.coefficient * factor) for term in terms)


def coalesced(terms: Iterable[Term]) -> Terms:
    """Sum the coefficients of equal directions, so that a long list of updates stays short.

    Args:
        terms: Any terms; those with equal (seed, group) become one, in order of first appearance.

    Example:
        >>> coalesced([Term(1, 0.5), Term(2, 1.0), Term(1, 0.25)])
        (Term(seed=1, coefficient=0.75, group=None), Term(seed=2, coefficient=1.0, group=None))
    """
    terms = tuple(terms)
    if len({(seed, group) for seed, _, group in terms}) == len(terms):
        return terms
    total: dict[tuple[int, int | None], float] = {}
    for seed, coefficient, group in terms:
        total[seed, group] = total.get((seed, group), 0.0) + coefficient
    return tuple(Term(seed, value, group) for (seed, group), value in total.items())


class Shift(NamedTuple):
    """A place seen from another, or the step that leads there.

    theta -> decay * theta + sum_k c_k z(s_k)

    What a probe is evaluated at, what an update applies, and where a snapshot lies from here.

    Args:
        terms: The directions and how far along each; of an update, learning rate and sign included.
        decay: Factor on theta itself (decoupled weight decay); 1.0 is none.

    Example:
        >>> there = Shift((Term(1, 0.5),)).then(Shift((Term(1, 0.25),), decay=0.5))
        >>> there
        Shift(terms=(Term(seed=1, coefficient=0.5, group=None),), decay=0.5)
        >>> there.then(there.inverse()) == Shift((Term(1, 0.0),))
        True
    """

    terms: Terms = ()
    decay: float = 1.0

    def then(self, shift: "Shift") -> "Shift":
        """This shift followed by another: d2 (d1 theta + u1) + u2."""
        return Shift(
            coalesced((*scaled(self.terms, shift.decay), *shift.terms)), self.decay * shift.decay
        )

    def plus(self, terms: Iterable[Term]) -> "Shift":
        """This place and some directions more, each direction once."""
        return self._replace(terms=coalesced((*self.terms, *terms)))

    def inverse(self) -> "Shift":
        """The way back: where this shift starts, seen from where it ends."""
        return Shift(scaled(self.terms, -1.0 / self.decay), 1.0 / self.decay)


HERE = Shift()
"""The live weights themselves."""


def check_directions(terms: Iterable[Term], groups: int) -> Terms:
    """Return the terms as a tuple after checking what they name, whatever their coefficients.

    Raises:
        TermError: A seed outside [0, 2**64), an unknown group, or something else than numbers.
    """
    checked = tuple(map(_as_term, terms))
    for term in checked:
        if not 0 <= term.seed < SEED_LIMIT:
            raise TermError(f"seed {term.seed} is outside 0 <= seed < 2**64")
        if term.group is not None and not 0 <= term.group < groups:
            raise TermError(f"group {term.group} is not one of the view's groups 0..{groups - 1}")
    return checked


def _as_term(given: Iterable[Any]) -> Term:
    """A term of Python's own numbers, whatever library they are of."""
    term = given if type(given) is Term else Term(*given)
    if type(term.seed) is int and type(term.coefficient) is float and term.group is None:
        return term
    try:
        if bool in (type(term.seed), type(term.group), type(term.coefficient)):
            raise TypeError("a truth value")
        if isinstance(term.coefficient, str | bytes):
            raise TypeError("text")
        group = None if term.group is None else operator.index(term.group)
        return Term(operator.index(term.seed), float(term.coefficient), group)
    except (TypeError, ValueError, OverflowError) as error:
        raise TermError(
            f"{term!r:.120} ({error}): a seed and a group are integers, a coefficient is a number"
        ) from error


def check_terms(terms: Iterable[Term], groups: int) -> Terms:
    """Return the terms as a tuple after checking their ranges.

    Raises:
        TermError: A seed outside [0, 2**64), a coefficient that is not finite, an unknown group.
    """
    checked = check_directions(terms, groups)
    for term in checked:
        if not math.isfinite(term.coefficient):
            raise TermError(f"coefficient {term.coefficient} of seed {term.seed} is not finite")
    return checked


MEASUREMENT = "measurement"
"""The kind of what moves nothing: optimizers find by it how far steps may go."""


class Step(NamedTuple):
    """One step of a run.

    Args:
        step: Number of the step, from 1.
        queries: Forwards of one sample so far, this step's included.
        value: Mean of the objective over the step's batch at the weights before the step, or at the
            perturbed points where the step asks about no others.
        lr: Learning rate applied, schedule and annealing included.
        projected_gradient: Root mean square of the step's projected gradients; NaN first-order.
        update: The shift applied; ``HERE`` for a first-order step, and in what callbacks and the
            history are given.
        kind: "minibatch", or "snapshot" for a large-batch step. By ask and tell also "measurement",
            which moves nothing and is no step.
        metrics: The watched metrics after the step, where they were due.

    Example:
        >>> Step(step=1, queries=128, value=0.7, lr=0.1, projected_gradient=2.0).kind
        'minibatch'
    """

    step: int
    queries: int
    value: float
    lr: float
    projected_gradient: float
    update: Shift = HERE
    kind: str = "minibatch"
    metrics: dict[str, float] | None = None

    def brief(self) -> "Step":
        """The step without its terms, of which a long history would be full; files keep them."""
        return self._replace(update=HERE)
