"""Every example in a docstring prints what it says."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import objectives
import zo_adapt
import zo_adapt_cli

MODULES = [
    module.name
    for package in (zo_adapt, objectives, zo_adapt_cli)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("default")  # of the libraries that an example uses
def test_examples_print_what_they_say(name: str) -> None:
    if ".triton_" in name and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0, f"python -m pytest --doctest-modules {name.replace('.', '/')}.py"
