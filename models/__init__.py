"""Architectures: one family a file, parameter names as in the checkpoint. `catalog` lists them without torch."""
