"""Who may come in, and whose jobs they see: API keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from sgl_diffusion.server.errors import ApiError

ENVIRONMENT = "SGLANG_API_KEY"  # several are separated by commas
LOOPBACK = ("127.0.0.1", "::1", "localhost")

_bearer = HTTPBearer(auto_error=False, description="Asked for where the server has API keys.")


def api_keys(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """The keys of the command line and of the environment."""
    return [*given, *(key for key in environment.get(ENVIRONMENT, "").split(",") if key)]


class Gate:
    """Lets in who has a key; everybody, where there is none. Keys are kept as digests."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]

    @property
    def is_open(self) -> bool:
        return not self._digests

    def tenant(self, key: str | None) -> str:
        """The name under which the key's jobs are kept; empty without keys.

        Raises:
            ApiError: 401.
        """
        if self.is_open:
            return ""
        if key is None:
            raise _refused("missing_api_key", "an API key is needed: Authorization: Bearer <key>")
        digest = hashlib.sha256(key.encode()).hexdigest()
        # every comparison is made, so that the time taken tells nothing
        if sum(hmac.compare_digest(digest, known) for known in self._digests) == 0:
            raise _refused("invalid_api_key", "this API key is not one of this server's")
        return digest[:16]


def _refused(code: str, message: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"www-authenticate": "Bearer"})


async def admit(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    gate: Gate = request.app.state.gate
    request.state.tenant = tenant = gate.tenant(None if given is None else given.credentials)
    return tenant


Tenant = Annotated[str, Depends(admit)]
"""In a route's arguments: let only the invited in, and say who it is."""
