"""Training with Lightning."""

from ensemblenet.extras import require

require("train")
