"""`python -m umr_plugins.cli` is `umr`."""

from __future__ import annotations

import sys

from umr_plugins.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
