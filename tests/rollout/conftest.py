"""Shares the SDK's test doubles, and starts the real services once for the tests that need them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "sdk"))
