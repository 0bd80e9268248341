"""`python -m glpretrain.cli`: the console script, for when only the interpreter is at hand."""

import sys
from pathlib import Path

from glpretrain.cli import main

if __name__ == "__main__":
    if not sys.flags.safe_path:
        here = sys.path.pop(0)  # the interpreter puts the current folder there, where a file named like a package would replace it
        if Path(here) == Path(__file__).parents[2]:
            sys.path.append(here)  # a checkout that is not installed
    sys.exit(main())
