"""Checkpoints of SVDQuant, packed here by the orders that nunchaku's packer documents: where every number goes is
computed from its row and column. No published file was at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stored_layers import numbers, read_layer
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers import svdquant as reader
from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint

D, HIDDEN, RANK = 128, 256, 16
SHIFT = 0.171875
TOLERANCE = 1e-4  # of sums up to 30 in size, of weights in fp32
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])

# -- the packer -----------------------------------------------------------------------


def places(rows: int, columns: int, place: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Where the number of every row and column goes."""
    return place(torch.arange(rows)[:, None], torch.arange(columns)[None]).expand(rows, columns)


def packed(values: Tensor, place: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    flat = torch.full((values.numel(),), 99, dtype=values.dtype)
    flat[places(*values.shape, place).flatten()] = values.flatten()
    return flat.view(shape)


def pack_codes(codes: Tensor) -> Tensor:
    """Words of 8 codes; four of them, of rows 8 apart and columns 32 apart, are a lane's."""
    N, K = codes.shape

    def place(n: Tensor, k: Tensor) -> Tensor:
        tile = n // 128 * (K // 64) + k // 64
        lane = (tile * 8 + n % 128 // 16) * 32 + n % 8 * 4 + k % 32 // 8
        return (lane * 4 + n % 16 // 8 * 2 + k % 64 // 32) * 8 + k % 8

    nibbles = packed(codes, place, (N, K // 2, 2))
    return (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8).view(torch.int8)


def scale_place(groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda n, g: (n // 128 * groups + g) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2


def pack_scales(scale: Tensor) -> Tensor:
    N, G = scale.shape
    return packed(scale, scale_place(G), (G, N))


def pack_vector(vector: Tensor) -> Tensor:
    return pack_scales(vector[:, None]).flatten()


def micro_place(groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    def place(n: Tensor, g: Tensor) -> Tensor:
        lane = (n // 128 * (groups // 4) + g // 4) * 32 + n % 8 * 4 + n % 32 // 8
        return (lane * 4 + n % 128 // 32) * 4 + g % 4

    return place


def pack_micro_scales(scale: Tensor) -> Tensor:
    N, G = scale.shape
    return packed(scale.view(torch.uint8), micro_place(G), (G, N)).view(torch.float8_e4m3fn)


def pack_low_rank(matrix: Tensor, *, down: bool) -> Tensor:
    """(N, R), or of (R, K) with `down` (K, R): fragments of 16 x 16, which are the other way around in `down`."""
    rank = matrix.shape[0] if down else matrix.shape[1]

    def place(row: Tensor, column: Tensor) -> Tensor:
        fragment = column // 16 * (rank // 16) + row // 16 if down else row // 16 * (rank // 16) + column // 16
        lane = fragment * 32 + row % 8 * 4 + column % 8 // 2
        return lane * 8 + row % 16 // 8 * 4 + column % 16 // 8 * 2 + column % 2

    return packed(matrix, place, tuple(matrix.T.shape if down else matrix.shape))


def pack_awq(codes: Tensor) -> Tensor:
    """16 bits have four codes 8 columns apart; 64 columns of four rows lie one after the other."""
    N, K = codes.shape

    def place(n: Tensor, k: Tensor) -> Tensor:
        word = (n // 4 * (K // 64) + k // 64) * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8
        return word * 4 + k % 32 // 8

    nibbles = packed(codes, place, (N // 4, 2 * K, 2))
    return (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8).view(torch.int32)


def test_orders_are_those_in_the_packers_comments() -> None:
    """`pack_scale`, `pack_micro_scale` and `pack_w4` spell out the beginnings of their orders."""
    rows = torch.arange(128)[:, None]
    assert pack_scales(rows).flatten()[:20].tolist() == [
        0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 16, 17, 24, 25,
    ]  # fmt: skip
    lanes = packed(rows.expand(128, 4), micro_place(4), (32, 4, 4))[..., 0]
    assert lanes[:5].tolist() == [
        [0, 32, 64, 96],
        [8, 40, 72, 104],
        [16, 48, 80, 112],
        [24, 56, 88, 120],
        [1, 33, 65, 97],
    ]
    columns = torch.arange(64).expand(4, 64) % 32 // 2  # codes that tell columns apart in pairs
    words = pack_awq(columns).view(torch.uint8).flatten()[:8]
    assert [(int(b) & 15) * 2 // 8 for b in words[::2]] == [0, 0, 0, 0]
    assert [int(b) >> 4 for b in words[::2]] == [4, 4, 5, 5] and [int(b) & 15 for b in words[1::2]] == [8, 8, 9, 9]


# -- layers -----------------------------------------------------------------------


@dataclass
class Layer:
    """A layer as nunchaku computes it, in float64.

    Attributes:
        tensors: of the file, by the names of the second format.
    """

    tensors: dict[str, Tensor]
    weight_NK: Tensor
    smooth_K: Tensor
    branch_NK: Tensor
    bias_N: Tensor
    shift: float

    def __call__(self, x_MK: Tensor) -> Tensor:
        smoothed = (x_MK + self.shift) / self.smooth_K
        return smoothed @ self.weight_NK.T + x_MK @ self.branch_NK.T + self.bias_N


def layer(N: int, K: int, seed: int, *, fp4: bool = False, shift: float = 0.0, smooth: Tensor | None = None) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).bfloat16()

    codes = torch.randint(0, 16, (N, K), generator=generator)
    bias, smooth = random(N) - 0.5, random(K) + 0.5 if smooth is None else smooth
    down, up = random(RANK, K) - 0.5, random(N, RANK) - 0.5
    tensors = {
        "qweight": pack_codes(codes),
        "bias": pack_vector(bias),
        "smooth_factor": pack_vector(smooth),
        "smooth_factor_orig": pack_vector(smooth * 2),
        "proj_down": pack_low_rank(down, down=True),
        "proj_up": pack_low_rank(up, down=False),
    }
    if fp4:
        scale, whole, of_rows = (random(N, K // 16) + 0.1).to(torch.float8_e4m3fn), random(1) + 0.1, random(N) + 0.1
        tensors |= {"wscales": pack_micro_scales(scale), "wtscale": whole, "wcscales": pack_vector(of_rows)}
        groups = scale.double() * whole.double() * of_rows.double()[:, None]
        values = FP4[codes].double()
    else:
        scale = random(N, K // 64) / 8 + 0.01
        tensors |= {"wscales": pack_scales(scale)}
        groups, values = scale.double(), (codes - 16 * (codes > 7)).double()
    weight = (values.view(N, groups.shape[1], -1) * groups[..., None]).view(N, K)
    return Layer(tensors, weight, smooth.double(), up.double() @ down.double(), bias.double(), shift)


def check(found: QuantizedCheckpoint, name: str, biases: list[str], x_MK: Tensor, expected_MN: Tensor) -> None:
    """That a layer with its biases computes what nunchaku's did; and what is known of it from headers."""
    weight = read_layer(found.layers[name])
    bias_N = torch.cat([found.tensors[bias].mapped() for bias in biases])
    for tensor in (found.tensors[bias] for bias in biases):
        assert (tensor.shape, tensor.dtype) == (tuple(tensor.mapped().shape), tensor.mapped().dtype)
    got_MN = x_MK @ weight.dequantized(torch.float32).double().T + bias_N.double()
    torch.testing.assert_close(got_MN, expected_MN, rtol=0, atol=TOLERANCE, msg=name)


def write(path: Path, layers: dict[str, Layer], plain: dict[str, Tensor], *, first_format: bool = False) -> Path:
    old = {
        "smooth_factor": "smooth",
        "smooth_factor_orig": "smooth_orig",
        "proj_down": "lora_down",
        "proj_up": "lora_up",
    }
    tensors = {
        f"{name}.{old.get(leaf, leaf) if first_format else leaf}": tensor
        for name, made in layers.items()
        for leaf, tensor in made.tensors.items()
    }
    save_file(tensors | plain, path)
    return path


def inputs(K: int) -> Tensor:
    return torch.randn(3, K, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


NAMES = {  # the second format's, those of our models, and of diffusers' biases
    "transformer_blocks.0.attn.to_qkv": ("attn.to_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "transformer_blocks.0.attn.add_qkv_proj": (
        "attn.add_qkv_proj",
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ),
    "transformer_blocks.0.attn.to_out.0": ("attn.to_out.0", ["attn.to_out.0"]),
    "transformer_blocks.0.ff.net.0.proj": ("ff.net.0.proj", ["ff.net.0.proj"]),
    "transformer_blocks.0.ff.net.2": ("ff.net.2", ["ff.net.2"]),
    "transformer_blocks.0.ff_context.net.2": ("ff_context.net.2", ["ff_context.net.2"]),
}
OLD_NAMES = dict(
    zip(NAMES, ["qkv_proj", "qkv_proj_context", "out_proj", "mlp_fc1", "mlp_fc2", "mlp_context_fc2"], strict=True)
)


@pytest.mark.parametrize("precision", ["int4", "fp4"])
@pytest.mark.parametrize("first_format", [True, False])
def test_layers_compute_what_nunchaku_does(precision: str, first_format: bool, tmp_path: Path) -> None:
    """After a GELU it adds a constant to activations in int4, which the bias makes up for."""
    fp4 = precision == "fp4"
    made = {
        name: layer(3 * D if "qkv" in name else D, D, i, fp4=fp4, shift=SHIFT if "net.2" in name and not fp4 else 0.0)
        for i, name in enumerate(NAMES)
    }
    named = {f"transformer_blocks.0.{OLD_NAMES[n]}" if first_format else n: made[n] for n in NAMES}
    norm = "transformer_blocks.0.norm_q.weight" if first_format else "transformer_blocks.0.attn.norm_q.weight"
    path = tmp_path / f"svdq-{precision}_r{RANK}-model.safetensors"
    write(path, named, {norm: torch.ones(8), "x_embedder.weight": torch.ones(4, 2)}, first_format=first_format)
    found = reader.read([path], {})
    assert found is not None and found.format == f"SVDQuant ({precision}, rank {RANK})"
    biases = {f"transformer_blocks.0.{b}.bias" for _, parts in NAMES.values() for b in parts}
    assert found.tensors.keys() == biases | {"transformer_blocks.0.attn.norm_q.weight", "x_embedder.weight"}
    x = inputs(D)
    for name, (ours, parts) in NAMES.items():
        of_layer = [f"transformer_blocks.0.{part}.bias" for part in parts]
        check(found, f"transformer_blocks.0.{ours}", of_layer, x, made[name](x))


@pytest.mark.parametrize("precision", ["int4", "fp4"])
def test_layers_of_parallel_blocks_become_two(precision: str, tmp_path: Path) -> None:
    fp4, block = precision == "fp4", "single_transformer_blocks.3"
    qkv = layer(3 * D, D, 1, fp4=fp4)
    up = layer(HIDDEN, D, 2, fp4=fp4, smooth=qkv.smooth_K.bfloat16())
    out, down = layer(D, D, 3, fp4=fp4), layer(D, HIDDEN, 4, fp4=fp4, shift=0.0 if fp4 else SHIFT)
    made = {f"{block}.{n}": m for n, m in [("qkv_proj", qkv), ("mlp_fc1", up), ("out_proj", out), ("mlp_fc2", down)]}
    found = reader.read([write(tmp_path / "model.safetensors", made, {}, first_format=True)], {})
    assert found is not None and found.layers.keys() == {f"{block}.attn.to_qkv_mlp", f"{block}.proj_out"}
    biases = [f"{block}.{part}.bias" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    x = inputs(D)
    check(found, f"{block}.attn.to_qkv_mlp", biases, x, torch.cat([qkv(x), up(x)], 1))
    x = inputs(D + HIDDEN)
    check(found, f"{block}.proj_out", [f"{block}.proj_out.bias"], x, out(x[:, :D]) + down(x[:, D:]))
    assert found.tensors.keys() == {*biases, f"{block}.proj_out.bias"}


def test_different_smoothing_of_one_input_is_refused(tmp_path: Path) -> None:
    block = "single_transformer_blocks.0"
    shapes = {"qkv_proj": (3 * D, D), "mlp_fc1": (HIDDEN, D), "out_proj": (D, D), "mlp_fc2": (D, HIDDEN)}
    made = {f"{block}.{name}": layer(*shape, i) for i, (name, shape) in enumerate(shapes.items())}
    found = reader.read([write(tmp_path / "model.safetensors", made, {})], {})
    assert found is not None
    with pytest.raises(
        UserError, match=r"qkv_proj.smooth_factor and .*mlp_fc1.smooth_factor differ; expected them equal"
    ):
        found.layers[f"{block}.attn.to_qkv_mlp"].read()
    del made[f"{block}.out_proj"]
    with pytest.raises(UserError, match=rf"{block} has no quantised attn.to_out"):
        reader.read([write(tmp_path / "model.safetensors", made, {})], {})


def test_gates_come_first(tmp_path: Path) -> None:
    """SwiGLU of diffusers has the gate, which is w1, in the second half; it has no constant added to its output."""
    both, last = layer(2 * HIDDEN, D, 1), layer(D, HIDDEN, 2)
    for made in (both, last):
        del made.tensors["bias"]
        made.bias_N.zero_()
    refiner = torch.arange(8.0).view(4, 2)
    path = write(
        tmp_path / "model.safetensors",
        {"layers.0.feed_forward.net.0.proj": both, "layers.0.feed_forward.net.2": last},
        {
            "noise_refiner.0.feed_forward.net.0.proj.weight": refiner,
            "noise_refiner.0.feed_forward.net.2.weight": refiner.clone(),
        },
    )
    found = reader.read([path], {})
    assert found is not None and found.layers.keys() == {"layers.0.feed_forward.w13", "layers.0.feed_forward.w2"}
    x = inputs(D)
    y = both(x)
    got = x @ numbers(found, "layers.0.feed_forward.w13").double().T
    torch.testing.assert_close(got, torch.cat([y[:, HIDDEN:], y[:, :HIDDEN]], 1), rtol=0, atol=TOLERANCE)
    got = inputs(HIDDEN) @ numbers(found, "layers.0.feed_forward.w2").double().T
    torch.testing.assert_close(got, last(inputs(HIDDEN)), rtol=0, atol=TOLERANCE)
    read = {name: tensor.mapped() for name, tensor in found.tensors.items()}
    names = {f"noise_refiner.0.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")}
    assert read.keys() == names
    assert torch.equal(read["noise_refiner.0.feed_forward.w1.weight"], refiner[2:])
    assert torch.equal(read["noise_refiner.0.feed_forward.w3.weight"], refiner[:2])


@pytest.mark.parametrize(
    ("name", "vectors"), [("transformer_blocks.0.norm1.linear", 6), ("single_transformer_blocks.0.norm.linear", 3)]
)
def test_modulation_layers_are_decoded(name: str, vectors: int, tmp_path: Path) -> None:
    """Their rows are of every vector in turn, and scales have had 1 added: `adanorm_zero` and `adanorm_single`."""
    width, K, generator = 8, 128, torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (vectors * width, K), generator=generator)
    scale, zero = (torch.rand(vectors * width, K // 64, generator=generator).bfloat16() for _ in range(2))
    weight = (codes.view(-1, K // 64, 64) * scale[..., None].float() + zero[..., None].float()).view(-1, K).bfloat16()
    bias = torch.randint(-4, 4, (vectors * width,), generator=generator).bfloat16()
    ones = torch.zeros(vectors, width)
    ones[1] = ones[-2] = 1
    turn = torch.arange(vectors * width).view(vectors, width).T.flatten()
    tensors = {
        "qweight": pack_awq(codes[turn]),
        "wscales": scale[turn].T.contiguous(),
        "wzeros": zero[turn].T.contiguous(),
        "bias": (bias + ones.flatten().bfloat16())[turn],
    }
    plain = {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
    path = write(tmp_path / "model.safetensors", {"transformer_blocks.0.attn.to_out.0": layer(D, D, 1)}, plain)
    found = reader.read([path], {})
    assert found is not None and found.format.endswith(", modulation layers decoded)")
    for leaf, expected in (("weight", weight), ("bias", bias)):
        tensor = found.tensors[f"{name}.{leaf}"]
        assert (tensor.shape, tensor.dtype) == (tuple(expected.shape), expected.dtype)
        assert torch.equal(tensor.mapped(), expected)


@pytest.mark.parametrize(
    ("file", "header", "told"),
    [
        ("svdq-fp4_r16-x", {}, "by its name fp4, rank 16; its tensors are int4, rank 16"),
        ("svdq-int4_r32-x", {}, "by its name int4, rank 32; its tensors are int4, rank 16"),
        ("x", {"weight": {"dtype": "fp4_e2m1_all"}}, "by its header fp4, rank 16; its tensors are int4, rank 16"),
        ("x", {"weight": {"dtype": "int4"}, "rank": 32}, "by its header int4, rank 32; its tensors are int4, rank 16"),
    ],
)
def test_files_are_what_they_say(file: str, header: dict[str, object], told: str, tmp_path: Path) -> None:
    tensors = {f"transformer_blocks.0.attn.to_out.0.{leaf}": t for leaf, t in layer(D, D, 1).tensors.items()}
    path = tmp_path / f"{file}.safetensors"
    save_file(tensors, path, {"quantization_config": json.dumps(header)})
    with pytest.raises(UserError, match=told):
        reader.read([path], {})


def test_other_layouts_are_refused_and_others_left_alone(tmp_path: Path) -> None:
    path, name = tmp_path / "model.safetensors", "transformer_blocks.0.attn.to_out.0"
    made = layer(D, D, 1)
    made.tensors["wscales"] = made.tensors["wscales"].repeat(2, 1)
    with pytest.raises(UserError, match=rf"{name} has 128 x 128 weights, and 4 scales of a row in torch.bfloat16"):
        reader.read([write(path, {name: made}, {})], {})
    made = layer(D, D, 1)
    del made.tensors["proj_up"]
    with pytest.raises(UserError, match=rf"{name} has no proj_up"):
        reader.read([write(path, {name: made}, {})], {})
    with pytest.raises(UserError, match=rf"{name}.rotation: not a tensor of SVDQuant's layers"):
        reader.read([write(path, {name: layer(D, D, 1)}, {f"{name}.rotation": torch.ones(1)})], {})
    with pytest.raises(UserError, match=r"layers of several kinds"):
        reader.read([write(path, {name: layer(D, D, 1), "other": layer(D, D, 1, fp4=True)}, {})], {})
    save_file({"a.lora_down.weight": torch.ones(2, 2), "b.proj_down": torch.ones(2, 2)}, path)
    assert reader.read([path], {}) is None
