"""The publisher's command line enters here."""

import sys

from casync_updater.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
