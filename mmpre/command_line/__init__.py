"""The command line: what is asked for, and what each command does."""
