"""`python -m glpretrain.cli`: the console script, for when only the interpreter is at hand."""

import sys

from glpretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
