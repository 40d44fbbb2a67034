"""What is kept on disk: run folders, saved models, the hub."""
