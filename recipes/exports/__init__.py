"""What `mmpre export` writes for other libraries: one file a class."""
