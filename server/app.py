"""The HTTP application: routes and what they have in common. No model is loaded here, and no torch."""

from __future__ import annotations

import importlib.metadata

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from sgl_diffusion.server import images, models, videos
from sgl_diffusion.server.auth import Gate, admit
from sgl_diffusion.server.context import Context
from sgl_diffusion.server.errors import HANDLERS
from sgl_diffusion.server.metrics import Metrics
from sgl_diffusion.server.page import mount_page


def make_app(context: Context, gate: Gate, metrics: Metrics) -> FastAPI:
    """The application of one running server."""
    app = FastAPI(
        title="sgl-diffusion",
        description="Pictures and clips from diffusion models, in the words of the OpenAI API.",
        version=importlib.metadata.version("sgl-diffusion"),
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        exception_handlers=HANDLERS,
        redirect_slashes=False,
    )
    app.state.context, app.state.gate = context, gate
    for router in (images.router, videos.router, models.router):
        app.include_router(router)
    app.include_router(metrics.make_router(), dependencies=[Depends(admit)])
    if not context.args.no_ui:
        mount_page(app)
    if context.args.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=context.args.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-job-id", "retry-after"],
        )  # fmt: skip
    _describe(app, needs_key=not gate.is_open)
    return app


def _describe(app: FastAPI, *, needs_key: bool) -> None:
    """Completes what `/openapi.json` says: without keys, no route asks for one."""
    schema = app.openapi()  # kept by the application, and given to whoever asks
    if not needs_key:
        del schema["components"]["securitySchemes"]
        for path in schema["paths"].values():
            for operation in path.values():
                operation.pop("security", None)
