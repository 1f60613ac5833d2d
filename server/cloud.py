"""Results in S3-compatible storage: generated here, uploaded in the background, then removed here. Torch-free.

What is still to be uploaded is in the job store alone, so that an outage or a restart loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.option import nearest
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.folders import REPORT, Folders
from sgl_diffusion.server.jobs import Job, UploadState
from sgl_diffusion.server.store import JobStore

TYPE = "SGLANG_CLOUD_STORAGE_TYPE"
PREFIX = "SGLANG_S3_"
REQUIRED = ("SGLANG_S3_BUCKET_NAME", "SGLANG_S3_ACCESS_KEY_ID", "SGLANG_S3_SECRET_ACCESS_KEY")
OPTIONAL = ("SGLANG_S3_ENDPOINT_URL", "SGLANG_S3_REGION_NAME")
DEFAULT_REGION = "us-east-1"
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 60.0
POLL_S = 1.0  # between looks for uploads whose next try is due; a new one wakes the uploader at once
STOP_TIMEOUT_S = 10.0  # for uploads under way at shutdown

log = logging.getLogger("sgl_diffusion.cloud")
T = TypeVar("T")


# -- the bucket ----------------------------------------------------------------------------


@dataclass(frozen=True)
class S3Settings:
    """A bucket and who writes to it. `endpoint_url` is None for Amazon's own."""

    bucket: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    endpoint_url: str | None = None
    region: str = DEFAULT_REGION


def read_settings(environment: Mapping[str, str]) -> S3Settings | None:
    """What the environment says of cloud storage; None where results stay here.

    Raises:
        UserError: a variable is missing, unknown or wrong; the message names it.
    """
    given = {name: value for name, value in environment.items() if name.startswith(PREFIX) and value}
    if not (kind := environment.get(TYPE, "")):
        if given:
            log.warning("%s is not set: results are not uploaded, whatever %s says", TYPE, ", ".join(sorted(given)))
        return None
    if kind != "s3":
        raise UserError(f"{TYPE}={kind}: expected s3")
    known = (*REQUIRED, *OPTIONAL)
    if unknown := sorted(given.keys() - set(known)):
        raise UserError(f"{unknown[0]}: is not a known variable{nearest(unknown[0], known)}")
    if missing := [name for name in REQUIRED if name not in given]:
        raise UserError(f"{TYPE}=s3 needs {' and '.join(missing)} in the environment")
    settings = S3Settings(
        bucket=given["SGLANG_S3_BUCKET_NAME"],
        access_key_id=given["SGLANG_S3_ACCESS_KEY_ID"],
        secret_access_key=given["SGLANG_S3_SECRET_ACCESS_KEY"],
        endpoint_url=given.get("SGLANG_S3_ENDPOINT_URL", "").rstrip("/") or None,
        region=given.get("SGLANG_S3_REGION_NAME", DEFAULT_REGION),
    )
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", settings.bucket) is None:
        raise UserError(f"SGLANG_S3_BUCKET_NAME={settings.bucket}: is no name of a bucket")
    _check_endpoint(settings.endpoint_url)
    return settings


def _check_endpoint(url: str | None) -> None:
    if url is None:
        return
    parts = urlsplit(url)
    if parts.username or parts.password:  # not repeated: it would be in logs, and in every result's URL
        raise UserError("SGLANG_S3_ENDPOINT_URL: may hold no user name or password; keys have variables of their own")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"SGLANG_S3_ENDPOINT_URL={url}: expected http(s)://HOST")


class CloudStorage:
    """Writes results into a bucket. Calls block; they may come from several threads.

    Raises:
        UserError: boto3 is not installed, or its own configuration is broken.
    """

    def __init__(self, settings: S3Settings) -> None:
        try:
            from boto3.session import Session
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ModuleNotFoundError as e:
            raise UserError(f"{TYPE}=s3 needs boto3: pip install 'sgl-diffusion[s3]'") from e
        self.settings = settings
        self._refusals: tuple[type[Exception], ...] = (BotoCoreError, ClientError, OSError)
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1},  # the uploader tries again, and says so
            # Trailing checksums are Amazon's own; other storages refuse them.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            ignore_configured_endpoint_urls=True,  # AWS_ENDPOINT_URL would make the public URLs untrue
        )
        try:
            session = Session(
                aws_access_key_id=settings.access_key_id,
                aws_secret_access_key=settings.secret_access_key,
                region_name=settings.region,
            )
            self._client: Any = session.client("s3", endpoint_url=settings.endpoint_url, config=config)
        except (BotoCoreError, ValueError) as e:
            raise UserError(f"{TYPE}=s3: {self._told(e)}") from e

    def put(self, job: Job, folder: Path) -> list[str]:
        """Uploads a job's results from their folder. Returns their public URLs, in order.

        Keys follow from the job alone: a second upload, after a crash, replaces the first by the same bytes.

        Raises:
            RunFailure: one line on what the storage, the network or the disk said.
        """
        urls = []
        for n, result in enumerate(job.results):
            key = _key(job, n)
            try:
                with (folder / result.name).open("rb") as file:
                    # In one request: a crash leaves either the whole object or none, and no parts that cost money.
                    self._client.put_object(
                        Bucket=self.settings.bucket, Key=key, Body=file, ContentType=result.media_type
                    )
            except self._refusals as e:
                raise RunFailure(f"bucket {self.settings.bucket}: {self._told(e)}") from e
            urls.append(self.public_url(key))
        return urls

    def get(self, job: Job, n: int) -> bytes:
        """One uploaded result, for a client that wants it in the answer itself.

        Raises:
            RunFailure: as `put`.
        """
        try:
            found = self._client.get_object(Bucket=self.settings.bucket, Key=_key(job, n))
            data: bytes = found["Body"].read()
        except self._refusals as e:
            raise RunFailure(f"bucket {self.settings.bucket}: {self._told(e)}") from e
        return data

    def public_url(self, key: str) -> str:
        """Where anyone finds an object, if the bucket lets them."""
        s = self.settings
        if s.endpoint_url is not None:
            return f"{s.endpoint_url}/{s.bucket}/{key}"
        return f"https://{s.bucket}.s3.{s.region}.amazonaws.com/{key}"

    def _told(self, error: Exception) -> str:
        """One line, without keys."""
        answer = getattr(error, "response", {}).get("Error", {})
        told = f"{answer['Code']}: {answer.get('Message', '')}" if "Code" in answer else str(error)
        for secret in (self.settings.secret_access_key, self.settings.access_key_id):
            told = told.replace(secret, "***")
        return " ".join(told.split())[:500] or type(error).__name__


def _key(job: Job, n: int) -> str:
    return f"{job.id}/{n}{PurePath(job.results[n].name).suffix}"


# -- the background ------------------------------------------------------------------------


class Uploader:
    """Uploads results of completed jobs, and removes them here; the report stays.

    An upload that fails is tried again for as long as the job is kept: after about 2 s, 4 s, 8 s ... 5 minutes.
    All methods belong to the event loop; what blocks is done in threads.

    Attributes:
        uploaded, failures: attempts that succeeded and that failed, since the start.
    """

    def __init__(
        self,
        store: JobStore,
        folders: Folders,
        storage: CloudStorage,
        *,
        first_delay_s: float = 2.0,
        longest_delay_s: float = 300.0,
        at_once: int = 4,
    ) -> None:
        self.uploaded = self.failures = 0
        self._store, self._folders, self._storage = store, folders, storage
        self._first_delay_s, self._longest_delay_s, self._at_once = first_delay_s, longest_delay_s, at_once
        # One thread more than uploads: a storage that hangs does not keep the store from being asked.
        self._threads = ThreadPoolExecutor(at_once + 1, thread_name_prefix="uploader")
        self._running: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._attempt_over: dict[str, asyncio.Event] = {}  # of jobs that someone waits for
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins with what earlier runs of the server left."""
        await self._in_thread(self._remove_leftovers)
        self._loop = asyncio.create_task(self._run(), name="uploader")

    async def stop(self) -> None:
        """Waits a little for uploads under way. What is not done is done after the next start."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])
        if running := list(self._running.values()):
            _, late = await asyncio.wait(running, timeout=STOP_TIMEOUT_S)
            for task in late:
                task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, job: Job, n: int) -> bytes:
        """A result that is not here any more. Raises RunFailure."""
        return await self._in_thread(lambda: self._storage.get(job, n))

    def wake(self) -> None:
        """A job with results to upload has completed."""
        self._woken.set()

    async def wait(self, job_id: str, timeout: float) -> Job | None:
        """The job once its results are uploaded, or as it is after `timeout` seconds; None if it was deleted."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        try:
            while True:
                attempt_over = self._attempt_over.setdefault(job_id, asyncio.Event())
                job = await self._in_thread(lambda: self._store.get(job_id))
                left = end - loop.time()
                if job is None or job.upload is not UploadState.WAITING or left <= 0:
                    return job
                with suppress(TimeoutError):  # another server of this store may be the one that uploads it
                    async with asyncio.timeout(min(left, POLL_S)):
                        await attempt_over.wait()
        finally:
            self._attempt_over.pop(job_id, None)

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            if free := self._at_once - len(self._running):
                for job in await self._take(free):
                    if job.id in self._running:  # given back in its name, when this server took over a dead one's work
                        continue
                    self._running[job.id] = asyncio.create_task(self._upload(job), name=f"upload of {job.id}")
            with suppress(TimeoutError):
                # Not `wait_for`: Python 3.11's loses a cancellation that comes together with the event.
                async with asyncio.timeout(POLL_S):
                    await self._woken.wait()

    async def _take(self, limit: int) -> list[Job]:
        """They are this server's until the outcome is recorded."""
        try:
            return await self._in_thread(lambda: self._store.uploads_due(limit))
        except StoreUnavailable as e:
            log.error("it cannot be told what to upload", extra={"fields": {"error": str(e)}})
            return []

    async def _upload(self, job: Job) -> None:
        results = self._folders.results(job.id)
        try:
            try:
                urls = await self._in_thread(lambda: self._storage.put(job, results))
            except RunFailure as e:
                self.failures += 1
                await self._record_failure(job, str(e))
            else:
                self.uploaded += 1
                await self._record_success(job, urls)
        finally:
            del self._running[job.id]
            self._woken.set()
            if over := self._attempt_over.pop(job.id, None):
                over.set()

    async def _record_success(self, job: Job, urls: list[str]) -> None:
        await self._insist(lambda: self._store.record_upload(job.id, urls=urls, error=None, next_at=None))
        # If this server was taken for dead, another one uploads them too, and still needs the files.
        now = await self._insist(lambda: self._store.get(job.id))
        if now is not None and now.upload is UploadState.UPLOADED:
            await self._in_thread(lambda: _remove_files(self._folders.results(job.id)))
        log.info("uploaded", extra={"fields": {"job": job.id, "files": len(urls)}})

    async def _record_failure(self, job: Job, told: str) -> None:
        # Doubles with every attempt; between half of it and the whole, lest all jobs of an outage come back at once.
        longest_s = min(self._longest_delay_s, self._first_delay_s * 2.0 ** min(job.upload_attempts, 30))
        delay_s = longest_s * random.uniform(0.5, 1.0)
        next_at = datetime.now(UTC) + timedelta(seconds=delay_s)
        await self._insist(lambda: self._store.record_upload(job.id, urls=None, error=told, next_at=next_at))
        log.warning(
            "upload failed", extra={"fields": {"job": job.id, "error": told, "next_try_in_s": round(delay_s, 1)}}
        )

    async def _insist(self, record: Callable[[], T]) -> T:
        """Until the store takes it: an upload without an outcome would be nobody's."""
        while True:
            try:
                return await self._in_thread(record)
            except StoreUnavailable as e:
                log.error("the outcome of an upload cannot be kept yet", extra={"fields": {"error": str(e)}})
                await asyncio.sleep(POLL_S)

    def _remove_leftovers(self) -> None:
        """Results that were uploaded, when the server died before it had removed them here."""
        for folder in (self._folders.root / "results").iterdir():
            if not folder.name.startswith(".") and any(file.name != REPORT for file in folder.iterdir()):
                job = self._store.get(folder.name)
                if job is not None and job.upload is UploadState.UPLOADED:
                    _remove_files(folder)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _remove_files(results: Path) -> None:
    """All but the report."""
    try:
        for file in results.iterdir():
            if file.name != REPORT:
                file.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # the job was deleted meanwhile, and all its files with it
    except OSError as e:
        log.warning("uploaded files cannot be removed here", extra={"fields": {"folder": results, "error": e.strerror}})
