"""The HTTP face: `sglang serve`. `run.py` is the file to read first."""
