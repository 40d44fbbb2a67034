"""What a trained network says of data, and how good that is."""

from ensemblenet.extras import require

require("train")
