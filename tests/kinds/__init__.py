"""Networks of the kinds that people own, each with inputs as its users give them; benchmarks/zoo.py converts all."""

from kinds.entry import Entry, Finding, check, check_base
from kinds.images import IMAGES
from kinds.sequences import SEQUENCES
from kinds.tables import TABLES
from kinds.transformers_models import TRANSFORMERS
from kinds.tricks import TRICKS

__all__ = ["BY_HAND", "TRANSFORMERS", "Entry", "Finding", "check", "check_base"]

BY_HAND = [*SEQUENCES, *IMAGES, *TABLES, *TRICKS]
