"""What the engine has said of requests, kept for those that are like them. Torch-free."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from sgl_diffusion.runtime.checked import Checked

MOST = 256  # kept; the one that was not asked for the longest goes


class Verdicts:
    """Most requests to a server differ from an earlier one in prompt and seed alone: the engine is not asked again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Checked] = OrderedDict()

    def find(self, sampling: Mapping[str, Any]) -> Checked | None:
        """What a request of these fields of `SamplingParams` comes to, if that is known."""
        key = _settings(sampling)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, sampling: Mapping[str, Any], checked: Checked) -> None:
        """Takes what the engine has said, if it says that it holds for others."""
        if checked.for_any_prompt:
            self._kept[_settings(sampling)] = checked
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)

    def forget(self) -> None:
        """All of them: there is another engine now."""
        self._kept.clear()


def _settings(sampling: Mapping[str, Any]) -> str:
    """All but the words of prompts and the seeds."""
    settings = dict(sampling)
    for name in ("prompt", "seed"):
        given = settings.pop(name, None)
        settings[f"number of {name}s"] = len(given) if isinstance(given, list) else 1
    return json.dumps(settings, sort_keys=True)
