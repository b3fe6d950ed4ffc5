"""``python -m zo_adapt info | tune``: the command line, which is a package on top of this one."""

from importlib import import_module

if __name__ == "__main__":
    import_module("zo_adapt_cli").main()
