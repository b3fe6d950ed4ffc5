"""Arrays in, tensors inside, arrays of the same form out: for functions without a torch model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, from_numpy, nn

from zo_adapt.errors import ArgumentTypeError, ViewError
from zo_adapt.view.parameters import ParameterView
from zo_adapt.view.tensors import check_whole


class Form:
    """How the caller gave the variables: one array or a mapping, of numpy arrays or of tensors.

    Args:
        x0: An array, a tensor, numbers, or a mapping of names to these.

    Raises:
        ViewError: Something that is not numbers.

    Example:
        >>> form, tensors = Form.of({"a": [1, 2]})
        >>> tensors["a"].dtype, form.filled(tensors)
        (torch.float64, {'a': array([1., 2.])})
    """

    def __init__(self, x0: Any) -> None:
        self.single = not isinstance(x0, Mapping)
        named = {"x": x0} if self.single else dict(x0)
        self.as_tensor = {name: isinstance(value, Tensor) for name, value in named.items()}

    @classmethod
    def of(cls, x0: Any) -> tuple["Form", dict[str, Tensor]]:
        """The form, and copies of the variables as tensors.

        Raises:
            ViewError: An empty array.
            ArgumentTypeError: A model or a view.
        """
        if isinstance(x0, nn.Module | ParameterView):
            raise ArgumentTypeError(
                f"x0 is a {type(x0).__name__}; give an array, a tensor or a mapping of these, or "
                "tune a model by minimize(objective, view, data)"
            )
        form = cls(x0)
        named = {"x": x0} if form.single else x0
        copies = {name: _copied(name, value) for name, value in named.items()}
        if empty := sorted(name for name, tensor in copies.items() if tensor.numel() == 0):
            raise ViewError(f"{empty} has no elements; leave it out")
        return form, copies

    def filled(self, tensors: Mapping[str, Tensor]) -> Any:
        """Copies of the tensors, in the caller's form."""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        given: dict[str, Any] = {
            name: copies[name] if as_tensor else copies[name].numpy()
            for name, as_tensor in self.as_tensor.items()
        }
        return given["x"] if self.single else given


def _copied(name: str, value: Any) -> Tensor:
    """Integers and lists become float64, as scipy has it; other dtypes stay."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    check_whole(name, value)
    array = np.asarray(value)
    native = np.float64 if array.dtype.kind in "iu" else array.dtype.newbyteorder("=")
    try:
        return from_numpy(array.astype(native, order="C"))
    except TypeError as error:
        raise ViewError(f"{name!r} is of type {array.dtype}, not numbers") from error
