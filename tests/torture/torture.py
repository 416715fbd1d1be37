"""`python tests/torture/torture.py`: kill, interrupt, starve and damage runs, and compare."""

import os
import sys
from pathlib import Path

# Before torch is loaded: runs go on two at a time.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests' helpers, and this package under its own name.
sys.path.insert(0, str(Path(__file__).parents[1]))

from torture.command import main

if __name__ == "__main__":
    main()
