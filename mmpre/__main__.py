"""`python -m mmpre` is the command line."""

from mmpre.command_line.cli import main

main()
