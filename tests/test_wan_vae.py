"""The native video autoencoder equals diffusers' `AutoencoderKLWan`, both kinds: fp32, 1e-4 of the std."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_checkpoints import randomise
from torch import Tensor

from sgl_diffusion.bench.launches import counted
from sgl_diffusion.cli.main import main
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.models.autoencoders.wan import AutoencoderKLWan, UpBlock, WanVaeConfig
from sgl_diffusion.models.autoencoders.windows import WHOLE, Padding, Span, Window
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import eager
from sgl_diffusion.runtime.graphs import Graphs
from sgl_diffusion.runtime.live_bytes import LiveBytes
from sgl_diffusion.runtime.tape import Tapes
from sgl_diffusion.runtime.weights import load_weights

pytestmark = pytest.mark.usefixtures("poisoned_memory", "no_gradients")


def statistics_of(channels: int) -> dict[str, list[float]]:
    return {
        "latents_mean": [0.1 * i for i in range(channels)],
        "latents_std": [1 + 0.1 * i for i in range(channels)],
    }


TINY: dict[str, dict[str, Any]] = {
    "plain": {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, **statistics_of(4)},
    "residual": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 6,
        "num_res_blocks": 1,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        **statistics_of(6),
    },
}


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vae")
    for name, config in TINY.items():
        randomise(diffusers.AutoencoderKLWan(**config), "vae").save_pretrained(root / name)
    return {name: root / name for name in TINY}


def both(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AutoencoderKLWan, Any]:
    """Ours and theirs."""
    config = WanVaeConfig.read(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        ours = AutoencoderKLWan(config, attention, **{"with_encoder": True, **options})
    load_weights(ours, list(folder.glob("*.safetensors")), torch.device("cpu"), dtype)
    theirs = diffusers.AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype)
    return ours.eval().requires_grad_(False), theirs.eval()


def clip(vae: AutoencoderKLWan, frames: int, rows: int, columns: int, batch: int = 1) -> Tensor:
    f = vae.config.downsampling
    return torch.randn(batch, 3, frames, rows * f, columns * f, generator=torch.Generator().manual_seed(0))


def latents(vae: AutoencoderKLWan, frames: int, rows: int, columns: int, batch: int = 1) -> Tensor:
    shape = (batch, vae.config.z_dim, 1 + frames // 4, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    error = ((got - want).abs().max() / want.std()).item()
    assert error < 1e-4, f"{error:.1e} of the std"


# -- parity -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("frames", "batch"), [(1, 2), (5, 1), (5, 2), (9, 1), (13, 2)])
def test_both_ways_equal_diffusers(folders: dict[str, Path], kind: str, frames: int, batch: int) -> None:
    ours, theirs = both(folders[kind])
    x = clip(ours, frames, 3, 5, batch)
    mean, log_variance = ours.encode(x)
    expected = theirs.encode(x).latent_dist
    assert_near(mean, expected.mean)
    assert_near(log_variance, expected.logvar)
    z = latents(ours, frames, 3, 5, batch)
    pixels = theirs.decode(z).sample
    assert (pixels.abs() < 1).float().mean() > 0.5
    assert_near(ours.decode(z), pixels)


@pytest.mark.parametrize("kind", TINY)
def test_smallest_pictures(folders: dict[str, Path], kind: str) -> None:
    """One latent, where contiguous and channels last are the same memory."""
    ours, theirs = both(folders[kind])
    z = latents(ours, 9, 1, 1)
    assert_near(ours.decode(z), theirs.decode(z).sample)
    x = clip(ours, 9, 1, 1)
    assert_near(ours.encode(x)[0], theirs.encode(x).latent_dist.mean)


@pytest.mark.parametrize("kind", TINY)
def test_half_precision_follows_diffusers(folders: dict[str, Path], kind: str) -> None:
    ours, theirs = both(folders[kind], torch.bfloat16)
    z = latents(ours, 9, 4, 6).bfloat16()
    got, want = ours.decode(z), theirs.decode(z).sample
    exact = both(folders[kind])[0].decode(z.float())
    assert torch.isfinite(got).all()
    assert rel_l2(got, exact) < 1.2 * rel_l2(want, exact) < 0.1
    x = clip(ours, 5, 4, 6).bfloat16()
    assert rel_l2(ours.encode(x)[0], theirs.encode(x).latent_dist.mean) < 0.05


@pytest.mark.parametrize("kind", TINY)
def test_every_small_weight_is_noticed(folders: dict[str, Path], kind: str) -> None:
    """Forgetting any bias or norm weight moves the result: none is dropped, doubled or read from another's place."""
    ours, _ = both(folders[kind])
    x, z = clip(ours, 5, 1, 2), latents(ours, 5, 1, 2)
    results = {"encoder": lambda: ours.encode(x)[0], "decoder": lambda: ours.decode(z)}
    before = {side: run() for side, run in results.items()}
    blind = []
    for name, p in ours.named_parameters():
        if not name.endswith((".bias", ".gamma")):
            continue
        side = "encoder" if name.startswith(("encoder.", "quant_conv.")) else "decoder"
        kept = p.clone()
        p.fill_(1.0 if name.endswith(".gamma") else 0.0)
        moved = (results[side]() - before[side]).abs().max() / before[side].std()
        p.copy_(kept)
        if moved < 1e-4:
            blind.append(name)
    assert blind == []


# -- chunks -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY)
def test_chunks_are_a_pure_function_of_latents_and_past(folders: dict[str, Path], kind: str) -> None:
    ours, _ = both(folders[kind])
    z = latents(ours, 17, 2, 3, 2)
    whole = ours.decode(z)
    streamed = list(ours.decode_chunks(z))
    assert [chunk.shape[2] for chunk in streamed] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(streamed, dim=2), whole)

    pixels, *past = ours.first_chunk(z[:, :, :1])
    assert torch.equal(pixels, whole[:, :, :1])
    shapes = None
    for i in range(1, z.shape[2]):
        given = [frames.clone() for frames in past]
        args = (z[:, :, i : i + 1], tuple(past))
        (again, *_), (pixels, *next_past) = ours.next_chunk(*args), ours.next_chunk(*args)
        assert torch.equal(pixels, whole[:, :, 4 * i - 3 : 4 * i + 1])
        assert torch.equal(again, pixels)
        assert all(torch.equal(a, b) for a, b in zip(past, given, strict=True))
        assert shapes in (None, [frames.shape for frames in next_past])
        shapes, past = [frames.shape for frames in next_past], next_past
        assert shapes == [frames.shape for frames in given]


def test_chunks_run_as_captured_graphs(folders: dict[str, Path]) -> None:
    ours, _ = both(folders["plain"])
    z = latents(ours, 17, 2, 3)
    whole, graphs = ours.decode(z), Graphs(Tapes())
    assert torch.equal(torch.cat(list(ours.decode_chunks(z, eager)), dim=2), whole)
    captured = [chunk.clone() for chunk in ours.decode_chunks(z, graphs)]
    assert_near(torch.cat(captured, dim=2), whole)
    assert (graphs.captures, graphs.replays) == (2, 3)


def test_a_frame_does_not_see_later_ones(folders: dict[str, Path]) -> None:
    ours, _ = both(folders["plain"])
    z = latents(ours, 13, 2, 3)
    changed = z.clone()
    changed[:, :, 2:] += 1
    assert torch.equal(ours.decode(z)[:, :, :5], ours.decode(changed)[:, :, :5])
    assert not torch.equal(ours.decode(z)[:, :, 5:9], ours.decode(changed)[:, :, 5:9])


def test_clips_of_a_batch_one_at_a_time(folders: dict[str, Path]) -> None:
    ours, _ = both(folders["plain"])
    x, z = clip(ours, 5, 2, 3, 2), latents(ours, 5, 2, 3, 2)
    want = (ours.encode(x)[0], ours.decode(z))
    ours.slicing = True
    assert_near(ours.encode(x)[0], want[0])
    assert_near(ours.decode(z), want[1])


def test_a_clip_has_one_frame_more_than_a_multiple_of_four(folders: dict[str, Path]) -> None:
    ours, _ = both(folders["plain"])
    with pytest.raises(ValueError, match=r"4 frames: expected 4 k \+ 1"):
        ours.encode(torch.zeros(1, 3, 4, 16, 16))


# -- tiles --------------------------------------------------------------------------


# convolutions of other shapes add up in another order: in fp32, 1e-6 to 1e-5 of the std
SEAMLESS = 2e-5


def seam(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.std()).item()


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(
    ("frames", "rows", "columns", "tile"),
    [
        (1, 9, 34, (5, 32)),  # inside of 27 latents from each side, a tile reaches no side of the picture
        (5, 5, 7, (2, 7)),
        (9, 4, 5, (4, 2)),
        (5, 3, 3, (1, 1)),  # tiles that are smaller than what they see of their neighbours
    ],
)
def test_tiles_have_no_seams(
    folders: dict[str, Path], kind: str, frames: int, rows: int, columns: int, tile: tuple[int, int]
) -> None:
    ours, _ = both(folders[kind])
    z, x = latents(ours, frames, rows, columns, 2), clip(ours, min(frames, 5), rows, columns)
    pixels, mean = ours.decode(z), ours.encode(x)[0]
    ours.tiling, ours.tile = True, (tile[0] * ours.config.downsampling, tile[1] * ours.config.downsampling)
    assert len(ours._tiles(rows, columns)) == -(-rows // tile[0]) * -(-columns // tile[1]) > 1
    tiled = ours.decode(z)
    assert seam(tiled, pixels) < SEAMLESS
    assert seam(ours.encode(x)[0], mean) < SEAMLESS
    streamed = list(ours.decode_chunks(z))
    assert [chunk.shape[2] for chunk in streamed] == [1] + [4] * (frames // 4)
    assert torch.equal(torch.cat(streamed, dim=2), tiled)


@pytest.mark.parametrize("kind", TINY)
def test_no_tile_sees_a_wrong_pixel(folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is far away weighs less than fp32 rounds: here it is NaN, and one that is seen is everywhere."""
    ours, _ = both(folders[kind])
    forward = UpBlock.forward

    def poisoned(block: UpBlock, x: Tensor, history: Any, padding: Padding = WHOLE) -> Tensor:
        y, zeros = forward(block, x, history, padding), iter(padding)
        for pixels in (y[..., 0, :], y[..., -1, :], y[..., 0], y[..., -1]):
            if not next(zeros) and block.grows:
                pixels.fill_(float("nan"))
        return y

    monkeypatch.setattr(UpBlock, "forward", poisoned)
    z = latents(ours, 5, 2, 33)
    whole, ours.tiling = ours.decode(z), True
    for columns in (1, 2, 3, 16):
        ours.tile = (64, columns * ours.config.downsampling)
        assert seam(ours.decode(z), whole) < SEAMLESS


@pytest.mark.parametrize("kind", TINY)
def test_tiles_in_half_precision(folders: dict[str, Path], kind: str) -> None:
    """Sums are fp32 and rounded once a layer: where they differ at all, it is by the last bit of a few values."""
    ours, _ = both(folders[kind], torch.bfloat16)
    z = latents(ours, 5, 5, 7).bfloat16()
    whole, ours.tiling, ours.tile = ours.decode(z), True, (32, 64)
    assert rel_l2(ours.decode(z), whole) < 1e-3


@pytest.mark.parametrize("tile", [(256, 256), (40, 56)])
def test_what_fits_into_a_tile_is_coded_as_a_whole(folders: dict[str, Path], tile: tuple[int, int]) -> None:
    ours, _ = both(folders["plain"])
    z, x = latents(ours, 5, 5, 7), clip(ours, 5, 5, 7)
    want = ours.encode(x)[0], ours.decode(z)
    ours.tiling, ours.tile = True, tile
    assert torch.equal(ours.encode(x)[0], want[0]) and torch.equal(ours.decode(z), want[1])


def test_tiles_of_what_is_no_whole_latents(folders: dict[str, Path]) -> None:
    ours, _ = both(folders["plain"], tiling=True, tile_height=32, tile_width=32)
    with pytest.raises(ValueError, match="44x64 pixels in tiles: expected multiples of 8"):
        ours.encode(torch.zeros(1, 3, 1, 64, 44))


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (16, 32), (48, 64)])
def test_what_a_tile_is_given(published: tuple[AutoencoderKLWan, Any], start: int, stop: int) -> None:
    """At every size, rows beyond the tile's own: 13 latents at first, 7 pixels at last."""
    tile = Window(Span(start, stop, 64), Span(0, 64, 64)).scaled(8)
    seen, rows = published[0].decoder.conv_out.sees(tile), []
    for scale, block in zip((8, 4, 2, 1), reversed(published[0].decoder.up_blocks), strict=True):
        seen = block.sees(seen)
        assert (seen.columns.start, seen.columns.stop) == (0, 64 * scale)
        rows.append((scale * start - seen.rows.start, seen.rows.stop - scale * stop))
    above, below = (0 if start == 0 else 1), (0 if stop == 64 else 1)
    assert rows == [(above * n, below * n) for n in (7, 10, 12, 13)]


# -- kernels and shapes -------------------------------------------------------------


@pytest.mark.usefixtures("repaired_interpreter")
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_kernels_and_references_give_the_same(
    folders: dict[str, Path], kind: str, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = both(folders[kind], dtype)
    x, z = clip(ours, 5, 1, 2).to(dtype), latents(ours, 5, 1, 2).to(dtype)
    want = ours.encode(x)[0], ours.decode(z)
    ran: set[str] = set()
    tile = launch.tile
    monkeypatch.setattr(launch, "runs_triton", lambda impl, x: True)
    monkeypatch.setattr(launch, "tile", lambda op, **size: ran.add(op) or tile(op, **size))
    got = ours.encode(x)[0], ours.decode(z)
    assert {"channel_norm", "upsample_nearest", "attention"} <= ran
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(b).all()
        assert rel_l2(a, b) < limit


@pytest.fixture(scope="module")
def published() -> tuple[AutoencoderKLWan, Any]:
    """At true size, of shapes alone: ours and theirs. What their configs leave out is as in Wan2.1."""
    with torch.device("meta"):
        ours = AutoencoderKLWan(WanVaeConfig.read({}), partial(attention, impl="torch")).bfloat16()
        return ours, diffusers.AutoencoderKLWan().bfloat16()


def test_a_clip_takes_few_launches(published: tuple[AutoencoderKLWan, Any]) -> None:
    """81 frames of 480p; diffusers takes 9294."""
    z = torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16, device="meta")
    with counted("sm_90") as launches:
        clip = published[0].decode(z)
    assert clip.shape == (1, 3, 81, 480, 832)
    assert launches.total() <= 3061


def peak(run: Any) -> int:
    with counted("sm_90"), LiveBytes("meta") as live:
        run()
    return live.peak


def stream(vae: AutoencoderKLWan, z: Tensor) -> None:
    for _ in vae.decode_chunks(z):
        pass


def test_memory_stays_below_that_of_diffusers(published: tuple[AutoencoderKLWan, Any]) -> None:
    """Of 480p, on a GPU; and streamed, it does not grow with the clip."""
    ours, theirs = published
    # four chunks have two that are as all others of a longer clip: not the first, and not the last, which keeps nothing
    four, five = (torch.empty(1, 16, n, 60, 104, dtype=torch.bfloat16, device="meta") for n in (4, 5))
    assert peak(lambda: ours.decode(five)) < 0.8 * peak(lambda: theirs.decode(five).sample)
    assert peak(lambda: stream(ours, four)) == peak(lambda: stream(ours, five))


def test_memory_of_tiles(published: tuple[AutoencoderKLWan, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole clip needs what one tile does, beside its pixels and latents; a stream remembers all its tiles."""
    ours, _ = published

    def latents(frames: int, rows: int) -> Tensor:
        return torch.empty(1, 16, frames, rows, 64, dtype=torch.bfloat16, device="meta")

    short, long, tall = latents(4, 96), latents(5, 96), latents(4, 192)
    whole, streamed = peak(lambda: ours.decode(short)), peak(lambda: stream(ours, short))
    monkeypatch.setattr(ours, "tiling", True)
    tiles, taller = peak(lambda: ours.decode(short)), peak(lambda: ours.decode(tall))
    # of one latent's place, in bf16: 13 frames of 64 pixels, 4 results of the middle block, and what that works with
    assert taller - tiles <= 96 * 64 * 2 * (13 * 64 * 3 + 4 * 384 + 12 * 384)
    assert tiles < 0.3 * whole
    assert peak(lambda: stream(ours, short)) < 0.8 * streamed
    assert peak(lambda: stream(ours, short)) == peak(lambda: stream(ours, long))


# -- config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 2}, "config key heads=2 is not understood"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"temperal_downsample": [True, True]}, "temperal_downsample.*3 values, 2 of them true"),
        ({"latents_mean": [0.0]}, "latents_mean: 1 values, expected z_dim=4"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial=16 is not supported natively; only 8 is"),
    ],
)
def test_a_config_that_is_not_understood(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WanVaeConfig.read(TINY["plain"] | change)


def test_widths_that_leave_no_shortcut() -> None:
    config = WanVaeConfig.read(TINY["residual"] | {"dim_mult": [1, 2, 3, 4]})
    with pytest.raises(ConfigError, match="a resolution of 48 channels beside one of 36 has no shortcut"):
        AutoencoderKLWan(config, attention)


def test_statistics_of_latents(folders: dict[str, Path]) -> None:
    ours, _ = both(folders["plain"], with_encoder=False)
    z = latents(ours, 5, 2, 2)
    x = ours.normalise(z)
    assert torch.allclose(x[:, 3], (z[:, 3] - 0.3) / 1.3)
    assert torch.allclose(ours.denormalise(x), z, atol=1e-6)


# -- benchmark ----------------------------------------------------------------------


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sgl_diffusion.cli.main", "bench", "vae", "--model", "wan2.1-t2v-1.3b"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_the_benchmark_compares_equal_results(folders: dict[str, Path], tmp_path: Path) -> None:
    config, file = str(folders["plain"] / "config.json"), tmp_path / "vae.json"
    ran = bench("--config", config, "--rounds", "2", "--threads", "1", "--json", str(file))
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(file.read_text())
    assert figures["difference"] < 1e-5
    assert figures["ratio"] == figures["diffusers_ms"] / figures["native_ms"]
    assert figures["memory_ratio"] > 0


def test_the_benchmark_of_tiles(folders: dict[str, Path]) -> None:
    size = ("--height", "16", "--width", "272", "--frames", "1", "--rounds", "1", "--threads", "1")
    ran = bench("--config", str(folders["plain"] / "config.json"), "--tiling", *size)
    assert ran.returncode == 0, ran.stderr
    assert "native without tiles" in ran.stdout


def test_the_benchmark_refuses_what_cannot_be(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("--frames", "4"): "frames=4: expected 4 k + 1",
        ("--height", "60"): "height=60: expected a multiple of 8",
        ("--rounds", "0"): "rounds=0: must be at least 1",
    }.items():
        words = ("--model", "wan2.1-t2v-1.3b", "--config", str(folders["plain"] / "config.json"), *arguments)
        assert main(["bench", "vae", *words]) == 2 and message in capsys.readouterr().err
