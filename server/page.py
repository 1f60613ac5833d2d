"""The page for people at `/`: static files of the folder `page/`, held in memory. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Request, Response

MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "form.js": "text/javascript; charset=utf-8",
    "jobs.js": "text/javascript; charset=utf-8",
    "gallery.js": "text/javascript; charset=utf-8",
}
"""Every file of the page. Nothing else in the folder, and nothing outside it, is ever served."""

PAGE_PATHS = {"/" if name == "index.html" else f"/page/{name}": name for name in MEDIA_TYPES}
"""Path -> file. They hold no secret and are open to all: the page itself asks for the API key."""

# Pictures and clips are fetched with the API key and shown from memory, hence blob:.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def mount_page(app: FastAPI) -> None:
    """Serves the page at `/` and its files below `/page/`, outside the OpenAPI description."""
    for path, name in PAGE_PATHS.items():
        app.add_route(path, _file(name), include_in_schema=False)


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    body = (files("sgl_diffusion.server") / "page" / name).read_bytes()
    headers = {
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",  # kept, but asked for each time: an upgraded server never meets its older page
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def respond(request: Request) -> Response:
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if headers["ETag"] in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=MEDIA_TYPES[name], headers=headers)

    return respond
