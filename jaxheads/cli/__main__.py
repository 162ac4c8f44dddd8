"""`python -m jaxheads.cli`, for where the script is not on the path."""

import sys

from jaxheads.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
