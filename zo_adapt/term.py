"""Terms: the one representation of estimates, updates, snapshots and log lines.

A direction is never stored, it is a seed. A tuple of terms ``(seed, coefficient)`` stands for the
vector ``sum_k coefficient_k * z(seed_k)`` over the parameters of a view.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

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

    def inverse(self) -> "Shift":
        """The way back: where this shift starts, seen from where it ends."""
        return Shift(scaled(self.terms, -1.0 / self.decay), 1.0 / self.decay)


HERE = Shift()
"""The live weights themselves."""


def check_directions(terms: Iterable[Term], groups: int) -> Terms:
    """Return the terms as a tuple after checking what they name, whatever their coefficients.

    Raises:
        TermError: A seed outside [0, 2**64), an unknown group.
    """
    checked = tuple(term if type(term) is Term else Term(*term) for term in terms)
    for term in checked:
        if not 0 <= term.seed < SEED_LIMIT:
            raise TermError(f"seed {term.seed} is outside 0 <= seed < 2**64")
        if term.group is not None and not 0 <= term.group < groups:
            raise TermError(f"group {term.group} is not one of the view's groups 0..{groups - 1}")
    return checked


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
