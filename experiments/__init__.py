"""Programs that make the evidence: `python -m experiments.NAME`. Each imports PyTorch, which takes seconds."""

import sys

from harness.options import before_slow_imports

if sys.argv[0] == "-m":  # so it is while `python -m` looks for the program in this package
    before_slow_imports()
