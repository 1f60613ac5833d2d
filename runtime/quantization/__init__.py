"""Smaller weights: schemes that make them while loading, readers of checkpoints that have them, and their layers."""
