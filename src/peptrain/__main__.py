"""`python -m peptrain`, and so `torchrun -m -- peptrain`."""

import sys

try:
    from peptrain.cli.app import main
except ModuleNotFoundError as missing:
    if missing.name != "tyro":
        raise
    sys.exit("error: the command needs tyro: pip install 'tyro>=1,<2' (the Python API does not)")

if __name__ == "__main__":
    sys.exit(main())
