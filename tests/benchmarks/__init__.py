"""Performance claims: each figure is a command that prints a ratio measured in one run."""
