"""Rules by which `mmpre import` reads models of other libraries: one file a family."""
