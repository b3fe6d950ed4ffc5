"""Which parameters a view exposes: by pattern, by depth, or all. No model is known by its name."""

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from zo_adapt.errors import ArgumentTypeError, NoMatchingParameterError, OptionError
from zo_adapt.view.blocks import block_list, names_after
from zo_adapt.view.inspection import Addresses
from zo_adapt.view.shards import gathering_modules

Parameters = dict[str, nn.Parameter]


def full(model: nn.Module) -> Parameters:
    """Every parameter, tied ones once.

    Raises:
        ArgumentTypeError: ``model`` is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is a {type(model).__name__}; give a torch.nn.Module, or tensors by name to "
            "ParameterView(tensors)"
        )
    gathering_modules(model)  # the parameters that last, not what they were gathered to
    return dict(model.named_parameters())


def trainable(model: nn.Module) -> Parameters:
    """Every parameter that requires a gradient, tied ones once."""
    return {name: p for name, p in full(model).items() if p.requires_grad}


def matching(model: nn.Module, pattern: str) -> Parameters:
    """Every parameter whose name the regular expression finds.

    Raises:
        NoMatchingParameterError: Nothing matches; near names are listed.
    """
    parameters = full(model)
    return {name: parameters[name] for name in names_matching(list(parameters), pattern)}


def names_matching(names: list[str], pattern: str) -> list[str]:
    """The names that a regular expression finds, in order.

    Raises:
        NoMatchingParameterError: Nothing matches, or the expression is not one.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise NoMatchingParameterError(
            f"{pattern!r} is not a regular expression: {error}"
        ) from error
    found = [name for name in names if expression.search(name)]
    if not found:
        raise NoMatchingParameterError(
            f"pattern {pattern!r} matches none of {len(names)} parameters; near names: "
            f"{_near(pattern, names)}"
        )
    return found


def names_listed(names: list[str], listed: Sequence[str]) -> list[str]:
    """The names that a list has, in order.

    Raises:
        NoMatchingParameterError: One of the list is not among the names.
    """
    known = frozenset(names)
    for name in listed:
        if name not in known:
            raise NoMatchingParameterError(
                f"{name!r} is none of {len(names)} parameters; near names: {_near(name, names)}"
            )
    wanted = frozenset(listed)
    return [name for name in names if name in wanted]


def _near(wanted: str, names: list[str]) -> list[str]:
    parts = {part for name in names for part in (name, name.rsplit(".", 1)[0], *name.split("."))}
    return difflib.get_close_matches(wanted, sorted(parts), n=5, cutoff=0.3) or names[:5]


def last_layers(model: nn.Module, n: int, head: bool) -> Parameters:
    """The last ``n`` of the model's repeated blocks and, with ``head``, what comes after them.

    Raises:
        ViewError: The model has no list of repeated blocks.
        OptionError: ``n`` is outside 0 .. number of blocks, or nothing would be selected.
    """
    full(model)
    path, blocks = block_list(model)
    if not 0 <= n <= len(blocks) or (n == 0 and not head):
        raise OptionError(
            f"n={n} layers of {len(blocks)} in {path!r}; choose 1..{len(blocks)} (0 with a head)"
        )
    first = len(blocks) - n
    later = names_after(model, path, blocks[min(first, len(blocks) - 1)]) if head else set()
    gathering_modules(model)
    prefixes = tuple(f"{path}.{index}." for index in range(first, len(blocks)))
    registered = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name for name in registered if name in later or name.startswith(prefixes)}
    # An embedding that is tied to a head is used outside, too.
    outside = Addresses({name: p for name, p in registered.items() if name not in chosen})
    return {
        name: registered[name]
        for name in registered
        if name in chosen and not outside.meeting(registered[name])
    }


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every place where a parameter is registered: module path, module, attribute, parameter."""
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield path, module, attribute, parameter
