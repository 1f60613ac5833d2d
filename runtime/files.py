"""How results get onto the disk: a file appears whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgl_diffusion.runtime.errors import RunFailure


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to. It takes the name when the block ends well, and is gone when it does not.

    Raises:
        RunFailure: the disk does not take the file.
    """
    part = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as e:
        raise RunFailure(f"{path} cannot be written: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)
