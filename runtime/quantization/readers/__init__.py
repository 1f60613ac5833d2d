"""One format of quantised checkpoints a file: what it looks like, and how its codes become ours."""
