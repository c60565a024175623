"""`python -m pdiff` is the command `pdiff`."""

import sys

from pdiff.cli.main import main

if __name__ == "__main__":  # and not in a process that this one spawns
    sys.exit(main())
