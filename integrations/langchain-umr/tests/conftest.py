"""Lets the tests import the helper modules beside them, from whichever folder pytest is started."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
