"""Denoisers whose weights come quantised, written by `sglang quantize` or by others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import test_readers_svdquant as svdquant
import torch
from forks import sglang
from safetensors.torch import load_file, save_file
from test_quantization import SIZES, drawn, layers_of, load, readers_of_codes
from tiny_checkpoints import build_flux
from torch import Tensor

from sgl_diffusion.cli.main import main
from sgl_diffusion.models.flux import ORIGINAL_NAMES
from sgl_diffusion.models.layers import read_by
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.quantization.layers import EightBitLinear, SideBySide

SIZE = SIZES["flux"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("quantized") / "flux", heads=2, head_dim=64, double=1, single=1)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in (folder / "transformer").glob("*.safetensors") for name, t in load_file(file).items()}


# -- what we write ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "svdquant"])
def test_what_is_written_is_what_is_made_while_loading(scheme: str, flux: Path, tmp_path: Path) -> None:
    out = tmp_path / "written"
    words = ("--model-path", flux, "--device", "cpu", "--quantization", scheme, "--output", out)
    done = sglang("quantize", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"transformer: {scheme}: " in done.stdout and f"wrote {out}" in done.stdout
    written, made = load(out), load(flux, quantization=scheme)
    ours, theirs = layers_of(written), layers_of(made)
    assert ours.keys() == theirs.keys()
    for path, layer in ours.items():
        assert all(torch.equal(t, theirs[path].quantized.tensors[n]) for n, t in layer.quantized.tensors.items()), path
    assert torch.equal(drawn(written, **SIZE), drawn(made, **SIZE))
    assert isinstance(written.backend, NativePipeline) and isinstance(made.backend, NativePipeline)
    told, expected = (e.backend.quantization["transformer"] for e in (written, made))  # type: ignore[union-attr]
    assert {k: told[k] for k in told if k != "kept"} == {k: expected[k] for k in expected if k != "kept"}
    # a folder of the transformer alone is as good
    other = load(flux, component_paths={"transformer": str(out / "transformer")})
    assert torch.equal(drawn(other, **SIZE), drawn(made, **SIZE))


@pytest.mark.parametrize("scheme", ["fp8", "svdquant"])
def test_calibration_shows_in_what_is_written(scheme: str, flux: Path, tmp_path: Path) -> None:
    """Fixed scales are those of the largest inputs; smoothing makes the product that was there before."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "written"
    prompts.write_text("a red circle\n\na green star\n")
    given = ["--model-path", str(flux), "--device", "cpu", "--quantization", scheme, "--output", str(out)]
    size = ["--height", "48", "--width", "80", "--num-inference-steps", "2"]
    assert main(["quantize", *given, "--calibration-prompts", str(prompts), *size]) == 0
    calibrated, plain = layers_of(load(out)), layers_of(load(flux, quantization=scheme))
    in_full = load(flux)
    assert isinstance(in_full.backend, NativePipeline)
    for path, layer in calibrated.items():
        weight = in_full.backend.parts["transformer"].get_submodule(path).weight
        error = (layer.quantized.dequantized(torch.float32) - weight).norm() / weight.norm()
        assert error < 0.3, path
        if scheme == "fp8":
            assert isinstance(layer, EightBitLinear) and read_by(layer) is None and read_by(plain[path]) == "fp8"
            assert layer.calibrated_scale is layer.input_scale and layer.quantized.input_scale is not None
        else:
            smooth = layer.quantized.smooth_K
            assert smooth is not None and smooth.std() > 0
    engine = load(out, enable_cuda_graph="false")
    got, want = drawn(engine, **SIZE), drawn(in_full, **SIZE)
    assert 0 < (got - want).norm() / want.norm() < 0.3
    if scheme == "fp8":  # known before a row is there: what comes before leaves codes of them, which are the same
        into = {"ff.net.2", "ff_context.net.2", "proj_out", "attn.to_qkv_mlp"}  # other inputs are those of two layers
        assert readers_of_codes(engine, "flux") == into
        for layer in layers_of(engine).values():
            layer.__dict__["code_place"] = lambda shape, like: None
        assert readers_of_codes(engine, "flux") == {"attn.to_qkv_mlp"} and torch.equal(drawn(engine, **SIZE), got)


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--output", "there"], "quantization: missing"),
        (["--quantization", "fp8", "--output", "."], "output=.: is there already"),
        (["--quantization", "fp8", "--output", "no/where"], "output=no/where: the folder no does not exist"),
        (["--quantization", "mxfp8", "--output", "o", "--calibration-prompts", "p"], "prompts: mxfp8 makes no use"),
        (["--quantization", "fp8", "--output", "o", "--calibration-prompts", "q"], "prompts=q: cannot be read"),
        (["--quantization", "fp8", "--output", "o", "--height", "64"], "height=64: no effect here"),
        (["--component-quantizations.text_encoder", "fp8", "--output", "o"], "only denoisers are written"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(
    words: list[str], refusal: str, flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p").write_text("red\n")
    assert main(["quantize", "--model-path", str(flux), "--device", "cpu", *words]) == 2
    assert refusal in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


# -- what others write -------------------------------------------------------------------


def as_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def scaled_fp8(folder: Path, file: Path) -> Path:
    """A single file by ComfyUI's rules, with original names: matrices of blocks in e4m3 with one scale."""
    diffusers, tensors = weights(folder), {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for original, ours in ORIGINAL_NAMES.names.items():
        targets = list(ours) if isinstance(ours, dict) else [ours]
        for leaf in ("weight", "bias", ""):
            parts = [diffusers.get(f"{t.replace('{}', '0')}{'.' * bool(leaf)}{leaf}") for t in targets]
            if any(part is None for part in parts):
                continue
            whole = torch.cat(parts)  # type: ignore[arg-type]
            if targets[0] in ORIGINAL_NAMES.swapped:
                whole = torch.cat(whole.chunk(2)[::-1])
            name = original.replace("{}", "0")
            if leaf == "weight" and "blocks" in name and whole.ndim == 2:
                codes, scale = as_codes(whole)
                tensors |= {f"{name}.weight": codes, f"{name}.scale_weight": scale}
            else:
                tensors[f"{name}{'.' * bool(leaf)}{leaf}"] = whole.contiguous()
    save_file({f"model.diffusion_model.{name}": t.clone() for name, t in tensors.items()}, file)
    return file


def test_a_single_file_with_original_names(flux: Path, tmp_path: Path) -> None:
    file = scaled_fp8(flux, tmp_path / "flux-fp8.safetensors")
    engine = load(flux, transformer_weights_path=str(file))
    assert isinstance(engine.backend, NativePipeline)
    told = engine.backend.quantization["transformer"]
    assert told["format"].startswith("ComfyUI (float8_e4m3fn") and told["products"] == {"gemm_fp8": told["layers"]}
    assert told["kept"]["outside of the blocks: decoded"] > 0, "its modulation has codes as well"
    online = layers_of(load(flux, quantization="fp8"))
    assert layers_of(engine).keys() == online.keys()
    got, want = drawn(engine, **SIZE), drawn(load(flux), **SIZE)
    assert 0 < (got - want).norm() / want.norm() < 0.2


def gguf_file(folder: Path, file: Path, *, mixed: bool) -> Path:
    """By the gguf package, with diffusers' names; matrices of blocks in Q8_0 and, of some, in Q4_0 or plain."""
    writer = gguf.GGUFWriter(file, "flux")
    for name, tensor in weights(folder).items():
        data = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.F32
        if tensor.ndim == 2 and "blocks" in name and ".norm" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            if mixed and name.endswith(("to_k.weight", "add_v_proj.weight", "proj_mlp.weight")):
                kind = gguf.GGMLQuantizationType.Q4_0
            if mixed and name.endswith("add_q_proj.weight"):
                kind = gguf.GGMLQuantizationType.F32
        packed = data if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(data, kind)
        writer.add_tensor(name, np.ascontiguousarray(packed), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("mixed", [False, True])
def test_a_gguf_file(mixed: bool, flux: Path, tmp_path: Path) -> None:
    """Weights are those that the package reads, also where Q, K and V, one layer of ours, are of several types."""
    engine = load(flux, transformer_weights_path=str(gguf_file(flux, tmp_path / "flux.gguf", mixed=mixed)))
    assert isinstance(engine.backend, NativePipeline)
    sides = [m for m in engine.backend.parts["transformer"].modules() if isinstance(m, SideBySide)]
    assert len(sides) == (3 if mixed else 0)
    told = engine.backend.quantization["transformer"]
    assert set(told["products"]) == ({"gemm_w4", "gemm_w8"} if mixed else {"gemm_w8"})
    # diffusers' own weights of the same file, in full
    read = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(tmp_path / "flux.gguf").tensors
    }
    folder = shutil.copytree(flux, tmp_path / "decoded")
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    shapes = {name: t.shape for name, t in weights(flux).items()}
    decoded = {name: t.reshape(shapes[name]).contiguous() for name, t in read.items()}
    save_file(decoded, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    want = drawn(load(folder), **SIZE)
    assert (drawn(engine, **SIZE) - want).abs().max() / want.std() < 1e-4


def nunchaku_file(folder: Path, file: Path) -> dict[str, svdquant.Layer]:
    """In the first format, with random codes; what is not quantised is the folder's."""
    made: dict[str, svdquant.Layer] = {}
    for block in ("transformer_blocks.0", "single_transformer_blocks.0"):
        streams = ("", "_context") if block.startswith("transformer") else ("",)
        for i, stream in enumerate(streams):
            for j, (name, N, K) in enumerate(
                [("qkv_proj", 384, 128), ("out_proj", 128, 128), ("mlp_fc1", 512, 128), ("mlp_fc2", 128, 512)]
            ):
                joined = f"mlp{stream}_{name[4:]}" if name.startswith("mlp") else name + stream
                shift = svdquant.SHIFT if name == "mlp_fc2" else 0.0
                # layers of a parallel block that read the same are smoothed alike
                smooth = (
                    torch.full((128,), 0.75).bfloat16()
                    if block.startswith("single") and K == N // 3 or N == 512
                    else None
                )
                made[f"{block}.{joined}"] = svdquant.layer(N, K, 10 * i + j, shift=shift, smooth=smooth)
    quantised = ("attn.to_", "attn.add_", "ff", "proj_mlp", "single_transformer_blocks.0.proj_out")
    plain = {
        n: t
        for n, t in weights(folder).items()
        if not (n.startswith(("transf", "single")) and any(q in n for q in quantised))
    }
    svdquant.write(file, made, {name.replace("attn.norm_", "norm_"): t for name, t in plain.items()}, first_format=True)
    return made


def test_a_nunchaku_file(flux: Path, tmp_path: Path) -> None:
    file = tmp_path / "svdq-int4_r16-flux.safetensors"
    made = nunchaku_file(flux, file)
    engine = load(flux, transformer_weights_path=str(file), nunchaku_config={"precision": "int4", "rank": 16})
    assert isinstance(engine.backend, NativePipeline)
    told = engine.backend.quantization["transformer"]
    assert told["format"] == "SVDQuant (int4, rank 16)"
    assert told["products"] == {"gemm_w4 with int8 activations and a low-rank branch": 10}
    layers = layers_of(engine)
    for ours, theirs in {
        "transformer_blocks.0.attn.to_qkv": "transformer_blocks.0.qkv_proj",
        "transformer_blocks.0.ff_context.net.2": "transformer_blocks.0.mlp_context_fc2",
    }.items():
        want = made[theirs].weight_NK / made[theirs].smooth_K + made[theirs].branch_NK
        assert torch.allclose(layers[ours].quantized.dequantized(torch.float32).double(), want, atol=1e-4, rtol=0)
    assert drawn(engine, **SIZE).isfinite().all()
    for config, refusal in [
        ({"rank": 32}, "nunchaku_config.rank=32: .* has 16"),
        ({"precision": "fp4"}, "nunchaku_config.precision=fp4: .* has int4"),
    ]:
        with pytest.raises(UserError, match=refusal):
            load(flux, transformer_weights_path=str(file), nunchaku_config=config)
    with pytest.raises(UserError, match="nunchaku_config: no effect without transformer_weights_path"):
        load(flux, nunchaku_config={"rank": 32})


def test_plain_weights_from_elsewhere(flux: Path, tmp_path: Path) -> None:
    """May be quantised while they load."""
    file = tmp_path / "other.safetensors"
    save_file({name: 0.9 * t for name, t in weights(flux).items()}, file)
    in_full = load(flux, transformer_weights_path=str(file))
    assert isinstance(in_full.backend, NativePipeline) and not in_full.backend.quantization
    assert not torch.equal(drawn(in_full, **SIZE), drawn(load(flux), **SIZE))
    assert layers_of(load(flux, transformer_weights_path=str(file), quantization="int8"))


def test_what_cannot_be_loaded(flux: Path, tmp_path: Path) -> None:
    file = str(scaled_fp8(flux, tmp_path / "flux-fp8.safetensors"))
    for options, refusal in [
        ({"quantization": "int8"}, "quantization=int8: the weights of transformer are quantised: ComfyUI"),
        ({"tp_size": 2}, "tp_size=2: not with weights that come quantised"),
        ({"backend": "diffusers"}, "transformer_weights_path=.*: needs a native model"),
    ]:
        with pytest.raises(UserError, match=refusal):
            load(flux, transformer_weights_path=file, **options)  # type: ignore[arg-type]
    other = build_flux(tmp_path / "other", heads=1, head_dim=64, double=1, single=1)
    with pytest.raises(UserError, match=r"ComfyUI .*mis-shaped weights: .* instead of"):
        load(other, transformer_weights_path=file)
    folder = shutil.copytree(flux, tmp_path / "unknown")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "quanto"}})
    )
    with pytest.raises(UserError, match="quantization_config of quanto: expected one of saved, torchao"):
        load(folder)
