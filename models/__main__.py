"""``python -m models``: see :mod:`models.cli.main`."""

import sys

from models.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
