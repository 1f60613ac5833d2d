"""Pictures over HTTP: a real `sglang serve` with the embedded model, asked by the official client."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hub import publish
from PIL import Image
from server_process import ServerProcess, documented, run_documented, serving, wait_for

PROMPT = "a red circle on a blue background"
FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--served-model-name", "Qwen/Qwen-Image", "--request-timeout", "60", "--max-upload-size", "1")
    with serving(tmp_path_factory.mktemp("images"), flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(api_key="sglang-anything", base_url=server.api, max_retries=0)


def picture(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_documents_example(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="Qwen/Qwen-Image",
        prompt="A cute raccoon",
        size="64x64",
        n=1,
        response_format="b64_json",
    )
    assert answer.data is not None and len(answer.data) == 1
    found = picture(answer.data[0].b64_json)
    assert (found.format, found.size) == ("PNG", (64, 64))
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    assert abs(answer.created - time.time()) < 120


def test_a_picture_is_that_of_the_command_line(client: openai.OpenAI, tmp_path: Path) -> None:
    from sgl_diffusion import Engine, SamplingParams, ServerArgs

    answer = client.images.generate(prompt=PROMPT, extra_body={"seed": 7, **FAST})
    assert answer.data is not None
    params = SamplingParams(prompt=[PROMPT], seed=[7], **FAST, output_path=str(tmp_path), output_file_name="0.png")
    (path,) = Engine.load(ServerArgs(device="cpu")).run(params).paths
    assert picture(answer.data[0].b64_json).tobytes() == Image.open(path).tobytes()


def test_several_pictures_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    both = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 3, **FAST}).data
    second = client.images.generate(prompt=PROMPT, extra_body={"seed": 4, **FAST}).data
    assert both is not None and second is not None
    assert [item.model_extra for item in both] == [{"seed": 3}, {"seed": 4}]
    assert picture(both[1].b64_json).tobytes() == picture(second[0].b64_json).tobytes()
    assert both[0].b64_json != both[1].b64_json


def test_a_url_is_absolute_and_leads_to_the_file(client: openai.OpenAI, server: ServerProcess) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, response_format="url", output_format="webp", extra_body=FAST)
    assert answer.data is not None
    for index, item in enumerate(answer.data):
        assert item.url is not None and item.b64_json is None
        assert item.url.startswith(f"{server.url}/v1/images/img_") and item.url.endswith(f"/content?index={index}")
        got = httpx.get(item.url)
        assert got.headers["content-type"] == "image/webp" and got.headers["x-content-type-options"] == "nosniff"
        assert Image.open(io.BytesIO(got.content)).size == (64, 64)
    assert httpx.get(str(answer.data[0].url).replace("index=0", "index=2")).status_code == 404


def test_compression_changes_the_file(client: openai.OpenAI) -> None:
    sizes = []
    for compression in (0, 100):
        answer = client.images.generate(
            prompt=PROMPT, output_format="jpeg", output_compression=compression, extra_body=FAST
        )
        assert answer.data is not None and picture(answer.data[0].b64_json).format == "JPEG"
        sizes.append(len(str(answer.data[0].b64_json)))
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(("quality", "steps"), [("low", 10), ("auto", 20), ("high", 30)])
def test_quality_is_a_number_of_steps(server: ServerProcess, quality: str, steps: int) -> None:
    body = {"prompt": PROMPT, "quality": quality, "size": "32x32"}
    status, answer, _ = server.call("POST", "/v1/images/generations", body)
    assert status == 200, answer
    report = server.get(f"/v1/images/{answer['id']}/report")
    assert len(report["denoise_steps_ms"]) == steps


def test_a_stream_shows_previews_and_ends_with_the_picture(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"seed": 3, "num_inference_steps": 8}
    *partial, last = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=fields)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    previews = [picture(event.b64_json) for event in partial]
    assert {preview.format for preview in previews} == {"WEBP"} == {event.output_format.upper() for event in partial}
    assert len({preview.tobytes() for preview in previews}) == 3
    assert last.type == "image_generation.completed"
    whole = client.images.generate(prompt=PROMPT, extra_body=fields).data
    assert whole is not None and last.b64_json == whole[0].b64_json


def test_a_stream_without_previews_is_one_event(client: openai.OpenAI) -> None:
    (only,) = client.images.generate(prompt=PROMPT, stream=True, extra_body=FAST)
    assert only.type == "image_generation.completed" and picture(only.b64_json).size == (64, 64)


def test_extra_body_may_come_as_it_is(server: ServerProcess) -> None:
    flat = server.call("POST", "/v1/images/generations", {"prompt": PROMPT, "seed": 9, **FAST})[1]
    nested = server.call("POST", "/v1/images/generations", {"prompt": PROMPT, "extra_body": {"seed": 9, **FAST}})[1]
    assert flat["data"] == nested["data"]


def test_a_repeated_request_is_the_same_job(server: ServerProcess) -> None:
    key, body = {"Idempotency-Key": "raccoon 1"}, {"prompt": PROMPT, **FAST}
    answers: list[Any] = []

    def ask() -> None:
        answers.append(server.call("POST", "/v1/images/generations", body, key))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _, _ in answers} == {200}
    assert len({answer["id"] for _, answer, _ in answers}) == 1
    status, answer, _ = server.call("POST", "/v1/images/generations", body | {"seed": 1}, key)
    assert status == 409 and answer["error"]["code"] == "idempotency_conflict"


LONG = {"prompt": PROMPT, "num_inference_steps": 1000, "size": "256x256"}


def in_progress(server: ServerProcess) -> bool:
    return bool(server.get("/server_info")["jobs"]["in_progress"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_job_along(server: ServerProcess, stream: bool) -> None:
    cancelled = server.get("/server_info")["jobs"]["cancelled"]
    address = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": stream}).encode()
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"  # noqa: E501
        connection.sendall(head.encode() + body)
        wait_for(lambda: in_progress(server))
    wait_for(lambda: server.get("/server_info")["jobs"]["cancelled"] == cancelled + 1, timeout=20)
    assert not in_progress(server)


def test_cancelling_ends_the_request_that_waits(server: ServerProcess) -> None:
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(server.call("POST", "/v1/images/generations", LONG)))
    waiting.start()
    with httpx.stream("POST", f"{server.api}/images/generations", json=LONG | {"stream": True}) as queued:
        job_id = queued.headers["x-job-id"]
        assert server.call("POST", f"/v1/cancel/{job_id}")[1]["status"] == "cancelled"
        assert '"job_cancelled"' in queued.read().decode()
    folders = wait_for(lambda: list((server.data_dir / "results").glob(".img_*")))
    status, told, _ = server.call("POST", f"/v1/cancel/{folders[0].name[1:]}")
    assert status == 200 and told["status"] in ("in_progress", "cancelled")
    waiting.join(20)
    assert answers[0][0] == 410 and answers[0][1]["error"]["code"] == "job_cancelled"


def test_edits_are_refused_by_a_model_that_looks_at_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=png(), prompt="Change the text to CUDA FOR LIFE", size="64x64")
    assert refused.value.param == "image" and "draws from text alone" in refused.value.message


def test_an_edit_by_the_documents(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """By the published name of a tiny checkpoint: what the command line draws of the same picture."""
    from sgl_diffusion import Engine, SamplingParams, ServerArgs

    publish(tiny("qwen_edit"), "Qwen/Qwen-Image-Edit", tmp_path / "hub", FAST | {"max_sequence_length": 64})
    asked: dict[str, Any] = {"prompt": "Change the text to CUDA FOR LIFE"}
    flags = ("--model-path", "Qwen/Qwen-Image-Edit", "--request-timeout", "60")
    with serving(tmp_path / "data", flags, {"HF_HUB_CACHE": str(tmp_path / "hub")}) as server:
        client = openai.OpenAI(api_key="sglang-anything", base_url=server.api, max_retries=0)
        answer = client.images.edit(
            model="Qwen/Qwen-Image-Edit", image=png((48, 32)), size="64x96", response_format="b64_json", **asked
        )
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.edit(image=[png(), png()], **asked)
        assert refused.value.param == "image" and "2 given; this checkpoint edits 1" in refused.value.message
    assert answer.data is not None
    (tmp_path / "given.png").write_bytes(png((48, 32)))
    params = SamplingParams(
        **asked | FAST, image_path=[str(tmp_path / "given.png")], width=64, height=96, max_sequence_length=64,
        output_path=str(tmp_path), output_file_name="0.png",
    )  # fmt: skip
    (path,) = Engine.load(ServerArgs(model_path=str(tiny("qwen_edit")), device="cpu")).run(params).paths
    assert picture(answer.data[0].b64_json).tobytes() == Image.open(path).tobytes()


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "orange").save(file, "PNG")
    return file.getvalue()


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("Qwen/Qwen-Image", "model", "sglang")
    assert client.models.retrieve("Qwen/Qwen-Image") == model
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("black-forest-labs/FLUX.1-dev")
    assert missing.value.code == "model_not_found"


def test_the_server_tells_of_itself(server: ServerProcess) -> None:
    assert server.get("/health") == {"status": "ok"}
    assert server.get("/ready") == server.get("/health_generate") == {"status": "ready"}
    info = server.get("/server_info")
    assert info["engine"]["state"] == "ready" and info["serve_args"]["max_upload_size"] == 1
    assert server.get("/model_info")["defaults"]["num_inference_steps"] == 20
    assert "/v1/images/generations" in server.get("/openapi.json")["paths"]


def test_the_documented_examples_run(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for the sizes. The edits come as far as they can with a model that draws from text alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.png").write_bytes(png())
    names: dict[str, Any] = {}
    generate, curl, edit, curl_edit, stream = (
        example.replace("1024x1024", "64x64") for example in documented("Images")
    )
    run_documented(generate, server, names)
    assert Image.open(tmp_path / "raccoon.png").size == (64, 64)
    (found,) = json.loads(run_documented(curl, server, names))["data"]
    assert httpx.get(found["url"]).status_code == 200
    with pytest.raises(openai.BadRequestError, match="draws from text alone"):
        run_documented(edit, server, names)
    assert "draws from text alone" in json.loads(run_documented(curl_edit, server, names))["error"]["message"]
    run_documented(stream, server, names)
    assert names["event"].type == "image_generation.completed"


def test_results_in_cloud_storage(tmp_path: Path) -> None:
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    storage = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    storage.start()
    host, port = storage.get_host_and_port()
    keys = {"aws_access_key_id": "id", "aws_secret_access_key": "a secret"}
    s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys)
    s3.create_bucket(Bucket="pictures", ACL="public-read")
    environment = {
        "SGLANG_CLOUD_STORAGE_TYPE": "s3",
        "SGLANG_S3_BUCKET_NAME": "pictures",
        "SGLANG_S3_ACCESS_KEY_ID": "id",
        "SGLANG_S3_SECRET_ACCESS_KEY": "a secret",
        "SGLANG_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }
    body = {"prompt": PROMPT, "response_format": "url", **FAST}
    try:
        with serving(tmp_path, env=environment) as server:
            made = server.call("POST", "/v1/images/generations", body)[1]
            (url,) = [item["url"] for item in made["data"]]
            assert url == f"http://{host}:{port}/pictures/{made['id']}/0.png"
            ours = httpx.get(f"{server.api}/images/{made['id']}/content")
            assert ours.status_code == 307 and ours.headers["location"] == url
            assert not list((tmp_path / "results" / made["id"]).glob("*.png"))
            assert server.get(f"/v1/images/{made['id']}/report")["outputs"]
            # as bytes, also when they are in the bucket by then
            key = {"Idempotency-Key": "1"}
            del body["response_format"]
            first = server.call("POST", "/v1/images/generations", body, key)[1]
            wait_for(lambda: not list((tmp_path / "results" / first["id"]).glob("*.png")))
            again = server.call("POST", "/v1/images/generations", body, key)[1]
            stored = s3.get_object(Bucket="pictures", Key=f"{made['id']}/0.png")["Body"].read()
            assert base64.b64decode(again["data"][0]["b64_json"]) == stored
            assert again == first
        assert not any("a secret" in line for line in server.lines)
    finally:
        storage.stop()


def test_a_server_that_is_asked_to_stop_keeps_the_job(tmp_path: Path) -> None:
    """Who waited is told so; with its key, it gets from the next server what the first one had begun."""
    flags = ("--shutdown-timeout", "0", "--snapshot-every", "5")
    body, key = {"prompt": PROMPT, "num_inference_steps": 200, "size": "128x128"}, {"Idempotency-Key": "1"}
    answers: list[Any] = []
    with serving(tmp_path, flags) as first:
        waiting = threading.Thread(
            target=lambda: answers.append(first.call("POST", "/v1/images/generations", body, key))
        )
        waiting.start()
        wait_for(lambda: list((tmp_path / "snapshots").glob("img_*")))
        assert first.stop() == 0
        waiting.join()
    status, told, headers = answers[0]
    assert status == 503 and told["error"]["code"] == "shutting_down" and headers["retry-after"]
    with serving(tmp_path, flags) as second:
        status, made, _ = second.call("POST", "/v1/images/generations", body, key)
        assert status == 200 and made["id"] in told["error"]["message"]
        assert len(second.get(f"/v1/images/{made['id']}/report")["denoise_steps_ms"]) < 200
