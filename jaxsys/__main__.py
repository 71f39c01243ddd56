"""``python -m jaxsys``: the command line."""

import sys

from jaxsys.cli import main

if __name__ == "__main__":
    sys.exit(main())
