"""``python -m zo_adapt.serve ADAPTER_OR_MODEL`` prints the command that starts a server."""

from zo_adapt.serve.start_command import main

if __name__ == "__main__":
    raise SystemExit(main())
