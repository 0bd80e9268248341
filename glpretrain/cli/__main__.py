"""`python -m glpretrain.cli`: the console script for whoever has only the interpreter."""

import sys

from glpretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
