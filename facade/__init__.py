"""sgl-diffusion: `from sgl_diffusion import Engine, SamplingParams, ServerArgs`. Names load when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
    from sgl_diffusion.runtime.engine import Engine
    from sgl_diffusion.runtime.errors import UserError

__all__ = ["Engine", "SamplingParams", "ServerArgs", "UserError"]

_HOMES = {"Engine": "engine", "SamplingParams": "args", "ServerArgs": "args", "UserError": "errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sgl_diffusion' has no attribute {name!r}")
    return getattr(import_module(f"sgl_diffusion.runtime.{_HOMES[name]}"), name)
