"""Commands that tests start as processes of their own."""

from __future__ import annotations

import os
from pathlib import Path


def own_environment(folder: Path) -> dict[str, str]:
    """Of a process of one thread that finds the user's module in a folder, and the package where tests find it."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
