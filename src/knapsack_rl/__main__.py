"""``python -m knapsack_rl`` is ``knapsack-rl``."""

import sys

from knapsack_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
