"""Which attention runs, why another does not, and its settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_args import parse

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.attention import BACKENDS, PREFERENCE, Attention, Case, read_settings
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "case", "reasons"),
    [
        ("torch_sdpa", Case(CPU, torch.float32, 300), []),
        ("triton", Case(CPU, torch.float32, 64), ["needs an NVIDIA GPU, the device is cpu"]),
        ("triton", Case(GPU, torch.float32, 128), []),
        ("triton", Case(GPU, torch.bfloat16, 160), ["head dim 160 is outside of 16 to 128"]),
        ("cudnn", Case(GPU, torch.float32, 60), ["runs in bf16 or fp16, not float32", "not a multiple of 8"]),
        ("fa", Case(GPU, torch.bfloat16, 64), ["the package flash-attn is not installed"]),
        ("fa", Case(GPU, torch.bfloat16, 512), ["head dim 512 is outside of 8 to 256"]),
        ("sage_attn", Case(GPU, torch.bfloat16), ["the package sageattention is not installed"]),
    ],
)
def test_a_backend_gives_its_reasons(name: str, case: Case, reasons: list[str]) -> None:
    told = BACKENDS[name].reasons(case)
    assert bool(told) == bool(reasons)
    assert all(any(reason in why for why in told) for reason in reasons)


def test_auto_never_takes_what_is_not_exact() -> None:
    assert "sage_attn" not in PREFERENCE and set(PREFERENCE) < set(BACKENDS)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"attention_backend": "nope"}, "attention backend 'nope' of transformer: expected one of torch_sdpa, triton"),
        ({"attention_backend": "cudnn"}, "cudnn: needs an NVIDIA GPU, the device is cpu; runs in bf16 or fp16"),
        ({"attention_backend": "sage_attn"}, "sage_attn: needs an NVIDIA GPU"),
        (
            {"attention_backend": "torch_sdpa", "attention_backend_config": {"form": "ws"}},
            "attention_backend_config.form=ws: torch_sdpa has no settings",
        ),
        ({"attention_backend_config": {"smooth_k": True}}, "needs attention_backend to say whose it is"),
        (
            {"backend": "diffusers", "attention_backend_config": {"smooth_k": True}},
            "diffusers' attention backends take no settings",
        ),
    ],
)
def test_a_mistake_is_named_before_any_work(server: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Engine.load(ServerArgs(device="cpu", **server))


def test_auto_may_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine.load(ServerArgs(device="cpu", attention_backend="auto"))
    assert engine.backend.attention["transformer"].requested is None  # type: ignore[union-attr]


@pytest.mark.parametrize("written", ['{"smooth_k": false}', "smooth_k=false", "json", "yaml"])
def test_settings_are_json_pairs_or_a_file(written: str, tmp_path: Path) -> None:
    if written in ("json", "yaml"):
        file = tmp_path / f"sage.{written}"
        file.write_text(json.dumps({"smooth_k": False}))
        written = str(file)
    server, _ = parse("--attention-backend", "sage_attn", "--attention-backend-config", written)
    assert read_settings(BACKENDS["sage_attn"], server.attention_backend_config) == {"smooth_k": False}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"smoth_k": True}, r"attention_backend_config.smoth_k=True: sage_attn has smooth_k; did you mean smooth_k\?"),
        ({"smooth_k": "maybe"}, "attention_backend_config.smooth_k=maybe: expected true or false"),
    ],
)
def test_unknown_settings_and_values_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(BACKENDS["sage_attn"], config)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match="attention_backend_config=nowhere.json: cannot be read: No such file"):
        parse("--attention-backend-config", "nowhere.json")


def test_settings_reach_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which needs a GPU: what it is called with, and that its result is returned."""
    seen: dict[str, Any] = {}
    module = ModuleType("sageattention")
    module.sageattn = lambda q, k, v, **given: seen.update(given) or q + k + v  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", module)
    monkeypatch.setattr(type(BACKENDS["sage_attn"]), "reasons", lambda self, case: [])
    attend = Attention("transformer", "sage_attn", CPU, torch.float32, {"smooth_k": "false"})
    q, k, v = torch.randn(3, 1, 4, 2, 16)
    out = torch.empty_like(q)
    assert attend(q, k, v, out=out) is out
    assert torch.equal(out, q + k + v) and attend.used == "sage_attn"
    assert seen == {"tensor_layout": "NHD", "smooth_k": False}
