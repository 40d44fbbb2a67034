"""Studies: methods compared over several seeds, and the pages that show them."""

from ensemblenet.extras import require

require("study")
