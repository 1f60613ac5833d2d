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

import sgl_diffusion.kernels
from sgl_diffusion.bench import attention_order
from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.kernels.quantize import DTYPES, quantize_rows
from sgl_diffusion.runtime import attention as attention_module
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.attention import BACKENDS, EXACT, Attention, Case, order_table, pick, read_settings
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.resolve import resolve

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "case", "reasons"),
    [
        ("torch_sdpa", Case(CPU, torch.float32, 300), []),
        ("triton", Case(CPU, torch.float32, 64), ["needs an NVIDIA GPU, the device is cpu"]),
        ("triton", Case(GPU, torch.float32, 128), []),
        ("triton", Case(GPU, torch.bfloat16, 160), ["head dim 160 is outside of 16 to 128"]),
        ("triton_int8", Case(CPU, torch.float32, 64), ["the device is cpu", "runs in bf16 or fp16, not float32"]),
        ("triton_int8", Case(GPU, torch.bfloat16, 64, settings={"pv": "fp8"}), []),
        ("triton_fp8", Case(GPU, torch.float16, 256), ["head dim 256 is outside of 16 to 128"]),
        ("triton_fp8", Case(GPU, torch.float16, 128, lse=True), []),
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


def test_the_table_has_an_order_of_exact_backends_for_every_architecture() -> None:
    table = order_table()
    tuned = Path(sgl_diffusion.kernels.__path__[0]) / "tuned"
    assert set(table) == {"cpu", *(p.stem for p in tuned.glob("sm_*.json") if "." not in p.stem)}
    for entry in table.values():
        assert isinstance(entry["measured"], bool)
        assert "at_most" not in entry["rows"][-1]  # whatever the shape, there is an order
        for row in entry["rows"]:
            assert set(row["order"]) <= set(EXACT) and len(set(row["order"])) == len(row["order"])
    assert set(BACKENDS) - set(EXACT) == {"sage_attn", "triton_int8", "triton_fp8"}


def test_fp8_is_refused_where_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "architecture", lambda: "sm_80")
    for name, settings in (("triton_fp8", {}), ("triton_int8", {"pv": "fp8"})):
        with pytest.raises(UserError, match=f"{name}: fp8 needs a GPU of sm_89 or later"):
            Attention("transformer", name, GPU, torch.bfloat16, settings)
    Attention("transformer", "triton_int8", GPU, torch.bfloat16, {"pv": "half"})


def test_auto_takes_the_tables_first_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"at_most": {"head_dim": 64, "keys": 8, "itemsize": 2}, "order": ["fa", "triton", "torch_sdpa"]}
    rows = [few, {"order": ["cudnn", "torch_sdpa"]}]
    monkeypatch.setattr(attention_module, "order_table", lambda: {**order_table(), "sm_90": {"rows": rows}})
    monkeypatch.setattr(attention_module, "architecture", lambda: "sm_90")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    def chosen(head_dim: int, keys: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return pick("transformer", None, Case(GPU, dtype, head_dim, keys)).name

    assert chosen(64, 8) == "triton"  # flash-attn is not installed
    assert chosen(64, 9) == chosen(80, 8) == "cudnn"
    assert chosen(64, 8, torch.float32) == "torch_sdpa"  # the last row: cuDNN refuses
    assert pick("transformer", None, Case(CPU, torch.float32, 300, 9)).name == "torch_sdpa"


def test_the_report_says_which_shapes_took_which_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "order_of", lambda case: ("sage_attn",) if case.keys > 4 else ("torch_sdpa",))
    for name in ("run", "reasons"):
        answer = lambda self, *args, **options: [] if len(args) == 1 else torch.empty(0)
        monkeypatch.setattr(type(BACKENDS["sage_attn"]), name, answer)
    attend = Attention("transformer", None, CPU, torch.float32)
    assert attend.used is None
    for keys in (4, 3, 4):
        x = torch.randn(1, keys, 2, 16)
        attend(x, x, x)
    assert attend.used == "torch_sdpa"
    for keys in (6, 5):
        x = torch.randn(1, keys, 2, 16)
        attend(x, x, x)
    assert attend.used == "torch_sdpa for 3, 4 keys; sage_attn for 5, 6 keys"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exps_come_with_the_result(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a matrix of all scores, which the kernel's reference would make."""
    monkeypatch.setattr(attention_module, "attention", None)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=draw).to(dtype) for n in (5, 9, 9))
    attend, out = Attention("transformer", None, CPU, dtype), torch.empty(2, 5, 6, 16, dtype=dtype)[:, :, ::2]
    got, lse = attend(q, k, v, out=out, return_lse=True)
    scores = torch.einsum("bqhk,bshk->bhqs", q.double(), k.double()) / 4
    want = torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v.double())
    assert got is out and torch.allclose(got.double(), want, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-5)
    assert lse.dtype == torch.float32 and lse.is_contiguous() and attend.used == "torch_sdpa"


@pytest.mark.usefixtures("repaired_interpreter")
@pytest.mark.parametrize(
    ("name", "config", "limit"),
    [("triton_int8", {}, 1.5e-2), ("triton_int8", {"pv": "fp8"}, 4.5e-2), ("triton_fp8", {"smooth_k": "false"}, 6e-2)],
)
def test_attention_in_8_bits(name: str, config: dict[str, Any], limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "not_on_a_gpu", lambda self: [])
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 32, generator=draw).bfloat16() for n in (5, 70, 70))
    attend = Attention("transformer", name, CPU, torch.bfloat16, config)
    out = torch.empty(1, 5, 4, 32, dtype=torch.bfloat16)[:, :, 1:3]
    got, lse = attend(q, k, v, out=out, return_lse=True)
    want, want_lse = BACKENDS["torch_sdpa"].run(q.double(), k.double(), v.double(), return_lse=True)
    assert got is out and rel_l2(got, want) < limit and rel_l2(lse, want_lse) < 5e-3
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert attend.used == name


def test_attention_of_nothing() -> None:
    attend, q = Attention("transformer", None, CPU, torch.float32), torch.randn(2, 5, 3, 16)
    out, lse = attend(q, q[:, :0], q[:, :0], return_lse=True)
    assert out.shape == q.shape and not out.any() and lse.shape == (2, 3, 5) and lse.isneginf().all()
    out, lse = attend(q[:, :0], q, q, return_lse=True)
    assert out.shape == (2, 0, 3, 16) and lse.shape == (2, 3, 0)
    assert attend(q[:, :0], q, q).shape == (2, 0, 3, 16)


def test_shapes_alone_give_log_sum_exps() -> None:
    q, k = (torch.empty(2, n, 3, 16, device="meta") for n in (5, 9))
    with rehearsing("cpu"):
        out, lse = attention_module.shape_only_attention("transformer", None, CPU)(q, k, k, return_lse=True)
    assert out.is_meta and out.shape == q.shape and lse.shape == (2, 3, 5) and lse.dtype == torch.float32


def test_plans_and_compile_checks_run_the_kernel_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(attention_module, "attention_int8", lambda q, k, v, **how: seen.update(how) or q)
    config = {"pv": "fp8", "smooth_k": "false"}
    args = ServerArgs(device="cpu", attention_backend="triton_int8", attention_backend_config=config)
    blueprint = resolve(args).blueprint
    assert blueprint is not None
    q = torch.empty(1, 5, 2, 16, device="meta", dtype=torch.bfloat16)
    assert blueprint.attention_on(GPU)("transformer")(q, q, q) is q
    assert seen.pop("out") is seen.pop("code_scale") is None
    assert seen == {"impl": "triton", "return_lse": False, "pv": "fp8", "smooth_k": False}


@pytest.mark.parametrize("keys", [7, 0])
@pytest.mark.parametrize("coded", ["fp8_block", "fp8", "int8"])
def test_codes_are_made_after_backends_that_leave_none(coded: Any, keys: int) -> None:
    """In a slice of a wider buffer, with scales of heads of 128 channels or one for all."""
    q, k, v = (torch.randn(2, tokens, 3, 128 if coded == "fp8_block" else 48) for tokens in (5, keys, keys))
    attend = Attention("transformer", "torch_sdpa", torch.device("cpu"), torch.float32)
    wide = torch.zeros(2, 5, 5, q.shape[-1]).to(DTYPES[coded])
    scales = torch.full((2, 5, 6), -1.0) if coded == "fp8_block" else torch.tensor([0.01])
    place, scale = wide[:, :, 1:4], scales[..., 3:] if coded == "fp8_block" else scales
    assert attend(q, k, v, out=place, code_scale=scale) is place
    codes, want = quantize_rows(attend(q, k, v).flatten(2), coded, scale=None if coded == "fp8_block" else scale)
    assert torch.equal(place.flatten(2).float(), codes.float()) and bool(codes.float().any()) == bool(keys)
    assert coded != "fp8_block" or torch.equal(scale, want) and (scales[..., :3] == -1).all()
    assert not wide[:, :, 0].float().any() and not wide[:, :, 4].float().any()


def test_log_sum_exps_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for packages that need a GPU: what they are called with, and that their results come back."""
    seen: dict[str, Any] = {}
    lse = torch.randn(1, 4, 2).mT

    def flash_attn_func(q: Any, k: Any, v: Any, **given: Any) -> Any:
        seen["fa"] = given
        return q + v, lse, None

    def sageattn(q: Any, k: Any, v: Any, return_lse: bool = False, **given: Any) -> Any:
        seen["sage_attn"] = given | {"return_lse": return_lse}
        return q + v, lse.half()

    for package, function in (("flash_attn", flash_attn_func), ("sageattention", sageattn)):
        module = ModuleType(package)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, package, module)
    q, _, v = torch.randn(3, 1, 4, 2, 16)
    for name in ("fa", "sage_attn"):
        out, got = BACKENDS[name].run(q, q, v, out=torch.empty_like(q), return_lse=True)
        assert torch.equal(out, q + v) and torch.allclose(got, lse, atol=1e-2)
        assert got.is_contiguous() and got.dtype == torch.float32
    assert seen["fa"] == {"return_attn_probs": True}
    assert seen["sage_attn"] == {"return_lse": True, "tensor_layout": "NHD", "smooth_k": True}

    monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name: object())
    case = Case(GPU, torch.bfloat16, 64, 9, lse=True)
    assert BACKENDS["sage_attn"].reasons(case) == []
    sys.modules["sageattention"].sageattn = lambda q, k, v: None  # type: ignore[attr-defined]
    assert BACKENDS["sage_attn"].reasons(case)[0].startswith("this version of sageattention gives no log-sum-exps")
    assert BACKENDS["sage_attn"].reasons(Case(GPU, torch.bfloat16, 64, 9)) == []


def test_backends_are_timed_and_wrong_ones_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention_order, "CLASSES", (({"itemsize": 2, "head_dim": 16, "keys": 8}, ((1, 4, 8, 2),)),))
    sdpa = BACKENDS["torch_sdpa"].run
    stand_ins = {"triton": sdpa, "cudnn": lambda q, k, v, out=None: torch.zeros_like(q), "fa": sdpa}
    for name, run in stand_ins.items():
        monkeypatch.setattr(type(BACKENDS[name]), "run", staticmethod(run))
        monkeypatch.setattr(type(BACKENDS[name]), "reasons", lambda self, case: [])
    seconds = {"torch_sdpa": 3.0, "triton": 1.0, "fa": 2.0}
    monkeypatch.setattr(attention_order, "medians_us", lambda calls, device: {name: seconds[name] for name in calls})
    path = attention_order.rewrite("sm_90", CPU, {"device": "H200"}, tmp_path / "order.json")
    table = json.loads(path.read_text())
    assert table["sm_90"] == {
        "measured": True,
        "device": "H200",
        "rows": [
            {"at_most": {"itemsize": 2, "head_dim": 16, "keys": 8}, "order": ["triton", "fa", "torch_sdpa"]},
            order_table()["sm_90"]["rows"][-1],
        ],
    }
    assert table["sm_80"] == order_table()["sm_80"]
    shipped = attention_order.FILE.read_text()
    assert attention_order.text_of(json.loads(shipped)) == shipped


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
        ({"pv": "fp8"}, "attention_backend_config.pv=fp8: sage_attn has smooth_k$"),
    ],
)
def test_unknown_settings_and_values_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(BACKENDS["sage_attn"], config)


def test_a_setting_may_be_one_of_some_words() -> None:
    assert read_settings(BACKENDS["triton_int8"], {"pv": "fp8", "smooth_k": "false"}) == {
        "pv": "fp8",
        "smooth_k": False,
    }
    with pytest.raises(UserError, match="attention_backend_config.pv=int8: expected half or fp8"):
        read_settings(BACKENDS["triton_int8"], {"pv": "int8"})


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
