"""How the event loop calls the store. Torch-free."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from sgl_diffusion.server.database import StoreUnavailable

log = logging.getLogger("sgl_diffusion")

RETRY_S = 1.0

P = ParamSpec("P")
T = TypeVar("T")


class StoreThread:
    """One thread, so that calls keep their order: a step is not recorded after the end of its job.

    Attributes:
        patient: whether `persist` tries for ever.
    """

    def __init__(self) -> None:
        self.patient = True
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises StoreUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(call, *args, **kwargs))

    async def persist(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Until the database takes it: what is finished is not lost for a full disk.

        Raises:
            StoreUnavailable: if not `patient`.
        """
        while True:
            try:
                return await self.run(call, *args, **kwargs)
            except StoreUnavailable as e:
                if not self.patient:
                    raise
                log.error("the state of a job is not stored, tried again in %g s: %s", RETRY_S, e)
            await asyncio.sleep(RETRY_S)
