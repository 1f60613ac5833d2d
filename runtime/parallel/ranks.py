"""This process among those that a launcher (torchrun, or ours) started together. Torch-free."""

from __future__ import annotations

import os


def started_ranks() -> int:
    """How many there are on all hosts; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Whether this is the one that users see."""
    return started_ranks() == 1 or os.environ["RANK"] == "0"


def local_rank() -> int:
    """Which one it is on its host: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
