"""``python -m zo_adapt.trajectory``; see ``tools``."""

from zo_adapt.trajectory.tools import main

if __name__ == "__main__":
    main()
