"""A decode by several ranks, each with a band of rows, equals one process's: fp32, 1e-5 of the std on average.

Every rank also decodes alone, and compares. Convolutions of other shapes add up in another order, so not bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.models.autoencoders.bands import ONE_BAND, Bands, Rims
from sgl_diffusion.models.autoencoders.catalog import build_autoencoder
from sgl_diffusion.models.autoencoders.kl import AutoencoderKL, VaeConfig
from sgl_diffusion.models.autoencoders.wan import AutoencoderKLWan, WanVaeConfig
from sgl_diffusion.models.family import eager
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.live_bytes import LiveBytes
from sgl_diffusion.runtime.parallel.group import Group, Traffic
from sgl_diffusion.runtime.parallel.rows import RankBands, check_rows, check_tiling, decode_traffic
from sgl_diffusion.runtime.rehearsal import FusedAttention
from sgl_diffusion.runtime.weights import load_weights, weight_files

EXACT = 1e-5  # of the std, on average
LARGEST = 3e-5  # of the std, of any pixel: 4e-6 to 1e-5 where this was written

WAN: dict[str, dict[str, Any]] = {
    "wan": {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    "residual": {
        "base_dim": 8, "decoder_base_dim": 12, "z_dim": 6, "is_residual": True, "patch_size": 2, "in_channels": 12,
        "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6,
    },
}  # fmt: skip

# autoencoder -> shapes of latents: rows that four ranks share evenly and not, one row a rank, batches, chunks
LATENTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "kl": ((2, 16, 5, 6), (1, 16, 7, 3), (1, 16, 4, 1)),
    "flux2": ((2, 32, 7, 4),),
    "taesd": ((2, 32, 5, 6),),
    "wan": ((2, 4, 3, 5, 6), (1, 4, 1, 4, 1)),
    "residual": ((1, 6, 3, 5, 3),),
}
Case = tuple[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    # here, and not in ranks, which would take seconds to import them
    import diffusers
    from tiny_checkpoints import kl_vae, randomise
    from tiny_flux2 import build_flux2_tiny_vae
    from tiny_flux2 import vae as flux2_vae

    root = tmp_path_factory.mktemp("vae")
    kl_vae("vae").save_pretrained(root / "kl")
    flux2_vae(decoder_block_out_channels=(8, 16, 16, 24)).save_pretrained(root / "flux2")
    build_flux2_tiny_vae(root / "taesd")
    for name, config in WAN.items():
        randomise(diffusers.AutoencoderKLWan(**config, num_res_blocks=1), "vae").save_pretrained(root / name)
    return {name: root / name for name in LATENTS}


def shapes_of(folder: Path, bands: Bands, **options: Any) -> Any:
    """Without weights, under a meta device."""
    config = read_json(folder / "config.json")
    if config["_class_name"] == "AutoencoderKLWan":
        return AutoencoderKLWan(WanVaeConfig.read(config), attention, bands=bands, **options)
    allowed = {config["_class_name"]: None}
    return build_autoencoder(config, attention, {"bands": bands, **options}, allowed)


def native(folder: Path, bands: Bands = ONE_BAND, **options: Any) -> Any:
    with torch.device("meta"):
        vae = shapes_of(folder, bands, **options)
    load_weights(vae, weight_files(folder), torch.device("cpu"), torch.float32)
    return vae.requires_grad_(False)


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def off(got: Tensor, want: Tensor) -> float:
    """Of the std, on average; infinity if a pixel is farther off than any may be that is right."""
    assert got.shape == want.shape
    away, std = got - want, want.std()
    return float(away.square().mean().sqrt() / std) if away.abs().max() < LARGEST * std else float("inf")


# -- on ranks -----------------------------------------------------------------------


def world() -> Group:
    dist = torch.distributed
    return Group("world", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def decodes(folders: dict[str, Path]) -> dict[Case, tuple[Any, Any, dict[str, Traffic]]]:
    """Of every autoencoder and shape: decoded by all ranks, decoded here alone, and what was sent."""
    results = {}
    for name, shapes in LATENTS.items():
        group, alone = world(), native(folders[name])
        together = native(folders[name], RankBands(group))
        for shape in shapes:
            group.traffic, z = {}, noise(shape)
            # tensors would travel by a server of the rank's, which ends with it
            results[name, shape] = together.decode(z).numpy(), alone.decode(z).numpy(), group.traffic
    return results


class NothingFromBelow(RankBands):
    def rims(self, band: Tensor) -> Rims | None:
        arrived = super().rims(band)
        assert arrived is not None

        def half() -> tuple[Tensor | None, None]:
            return arrived()[0], None

        return half


class OwnMoments(RankBands):
    def gathered(self, x: Tensor) -> Tensor:
        return super().gathered(x)[self.group.rank][None]


class OwnKeys(RankBands):
    def whole(self, band: Tensor, rows: int) -> Tensor:
        whole = super().whole(band, rows)
        return whole if band.shape[1] == 3 else torch.zeros_like(whole)


def variants(folders: dict[str, Path]) -> dict[str, float]:
    """Other ways to decode, right and wrong ones, and how far each is from a decode here alone."""
    group, z, clip = world(), noise(LATENTS["kl"][0]), noise(LATENTS["wan"][0])
    kl, wan = native(folders["kl"]).decode(z), native(folders["wan"]).decode(clip)
    sliced = native(folders["kl"], RankBands(group), slicing=True, tiling=True, tile_height=512, tile_width=512)
    chunks = native(folders["wan"], RankBands(group)).decode_chunks(clip, eager)
    given = noise((1, 3, 48, 40))
    encoded = native(folders["kl"], RankBands(group), with_encoder=True).encode(given)[0]
    far = {
        "sliced": off(sliced.decode(z), kl),
        "chunks": off(torch.cat(list(chunks), 2), wan),
        "encoded": off(encoded, native(folders["kl"], with_encoder=True).encode(given)[0]),
    }
    for broken in (NothingFromBelow, OwnMoments, OwnKeys):
        far[broken.__name__] = off(native(folders["kl"], broken(group)).decode(z), kl)
    for broken in (NothingFromBelow, OwnKeys):
        far[f"{broken.__name__} of clips"] = off(native(folders["wan"], broken(group)).decode(clip), wan)
    return far


# -- parity -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded(folders: dict[str, Path]) -> Any:
    """`decodes` on so many ranks."""

    def on_ranks(ranks: int) -> list[dict[Case, tuple[Tensor, Tensor, dict[str, Traffic]]]]:
        results = run_ranks(ranks, decodes, folders)
        return [{case: (*map(torch.from_numpy, r[:2]), r[2]) for case, r in result.items()} for result in results]

    return cache(on_ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_decode_what_one_decodes(decoded: Any, ranks: int) -> None:
    for case in decoded(ranks)[0]:
        pixels = [result[case][0] for result in decoded(ranks)]
        errors = [off(together, alone) for together, alone, _ in (result[case] for result in decoded(ranks))]
        assert max(errors) < EXACT, f"{case}: {errors} of the std"
        assert all(torch.equal(x, pixels[0]) for x in pixels), f"{case}: ranks have other pixels than each other"


@torch.no_grad()
def test_ranks_decode_what_diffusers_decodes(decoded: Any, folders: dict[str, Path]) -> None:
    import diffusers

    for (name, shape), (pixels, *_) in decoded(4)[0].items():
        cls = getattr(diffusers, read_json(folders[name] / "config.json")["_class_name"])
        want = cls.from_pretrained(folders[name]).eval().decode(noise(shape)).sample
        assert (pixels - want).abs().max() < 1e-4 * want.std(), name


def test_other_ways_to_decode_and_what_would_be_wrong(folders: dict[str, Path]) -> None:
    """Had a row, a statistic or a key been forgotten, it would have shown."""
    for rank, far in enumerate(run_ranks(2, variants, folders)):
        assert far.pop("encoded") == 0
        for name in ("sliced", "chunks"):
            assert far.pop(name) < EXACT, f"rank {rank}: {name}"
        assert min(far.values()) > EXACT, f"rank {rank}: not noticed: {far}"


# -- traffic and memory -------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "names"), [(2, ("kl", "flux2", "wan")), (4, ("taesd", "residual"))])
def test_what_is_sent_is_what_was_predicted(
    decoded: Any, folders: dict[str, Path], ranks: int, names: tuple[str, ...]
) -> None:
    for name, shape in ((name, LATENTS[name][0]) for name in names):
        predicted = decode_traffic(partial(shapes_of, folders[name]), shape, torch.float32, ranks, "cpu")
        assert [result[name, shape][2] for result in decoded(ranks)] == predicted
        assert predicted[0]["exchange"].bytes > 0


def test_bytes_are_those_of_the_formula(folders: dict[str, Path]) -> None:
    """Rows of the inputs of all convolutions, 3 numbers a group, features of the attention, and pixels."""
    B, C, h, w = shape = (2, 16, 7, 6)
    first, inner, _, last = decode_traffic(partial(shapes_of, folders["kl"]), shape, torch.bfloat16, 4, "cpu")
    # widths 32, 32, 16, 16 from the latents on; a block has two convolutions, a stage two blocks and a way up
    stages = [(1, [C, *[32] * 4, *[32] * 5]), (2, [32] * 5), (4, [32, 16, 16, 16, 16]), (8, [16] * 4 + [16])]
    row = sum(scale * w * sum(inputs) for scale, inputs in stages) * B * 2
    norms = 2 * 2 + 1 + 4 * 4 + 1
    for rank, neighbours, rows in ((first, 1, 2), (inner, 2, 2), (last, 1, 1)):
        features, pixels = 3 * B * 32 * rows * w * 2, 3 * B * 3 * 64 * rows * w * 2
        assert asdict(rank["exchange"]) == {
            "calls": sum(len(inputs) for _, inputs in stages) + 2,
            "bytes": neighbours * row + features + pixels,
        }
        assert asdict(rank["all_gather"]) == {"calls": norms, "bytes": 3 * norms * B * 4 * 3 * 4}


def peak(vae: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes of a decode beside its weights and latents, on a CPU."""
    live, z = LiveBytes("meta"), torch.empty(shape, device="meta")
    with torch.inference_mode(), rehearsing("cpu"), FusedAttention(), live.rising():
        vae.decode(z)  # type: ignore[operator]
    return live.peak


def test_a_rank_holds_its_share() -> None:
    """At true width, of a picture of 512 x 512: a quarter, its rims, and the pixels of all."""
    widths = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 1024}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    channels = {"in_channels": 3, "out_channels": 3, "latent_channels": 16, "scaling_factor": 1.0}
    config = VaeConfig.read({**widths, **blocks, **channels, "use_post_quant_conv": False})
    peaks = []
    for bands in (ONE_BAND, RankBands(Group("world", 4, rank=1))):
        with torch.device("meta"):
            vae = AutoencoderKL(config, attention, bands=bands)
        peaks.append(peak(vae, (1, 16, 64, 64)))
    assert 0.25 < peaks[1] / peaks[0] < 0.3, peaks


# -- refusals -----------------------------------------------------------------------


def test_what_cannot_be_spread_is_refused(folders: dict[str, Path]) -> None:
    few = "vae_sp=true: 3 rows of latents for 4 ranks; expected one a rank at least"
    with pytest.raises(UserError, match=few):
        check_rows(3, 4)
    bands = RankBands(Group("world", 4))
    with torch.device("meta"), pytest.raises(UserError, match=few):
        shapes_of(folders["kl"], bands).decode(torch.empty(1, 16, 3, 5))
    check_tiling(True, 1)
    with pytest.raises(UserError, match="vae_sp=true: not with vae_tiling"):
        check_tiling(True, 4)
    options: Mapping[str, Any] = {"tiling": True, "tile_height": 64, "tile_width": 64}
    for name, shapes in LATENTS.items():
        shape = (*shapes[0][:-2], 16, 16)
        with torch.device("meta"), pytest.raises(ValueError, match="tiles: not in bands of rows on 4 ranks"):
            shapes_of(folders[name], bands, **options).decode(torch.empty(shape))
