"""`python -m mmpre` is the command line."""

from mmpre.cli import main

main()
