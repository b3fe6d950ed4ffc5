"""Data: examples, how they become a batch, and whether their classes are spread over it."""

from dataclasses import dataclass, field
from typing import Any

from zo_adapt.data.forms import Collate, rows_given
from zo_adapt.data.labels import class_labels
from zo_adapt.data.sources import Source, as_source
from zo_adapt.errors import ArgumentTypeError


@dataclass(frozen=True, eq=False)
class Data:
    """Examples with what is to be known of them, accepted wherever data are.

    Args:
        examples: None (the objective is called with None); a tensor, an array, or a tuple (x, y)
            or mapping of them, with one row an example; or a sequence of examples (a list, a torch
            or a Hugging Face dataset). A table (pandas, polars, pyarrow), lists by name and an
            array of objects become a sequence of examples; of a DataLoader its dataset and collate
            function are used, not its order.
        collate: Makes a batch of a list of examples; None: the objective's own ``collate`` or, if
            it has none, torch's default.
        stratify: Spread the classes evenly over every pass, where the examples have one integer
            each as ``labels`` or ``label``, or as the second of (x, y).

    Raises:
        ArgumentTypeError: A collate function that cannot be called, or data within data.
        DataError: Examples that cannot be rows of a batch.

    Example:
        >>> data = Data([1, 2, 3], collate=sum)
        >>> data.source().take([0, 2])
        4
    """

    examples: Any = field(default=None, repr=False)
    collate: Collate | None = None
    stratify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.examples, Data):
            raise ArgumentTypeError("examples is a Data already; use dataclasses.replace on it")
        if self.collate is not None and not callable(self.collate):
            raise ArgumentTypeError(
                f"collate is a {type(self.collate).__name__}; give a function of a list of examples"
            )
        examples, collate = rows_given(self.examples, self.collate)
        object.__setattr__(self, "examples", examples)
        object.__setattr__(self, "collate", collate)
        as_source(examples)

    def source(self, own: Collate | None = None) -> Source:
        """What batches are rows of.

        Args:
            own: The objective's collate function, for data that bring none.
        """
        return as_source(self.examples, self.collate or own)

    def classes(self) -> list[int] | None:
        """The class of every example where passes are to be stratified, or None."""
        return class_labels(self.examples) if self.stratify else None


def as_data(data: Any) -> Data:
    """The data as they are if they are a ``Data``, else as examples of one."""
    return data if isinstance(data, Data) else Data(data)
