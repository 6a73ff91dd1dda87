"""The client's command line enters here."""

import sys

from casync_updater.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
