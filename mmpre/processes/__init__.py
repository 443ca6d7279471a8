"""The processes of a run: those that torchrun started, how they keep together, and how they end."""
