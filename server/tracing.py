"""Whether there are traces: only where OpenTelemetry's own variables name a collector. Torch-free.

Nothing of OpenTelemetry is imported before that is known; what traces are made of is in `spans.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sgl_diffusion.runtime.errors import UserError

if TYPE_CHECKING:
    from sgl_diffusion.server.spans import Tracing

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"


def open_tracing(environment: Mapping[str, str]) -> Tracing | None:
    """Traces to the collector that the environment names; None without one, or where they are switched off.

    Raises:
        UserError: OpenTelemetry is not installed, or is asked for something else than OTLP over HTTP.
    """
    endpoint = next((name for name in ENDPOINTS if environment.get(name)), None)
    exporter = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if endpoint is None or exporter == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if exporter != "otlp":
        raise UserError(f"OTEL_TRACES_EXPORTER={exporter}: expected otlp or none")
    for name in PROTOCOLS:
        if (protocol := environment.get(name) or PROTOCOL) != PROTOCOL:
            raise UserError(f"{name}={protocol}: expected {PROTOCOL}")
    try:
        from sgl_diffusion.server.spans import open_spans
    except ModuleNotFoundError as e:
        raise UserError(f"{endpoint} is set, but OpenTelemetry is missing: pip install 'sgl-diffusion[tracing]'") from e
    return open_spans(environment)
