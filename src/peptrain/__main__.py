"""`python -m peptrain`, and so `torchrun -m peptrain`."""

import sys

from peptrain.cli import main

sys.exit(main())
