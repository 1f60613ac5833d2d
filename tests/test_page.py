"""The page for people, in a headless Chromium and against a real server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from PIL import Image
from server_process import ServerProcess, serving, wait_for
from starlette.testclient import TestClient

from sgl_diffusion.server.page import MEDIA_TYPES, mount_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no binary named chromium or google-chrome on the PATH")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
KEY = "sk-test"
IS_SHOWN_AS_IT_COMES = """() => {
    const found = ["img.preview", "progress", ".state"].map(name => document.querySelector(name));
    if (found.includes(null)) return false;
    const [preview, progress, state] = found;
    const told = progress.hasAttribute("value") && /^Step \\d+ of 60$/.test(state.textContent);
    return told && preview.checkVisibility();
}"""  # all at one moment: at the next, the picture may be there
FOLDER = files("sgl_diffusion.server") / "page"


# -- the files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    mount_page(app)
    return TestClient(app)


def test_the_page_is_served_with_a_strict_policy_and_kept_by_browsers(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and "<!doctype html>" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"another"'}).status_code == 200


def test_every_file_of_the_folder_is_served_and_nothing_else(client: TestClient) -> None:
    assert {entry.name for entry in FOLDER.iterdir()} == set(MEDIA_TYPES)
    for name in set(MEDIA_TYPES) - {"index.html"}:
        assert client.get(f"/page/{name}").headers["content-type"] == MEDIA_TYPES[name]
    for path in ("/page/", "/page/../page.py", "/page/%2e%2e/page.py", "/page/..%2fpage.py", "/page//etc/passwd"):
        assert client.get(path).status_code == 404, path


def test_no_file_names_another_host() -> None:
    for name in set(MEDIA_TYPES) - {"icon.svg"}:  # whose namespace looks like an address
        assert not re.search(r"(https?:)?//\w+\.\w", (FOLDER / name).read_text()), name


# -- in a browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("page"), ["--api-key", KEY]) as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(url)`: a tab of a new visitor who has the key. No page may err, or ask another host for anything."""
    contexts, wrong = [], []

    def opened(url: str, *, key: str | None = KEY, width: int = 1280, height: int = 900) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
        contexts.append(context)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('api-key', '{key}')")
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
        # a browser reports every status from 400 on as an error of its own
        page.on("console", lambda said: wrong.append(said.text) if _is_error(said) else None)
        page.on("request", lambda request: wrong.append(request.url) if _is_foreign(request.url, url) else None)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def _is_error(said: Any) -> bool:
    return said.type in ("error", "warning") and not said.text.startswith("Failed to load resource")


def _is_foreign(url: str, home: str) -> bool:
    return urlsplit(url).scheme not in ("blob", "data") and urlsplit(url).netloc != urlsplit(home).netloc


def shown_number(page: Any, selector: str, attribute: str) -> float:
    return float(page.eval_on_selector(selector, f"element => element.{attribute}"))


@needs_chromium
def test_a_picture_is_drawn_with_the_keyboard_alone(server: ServerProcess, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.wait_for_selector("#prompt:focus")
    page.keyboard.type("a red circle on a yellow background")
    while page.evaluate("document.activeElement.id") != "num_inference_steps":
        page.keyboard.press("Tab")
    page.keyboard.type("60")  # replaces what a focused field holds
    assert page.input_value("#num_inference_steps") == "60"
    page.keyboard.press("Control+Enter")

    page.wait_for_selector("progress:not([hidden])")
    box = page.locator(".frame").bounding_box()
    page.wait_for_function(IS_SHOWN_AS_IT_COMES)

    page.wait_for_selector("li.completed figure button img")
    assert page.locator(".frame").bounding_box() == box  # nothing moved
    assert shown_number(page, "figure img", "naturalWidth") == 64
    assert not page.is_visible("progress")
    assert page.text_content("#said") == "Finished."
    assert "64 × 64 · 60 steps · seed" in page.text_content(".settings").replace("\xa0", " ")

    page.focus("figure button")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] img")
    page.keyboard.press("Escape")
    assert not page.is_visible("dialog")
    with page.expect_download() as download:
        page.focus(".download")
        page.keyboard.press("Enter")
    assert re.fullmatch(r"img_[0-9a-f]{32}\.png", download.value.suggested_filename)


@needs_chromium
def test_the_form_has_the_controls_of_the_model(server: ServerProcess, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.wait_for_selector("#draw")
    assert page.text_content("#model") == "embedded"
    assert page.text_content("#server").startswith("Ready")
    assert page.input_value("#num_inference_steps") == "20"
    assert (page.input_value("#width"), page.get_attribute("#width", "step")) == ("64", "16")
    for absent in ("#num_frames", "#fps", "#image_path", "#guidance_scale", "#negative_prompt"):
        assert not page.is_visible(absent)
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(c => !c.labels.length).map(c => c.id)"
    assert page.evaluate(unnamed) == []


@needs_chromium
def test_settings_are_used_again_and_a_reload_loses_nothing(server: ServerProcess, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.fill("#prompt", "a blue square")
    for name, value in {"width": "96", "num_inference_steps": "4", "seed": "7", "n": "2"}.items():
        page.fill(f"#{name}", value)
    page.click("text=Draw")
    page.wait_for_selector("li.completed figure:nth-child(2) button img")
    first = page.evaluate(PIXELS_OF_PICTURE)

    page.reload()
    page.wait_for_selector("li.completed figure:nth-child(2) button img")
    assert page.evaluate(PIXELS_OF_PICTURE) == first
    assert page.input_value("#num_inference_steps") == "20"
    page.click("text=Use settings")
    found = {name: page.input_value(f"#{name}") for name in ("prompt", "width", "num_inference_steps", "seed", "n")}
    assert found == {"prompt": "a blue square", "width": "96", "num_inference_steps": "4", "seed": "7", "n": "2"}
    page.click("text=Draw")
    page.wait_for_selector("li.completed + li")
    assert page.evaluate(PIXELS_OF_PICTURE) == first  # the newer job: the same settings, the same picture

    page.click("text=New seed >> nth=0")
    page.wait_for_selector("li.completed + li + li")
    assert not page.text_content(".settings").endswith("seed\xa07")
    page.click("text=Remove >> nth=0")
    assert page.locator("#gallery li").count() == 2
    page.reload()
    page.wait_for_selector("li.completed + li")
    assert page.locator("#gallery li").count() == 2


PIXELS_OF_PICTURE = """() => {
    const picture = document.querySelector("figure img");
    const canvas = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight).getContext("2d");
    canvas.drawImage(picture, 0, 0);
    return canvas.getImageData(0, 0, picture.naturalWidth, picture.naturalHeight).data.join();
}"""


@needs_chromium
def test_cancel_ends_the_job_on_the_server_too(server: ServerProcess, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.fill("#prompt", "a white cross")
    page.fill("#num_inference_steps", "1000")
    page.click("text=Draw")
    page.wait_for_selector("li.queued, li.in_progress")
    page.click("text=Cancel")
    page.wait_for_selector("li.cancelled")
    assert page.text_content(".state") == "Cancelled"

    def idle() -> bool:
        jobs = server.get("/server_info", {"Authorization": f"Bearer {KEY}"})["jobs"]
        return bool(jobs["in_progress"] == jobs["queued"] == 0 and jobs["cancelled"])

    wait_for(idle)


@needs_chromium
def test_a_mistake_is_told_where_it_was_made(server: ServerProcess, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.fill("#height", "65")
    page.fill("#prompt", "a green triangle")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#error:has-text('height=65')")
    assert page.evaluate("document.activeElement.id") == "height"
    assert page.get_attribute("#height", "aria-invalid") == "true"
    assert page.input_value("#prompt") == "a green triangle"  # nothing typed is lost
    assert page.locator("#gallery li").count() == 0
    page.fill("#prompt", "")
    page.keyboard.press("Control+Enter")
    assert page.text_content("#error") == "Say what to draw."


@needs_chromium
def test_a_narrow_screen_has_no_sideways_scrolling(server: ServerProcess, visit: Callable[..., Any]) -> None:
    page = visit(server.url, width=360, height=740)
    page.click("summary")
    page.fill("#num_inference_steps", "2")
    page.fill("#prompt", "x" * 300)  # more tokens than the model reads
    page.click("text=Draw")
    page.wait_for_selector("li.failed")
    assert "the prompt has 302 tokens" in page.text_content(".state")
    page.fill("#prompt", "a yellow circle")
    page.click("text=Draw")
    page.wait_for_selector("li.completed img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@needs_chromium
def test_a_key_is_asked_for_only_where_it_is_needed(server: ServerProcess, visit: Callable[..., Any]) -> None:
    page = visit(server.url, key=None)
    page.wait_for_selector("#key:focus")
    assert not page.is_visible("#draw")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#login-error:not(:empty)")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#draw:visible")
    assert not page.is_visible("#login")
    assert page.evaluate("JSON.stringify(localStorage)").count(KEY) == 0


@needs_chromium
def test_clips_begin_with_a_picture_show_progress_and_survive_a_reload(
    tiny: Callable[[str], Path], tmp_path: Path, visit: Callable[..., Any]
) -> None:
    picture = tmp_path / "first.png"
    Image.new("RGB", (48, 48), "teal").save(picture)
    with serving(tmp_path / "data", ["--model-path", str(tiny("wan_i2v"))]) as server:
        page = visit(server.url, key=None)
        page.fill("#prompt", "a cat")
        page.set_input_files("#image_path", str(picture))
        page.wait_for_selector("#inputs img")
        for name, value in {"width": "32", "height": "32", "num_frames": "5", "num_inference_steps": "400"}.items():
            page.fill(f"#{name}", value)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("progress[value]")
        page.reload()  # it goes on without the page, which comes back to it
        page.wait_for_selector("li.completed video", timeout=60_000)
        wait_for(lambda: shown_number(page, "video", "readyState") >= 2)
        assert shown_number(page, "video", "videoWidth") == 32
        settings = page.text_content(".settings").replace("\xa0", " ")
        assert settings.startswith("32 × 32 · 5 frames · ") and settings.endswith("1 input picture")
        page.click("text=New seed")  # which would be another clip without the picture
        assert page.text_content("#error").startswith("Choose the input pictures again")
        page.click("text=Delete")
        page.wait_for_selector("#empty:visible")
        assert server.get("/v1/videos")["data"] == []
