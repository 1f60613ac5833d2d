"""Pictures as Qwen2.5-VL sees them (Alibaba 2025, arXiv 2502.13923): patches, their features, and where these stand.

Weights and layers are those of transformers' model, whose own way through them asks for values on the device again and
again; here all that a picture's size decides is worked out on the host. The patches are those of its processor with
torchvision, bit for bit, without a need for torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from sgl_diffusion.models.config import ConfigError, demand, read_config

# N patches  M = N / merge^2 tokens  C channels of a patch's pixels  D width  P rotary pairs of a head
MAX_ASPECT = 200  # how many times as long as wide a picture may be
CHANNELS = 3
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}  # of a picture, whatever the keys say

Grid = tuple[int, int]  # rows and columns of patches


# -- patches ------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessorConfig:
    """`processor/preprocessor_config.json`; newer files hold the same under `image_processor`."""

    size: Mapping[str, int] | None = None  # pixels at least ("shortest_edge") and at most ("longest_edge")
    min_pixels: int | None = None  # overrules `size`
    max_pixels: int | None = None
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2  # patches per side of a token
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Resampling.BICUBIC
    do_convert_rgb: bool | None = True
    do_resize: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    do_center_crop: bool | None = None
    do_pad: bool | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> ProcessorConfig:
        ignored = dict.fromkeys(("architectures", "processor_class", "image_processor_type"), "names of classes")
        ignored |= dict.fromkeys(("data_format", "input_data_format", "return_tensors"), "of arrays, which none is")
        ignored |= dict.fromkeys(("device", "disable_grouping"), "pictures are prepared one by one, on the host")
        ignored |= {"crop_size": "needs do_center_crop", "pad_size": "needs do_pad", "default_to_square": "sides fit"}
        config = read_config(cls, raw.get("image_processor", raw), ignored=ignored)
        demand(config, resample=Resampling.BICUBIC, do_resize=True, do_rescale=True, do_normalize=True)
        for name in ("do_center_crop", "do_pad"):
            if getattr(config, name):
                raise ConfigError(f"config key {name}=True is not supported natively")
        if config.size is not None and set(config.size) != set(PIXELS):
            raise ConfigError(f"config key size={dict(config.size)!r}: expected {' and '.join(PIXELS)}")
        return config

    @property
    def limits(self) -> tuple[int, int]:
        """Pixels of a picture, at least and at most."""
        least, most = ((self.size or PIXELS)[key] for key in PIXELS)
        return self.min_pixels or least, self.max_pixels or most


class Patches(nn.Module):
    """The pictures' part of transformers' `Qwen2VLProcessor`. It has no weights."""

    def __init__(self, config: ProcessorConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, picture: Image) -> tuple[Tensor, Grid]:
        """Pixels of the patches (N, C) in fp32, those of a token side by side, and their rows and columns."""
        c = self.config
        height, width = self.fitting(picture.height, picture.width)
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].contiguous()
        if pixels.shape[2:] != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        whole = 1 / c.rescale_factor  # of a pixel's value
        mean, std = (torch.tensor(v, device="cpu").view(-1, 1, 1) * whole for v in (c.image_mean, c.image_std))
        unit = pixels[0].float().sub_(mean).div_(std)
        rows, columns = height // c.patch_size, width // c.patch_size
        sides = (rows // c.merge_size, c.merge_size, c.patch_size, columns // c.merge_size, c.merge_size, c.patch_size)
        patches = unit.view(CHANNELS, *sides).permute(1, 4, 2, 5, 0, 3, 6)
        frames = patches[:, :, :, :, :, None].expand(*[-1] * 5, c.temporal_patch_size, -1, -1)
        return frames.reshape(rows * columns, -1), (rows, columns)

    def fitting(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to a picture's of which tokens are a whole number, within the limits of the config."""
        c = self.config
        step = c.patch_size * c.merge_size
        smallest, largest = c.limits
        near = round(height / step) * step, round(width / step) * step
        if math.prod(near) > largest:
            shrink = math.sqrt(height * width / largest)
            height, width = (max(step, math.floor(side / shrink / step) * step) for side in (height, width))
            return height, width
        if math.prod(near) < smallest:
            grow = math.sqrt(smallest / (height * width))
            height, width = (math.ceil(side * grow / step) * step for side in (height, width))
            return height, width
        return near


# -- features -----------------------------------------------------------------------


def features(encoder: Any, patches_NC: Tensor, grid: Grid) -> Tensor:
    """What the language model reads of a picture, (M, D): tokens of a few patches each, row by row.

    Args:
        encoder: transformers' `Qwen2_5_VLForConditionalGeneration`.
        patches_NC: as of `Patches`.
    """
    visual, (rows, columns) = encoder.base_model.visual, grid
    merge, device = visual.spatial_merge_size, encoder.device
    order_M, windows = _windows(rows // merge, columns // merge, visual.window_size // merge // visual.patch_size)
    places_N2 = _places(rows, columns, merge).unflatten(0, (-1, merge**2))[order_M].flatten(0, 1)
    # lengths stay on the host, where the layers look at them
    whole, parts = (torch.tensor(sums, device="cpu") for sums in ((0, rows * columns), [n * merge**2 for n in windows]))
    order_M = order_M.to(device)
    angles_NP = (places_N2[..., None].to(device).float() * visual.rotary_pos_emb.inv_freq.float()).flatten(1)
    rotary = torch.cat([angles_NP, angles_NP], dim=-1)
    x = visual.patch_embed(patches_NC.to(device, encoder.dtype))
    x = x.unflatten(0, (-1, merge**2))[order_M].flatten(0, 1)
    for i, block in enumerate(visual.blocks):
        seen = whole if i in visual.fullatt_block_indexes else parts
        x = block(x, cu_seqlens=seen, position_embeddings=(rotary.cos(), rotary.sin()))
    merged_MD: Tensor = visual.merger(x)
    return merged_MD[torch.argsort(order_M)]


def _windows(rows: int, columns: int, side: int) -> tuple[Tensor, list[int]]:
    """Tokens of a grid in the order of the windows that attend within themselves, and the sums of their lengths."""
    tokens = torch.arange(rows * columns, device="cpu").view(rows, columns)
    windows = [window.flatten() for band in tokens.split(side) for window in band.split(side, dim=1)]
    return torch.cat(windows), [0, *np.cumsum([len(window) for window in windows]).tolist()]


def _places(rows: int, columns: int, merge: int) -> Tensor:
    """Row and column of every patch (N, 2), those of a token side by side."""
    places = torch.cartesian_prod(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"))
    return places.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)


# -- pictures among words -------------------------------------------------------------


def positions(texts: Sequence[int], grids: Sequence[Grid]) -> Tensor:
    """Where tokens stand, (3, T): in time, row and column.

    Words stand on the diagonal; a picture's tokens share a time, and what follows begins behind its longer side.

    Args:
        texts: lengths of the runs of words, before, between and after the pictures.
        grids: tokens of the pictures.
    """
    runs, start = [], 0
    for words, grid in zip(texts, (*grids, None), strict=True):
        runs.append((torch.arange(words, device="cpu") + start).expand(3, -1))
        start += words
        if grid is not None:
            rows, columns = (torch.arange(side, device="cpu") for side in grid)
            time = torch.zeros(1, dtype=torch.int64, device="cpu")
            runs.append(torch.cartesian_prod(time, rows, columns).T + start)
            start += max(grid)
    return torch.cat(runs, dim=1)


def states_with_pictures(
    encoder: Any, texts: Sequence[Sequence[int]], pictures: Sequence[tuple[Tensor, Grid]]
) -> Tensor:
    """Last hidden states (1, T, D) of the language model, of runs of words with pictures between them.

    Args:
        encoder: as of `features`.
        texts: token ids of every run, one run more than there are pictures.
        pictures: as of `Patches`.
    """
    model, device = encoder.base_model.language_model, encoder.device
    merge = encoder.base_model.visual.spatial_merge_size
    runs: list[Tensor] = []
    for i, ids in enumerate(texts):
        runs.append(model.embed_tokens(torch.tensor(ids, dtype=torch.int64, device="cpu").to(device)))
        if i < len(pictures):
            runs.append(features(encoder, *pictures[i]).to(runs[0].dtype))
    grids = [(rows // merge, columns // merge) for _, (rows, columns) in pictures]
    places_31T = positions([len(ids) for ids in texts], grids)[:, None].to(device)
    states: Tensor = model(
        inputs_embeds=torch.cat(runs)[None], position_ids=places_31T, use_cache=False
    ).last_hidden_state
    return states
