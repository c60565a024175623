"""`python -m pdiff` is the command `pdiff`."""

import sys

from pdiff.cli.main import main

sys.exit(main())
