"""Clips over HTTP: a real `sglang serve` with a tiny checkpoint, asked by the official client."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import pytest
from PIL import Image
from server_process import ServerProcess, documented, run_documented, serving, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

PROMPT = "A calico cat playing a piano on stage"
TINY: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2}
LONG: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 1000}


@pytest.fixture(scope="module")
def server(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = (str(tiny("wan")), "--served-model-name", "tiny", "--retain-days", "2")
    with serving(tmp_path_factory.mktemp("videos"), flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(api_key="sk-proj-1234567890", base_url=server.api, max_retries=0)


@pytest.fixture(scope="module")
def video(client: openai.OpenAI) -> openai.types.Video:
    """A completed one."""
    video = client.videos.create_and_poll(prompt=PROMPT, size="48x32", poll_interval_ms=100, extra_body=TINY)
    assert video.status == "completed", video.error
    return video


def test_the_documents_example(client: openai.OpenAI, tmp_path: Path) -> None:
    video = client.videos.create(prompt=PROMPT, size="48x32", extra_body=TINY)
    assert (video.object, video.status, video.size, video.progress) == ("video", "queued", "48x32", 0)

    def listed() -> bool:
        page = client.videos.list()
        item = next((v for v in page.data if v.id == video.id), None)
        return item is not None and item.status == "completed"

    wait_for(listed, every=0.2)
    path = tmp_path / "output.mp4"
    path.write_bytes(client.videos.download_content(video_id=video.id).read())
    with av.open(str(path)) as clip:
        frames = list(clip.decode(video=0))
    assert [(frame.width, frame.height) for frame in frames] == [(48, 32)] * 5


def test_an_ended_one_tells_all(client: openai.OpenAI, video: openai.types.Video, server: ServerProcess) -> None:
    again = client.videos.retrieve(video.id)
    assert again == video
    assert (again.progress, again.model, again.prompt, again.error) == (100, "tiny", PROMPT, None)
    assert again.seconds == "0.31"  # 5 frames at 16 a second
    assert again.completed_at is not None and again.expires_at == again.completed_at + 2 * 86400
    told = again.model_dump()
    assert told["storage"] == {"state": "local", "attempts": 0, "error": None}
    assert told["url"] == f"{server.url}/v1/videos/{video.id}/content"
    report = server.get(f"/v1/videos/{video.id}/report")
    assert len(report["denoise_steps_ms"]) == 2


@pytest.mark.parametrize(("seconds", "frames"), [("0.5", 9), (1, 17), ("0.01", 1)])
def test_seconds_become_frames_that_the_model_can_draw(server: ServerProcess, seconds: Any, frames: int) -> None:
    body = {"prompt": PROMPT, "size": "32x32", "num_inference_steps": 1, "seconds": seconds}
    status, video, _ = server.call("POST", "/v1/videos", body)
    assert status == 200, video
    assert float(video["seconds"]) == pytest.approx(frames / 16, abs=0.005)
    server.call("DELETE", f"/v1/videos/{video['id']}")


def test_parts_of_the_file(server: ServerProcess, video: openai.types.Video) -> None:
    url = f"{server.api}/videos/{video.id}/content"
    whole = httpx.get(url)
    assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"
    size, etag = len(whole.content), whole.headers["etag"]
    part = httpx.get(url, headers={"range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{size}"
    assert httpx.get(url, headers={"range": "bytes=-5"}).content == whole.content[-5:]
    assert httpx.get(url, headers={"range": "bytes=0-1", "if-range": etag}).status_code == 206
    assert httpx.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'}).status_code == 200
    beyond = httpx.get(url, headers={"range": f"bytes={size}-"})
    assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{size}"
    assert beyond.json()["error"]["param"] == "range"


def test_events_tell_every_stage_and_the_end(server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "size": "32x32", "num_frames": 5, "num_inference_steps": 4, "partial_images": 2}
    job = server.call("POST", "/v1/videos", body)[1]
    events = list(sse(server, job["id"]))
    kinds = [event["type"] for event in events]
    assert kinds[-1] == "video.completed" and kinds.count("video.preview") == 2
    assert events[-1]["url"].endswith("/content")
    steps = [event for event in events if event["type"] == "video.progress" and event["steps"]]
    assert steps and all(event["steps"] == 4 for event in steps)
    percents = [event["progress"] for event in events if "progress" in event]
    assert percents == sorted(percents)
    preview = next(event for event in events if event["type"] == "video.preview")
    shown = Image.open(io.BytesIO(base64.b64decode(preview["b64_json"])))
    assert shown.format == "WEBP" and preview["output_format"] == "webp"
    assert [event["type"] for event in sse(server, job["id"])] == ["video.completed"]  # for who comes late


def sse(server: ServerProcess, job_id: str) -> Iterator[dict[str, Any]]:
    with httpx.stream("GET", f"{server.api}/videos/{job_id}/events", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_pages(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=f"cat {i}", size="32x32", extra_body=TINY).id for i in range(5)]
    newest = client.videos.list(limit=2)
    assert [v.id for v in newest.data] == made[:-3:-1] and newest.has_more
    second = client.videos.list(limit=2, after=made[-2])
    assert [v.id for v in second.data] == [made[2], made[1]]
    oldest = client.videos.list(limit=100, order="asc")
    assert [v.id for v in oldest.data][-5:] == made
    walked = [v.id for v in client.videos.list(limit=2)]  # the client asks for one page after the other
    assert walked == [v.id for v in oldest.data][::-1]
    for job_id in made:
        client.videos.delete(job_id)


def test_deleting_ends_a_running_one_within_a_step(client: openai.OpenAI, server: ServerProcess) -> None:
    running = client.videos.create(prompt=PROMPT, size="48x32", extra_body=LONG)
    waiting = client.videos.create(prompt=PROMPT, size="48x32", extra_body=LONG)
    wait_for(lambda: client.videos.retrieve(running.id).progress >= 1)
    assert client.videos.delete(waiting.id).model_dump() == {
        "id": waiting.id,
        "object": "video.deleted",
        "deleted": True,
    }
    began = time.monotonic()
    client.videos.delete(running.id)
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(running.id)
    wait_for(lambda: not server.get("/server_info")["jobs"]["in_progress"], timeout=10)
    assert time.monotonic() - began < 5
    for kind in ("results", "inputs", "snapshots"):
        wait_for(lambda kind=kind: not [p for p in (server.data_dir / kind).iterdir() if running.id in p.name])


def test_deleting_an_ended_one_removes_its_files(client: openai.OpenAI, server: ServerProcess) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, size="32x32", poll_interval_ms=100, extra_body=TINY)
    folder = server.data_dir / "results" / video.id
    assert folder.is_dir()
    client.videos.delete(video.id)
    assert not folder.exists()
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content(video.id)


def test_cancelled_is_a_status_of_its_own(client: openai.OpenAI, server: ServerProcess) -> None:
    video = client.videos.create(prompt=PROMPT, size="48x32", extra_body=LONG)
    with pytest.raises(openai.NotFoundError, match="nothing to fetch"):
        client.videos.download_content(video.id)
    server.call("POST", f"/v1/cancel/{video.id}")
    status = wait_for(lambda: (s := client.videos.retrieve(video.id).status) not in ("queued", "in_progress") and s)
    assert status == "cancelled"


def test_a_repeated_request_is_the_same_job(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "size": "32x32", "extra_body": TINY}
    key = {"Idempotency-Key": "cat 1"}
    first, second = (client.videos.create(**fields, extra_headers=key) for _ in range(2))
    assert first.id == second.id
    with pytest.raises(openai.ConflictError):
        client.videos.create(**fields | {"prompt": "a dog"}, extra_headers=key)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_frames": 6}, "num_frames"),
        ({"seconds": "1", "num_frames": 5}, "seconds"),
        ({"seconds": "-1"}, "seconds"),
        ({"seconds": "nan"}, "seconds"),
        ({"size": "50x32"}, "size"),
        ({"n": 2}, "n"),
        ({"input_reference": "data:image/png;base64,aGk="}, "input_reference"),
        ({"quality": "hd"}, "quality"),
        ({"output_format": "png"}, "output_format"),
        ({"model": "sora-2"}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    status, told, _ = server.call("POST", "/v1/videos", {"prompt": PROMPT, **fields})
    assert status in (400, 404) and told["error"]["param"] == param, told


def test_what_this_server_does_not_make(client: openai.OpenAI, video: openai.types.Video) -> None:
    with pytest.raises(openai.BadRequestError, match="thumbnail"):
        client.videos.download_content(video.id, variant="thumbnail")
    with pytest.raises(openai.BadRequestError, match="remix"):
        client.videos.remix(video.id, prompt="in space")
    with pytest.raises(openai.BadRequestError, match="POST /v1/videos"):
        client.images.generate(prompt=PROMPT)


def test_the_documented_examples_run(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for the size and the number of frames and steps."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    create, curl, listing = documented("Videos")
    small = create.replace('size="1280x720"', f'size="32x32", extra_body={TINY}')
    run_documented(small, server, names)
    assert decoded((tmp_path / "cat.mp4").read_bytes())
    small = curl.replace('"size": "1280x720"', f'"size": "32x32", {json.dumps(TINY)[1:-1]}')
    made = json.loads(run_documented(small, server, names))
    assert made["status"] == "queued"
    assert json.loads(run_documented(listing, server, names))["data"][0]["id"] == made["id"]


def test_a_first_frame_comes_as_a_file(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "orange").save(file, "JPEG")
    with serving(tmp_path, [str(tiny("wan22_ti2v"))]) as server:
        client = openai.OpenAI(api_key="x", base_url=server.api, max_retries=0)
        fields: dict[str, Any] = {"prompt": PROMPT, "size": "64x64", "extra_body": TINY}
        with_file = client.videos.create(**fields, input_reference=("../../evil.sh", file.getvalue()))
        stored = list((tmp_path / "inputs" / with_file.id).iterdir())
        assert [path.name for path in stored] == ["0.jpg"]
        uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        body = {"prompt": PROMPT, "size": "64x64", **TINY, "input_reference": {"image_url": uri}}
        by_uri = server.call("POST", "/v1/videos", body)[1]
        clips = []
        for job_id in (with_file.id, by_uri["id"]):
            assert client.videos.poll(job_id, poll_interval_ms=100).status == "completed"
            report = server.get(f"/v1/videos/{job_id}/report")
            assert len(report["meta"]["image_path"]) == 1
            clips.append(decoded(client.videos.download_content(job_id).read()))
        assert clips[0] == clips[1]


def decoded(clip: bytes) -> list[bytes]:
    with av.open(io.BytesIO(clip)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
