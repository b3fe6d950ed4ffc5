"""``python -m zo_adapt.trajectory``; see ``trajectory_tools``."""

from zo_adapt.trajectory_tools import main

if __name__ == "__main__":
    main()
