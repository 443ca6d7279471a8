"""A run: its folder, its record and checkpoints, and how it begins, goes on and is looked at."""
