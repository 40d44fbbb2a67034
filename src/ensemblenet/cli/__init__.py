"""The command line: `main` finds the command, one file holds one command."""
