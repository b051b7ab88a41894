"""`python -m liveact`: the command line."""

import sys

from liveact.commands.cli import main

sys.exit(main())
