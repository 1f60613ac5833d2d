"""News of jobs, and who waits for them in this process. Torch-free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sgl_diffusion.server.jobs import Ended, Job, JobEvent, Preview, Progress

RECORDED_WITHIN_S, LOOK_EVERY_S = 1.0, 0.002  # an end that was told


class Feed:
    """What one watcher has not taken yet.

    A slow one does not hold up the others, nor fill the memory: progress that it did not see is replaced by the newer.
    Nothing else is dropped.

    Args:
        end_only: the watcher sleeps until the end.
    """

    def __init__(self, *, end_only: bool = False) -> None:
        self._end_only = end_only
        self._events: deque[JobEvent | None] = deque()
        self._some = asyncio.Event()

    def put(self, event: JobEvent | None) -> None:
        """None: nothing more will be told."""
        if self._end_only and isinstance(event, Progress | Preview):
            return
        if isinstance(event, Progress) and self._events and isinstance(self._events[-1], Progress):
            self._events.pop()
        self._events.append(event)
        self._some.set()

    async def get(self) -> JobEvent | None:
        while not self._events:
            self._some.clear()
            await self._some.wait()
        return self._events.popleft()


class News:
    """What is told of jobs: to those who watch one, and to those who follow all.

    Attributes:
        on_event: called with all progress and previews of this server's jobs, in the event loop.
        on_end: called with every job that ends here.
        drawn: jobs as they end, by their ids, while that is being recorded.
    """

    def __init__(self) -> None:
        self.on_event: list[Callable[[str, Progress | Preview], None]] = []
        self.on_end: list[Callable[[Job], None]] = []
        self.drawn: dict[str, Job] = {}
        self._feeds: dict[str, set[Feed]] = {}
        self._last: dict[str, Progress] = {}  # of jobs that are worked on

    @contextmanager
    def feed(self, job_id: str, *, end_only: bool = False) -> Iterator[Feed]:
        """Of one job, for one watcher. It begins with the last progress."""
        feed = Feed(end_only=end_only)
        if job_id in self._last:
            feed.put(self._last[job_id])
        feeds = self._feeds.setdefault(job_id, set())
        feeds.add(feed)
        try:
            yield feed
        finally:
            feeds.discard(feed)
            if not feeds:
                self._feeds.pop(job_id, None)

    def tell(self, job_id: str, event: Progress | Preview) -> None:
        if isinstance(event, Progress):
            self._last[job_id] = event
        for feed in self._feeds.get(job_id, ()):
            feed.put(event)
        for hook in self.on_event:
            hook(job_id, event)

    def tell_drawn(self, job: Job) -> None:
        """A job as it ends, to those who wait for its results."""
        self._last.pop(job.id, None)
        self.drawn[job.id] = job
        for feed in self._feeds.get(job.id, ()):
            feed.put(Ended(job))

    def tell_end(self, job: Job) -> None:
        """A job has ended, and that is recorded."""
        self.forget(job.id)
        for feed in self._feeds.get(job.id, ()):
            feed.put(Ended(job))
        for hook in self.on_end:  # after those who wait for the results
            asyncio.get_running_loop().call_soon(hook, job)

    async def recorded(self) -> None:
        """Until the ends that were told are in the store, with the reports; or until that takes too long."""
        told = set(self.drawn)
        with suppress(TimeoutError):
            async with asyncio.timeout(RECORDED_WITHIN_S):
                while told & self.drawn.keys():
                    await asyncio.sleep(LOOK_EVERY_S)

    def forget(self, job_id: str) -> None:
        """It is not worked on any more."""
        self._last.pop(job_id, None)
        self.drawn.pop(job_id, None)

    def dismiss(self, is_one: Callable[[str], bool]) -> None:
        """Tells the watchers of these jobs that nothing more will be told."""
        for job_id, feeds in self._feeds.items():
            if is_one(job_id):
                for feed in feeds:
                    feed.put(None)
