"""Studies: methods compared over several seeds, and the pages that show them."""
