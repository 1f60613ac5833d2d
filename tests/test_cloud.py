"""Results on their way to a bucket, over real HTTP: moto's server speaks S3's protocol."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

boto3 = pytest.importorskip("boto3")
httpx = pytest.importorskip("httpx")
moto = pytest.importorskip("moto.server")

from sgl_diffusion.runtime.errors import UserError  # noqa: E402
from sgl_diffusion.server.cloud import CloudStorage, S3Settings, Uploader, read_settings  # noqa: E402
from sgl_diffusion.server.database import StoreUnavailable  # noqa: E402
from sgl_diffusion.server.folders import REPORT, Folders  # noqa: E402
from sgl_diffusion.server.jobs import Job, Kind, NewJob, ResultFile, UploadState  # noqa: E402
from sgl_diffusion.server.store import JobStore  # noqa: E402

BUCKET = "pictures"
LEASE_S = 0.5
ENVIRONMENT = {
    "SGLANG_CLOUD_STORAGE_TYPE": "s3",
    "SGLANG_S3_BUCKET_NAME": "my-bucket",
    "SGLANG_S3_ACCESS_KEY_ID": "your-access-key",
    "SGLANG_S3_SECRET_ACCESS_KEY": "your-secret-key",
    "SGLANG_S3_ENDPOINT_URL": "https://minio.example.com",
}
PNG, MP4 = b"\x89PNG\r\n\x1a\n and so on", b"\0\0\0\x18ftypmp42 and so on" * 1000
REPORT_TEXT = '{"request_id": "1"}'


class S3:
    """A server with one bucket that everybody may read."""

    def __init__(self, port: int = 0) -> None:
        self._server = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self._server.start()
        self.url = "http://{}:{}".format(*self._server.get_host_and_port())
        admin = self._admin("s3")
        admin.create_bucket(Bucket=BUCKET)
        everybody = {
            "Effect": "Allow",
            "Principal": "*",
            "Action": "s3:GetObject",
            "Resource": f"arn:aws:s3:::{BUCKET}/*",
        }
        admin.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({"Version": "2012-10-17", "Statement": [everybody]}))

    def _admin(self, service: str) -> Any:
        return boto3.client(
            service, endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )

    def check_keys(self) -> None:
        """From now on requests need the keys of a user; there is none."""
        httpx.post(f"{self.url}/moto-api/reset-auth", content="0").raise_for_status()

    def stop(self) -> None:
        httpx.post(f"{self.url}/moto-api/reset").raise_for_status()
        self._server.stop()


@pytest.fixture
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    httpx.post(f"{server.url}/moto-api/reset-auth", content="inf")
    server.stop()


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = _open(tmp_path, "first")
    yield store
    store.close()


def _open(folder: Path, server_id: str) -> JobStore:
    return JobStore(f"sqlite:///{folder / 'jobs.db'}", server_id, lease_seconds=LEASE_S)


def completed(store: JobStore, folders: Folders, number: int = 0, kind: Kind = Kind.IMAGE) -> Job:
    """A job whose results (a clip, or two pictures) wait for their upload."""
    prefix = "video" if kind is Kind.VIDEO else "img"
    files = {"0.mp4": MP4} if kind is Kind.VIDEO else {"0.png": PNG, "1.png": PNG[::-1]}
    store.add(NewJob(f"{prefix}_{number:032x}", kind, {"prompt": ["x"]}), 100)
    (job,) = store.claim()
    folder = folders.results(job.id)
    folder.mkdir()
    (folder / REPORT).write_text(REPORT_TEXT)
    results = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        results.append(ResultFile(name, "video/mp4" if kind is Kind.VIDEO else "image/png", len(data), seed=1))
    ended = store.complete(job.id, results, UploadState.WAITING)
    assert ended is not None
    return ended


def storage(url: str, bucket: str = BUCKET, secret: str = "secret-of-tests") -> CloudStorage:
    return CloudStorage(S3Settings(bucket, "key-of-tests", secret, endpoint_url=url))


class Slow(CloudStorage):
    """Uploads when it is told to."""

    def __init__(self, url: str) -> None:
        super().__init__(storage(url).settings)
        self.asks = 0
        self.asked, self.go_on = threading.Event(), threading.Event()

    def put(self, job: Job, folder: Path) -> list[str]:
        self.asks += 1
        self.asked.set()
        assert self.go_on.wait(20)
        return super().put(job, folder)


@asynccontextmanager
async def uploading(store: JobStore, folders: Folders, cloud: CloudStorage) -> AsyncIterator[Uploader]:
    uploader = Uploader(store, folders, cloud, first_delay_s=0.1, longest_delay_s=0.2)
    await uploader.start()
    try:
        yield uploader
    finally:
        await uploader.stop()


async def until_tried(store: JobStore, job: Job, attempts: int = 1) -> Job:
    """The job after so many failed attempts."""
    async with asyncio.timeout(20):
        while (now := await asyncio.to_thread(store.get, job.id)) is None or now.upload_attempts < attempts:
            await asyncio.sleep(0.02)
    return now


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# -- what is uploaded ----------------------------------------------------------------------


def test_results_go_to_the_bucket_and_the_report_stays(s3: S3, store: JobStore, folders: Folders) -> None:
    async def scenario() -> list[Job]:
        async with uploading(store, folders, storage(s3.url)) as uploader:
            jobs = [completed(store, folders), completed(store, folders, 1, Kind.VIDEO)]
            uploader.wake()
            told = [await uploader.wait(job.id, timeout=20) for job in jobs]
            assert (uploader.uploaded, uploader.failures) == (2, 0)
            assert told[0] is not None and await uploader.fetch(told[0], 1) == PNG[::-1]
            return [job for job in told if job is not None]

    pictures, clip = asyncio.run(scenario())
    for job, contents, kind in ((pictures, [PNG, PNG[::-1]], "image/png"), (clip, [MP4], "video/mp4")):
        assert job.upload is UploadState.UPLOADED and job.upload_error is None
        suffix = job.results[0].name.rpartition(".")[2]
        assert [r.url for r in job.results] == [
            f"{s3.url}/{BUCKET}/{job.id}/{n}.{suffix}" for n in range(len(contents))
        ]
        for result, content in zip(job.results, contents, strict=True):
            answer = httpx.get(result.url)
            assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, content, kind)
        assert names(folders.results(job.id)) == [REPORT]


def test_a_new_result_is_not_kept_waiting(s3: S3, store: JobStore, folders: Folders) -> None:
    """An idle uploader looks once a second; woken, it begins at once."""

    async def scenario() -> float:
        async with uploading(store, folders, storage(s3.url)) as uploader:
            warm = completed(store, folders)
            uploader.wake()
            await uploader.wait(warm.id, timeout=20)
            await asyncio.sleep(0.1)  # idle again
            job = completed(store, folders, 1)
            began = asyncio.get_running_loop().time()
            uploader.wake()
            done = await uploader.wait(job.id, timeout=20)
            assert done is not None and done.upload is UploadState.UPLOADED
            return asyncio.get_running_loop().time() - began

    assert asyncio.run(scenario()) < 0.6


# -- what goes wrong -----------------------------------------------------------------------


def test_an_outage_is_told_and_waited_out(store: JobStore, folders: Folders) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def scenario() -> None:
        async with uploading(store, folders, storage(f"http://127.0.0.1:{port}")) as uploader:
            jobs = [completed(store, folders, n) for n in range(6)]
            uploader.wake()
            assert (waited := await uploader.wait(jobs[0].id, timeout=0.3)) is not None
            assert waited.upload is UploadState.WAITING, "a bounded wait"
            for job in jobs:
                told = await until_tried(store, job, attempts=2)
                assert "Could not connect" in (told.upload_error or "") and told.upload_next_at is not None
                assert names(folders.results(job.id)) == ["0.png", "1.png", REPORT], "kept here"
            assert uploader.uploaded == 0 and uploader.failures >= 12
            server = await asyncio.to_thread(S3, port)
            try:
                for job in jobs:
                    done = await uploader.wait(job.id, timeout=20)
                    assert done is not None and done.upload is UploadState.UPLOADED and done.upload_error is None
                    assert (await asyncio.to_thread(httpx.get, done.results[1].url)).content == PNG[::-1]
            finally:
                await asyncio.to_thread(server.stop)

    asyncio.run(scenario())


@pytest.mark.parametrize("wrong", ["bucket", "keys"])
def test_what_the_storage_refuses_is_told(s3: S3, store: JobStore, folders: Folders, wrong: str) -> None:
    if wrong == "keys":
        s3.check_keys()
    secret = "hush-hush-hush"

    async def scenario() -> Job:
        cloud = storage(s3.url, bucket="no-such-bucket" if wrong == "bucket" else BUCKET, secret=secret)
        async with uploading(store, folders, cloud):
            return await until_tried(store, completed(store, folders))

    job = asyncio.run(scenario())
    assert job.upload is UploadState.WAITING and job.upload_error is not None
    assert ("NoSuchBucket" if wrong == "bucket" else "InvalidAccessKeyId") in job.upload_error
    assert "\n" not in job.upload_error and secret not in job.upload_error


def test_a_storage_that_repeats_keys_is_not_quoted(store: JobStore, folders: Folders) -> None:
    class Echo(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = b"<Error><Code>Odd</Code><Message>key-of-tests and\nsecret-of-tests</Message></Error>"
            self.send_response(403)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    async def scenario() -> Job:
        async with uploading(store, folders, storage(f"http://127.0.0.1:{server.server_port}")):
            return await until_tried(store, completed(store, folders))

    try:
        assert asyncio.run(scenario()).upload_error == f"bucket {BUCKET}: Odd: *** and ***"
    finally:
        server.shutdown()
        server.server_close()


def test_an_outcome_waits_for_the_database(
    s3: S3, store: JobStore, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, busy = store.record_upload, iter([True, False])

    def record_late(*args: Any, **more: Any) -> None:
        if next(busy):
            raise StoreUnavailable("the database is locked")
        record(*args, **more)

    monkeypatch.setattr(store, "record_upload", record_late)

    async def scenario() -> None:
        job = completed(store, folders)
        async with uploading(store, folders, storage(s3.url)) as uploader:
            done = await uploader.wait(job.id, timeout=20)
            assert done is not None and done.upload is UploadState.UPLOADED
            assert uploader.uploaded == 1, "not uploaded again"

    asyncio.run(scenario())


def test_a_server_taken_for_dead_does_no_harm(s3: S3, store: JobStore, folders: Folders) -> None:
    """Its upload takes longer than its lease; another server has begun the same one, and still needs the files."""

    async def scenario(other: JobStore) -> None:
        slow, quick = Slow(s3.url), Slow(s3.url)
        job = completed(store, folders)
        async with uploading(store, folders, slow) as first:
            assert await asyncio.to_thread(slow.asked.wait, 20)
            await asyncio.sleep(LEASE_S + 0.1)
            other.reclaim()
            async with uploading(other, folders, quick) as second:
                assert await asyncio.to_thread(quick.asked.wait, 20)
                slow.go_on.set()
                await first.stop()
                assert names(folders.results(job.id)) == ["0.png", "1.png", REPORT]
                quick.go_on.set()
                done = await second.wait(job.id, timeout=20)
        assert done is not None and done.upload is UploadState.UPLOADED and done.upload_attempts == 0
        assert names(folders.results(job.id)) == [REPORT]

    other = _open(folders.root, "other")
    asyncio.run(scenario(other))
    other.close()


def test_an_upload_under_way_is_not_begun_twice(s3: S3, store: JobStore, folders: Folders) -> None:
    """Even where the store offers it again, as at a start that takes over what a dead server held."""

    async def scenario() -> None:
        job, slow = completed(store, folders), Slow(s3.url)
        async with uploading(store, folders, slow) as uploader:
            assert await asyncio.to_thread(slow.asked.wait, 20)
            store.release_own()
            uploader.wake()
            await asyncio.sleep(0.2)
            slow.go_on.set()
            done = await uploader.wait(job.id, timeout=20)
            assert done is not None and done.upload is UploadState.UPLOADED
            assert (slow.asks, uploader.uploaded) == (1, 1)

    asyncio.run(scenario())


def test_a_file_that_is_not_there_is_told(s3: S3, store: JobStore, folders: Folders) -> None:
    async def scenario() -> Job:
        job = completed(store, folders)
        (folders.results(job.id) / "1.png").unlink()
        async with uploading(store, folders, storage(s3.url)):
            return await until_tried(store, job)

    assert "1.png" in (asyncio.run(scenario()).upload_error or "")


def test_a_deleted_job_is_not_uploaded_again(s3: S3, store: JobStore, folders: Folders) -> None:
    async def scenario() -> None:
        job = completed(store, folders)
        store.delete(job.id)
        folders.remove(job.id)
        async with uploading(store, folders, storage(s3.url)) as uploader:
            uploader.wake()
            assert await uploader.wait(job.id, timeout=5) is None
            assert (uploader.uploaded, uploader.failures) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(6))
def test_it_stops_though_it_is_just_woken(turns: int, s3: S3, store: JobStore, folders: Folders) -> None:
    """So many turns of the event loop before: somewhere between, a cancellation and the event come together."""

    async def scenario() -> None:
        async with asyncio.timeout(20), uploading(store, folders, storage(s3.url)) as uploader:
            await asyncio.sleep(0.2)  # it has looked for uploads, and sleeps
            uploader.wake()
            for _ in range(turns):
                await asyncio.sleep(0)

    asyncio.run(scenario())


def test_a_restart_goes_on_where_uploads_stopped(s3: S3, folders: Folders) -> None:
    """The first server sees an outage and is gone; another one, of the same data, has nothing in memory."""

    async def outage(store: JobStore) -> list[Job]:
        jobs = [completed(store, folders, n) for n in range(3)]
        async with uploading(store, folders, storage("http://127.0.0.1:9")):
            return [await until_tried(store, job) for job in jobs]

    async def recovery(store: JobStore, jobs: list[Job]) -> None:
        leftover = folders.results(jobs[0].id) / "0.png"
        async with uploading(store, folders, storage(s3.url)) as uploader:
            for job in jobs:
                done = await uploader.wait(job.id, timeout=60)
                assert done is not None and done.upload is UploadState.UPLOADED
        leftover.write_bytes(PNG)  # as if the server had died between the record and the removal
        async with uploading(store, folders, storage(s3.url)):
            assert names(folders.results(jobs[0].id)) == [REPORT]

    first = _open(folders.root, "first")
    jobs = asyncio.run(outage(first))
    first.close()
    second = _open(folders.root, "second")
    asyncio.run(recovery(second, jobs))
    second.close()


# -- settings ------------------------------------------------------------------------------


def test_settings_are_those_of_the_documents() -> None:
    settings = read_settings(ENVIRONMENT)
    assert settings is not None
    assert settings == S3Settings("my-bucket", "your-access-key", "your-secret-key", "https://minio.example.com")
    assert "your-" not in repr(settings)
    assert CloudStorage(settings).public_url("img_1/0.png") == "https://minio.example.com/my-bucket/img_1/0.png"
    amazon = {k: v for k, v in ENVIRONMENT.items() if "ENDPOINT" not in k} | {"SGLANG_S3_REGION_NAME": "eu-north-1"}
    settings = read_settings(amazon)
    assert settings is not None
    assert CloudStorage(settings).public_url("v/0.mp4") == "https://my-bucket.s3.eu-north-1.amazonaws.com/v/0.mp4"


def test_without_a_type_results_stay_here(caplog: pytest.LogCaptureFixture) -> None:
    assert read_settings({"PATH": "/bin"}) is None and not caplog.messages
    assert read_settings({k: v for k, v in ENVIRONMENT.items() if "TYPE" not in k}) is None
    assert "SGLANG_CLOUD_STORAGE_TYPE is not set" in caplog.text and "your-secret-key" not in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"SGLANG_CLOUD_STORAGE_TYPE": "gcs"}, "SGLANG_CLOUD_STORAGE_TYPE=gcs: expected s3"),
        ({"SGLANG_S3_BUCKET_NAME": ""}, "needs SGLANG_S3_BUCKET_NAME"),
        ({"SGLANG_S3_SECRET_ACCESS_KEY": ""}, "needs SGLANG_S3_SECRET_ACCESS_KEY"),
        ({"SGLANG_S3_BUCKET_NAME": "a/b"}, "SGLANG_S3_BUCKET_NAME=a/b"),
        ({"SGLANG_S3_REGION": "x"}, "SGLANG_S3_REGION: is not a known variable; did you mean SGLANG_S3_REGION_NAME?"),
        ({"SGLANG_S3_ENDPOINT_URL": "minio"}, "SGLANG_S3_ENDPOINT_URL=minio: expected http"),
        ({"SGLANG_S3_ENDPOINT_URL": "http://me:hush@minio"}, "SGLANG_S3_ENDPOINT_URL: may hold no user name"),
    ],
)
def test_wrong_settings_are_refused_by_name(change: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=".*") as refusal:
        read_settings(ENVIRONMENT | change)
    assert told in str(refusal.value) and "hush" not in str(refusal.value)
    assert "\n" not in str(refusal.value) and "your-secret-key" not in str(refusal.value)


def test_without_boto3_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(UserError, match=r"pip install 'sgl-diffusion\[s3\]'"):
        storage("http://127.0.0.1:9")
