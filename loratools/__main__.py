"""`python -m loratools`: the command line, where no script was installed."""

import sys

from loratools.cli import main

if __name__ == "__main__":
    sys.exit(main())
