"""``python -m zo_adapt.trajectory info | verify | replay | export FILE``."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_adapt.errors import TrajectoryError, ZOError
from zo_adapt.trajectory.file import Reader
from zo_adapt.trajectory.playback import export, follow, replay
from zo_adapt.view.group import Group
from zo_adapt.view.parameters import ParameterView

ADAPTER = "adapter_model.safetensors"


def info(path: Path) -> str:
    """What the file says of itself, and how far it goes."""
    reader = Reader(path)
    steps = [step for step, _ in reader.steps()]
    header = reader.header
    numel = sum(torch.Size(shape).numel() for _, shape, _ in header["view"])
    rows: dict[str, Any] = {
        "file": f"{path} ({path.stat().st_size:,} bytes)",
        "view": f"{len(header['view'])} tensors, {numel:,} scalars",
        "noise": header["noise"],
        "initial weights": f"sha256 {header['initial']}",
        "written with": ", ".join(f"{name} {v}" for name, v in header["versions"].items()),
        "steps": len(steps),
        **header.get("settings", {}),
    }
    if steps:
        rows["queries"] = f"{steps[-1].queries:,}"
        rows["value"] = f"{steps[0].value:.4g} -> {steps[-1].value:.4g}"
    return "\n".join(shown(f"{name:20} {value}") for name, value in rows.items())


def shown(text: str) -> str:
    """Text of a file of another origin in one line, without codes that a terminal obeys."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def verify(path: Path) -> str:
    """Read every record and its checksum."""
    steps = sum(1 for _ in Reader(path).steps())
    return f"{path}: {steps} steps, every checksum is right"


def rebuild(path: Path, start: Path, until: int | None) -> tuple[dict[str, Tensor], int]:
    """The tensors of a step (None is the last), and its number; see ``starting``."""
    view = starting(path, start)
    steps = replay(view, path, until)
    return export(view), steps


def followed(args: argparse.Namespace) -> str:
    """Go along with a run that is still writing, a line for every step."""
    view, number = starting(args.file, args.start), 0
    for step in follow(view, args.file, until=args.until, patience=args.patience):
        number = step.step
        print(f"step {number}: value {step.value:.6g}, {step.queries:,} queries", flush=True)
    return json.dumps({"steps": number, "sha256": view.hash()})


def starting(path: Path, start: Path) -> ParameterView:
    """A view of the weights that a trajectory starts from.

    Args:
        path: The trajectory.
        start: A safetensors file, or the folder of the peft adapter as it was before tuning.

    Raises:
        TrajectoryError: A tensor of the view is not in ``start``, or the two do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = Reader(path).header
    try:
        saved = load_file(start / ADAPTER if start.is_dir() else start)
    except SafetensorError as error:
        raise TrajectoryError(f"{start} is no safetensors file ({error})") from error
    tensors = {}
    for name, _, _ in header["view"]:
        key = name if name in saved else adapter_key(name)
        if key not in saved:
            raise TrajectoryError(
                f"{start} has no tensor {key!r}; it holds {sorted(saved)[:3]} ..."
            )
        tensors[name] = saved[key]
    groups = [Group(*group) for group in header["groups"][:-1]]
    return ParameterView(tensors, noise=header["noise"], groups=groups)


def adapter_key(name: str) -> str:
    """The name that peft gives a parameter in an adapter's file."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def write(path: Path, start: Path, output: Path, until: int | None) -> str:
    """Write the tensors of a step: a safetensors file, or a peft adapter with its configuration."""
    from safetensors.torch import load_file, save_file

    began = time.perf_counter()
    tensors, steps = rebuild(path, start, until)
    if start.is_dir():
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(start / "adapter_config.json", output)
        saved = load_file(start / ADAPTER)
        saved |= {adapter_key(name): tensor for name, tensor in tensors.items()}
        save_file(saved, output / ADAPTER, metadata={"format": "pt"})
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, output)
    return f"step {steps} -> {output} ({time.perf_counter() - began:.2f} s)"


def main(arguments: list[str] | None = None) -> None:
    """The command line; a fault is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m zo_adapt.trajectory")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "what a file says of itself"),
        ("verify", "read every record and its checksum"),
        ("replay", "apply it and print the hash of the weights"),
        ("export", "write the weights of a step"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path)
        if name in ("replay", "export"):
            command.add_argument(
                "--start",
                type=Path,
                required=True,
                help="safetensors file or adapter folder that the run started from",
            )
            command.add_argument("--until", type=int, help="step; the last by default")
        if name == "replay":
            command.add_argument(
                "--follow", action="store_true", help="go along with a run that is still writing"
            )
            command.add_argument(
                "--patience", type=float, help="seconds without a new step that end it"
            )
        if name == "export":
            command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        print(_run(args))
    except (ZOError, OSError) as error:
        sys.exit(shown(f"{type(error).__name__}: {error}"))


def _run(args: argparse.Namespace) -> str:
    if args.command == "info":
        return info(args.file)
    if args.command == "verify":
        return verify(args.file)
    if args.command == "export":
        return write(args.file, args.start, args.output, args.until)
    if args.follow:
        return followed(args)
    tensors, steps = rebuild(args.file, args.start, args.until)
    digest = ParameterView(tensors).hash()
    return json.dumps({"steps": steps, "sha256": digest})
