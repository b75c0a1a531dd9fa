"""`python -m anymask.check`."""

import sys

from anymask.check.command import main

if __name__ == "__main__":
    sys.exit(main())
