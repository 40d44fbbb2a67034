"""What is kept on disk: run folders, saved models, the hub."""

__all__ = ["TRUST_HELP"]

TRUST_HELP = "import and run what the folder names of its author's own code"  # of the option --trust, everywhere
