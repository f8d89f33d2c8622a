"""``python -m dmc`` and ``torchrun -m dmc`` are the console command."""

import sys

from dmc.cli import main

sys.exit(main())
