"""Hyper-parameters as values: compared and printed as they were written, listed for a log."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class Settings:
    """Base of the frozen dataclasses that hold hyper-parameters, and nothing that changes.

    Example:
        >>> from zo_adapt.optimizers.estimator import OneSided
        >>> OneSided(4), OneSided(4) == OneSided(4, baseline="others")
        (OneSided(num_directions=4, baseline='others'), True)
    """

    def __repr__(self) -> str:
        """The call that makes it, keywords with their default left out."""
        values = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in sorted(dataclasses.fields(self), key=lambda field: bool(field.kw_only))
            if not field.kw_only or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(values)})"

    def settings(self) -> dict[str, Any]:
        """Every hyper-parameter by name, as JSON can hold it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _set(self, **values: Any) -> None:
        """Set fields while the object is made; from then on it is frozen."""
        vars(self).update(values)
