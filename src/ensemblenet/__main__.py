"""`python -m ensemblenet` is the command `ensemblenet`."""

import sys

from ensemblenet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
