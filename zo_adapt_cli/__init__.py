"""The command line: ``zo-adapt info MODEL`` and ``zo-adapt tune --model ... --data ...``."""

import sys
import warnings
from collections.abc import Sequence

from zo_adapt.errors import ZOError

USAGE = """usage: zo-adapt info MODEL_OR_ADAPTER   what could be tuned, its memory and its queries
       zo-adapt tune --model ... --data FILE.jsonl --objective ... --view ...   (--help: all)
       python -m zo_adapt.trajectory info | verify | replay | export FILE"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a fault is one line and exit code 1.

    Args:
        arguments: The words after the program's name; None: those of the process.

    Example:
        >>> main(["--help"])  # doctest: +ELLIPSIS
        usage: zo-adapt info MODEL_OR_ADAPTER ...
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, *rest = words
    try:
        if command == "info":
            from zo_adapt_cli.info import main as run
        elif command == "tune":
            from zo_adapt_cli.tune import main as run
        else:
            sys.exit(f"no command {command!r}\n{USAGE}")
        with warnings.catch_warnings():
            # peft reads an attribute of transformers by its former name, and Trainer asks for
            # pinned memory on a CPU too: nothing that who gave a command could change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "'pin_memory' argument", UserWarning)
            run(rest)
    except (ZOError, OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
