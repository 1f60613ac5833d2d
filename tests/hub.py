"""A hub cache in a folder, so that ids of published checkpoints resolve to tiny ones, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def publish(checkpoint: Path, repo_id: str, cache: Path, sampling_defaults: Mapping[str, Any] | None = None) -> None:
    """Puts a copy of the checkpoint where `huggingface_hub` keeps downloads (`HF_HUB_CACHE`).

    Args:
        sampling_defaults: the checkpoint's own defaults, for a size that a test has time for.
    """
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(checkpoint, snapshot)
    if sampling_defaults is not None:
        (snapshot / "sampling_defaults.json").write_text(json.dumps(sampling_defaults))
