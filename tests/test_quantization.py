"""Denoisers whose weights are quantised while they load: what is drawn is what the codes stand for, and is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import sglang
from ranks import run_ranks
from test_offload import StandIn
from test_offload import load as load_offloaded
from test_parallel import draw_all
from tiny_checkpoints import build_flux
from tiny_flux2 import HEAD_DIM, build_flux2
from torch import Tensor, nn

from sgl_diffusion.kernels.activation import activation
from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.kernels.quantize import quantize_rows
from sgl_diffusion.models.layers import ALL_FORMATS, Codes, Linear, code_place, swiglu, swiglu_at
from sgl_diffusion.runtime.accounting import counted
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import Drawn
from sgl_diffusion.runtime.live_bytes import LiveBytes
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.quantization.layers import LAYERS, EightBitLinear, QuantizedLinear, SideBySide
from sgl_diffusion.runtime.quantization.schemes import SCHEMES
from sgl_diffusion.runtime.quantization.weight import side_by_side
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.trace import Stopwatch

CPU = torch.device("cpu")
REQUEST = {"prompt": "a red circle left of a blue square", "num_inference_steps": 2, "seed": 3}
SIZES: dict[str, dict[str, Any]] = {
    "flux": {"height": 48, "width": 80},
    "flux2": {"height": 64, "width": 96, "max_sequence_length": 96},
    "qwen": {"height": 48, "width": 80, "negative_prompt": "a square", "true_cfg_scale": 2.5},
    "z_image": {"height": 48, "width": 80},
    "wan": {"height": 32, "width": 80, "num_frames": 5, "guidance_scale": 4.0},
}


def load(folder: Path | str, **options: Any) -> Engine:
    return Engine.load(ServerArgs(model_path=str(folder), device="cpu", log_level="error", **options))


def drawn(engine: Engine, **sampling: Any) -> Tensor:
    """Final latents."""
    pipeline = engine.backend
    assert isinstance(pipeline, NativePipeline)
    request = resolve_request(SamplingParams(save_output=False, **{**REQUEST, **sampling}), {}, engine.args)
    last = next(e for e in pipeline.run(pipeline.prepare(request), Stopwatch(CPU)) if isinstance(e, Drawn))
    return last.latents.clone()


def layers_of(engine: Engine, key: str = "transformer") -> dict[str, QuantizedLinear]:
    assert isinstance(engine.backend, NativePipeline)
    found = engine.backend.parts[key].named_modules()
    return {path: layer for path, layer in found if isinstance(layer, QuantizedLinear)}


class Stated(nn.Module):
    """A layer that multiplies the numbers which codes stand for."""

    def __init__(self, layer: QuantizedLinear, activations: str | None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.bias = layer.out_features, layer.in_features, layer.bias
        self.numbers, self.activations = layer.quantized.dequantized(torch.float32), activations

    def forward(self, x: Tensor, **epilogue: Any) -> Any:
        x = x.contiguous()
        if self.activations is not None:
            codes, scale = quantize_rows(x, self.activations)  # type: ignore[arg-type]
            wide = scale.unsqueeze(-1) if scale.ndim < x.ndim else scale.repeat_interleave(128, -1)[..., : x.shape[-1]]
            x = codes.float() * wide
        return gemm(x, self.numbers, self.bias, **epilogue)


# -- what is drawn --------------------------------------------------------------------


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize(("scheme", "activations"), [("int8", "int8"), ("fp8_block", "fp8_block"), ("mxfp8", None)])
def test_codes_are_the_numbers_they_stand_for(
    model: str, scheme: str, activations: str | None, tiny: Callable[[str], Path]
) -> None:
    """Whether a norm writes codes or a layer makes them of its input, and wherever rows are cut and joined."""
    engine, plain = load(tiny(model), quantization=scheme), load(tiny(model))
    layers = layers_of(engine)
    assert len(layers) > 5
    for path, layer in layers.items():
        assert isinstance(plain.backend, NativePipeline)
        plain.backend.parts["transformer"].set_submodule(path, Stated(layer, activations))
    want = drawn(plain, **SIZES[model])
    error = (drawn(engine, **SIZES[model]) - want).abs().max() / want.std()
    # codes may fall to the other side of a tie: seldom, and by one
    assert error < (1e-4 if activations is None else 2e-2)


def readers_of_codes(engine: Engine, model: str) -> set[str]:
    """Quantised layers of blocks whose input some other pass left as codes, in all blocks and steps."""
    seen: dict[str, set[type]] = {}
    for path, layer in layers_of(engine).items():
        name = path.split(".", 2)[2]
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, set()).add(type(given[0])))
    drawn(engine, **SIZES[model])
    assert all(len(kinds) == 1 for kinds in seen.values()), seen
    return {name for name, kinds in seen.items() if kinds == {Codes}}


def test_norms_hand_on_codes(tiny: Callable[[str], Path]) -> None:
    """Of a scale a row, as they hold whole rows; all else is quantised by a pass of its own."""
    engine = load(tiny("wan"), quantization="int8", enable_cuda_graph="false")
    assert readers_of_codes(engine, "wan") == {"attn1.to_qkv", "attn2.to_q", "ffn.net.0.proj"}


@pytest.mark.parametrize(
    ("model", "after"),
    [
        ("flux", {"ff.net.2", "ff_context.net.2", "proj_out", "attn.to_out.0", "attn.to_add_out"}),
        ("flux2", {"ff.linear_out", "ff_context.linear_out", "attn.to_out", "attn.to_out.0", "attn.to_add_out"}),
        ("qwen", {"img_mlp.net.2", "txt_mlp.net.2", "attn.to_out.0", "attn.to_add_out"}),
        ("wan", {"ffn.net.2", "attn1.to_out.0", "attn2.to_out.0"}),
        ("z_image", {"attention.to_out.0"}),
    ],
)
def test_attention_and_activations_hand_on_codes(
    model: str, after: set[str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of scales of blocks, as a tile of a product, and a head, hold whole ones. What is drawn does not tell."""
    folder = tiny(model)
    if model == "flux2":  # what stands beside the MLP of a single block has to be whole blocks wide
        assert "attn.to_out" not in readers_of_codes(load(folder, quantization="fp8_block"), model)
        folder = build_flux2(tmp_path / "wider", num_attention_heads=128 // HEAD_DIM)
    engine = load(folder, quantization="fp8_block", enable_cuda_graph="false")
    assert after <= readers_of_codes(engine, model)
    for layer in layers_of(engine).values():
        layer.__dict__["code_place"] = lambda shape, like: None
    alone = drawn(engine, **SIZES[model])
    assert not after <= readers_of_codes(engine, model)
    assert torch.equal(drawn(load(folder, quantization="fp8_block"), **SIZES[model]), alone)


@pytest.mark.parametrize(
    ("model", "into"),
    [
        ("flux2", {"attn.to_qkv_mlp_proj", "attn.to_out", "ff.linear_out", "ff_context.linear_out"}),
        ("wan", {"attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"}),
        ("z_image", {"attention.to_qkv", "attention.to_out.0"}),
    ],
)
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_codes_of_known_scales_are_handed_on(
    model: str, into: set[str], scheme: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By norms, products, attention, SwiGLUs; what two layers read has not one scale. What is drawn does not tell."""
    engine = load(tiny(model), quantization=scheme, enable_cuda_graph="false")
    for layer in layers_of(engine).values():
        assert isinstance(layer, EightBitLinear)
        layer.input_scale, layer.names = nn.Parameter(torch.tensor([0.02]), False), (*layer.names, "input_scale")
    assert readers_of_codes(engine, model) == into
    got = drawn(engine, **SIZES[model])
    monkeypatch.setattr("sgl_diffusion.models.layers.scale_of", lambda layer: None)
    monkeypatch.setattr("sgl_diffusion.models.layers.read_by", lambda *layers: None)
    monkeypatch.setattr(EightBitLinear, "code_place", lambda layer, shape, like: None)
    assert readers_of_codes(engine, model) == set()
    assert torch.equal(drawn(engine, **SIZES[model]), got)


def test_heads_that_are_blocks_hand_on_codes(tmp_path: Path) -> None:
    """Of 128 channels, as those of the published models: then attention is asked for codes, and not for numbers."""
    engine = load(build_flux(tmp_path / "wide", heads=1, head_dim=128), quantization="fp8_block")
    assert {"attn.to_out.0", "attn.to_add_out", "proj_out"} <= readers_of_codes(engine, "flux")
    got = drawn(engine, **SIZES["flux"])
    for layer in layers_of(engine).values():
        layer.__dict__["code_place"] = lambda shape, like: None
    assert torch.equal(drawn(engine, **SIZES["flux"]), got)


def layer_of(kind: str, outputs: int, inputs: int, known_scale: bool = False) -> nn.Module:
    """Of a scheme, or "full"; calibrated, if asked for."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
    if kind == "full":
        layer = Linear(inputs, outputs, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer
    if kind == "side by side":
        parts = [layer_of("int8", outputs // 4, inputs), layer_of("full", outputs - outputs // 4, inputs)]
        return SideBySide(parts)
    quantized = SCHEMES[kind].quantize(weight)
    layer = LAYERS[quantized.kind](quantized, None)
    if known_scale:
        layer.input_scale, layer.names = nn.Parameter(torch.tensor([0.5]), False), (*layer.names, "input_scale")
    return layer


@pytest.mark.parametrize(
    ("kind", "into", "known_scale", "passes"),
    [
        ("full", "full", False, 0),
        ("full", "fp8", False, 1),
        ("full", "fp8_block", False, 1),
        ("full", "int8", True, 1),
        ("fp8", "full", False, 0),
        ("fp8", "fp8", False, 1),
        ("fp8", "fp8", True, 0),
        ("fp8", "fp8_block", False, 0),
        ("fp8_block", "fp8_block", False, 0),
        ("int8", "int8", False, 1),
        ("int8", "int8", True, 0),
        ("int8", "fp8", True, 1),
        ("int4", "int4", False, 0),
        ("int4", "fp8_block", False, 1),
        ("svdquant", "svdquant", False, 0),
        ("mxfp8", "full", False, 1),
        ("side by side", "full", False, 1),
        ("side by side", "fp8_block", False, 1),
    ],
)
def test_a_swiglu_is_a_pass_only_where_no_epilogue_can_have_it(
    kind: str, into: str, known_scale: bool, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a feed-forward's first layer, and of one that has a head; the numbers are those of the pass."""
    layer, reader = layer_of(kind, 128 + 512, 128), layer_of(into, 128, 256, known_scale)
    first, x = layer_of(kind, 512, 128), torch.randn(2, 5, 128)
    y, both = layer(x), first(x)
    want = reader(activation(both, "swiglu")), reader(activation(y[..., 128:], "swiglu"))
    taken: list[str] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        taken.append(args[1])
        return activation(*args, **kwargs)

    for module in ("models.layers", "runtime.quantization.layers"):
        monkeypatch.setattr(f"sgl_diffusion.{module}.activation", noted)
    assert torch.equal(reader(swiglu(first, x, reader)), want[0])
    assert taken == ["swiglu"] * passes
    taken.clear()
    place: Any = code_place(reader, x, 256, writes=ALL_FORMATS)
    coded = place is not None
    place = place if coded else x.new_empty(2, 5, 256)
    assert torch.equal(swiglu_at(place, layer, x, 128), y[..., :128])
    assert torch.equal(reader(place), want[1])
    # a scale of each token is not known before the last column: what is left there is numbers
    assert len(taken) == (passes if coded or kind in ("mxfp8", "side by side") else 0)


def test_rows_and_columns_of_codes() -> None:
    """With a scale a row, a scale a block, and one that is known, which goes with every part."""
    values = torch.arange(6.0)[:, None] * torch.ones(384)
    by_row, by_block, known = (
        Codes(values, scale, torch.float32)
        for scale in (torch.arange(6.0), torch.arange(18.0).view(6, 3), torch.tensor([7.0]))
    )
    for codes, scale in ((by_row, [2.0, 3.0]), (by_block, [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]), (known, [7.0])):
        assert codes[2:4].values[:, 0].tolist() == [2, 3] and codes[2:4].scale.tolist() == scale
        samples = codes.view(2, 3, 384)
        assert samples.shape == (2, 3, 384) and samples.dtype == torch.float32
        assert torch.equal(samples.scale.flatten(), codes.scale.flatten())
        assert samples.scale.shape == ((1,) if codes is known else (2, 3, *codes.scale.shape[1:]))
    head, tail = by_block.split((256, 128))
    assert head.scale.tolist()[1] == [3, 4] and tail.scale.tolist()[1] == [5] and tail.shape == (6, 128)
    assert all(part.scale is known.scale for part in known.split((40, 344)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_near(scheme: str) -> None:
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    quantized = SCHEMES[scheme].quantize(weight)
    error = (quantized.dequantized(torch.float32) - weight).norm() / weight.norm()
    assert 0.2 * SCHEMES[scheme].tolerance.weights < error < SCHEMES[scheme].tolerance.weights
    assert torch.equal(weight, before) and quantized.shape == (192, 256)
    shapes = SCHEMES[scheme].quantize(weight.to("meta")).tensors
    assert {n: (t.shape, t.dtype) for n, t in shapes.items()} == {
        n: (t.shape, t.dtype) for n, t in quantized.tensors.items()
    }
    zeros = SCHEMES[scheme].quantize(torch.zeros(32, 128))
    assert torch.equal(zeros.dequantized(torch.float32), torch.zeros(32, 128))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in ("fp8_block", "svdquant")])
def test_rows_are_cut_and_joined(scheme: str) -> None:
    quantized = SCHEMES[scheme].quantize(torch.randn(96, 128, generator=torch.Generator().manual_seed(0)))
    parts = [quantized.rows(0, 32), quantized.rows(32, 96)]
    joined = side_by_side(parts)
    assert joined is not None and all(torch.equal(t, quantized.tensors[n]) for n, t in joined.tensors.items())
    other = SCHEMES["int8" if scheme == "fp8" else "fp8"].quantize(torch.randn(96, 128))
    assert side_by_side([quantized, other]) is None
    blocks = SCHEMES["fp8_block"].quantize(torch.randn(256, 128))
    with pytest.raises(ValueError, match="rows 0 to 100: scale has one for every 128 rows"):
        blocks.rows(0, 100)


# -- where weights are, and what they take ----------------------------------------------


def test_one_layer_at_a_time_is_there_in_full(tmp_path: Path) -> None:
    folder = build_flux(tmp_path / "flux", heads=4, head_dim=32, double=2, single=4)
    load(folder, quantization="int8")  # what is imported and made once
    counted: dict[str, int] = {}
    for scheme in (None, "int8"):
        live = LiveBytes("cpu")
        with live.rising():
            engine = load(folder, quantization=scheme)
        counted[str(scheme)] = live.peak
    assert isinstance(engine.backend, NativePipeline)
    told = engine.backend.quantization["transformer"]
    saved = (told["in_full_mb"] - told["weights_mb"]) * 1024**2
    largest = max(layer.out_features * layer.in_features for layer in layers_of(engine).values()) * 4
    assert counted["None"] - counted["int8"] > saved - 5 * largest > 0.5 * saved


def test_offloaded_layers_draw_the_same(tiny: Callable[[str], Path]) -> None:
    resident = drawn(load(tiny("flux"), quantization="int8"), **SIZES["flux"])
    for place in ("layerwise", "component"):
        engine = load_offloaded(tiny("flux"), StandIn(), {"transformer": place}, quantization="int8")
        assert torch.equal(drawn(engine, **SIZES["flux"]), resident)


@pytest.mark.usefixtures("nothing_compiled")
def test_blocks_of_codes_are_compiled(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as Dynamo: what it traced is run as it is. Inductor takes a minute, and has a test of blocks in full."""
    traced: list[int] = []

    def run_as_traced(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        traced.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", run_as_traced)
    options, size = {"quantization": "svdquant"}, SIZES["flux"]
    expected = drawn(load(tiny("flux"), **options), **size)
    assert torch.equal(drawn(load(tiny("flux"), enable_torch_compile=True, **options), **size), expected)
    assert sum(traced) > 200, "nothing was compiled"


def test_dummies_are_quantised(tiny: Callable[[str], Path]) -> None:
    engine = load(tiny("flux"), quantization="svdquant", load_format="dummy")
    assert drawn(engine, **SIZES["flux"]).isfinite().all() and layers_of(engine)


def test_a_text_encoder_is_quantised(tiny: Callable[[str], Path]) -> None:
    """T5's feed-forward asks its weights for their dtype."""
    engine = load(tiny("flux"), component_quantizations={"text_encoder_2": "int8", "text_encoder": "fp8"})
    assert not layers_of(engine) and layers_of(engine, "text_encoder") and layers_of(engine, "text_encoder_2")
    plain, got = drawn(load(tiny("flux")), **SIZES["flux"]), drawn(engine, **SIZES["flux"])
    assert 0 < (got - plain).norm() / plain.norm() < 0.1


LAYOUTS: list[dict[str, Any]] = [{"ulysses_degree": 2}, {"ring_degree": 2}, {"tp_size": 2}]


def test_ranks_draw_the_same(tmp_path: Path) -> None:
    """Rows of activations have their own scales wherever they are; of shared inputs, every rank's part has its own."""
    folder = str(build_flux(tmp_path / "flux", heads=2, head_dim=128, double=1, single=1))
    options = [layout | {"quantization": s} for s in ("int8", "int4") for layout in LAYOUTS]
    options.append({"ulysses_degree": 2, "quantization": "fp8_block"})  # heads come back as numbers, and become codes
    asked = [(folder, each, REQUEST | SIZES["flux"]) for each in options]
    for each, got in zip(options, run_ranks(2, draw_all, asked)[0], strict=True):
        want = drawn(load(folder, quantization=each["quantization"]), **SIZES["flux"])
        error = (got[0] - want).abs().max() / want.std()
        assert error < (0.2 if "tp_size" in each else 2e-2), each


def test_work_is_counted() -> None:
    """Every product by its own formulas: weights move as codes."""
    weight = torch.randn(192, 256, dtype=torch.bfloat16)
    for scheme in SCHEMES.values():
        codes = scheme.quantize(weight)
        layer = LAYERS[codes.kind](codes.map(lambda t: t.to("meta")), None)
        with counted() as work:
            layer(torch.empty(2, 5, 256, dtype=torch.bfloat16, device="meta"))
        branch = 0 if codes.down_RK is None else 10 * 32 * (192 + 256)
        assert sum(work.flops.values()) == 2 * (10 * 192 * 256 + branch), scheme.name
        # results, and inputs once as numbers or as codes, or as both
        rows = 10 * 2 * 192 + torch.tensor([1, 2, 4]) * 10 * 256
        moved = sum(work.bytes.values()) - codes.nbytes
        assert rows.min() <= moved <= rows.max() + 10 * 160, scheme.name


# -- what is told, and refused ------------------------------------------------------------


def test_the_receipt(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dump = tmp_path / "perf.json"
    size = [word for name, value in SIZES["flux"].items() for word in (f"--{name}", str(value))]
    done = sglang(
        "generate", "--model-path", str(tiny("flux")), "--device", "cpu", "--prompt", "red",
        "--num-inference-steps", "1", "--quantization", "fp8", "--quantization-ignored-layers", "attn.to_out",
        "single_transformer_blocks.0.*", *size,
        "--output-path", str(tmp_path), "--perf-dump-path", str(dump), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(dump.read_text())
    told = report["effective"]["quantization"]["transformer"]
    assert told["format"] == "fp8" and set(told["products"]) == {"gemm_fp8"}
    assert told["products"]["gemm_fp8"] == told["layers"] > 0
    assert told["classes"]["transformer_blocks.*.attn.to_qkv"] == "gemm_fp8"
    assert told["weights_mb"] < told["in_full_mb"]
    reasons = dict(told["kept"])
    assert reasons.pop("quantization_ignored_layers has attn.to_out") > 0
    assert reasons.pop("quantization_ignored_layers has single_transformer_blocks.0.*") == 3  # its modulation as well
    assert reasons.pop("outside of the blocks") > 0 and not reasons
    assert f"quantization transformer=fp8: layers: {told['layers']} by gemm_fp8" in done.stdout + done.stderr
    products = report["effective"]["products"]
    assert {op: list(by) for op, by in products.items()} == {"gemm": ["torch"], "gemm_fp8": ["torch"]}
    assert re.search(
        r"products (gemm by torch; gemm_fp8|gemm_fp8 by torch; gemm) by torch\n", done.stdout + done.stderr
    )
    flops = {stage["name"]: stage["classes"] for stage in report["accounting"]["stages"]}
    assert flops["denoising"]["gemm_fp8"]["flops"] > flops["denoising"]["gemm"]["flops"] > 0


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"quantization": "int4", "quantization_ignored_layers": ["atn.to_"]}, "atn.to_: in no name of a layer of tra"),
        ({"quantization": "int8", "quantization_ignored_layers": ["blocks"]}, "nothing of transformer can be quant"),
        ({"quantization_ignored_layers": ["attn"]}, "no effect without quantization"),
        ({"component_quantizations": {"vae": "int8"}}, "component_quantizations.vae=int8: expected one of transformer"),
        ({"quantization": "int8", "backend": "diffusers"}, "the diffusers backend quantises nothing"),
        ({"quantization": "int8", "use_fsdp_inference": True, "num_gpus": 2}, "not with use_fsdp_inference"),
        ({"transformer_weights_path": "nowhere.bin"}, "transformer_weights_path=nowhere.bin: no such file"),
        ({"transformer_weights_path": ".", "load_format": "dummy"}, "no effect on dummy weights"),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], refusal: str, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=refusal):
        load(tiny("flux"), **options)


def test_layers_that_do_not_fit_are_kept(tmp_path: Path) -> None:
    engine = load(build_flux(tmp_path / "flux", heads=3, head_dim=32, double=1, single=1), quantization="int4")
    assert isinstance(engine.backend, NativePipeline)
    kept = engine.backend.quantization["transformer"]["kept"]
    assert kept["288 x 96: int4 takes multiples of 16 x 64"] == 2
