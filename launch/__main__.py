"""`python -m millrace.launch` is `millrace`."""

import sys

from millrace.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
