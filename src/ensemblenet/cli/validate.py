"""The command `validate`: what `test` does, on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ensemblenet.cli.test import score_split

__all__ = ["validate"]


def validate(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Score a trained network on validation examples, see [`ensemblenet.cli.test.test`][]."""
    return score_split("validate", "val", arguments)
