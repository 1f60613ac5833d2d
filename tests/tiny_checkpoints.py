"""Tiny random checkpoints, built with diffusers' own classes: the judge's layout, not ours.

Weights depend on the seed, the component and the parameter's name alone. Norms and biases are far from their defaults,
so that a swapped scale or a missing bias shows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers
from torch import nn

from sgl_diffusion.models.embedded.tokens import Tokens, build_tokenizers

CLIP_WIDTH, T5_WIDTH = 32, 48
QK_NORMS = ("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")
FLUX_SCHEDULE = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@torch.no_grad()
def randomise(module: nn.Module, component: str, seed: int = 0) -> Any:
    """Overwrites every parameter by name: matrices keep the scale of activations, norms are 1 +- 0.2, biases +- 0.1."""
    for name, p in module.named_parameters():
        digest = hashlib.sha256(f"{seed}/{component}/{name}".encode()).digest()
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:6], "big")))
        if name.endswith(QK_NORMS):
            p.copy_(1.6 * (1 + 0.2 * noise))
        elif p.ndim > 1:
            embedding = any(part in name for part in ("shared", "embed_tokens", "token_embedding"))
            p.copy_(noise if embedding else noise / p[0].numel() ** 0.5)
        elif name.endswith("weight") or name.endswith("gamma"):
            p.copy_(1 + 0.2 * noise)
        else:
            p.copy_(0.1 * noise)
    return module.float().eval()


# -- components -----------------------------------------------------------------------


def tokens(work: Path) -> Tokens:
    """The word-level CLIP and T5 tokenizers of the embedded model's world; other words are spelled in letters."""
    if not (work / "tokenizer_2").is_dir():
        build_tokenizers(work)
    return Tokens(work)


def clip_encoder(tokenizer: Any, component: str, width: int = CLIP_WIDTH, *, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomise(cls(config), component)


def t5_encoder(tokenizer: Any, component: str, width: int = T5_WIDTH, *, multilingual: bool = False) -> Any:
    config = {
        "vocab_size": len(tokenizer) // 8 * 8 + 8, "d_model": width, "d_kv": 16, "d_ff": 2 * width, "num_layers": 2,
        "num_heads": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    if multilingual:
        return randomise(transformers.UMT5EncoderModel(transformers.UMT5Config(**config)), component)
    return randomise(transformers.T5EncoderModel(transformers.T5Config(**config)), component)


def kl_vae(component: str, latent_channels: int = 16, scaling: float = 0.3611, shift: float | None = 0.1159) -> Any:
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 16, 32, 32], layers_per_block=1, latent_channels=latent_channels, norm_num_groups=4,
        sample_size=64, scaling_factor=scaling, shift_factor=shift, use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )  # fmt: skip
    return randomise(vae, component)


# -- pipelines ------------------------------------------------------------------------


def build_flux(
    path: Path,
    *,
    heads: int = 2,
    head_dim: int = 64,
    double: int = 2,
    single: int = 2,
    guidance_embeds: bool = True,
    dynamic_shift: bool = True,
    seed: int = 0,
) -> Path:
    token = tokens(path.parent / "tokenizers")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
    )  # fmt: skip
    schedule = FLUX_SCHEDULE if dynamic_shift else {"shift": 1.0}
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**schedule),
        vae=kl_vae("vae"),
        text_encoder=clip_encoder(token.clip, "text_encoder"),
        tokenizer=token.clip,
        text_encoder_2=t5_encoder(token.t5, "text_encoder_2"),
        tokenizer_2=token.t5,
        transformer=randomise(transformer, "transformer", seed),
    ).save_pretrained(path)
    return path


def build_sdxl(path: Path) -> Path:
    token = tokens(path.parent / "tokenizers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, cross_attention_dim=2 * CLIP_WIDTH, attention_head_dim=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=CLIP_WIDTH + 6 * 32,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=kl_vae("vae", 4, 0.13025, None),
        text_encoder=clip_encoder(token.clip, "text_encoder"),
        text_encoder_2=clip_encoder(token.clip, "text_encoder_2", projected=True),
        tokenizer=token.clip,
        tokenizer_2=token.clip,
        unet=randomise(unet, "unet"),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(path)
    return path


def build_sd3(path: Path) -> Path:
    token = tokens(path.parent / "tokenizers")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=2 * CLIP_WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH, pos_embed_max_size=24,
    )  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=randomise(transformer, "transformer"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae("vae", 16, 1.5305, 0.0609),
        text_encoder=clip_encoder(token.clip, "text_encoder", projected=True),
        tokenizer=token.clip,
        text_encoder_2=clip_encoder(token.clip, "text_encoder_2", projected=True),
        tokenizer_2=token.clip,
        text_encoder_3=t5_encoder(token.t5, "text_encoder_3", 2 * CLIP_WIDTH),
        tokenizer_3=token.t5,
    ).save_pretrained(path)
    return path


def build_ovis(path: Path) -> Path:
    tokenizer = byte_level_tokenizer()
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer) // 8 * 8 + 8,
            hidden_size=T5_WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )  # fmt: skip
    )
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=64, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=1, joint_attention_dim=T5_WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    diffusers.OvisImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE),
        vae=kl_vae("vae"),
        text_encoder=randomise(encoder, "text_encoder"),
        tokenizer=tokenizer,
        transformer=randomise(transformer, "transformer"),
    ).save_pretrained(path)
    return path


def byte_level_tokenizer() -> Any:
    """A Qwen2 tokenizer without merges: every byte is a token, and the turns of a chat are marked."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = {len(alphabet) + i: AddedToken(t, special=True, normalized=False) for i, t in enumerate(specials)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(alphabet)}, merges=[], unk_token="<|endoftext|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>", model_max_length=4096, added_tokens_decoder=added, padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    return tokenizer


def build_custom(path: Path) -> Path:
    """A checkpoint whose pipeline class is Python code in its own folder: it inverts what its parent class draws."""
    build_flux(path, double=1, single=1, guidance_embeds=False, dynamic_shift=False)
    (path / "pipeline.py").write_text(
        "from diffusers import FluxPipeline\n\n\n"
        "class InvertedPipeline(FluxPipeline):\n"
        "    def __call__(self, *args, **kwargs):\n"
        "        result = super().__call__(*args, **kwargs)\n"
        "        result.images = 1 - result.images\n"
        "        return result\n"
    )
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "InvertedPipeline"]}))
    return path


# -- variations -----------------------------------------------------------------------


def copy(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


def reshard(folder: Path, component: str, parts: int = 3) -> None:
    """Rewrites a component's weights as `parts` shards with an index."""
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    weight_map = {}
    for i in range(parts):
        shard = f"{file.stem}-{i + 1:05d}-of-{parts:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::parts]}, folder / component / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(names[i::parts], shard))
    file.unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / component / f"{file.name}.index.json").write_text(json.dumps(index))


def edit_weights(folder: Path, component: str, edit: Any) -> None:
    """Applies `edit(tensors)` to the dict of a component's tensors and saves it."""
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def neutral(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """What a tensor would be if it were forgotten: biases 0, norm weights 1; None for matrices."""
    if tensor.ndim > 1:
        return None
    return torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)


def link_into_hub_cache(cache: Path, repo: str, folder: Path, revision: str = "main") -> None:
    """Lays a folder out as a Hugging Face hub cache does, so that `repo` resolves offline."""
    commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    home = cache / ("models--" + repo.replace("/", "--"))
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)
