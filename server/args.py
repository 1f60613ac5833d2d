"""Options of `sglang serve` beside those of the model. Torch-free."""

from __future__ import annotations

from typing import Literal

from sgl_diffusion.runtime.option import Options, Strings, option


class HttpOptions(Options):
    """HTTP"""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every one.")
    port: int = option(30010, "Port to listen on; 0 picks a free one.", ge=0, le=65535)
    api_key: Strings = option(
        [], "Keys that clients have to send, one or several; better in SGLANG_API_KEY, which `ps` does not show."
    )
    served_model_name: str | None = option(None, "The model's id over HTTP.", unset="model_path")
    request_timeout: float = option(600.0, "Seconds a request waits for its pictures, then it is cancelled.", gt=0)
    max_upload_size: int = option(32, "MiB of one request's body.", ge=1)
    max_input_pixels: int = option(64_000_000, "Pixels of one input picture, before it is decoded.", ge=1)
    allowed_input_hosts: Strings = option(
        [], "Hosts from which clients may have pictures fetched by URL; none unless named."
    )
    cors_origins: Strings = option([], "Web origins that may call from a browser; none unless named.")
    no_ui: bool = option(False, "Serve no page at /.")


class JobOptions(Options):
    """Jobs"""

    data_dir: str = option("sglang-data/", "Folder of jobs, inputs and results; made if missing.")
    database_url: str | None = option(
        None,
        "Where jobs are kept, as SQLAlchemy writes it; servers that share one share its queue, and need one data_dir.",
        unset="SQLite in data_dir",
    )
    max_queue_size: int = option(1000, "Jobs that may wait; further ones are refused with 429.", ge=1)
    max_batch_size: int = option(1, "Results drawn at once, of requests of the same shape, steps and guidance.", ge=1)
    batch_wait_ms: float = option(5.0, "How long the first of a batch waits for others, at most.", ge=0)
    snapshot_every: int = option(10, "Steps between snapshots, from which an interrupted job goes on; 0: none.", ge=0)
    retain_days: float | None = option(None, "Days that ended jobs and their files are kept.", unset="for ever", gt=0)
    disk_quota_mb: int | None = option(
        None, "MiB of results; beyond it, those of the jobs that ended first go.", unset="none", ge=1
    )
    shutdown_timeout: float = option(
        60.0, "Seconds the running job may take to finish at shutdown; then it is kept at its last step.", ge=0
    )


class WatchingOptions(Options):
    """Logs and metrics"""

    log_format: Literal["text", "json"] = option("text", "Of lines on stderr.")


class ServeArgs(HttpOptions, JobOptions, WatchingOptions):
    """How to serve it."""
