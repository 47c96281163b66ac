"""`python -m lightning_influence.cli`, for where the console script is not installed."""

import sys

from lightning_influence.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
