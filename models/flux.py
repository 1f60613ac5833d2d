"""FLUX.1 (Black Forest Labs 2024): a rectified-flow transformer over text and image tokens.

Double blocks keep separate weights for the two streams and attend jointly; single blocks run the joined stream with
attention and MLP in parallel. Checkpoint layout and maths follow diffusers' `FluxPipeline` / `FluxTransformer2DModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import patchify, timestep_embedding, unpatchify
from sgl_diffusion.kernels.qk_norm_rope import Stream, qk_norm_rope
from sgl_diffusion.models.autoencoders.catalog import build_autoencoder
from sgl_diffusion.models.autoencoders.kl import Decode
from sgl_diffusion.models.config import demand, read_config
from sgl_diffusion.models.family import (
    ONE_RANK,
    AttentionFn,
    Condition,
    Defaults,
    Execute,
    Guidance,
    OriginalNames,
    Phase,
    Predictor,
    Preset,
    Read,
    Size,
    Split,
    check_step,
    eager,
    inputs,
    outputs,
)
from sgl_diffusion.models.layers import (
    FeedForward,
    JointAttention,
    Linear,
    Modulations,
    Residual,
    RMSNormWeight,
    Rotary,
    Rows,
    Sequenced,
    TimestepEmbedding,
    attend_at,
    code_place,
    rotary_table,
    written_by,
)
from sgl_diffusion.models.text import clip_pooled, t5_hidden

# B batch  T text tokens  I image tokens  L = T + I  R = B * L rows  H heads  K head dim  D = H * K width
# P = K / 2 rotary pairs  S steps  N blocks  G groups of rows with one modulation
MLP_RATIO = 4
TIMESTEPS = 1000  # the transformer sees sigma in thousandths
ROPE_THETA = 10_000.0
SINUSOID_CHANNELS = 256  # of the timestep and guidance embeddings


@dataclass(frozen=True)
class FluxConfig:
    """`transformer/config.json`."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    patch_size: int = 1
    out_channels: int | None = None
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# -- transformer ----------------------------------------------------------------


@dataclass(frozen=True)
class Modulation:
    """Vectors of one step: shift, scale and gate of every half block; for the double blocks of text, then of image."""

    double_N6GD: Tensor  # G = 2 B groups of rows
    single_N3BD: Tensor
    out_2BD: Tensor  # scale, shift


class DoubleBlock(nn.Module):
    """Text and image with weights of their own; every pass that treats rows alike runs over both at once."""

    def __init__(self, config: FluxConfig, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D = config.width
        self.attn = JointAttention(D, config.attention_head_dim, attention, split=split)
        self.ff, self.ff_context = FeedForward(D, MLP_RATIO * D), FeedForward(D, MLP_RATIO * D)

    def forward(self, stream: Residual, rows: Rows, modulation_6GD: Tensor, rotary: Rotary) -> None:
        shift, scale, gate, shift2, scale2, gate2 = modulation_6GD
        normed_RD = stream.norm(scale, shift, rows.group_R, into=self.attn.first)
        stream.add(self.attn(normed_RD, rows, rotary), gate)
        normed_RD = stream.norm(scale2, shift2, rows.group_R, into=(self.ff_context.up, self.ff.up))
        stream.add(rows.apply(self.ff_context, self.ff, normed_RD), gate2)


class SingleAttention(nn.Module):
    """Weights of a single block's attention, with the MLP's first layer in the same GEMM."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.to_qkv_mlp = Linear(width, (3 + MLP_RATIO) * width)
        self.norm_q, self.norm_k = RMSNormWeight(head_dim), RMSNormWeight(head_dim)


class SingleBlock(nn.Module):
    """One GEMM in (Q, K, V and MLP), one GEMM out over [attention, GELU(MLP)] written side by side."""

    packed = {"attn.to_qkv_mlp": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": MLP_RATIO}}
    tensor_parallel = {"attn.to_qkv_mlp": outputs(1, 1, 1, MLP_RATIO), "proj_out": inputs(1, MLP_RATIO)}

    def __init__(self, config: FluxConfig, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D, K = config.width, config.attention_head_dim
        self.head_dim, self.attention, self.split = K, attention, split
        self.attn = SingleAttention(D, K)
        self.proj_out = Linear((1 + MLP_RATIO) * D, D)

    def forward(self, stream: Residual, modulation_3BD: Tensor, rows: Rows, rotary: Rotary) -> None:
        shift, scale, gate = modulation_3BD
        a = self.attn
        normed_BLD = stream.norm(scale, shift, into=(a.to_qkv_mlp,))
        B, L, _ = normed_BLD.shape
        D = a.to_qkv_mlp.out_features // (3 + MLP_RATIO)  # of the heads that are here
        widths = (D, MLP_RATIO * D)
        mixed: Any = code_place(self.proj_out, normed_BLD, *widths, writes=written_by(a.to_qkv_mlp))
        mixed = normed_BLD.new_empty(B, L, sum(widths)) if mixed is None else mixed
        seen, mlp = mixed.split(widths, dim=-1)
        qkv, _ = a.to_qkv_mlp(normed_BLD, gelu_from=3 * D, tail=mlp)
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.unbind(2)
        qk_norm_rope([Stream(qkv, a.norm_q.weight, a.norm_k.weight)], rotary.cos, rotary.sin, q, k, None)
        attend_at(seen, self.split, self.attention, q, k, v, rows.streams, rows.replicated)
        stream.add(self.proj_out(mixed), gate)


def sinusoid(t: Tensor, dtype: torch.dtype) -> Tensor:
    return timestep_embedding(t, SINUSOID_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0.0).to(dtype)


class TimeTextEmbedding(nn.Module):
    """`CombinedTimestep(Guidance)TextProjEmbeddings`: the vector every modulation is computed from."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        D = config.width
        self.timestep_embedder = TimestepEmbedding(SINUSOID_CHANNELS, D)
        if config.guidance_embeds:
            self.guidance_embedder = TimestepEmbedding(SINUSOID_CHANNELS, D)
        self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, D)

    def forward(self, t_S: Tensor, guidance: Tensor | None, pooled_BC: Tensor) -> Tensor:
        """(B, S, D) for every sample, by itself, and step."""
        embedding = self.timestep_embedder(sinusoid(t_S, pooled_BC.dtype))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoid(guidance, pooled_BC.dtype))
        return torch.stack([embedding + self.text_embedder(pooled_1C) for pooled_1C in torch.split(pooled_BC, 1)])


ORIGINAL_NAMES = OriginalNames(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
        "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
        "double_blocks.{}.img_attn.qkv": {f"transformer_blocks.{{}}.attn.to_{x}": 1 for x in "qkv"},
        "double_blocks.{}.txt_attn.qkv": {f"transformer_blocks.{{}}.attn.add_{x}_proj": 1 for x in "qkv"},
        "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
        "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
        "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
        "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
        "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
        "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
        "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
        "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
        "single_blocks.{}.linear1": {
            **{f"single_transformer_blocks.{{}}.attn.to_{x}": 1 for x in "qkv"},
            "single_transformer_blocks.{}.proj_mlp": MLP_RATIO,
        },
        "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
        "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
        "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
    swapped=frozenset({"norm_out.linear"}),  # there, shift before scale
)


class FluxTransformer(nn.Module):
    """`FluxTransformer2DModel`."""

    before_first_step = ("context_embedder", "time_text_embed", "modulation")
    original_names = ORIGINAL_NAMES

    def __init__(self, config: FluxConfig, attention: AttentionFn, split: Split = ONE_RANK) -> None:
        super().__init__()
        demand(config, patch_size=1)
        D, self.config, self.split = config.width, config, split
        self.time_text_embed = TimeTextEmbedding(config)
        self.context_embedder = Linear(config.joint_attention_dim, D)
        self.x_embedder = Linear(config.in_channels, D)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config, attention, split) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config, attention, split) for _ in range(config.num_single_layers)
        )
        parts: dict[str, int] = {}
        for i in range(config.num_layers):
            parts |= {f"transformer_blocks.{i}.norm1_context.linear": 6, f"transformer_blocks.{i}.norm1.linear": 6}
        parts |= {f"single_transformer_blocks.{i}.norm.linear": 3 for i in range(config.num_single_layers)}
        parts |= {"norm_out.linear": 2}
        self.modulation = Modulations(D, parts)
        self.packed = self.modulation.packed_as("modulation")
        self.proj_out = Linear(D, config.out_channels or config.in_channels)

    def rotary(self, sequence: Sequenced, rows: int, columns: int, device: torch.device) -> Rotary:
        """Three axes: text tokens stand at (0, 0, 0), image tokens at (0, row, column)."""
        grid = torch.zeros(rows, columns, 3)
        grid[..., 1] = torch.arange(rows)[:, None]
        grid[..., 2] = torch.arange(columns)[None]
        ids = sequence.here(torch.cat([torch.zeros(sequence.streams[0], 3), grid.reshape(-1, 3)]))
        tables = [rotary_table(ids[:, i], width, ROPE_THETA) for i, width in enumerate(self.config.axes_dims_rope)]
        cos, sin = (torch.cat(t, dim=-1).to(device) for t in zip(*tables, strict=True))
        return Rotary(cos, sin)

    def modulate(self, t_S: Tensor, guidance: Tensor | None, pooled_BC: Tensor) -> list[Modulation]:
        """The vectors of every step.

        Args:
            t_S, guidance: in thousandths and in the model's dtype; guidance of one element, or None.
        """
        y = self.modulation(self.time_text_embed(t_S, guidance, pooled_BC)).transpose(0, 1)  # steps before samples
        doubles, singles = 12 * self.config.num_layers, 3 * self.config.num_single_layers
        double, single, out = y.split([doubles, singles, 2], dim=2)
        double_SN6GD = double.unflatten(2, (-1, 2, 6)).permute(0, 2, 4, 3, 1, 5).flatten(3, 4)
        single_SN3BD = single.unflatten(2, (-1, 3)).permute(0, 2, 3, 1, 4)
        return [Modulation(*step) for step in zip(double_SN6GD, single_SN3BD, out.transpose(1, 2), strict=True)]

    def forward(self, x_BIC: Tensor, modulation: Modulation, context_BTD: Tensor, rows: Rows, rotary: Rotary) -> Tensor:
        """Velocity (B, I, C) from the state and the embedded text, of which only what is computed here."""
        tokens = x_BIC.shape[1]
        image_BID = self.x_embedder(x_BIC[:, self.split.own(tokens)])
        stream = Residual(torch.cat([context_BTD.flatten(0, 1), image_BID.flatten(0, 1)]))
        for block, vectors_6GD in zip(self.transformer_blocks, modulation.double_N6GD, strict=True):
            block(stream, rows, vectors_6GD, rotary)
        stream = Residual(rows.join(stream.total(rows.group_R)))
        for block, vectors_3BD in zip(self.single_transformer_blocks, modulation.single_N3BD, strict=True):
            block(stream, vectors_3BD, rows, rotary)
        scale, shift = modulation.out_2BD
        return self.split.whole(self.proj_out(stream.after(rows.text).norm(scale, shift)), tokens)


# -- pipeline -------------------------------------------------------------------


class Flux1:
    """`FluxPipeline`: CLIP gives the pooled vector, T5 the token sequence; latents are packed 2x2 into tokens."""

    draws_video = classifier_free = keeps_norm = exact_tiles = False
    language_models: Mapping[str, Read] = {}
    unguided_scale, distilled = 1.0, None

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts
        self.transformer: FluxTransformer = parts["transformer"]
        self.vae: Any = parts["vae"]
        self.patch = 2 * self.vae.config.downsampling  # pixels a token covers per side

    @classmethod
    def components(cls) -> Mapping[str, str]:
        return {
            "transformer": "denoiser",
            "vae": "vae",
            "text_encoder": "text_encoder",
            "text_encoder_2": "text_encoder",
            "tokenizer": "tokenizer",
            "tokenizer_2": "tokenizer",
            "scheduler": "scheduler",
        }

    @classmethod
    def optional(cls) -> frozenset[str]:
        return frozenset()

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return PRESETS

    @classmethod
    def build(
        cls,
        component: str,
        config: Mapping[str, Any],
        attention: AttentionFn,
        options: Mapping[str, Any],
        split: Split = ONE_RANK,
    ) -> nn.Module:
        if component == "transformer":
            return FluxTransformer(read_config(FluxConfig, config), attention, split)
        return build_autoencoder(config, attention, options, {"AutoencoderKL": None, "AutoencoderTiny": 16})

    @classmethod
    def encodes_pictures(cls, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return False

    @classmethod
    def attention_heads(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return read_config(FluxConfig, configs["transformer"]).num_attention_heads

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return DEV_DEFAULTS if configs["transformer"].get("guidance_embeds") else SCHNELL_DEFAULTS

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        if pictures:
            raise ValueError(f"image_path: {pictures} given; this model draws from text alone")
        if size.frames != 1:
            raise ValueError(f"num_frames={size.frames}: this model draws pictures")
        for name, pixels in (("height", size.height), ("width", size.width)):
            check_step(name, pixels, self.patch)
        if max_sequence_length > 512:
            raise ValueError(f"max_sequence_length={max_sequence_length}: at most 512")
        if not self.transformer.config.guidance_embeds and guidance.embedded not in (
            None,
            0.0,
            1.0,
        ):
            raise ValueError(
                f"guidance_scale={guidance.embedded}: this checkpoint has no guidance embedding; "
                "leave it out, or use negative_prompt with true_cfg_scale"
            )

    def fitting_size(self, pictures: Sequence[Image], defaults: Defaults) -> tuple[int, int]:
        return defaults.height, defaults.width

    def encode(
        self, prompt: str, max_sequence_length: int, pictures: Sequence[Image] = (), execute: Execute = eager
    ) -> Condition:
        p = self.parts
        pooled = clip_pooled(p["tokenizer"], p["text_encoder"], prompt, execute)
        hidden = t5_hidden(p["tokenizer_2"], p["text_encoder_2"], prompt, max_sequence_length, execute)
        return Condition({"pooled_projections": pooled, "encoder_hidden_states": hidden})

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        config, tokens = configs["transformer"], cls.defaults(configs).max_sequence_length
        pooled = torch.zeros(1, config["pooled_projection_dim"], dtype=torch.bfloat16)
        hidden = torch.zeros(1, tokens, config["joint_attention_dim"], dtype=torch.bfloat16)
        return [Condition({"pooled_projections": pooled, "encoder_hidden_states": hidden})]

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        channels, patch = (
            configs["transformer"]["in_channels"],
            2 * 2 ** (len(configs["vae"]["block_out_channels"]) - 1),
        )
        I, T = (size.height // patch) * (size.width // patch), condition.tensors["encoder_hidden_states"].shape[1]
        return {
            **condition.tensors,
            "hidden_states": torch.zeros(1, I, channels, dtype=torch.bfloat16),
            "timestep": torch.zeros(1, dtype=torch.bfloat16),
            "guidance": torch.zeros(1) if configs["transformer"].get("guidance_embeds") else None,
            "img_ids": torch.zeros(I, 3, dtype=torch.bfloat16),
            "txt_ids": torch.zeros(T, 3, dtype=torch.bfloat16),
        }

    def image_tokens(self, size: Size) -> int:
        return (size.height // self.patch) * (size.width // self.patch)

    def noise_levels(self, steps: int) -> Sequence[float] | None:
        return None

    def dynamic_shift(self, size: Size, steps: int) -> float | None:
        return None

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        weight = self.transformer.x_embedder.weight
        f = self.vae.config.downsampling
        shape = (1, self.transformer.config.in_channels // 4, size.height // f, size.width // f)
        z = torch.cat([torch.randn(shape, generator=g, dtype=weight.dtype) for g in generators])
        return patchify(z, (2, 2)).to(weight.device)

    def phases(self, timesteps: Sequence[float], guidance: Guidance) -> Sequence[Phase]:
        return [Phase("transformer", range(len(timesteps)), guidance.true_cfg)]

    def finished(self, x: Tensor, condition: Condition) -> Tensor:
        return x

    def predictor(
        self,
        condition: Condition,
        size: Size,
        guidance: Guidance,
        timesteps: Sequence[float],
        denoiser: str = "transformer",
    ) -> Predictor:
        model, text = self.transformer, condition.tensors["encoder_hidden_states"]
        dtype, device = model.proj_out.weight.dtype, text.device
        rows, columns = size.height // self.patch, size.width // self.patch
        B, T = text.shape[:2]
        sequence = Sequenced.over(model.split, T, rows * columns)
        context = model.context_embedder(text[:, sequence.own[0]].to(dtype))
        rotary = model.rotary(sequence, rows, columns, device)
        token_rows = Rows.of(B, sequence, B, device)
        # the roundings of diffusers, step by step: thousandths in the model's dtype, down and up again
        t_S = torch.tensor(timesteps).to(dtype) / TIMESTEPS * TIMESTEPS
        strength = None
        if model.config.guidance_embeds:
            assert guidance.embedded is not None, "checkpoints with a guidance embedding have a default strength"
            strength = (torch.tensor([guidance.embedded]).to(dtype) * TIMESTEPS).to(device)
        modulations = model.modulate(t_S.to(device), strength, condition.tensors["pooled_projections"].to(dtype))
        return Predictor(model, (context, token_rows, rotary), modulations)

    def decode(self, x: Tensor, size: Size, execute: Execute = eager) -> Iterator[Tensor]:
        z = unpatchify(x, (size.height // self.patch, size.width // self.patch), (2, 2))
        config = self.vae.config
        z = z / config.scaling_factor + (config.shift_factor or 0.0)
        z = z.to(self.vae.dtype)
        yield execute(Decode(self.vae, self.vae.tiling, self.vae.slicing), z)[0]


# -- presets: published configs, for dummy weights at true size -------------------

DEV_DEFAULTS = Defaults(num_inference_steps=50, guidance_scale=3.5, height=1024, width=1024, max_sequence_length=512)
SCHNELL_DEFAULTS = Defaults(
    num_inference_steps=4, guidance_scale=None, height=1024, width=1024, max_sequence_length=256
)

_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _preset(*, guided: bool) -> Preset:
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guided else {"shift": 1.0, "use_dynamic_shifting": False}
    return Preset(
        components={
            "transformer": {**_TRANSFORMER, "guidance_embeds": guided},
            "vae": _VAE,
            "text_encoder": _CLIP_L,
            "text_encoder_2": _T5_XXL,
            "scheduler": {**_SCHEDULER, **shift},
        },
        defaults=DEV_DEFAULTS if guided else SCHNELL_DEFAULTS,
        pipeline_class="FluxPipeline",
    )


PRESETS = {
    "black-forest-labs/FLUX.1-dev": _preset(guided=True),
    "black-forest-labs/FLUX.1-schnell": _preset(guided=False),
}
