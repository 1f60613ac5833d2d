"""Trains the embedded model from nothing: `python -m sgl_diffusion.models.embedded.train all --work DIR`.

Stages, each resumable from its last checkpoint in DIR and fully determined by its seed:
  tokenizers  a CLIP byte-level BPE and a T5 unigram in which every word of the world is one token
  vae         AutoencoderKL on rendered scenes, one latent per 8x8 pixels
  text        both text encoders alone: tell what stands where from the caption. Joint training sits on a
              bag-of-words plateau (colours right, places and shapes bound at random); this avoids it
  flow        the transformer by rectified flow (Liu et al. 2022) on cached latents, text encoders frozen, EMA
  export      the pipeline folder in the diffusers layout, float16
  score       draws held-out prompts through diffusers and judges them

Needs diffusers and transformers; no GPU. One CPU core takes about 75 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.models.embedded import world
from sgl_diffusion.models.embedded.tokens import TEXT_TOKENS, Tokens, build_tokenizers
from sgl_diffusion.models.embedded.training import train

# B batch  L text tokens  N image tokens  C channels  D text width
TEXT_WIDTH = 128
LATENT_CHANNELS = 4
WIDTH, HEADS, DOUBLE_BLOCKS, SINGLE_BLOCKS = 192, 3, 2, 4
LATENT_POOL = 30_000
SAMPLING_DEFAULTS = {
    "height": world.SIZE,
    "width": world.SIZE,
    "num_inference_steps": 20,
    "max_sequence_length": TEXT_TOKENS,
}
NOTHING = -100  # a target the caption does not give
TRAIN_SCENES = world.split_scenes(held_out=False)
TEST_SCENES = world.split_scenes(held_out=True)


# -- autoencoder ----------------------------------------------------------------


def build_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 48, 64],
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def train_vae(work: Path, steps: int) -> None:
    vae = build_vae()

    def loss_of(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = world.draw_scenes(TRAIN_SCENES, rng, 24, alone=0.2)
        x = torch.from_numpy(np.stack([world.render(s, rng) for s in scenes]))
        mean, log_var = vae.encoder(x).chunk(2, 1)
        log_var = log_var.clamp(-20, 5)
        y = vae.decoder(mean + (log_var / 2).exp() * torch.randn_like(mean))
        error = y - x
        # shapes cover a sixth of a picture: without the weight the background takes most of the gradient
        shape = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
        recon = ((1 + 4 * shape) * (error.abs() + error**2)).mean()
        loss = recon + 0.5 * slope + 2e-3 * kl
        return loss, {
            "l1": error.abs().mean().item(),
            "kl": kl.item(),
            "sigma": (log_var / 2).exp().mean().item(),
        }

    train("vae", vae, loss_of, work=work, steps=steps, lr=2e-3, ema=0.995, decay_from=0.3)
    vae.eval()
    rng = np.random.default_rng(7)
    scenes = world.draw_scenes(TRAIN_SCENES, rng, 256)
    with torch.no_grad():
        x = torch.from_numpy(np.stack([world.render(s, rng) for s in scenes]))
        mean = vae.encoder(x).chunk(2, 1)[0]
        pictures = [p.numpy() for p in vae.decoder(mean)]
    vae.register_to_config(scaling_factor=1 / mean.std().item(), shift_factor=mean.mean().item())
    vae.save_pretrained(work / "vae")
    print("vae round trip:", world.score(pictures[:100], scenes[:100]), "std", mean.std(dim=(0, 2, 3)))


# -- text encoders ----------------------------------------------------------------


def build_text_encoders(work: Path) -> tuple[nn.Module, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokens = Tokens(work)
    torch.manual_seed(1)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens.clip),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokens.clip.bos_token_id,
            eos_token_id=tokens.clip.eos_token_id,
            pad_token_id=tokens.clip.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=math.ceil(len(tokens.t5) / 8) * 8,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    _look_around(t5)
    return clip, t5


@torch.no_grad()
def _look_around(t5: nn.Module) -> None:
    """Starts T5's relative bias as heads that look back and ahead, near words first.

    From its default start the text is a bag of words, a saddle point that a short training does not leave.
    """
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (32 buckets, heads)
    distance = torch.tensor([i if i < 8 else 8 * 16 ** ((i - 7.5) / 8) for i in range(16)])
    for head in range(bias.shape[1]):
        near = -(0.35 if head >= 2 else 0.7) * (distance.clamp(max=24) - 1)
        near[0] = -1.0
        back, ahead = bias[:16, head], bias[16:, head]  # buckets of keys before and after the query
        back.copy_(near if head % 2 == 0 else torch.full((16,), -6.0))
        back[0] = -1.0
        ahead.copy_(near if head % 2 else torch.full((16,), -6.0))


PLACES = list(world.PLACES)
COLOURS = list(world.COLOURS)
FACT_SIZES = [len(COLOURS)] + [len(COLOURS) + 1, len(world.SHAPES) + 1] * len(PLACES)


def facts_of(scene: world.Scene, text: str) -> list[int]:
    """The scene as class ids: background, then colour and shape at every place (last class: nothing there)."""
    at = {t.place: t for t in scene.things}
    facts = [COLOURS.index(scene.background) if "background" in text else NOTHING]
    for place in PLACES:
        thing = at.get(place)
        facts.append(COLOURS.index(thing.colour) if thing else len(COLOURS))
        facts.append(world.SHAPES.index(thing.shape) if thing else len(world.SHAPES))
    return facts


def train_text(work: Path, steps: int) -> None:
    clip, t5 = build_text_encoders(work)
    tokens = Tokens(work)
    torch.manual_seed(2)
    readers = nn.ModuleDict(
        {
            "clip": nn.Linear(TEXT_WIDTH, sum(FACT_SIZES)),
            "t5": nn.Linear(TEXT_WIDTH, sum(FACT_SIZES)),
        }
    )
    model = nn.ModuleDict({"clip": clip, "t5": t5, "readers": readers})

    def reading_loss(logits: Tensor, facts: Tensor) -> tuple[Tensor, float]:
        loss, right = torch.zeros(()), torch.ones(facts.shape[:-1], dtype=torch.bool)
        for part, fact in zip(logits.split(FACT_SIZES, -1), facts.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(part.flatten(0, -2), fact.flatten(), ignore_index=NOTHING)
            right &= (part.argmax(-1) == fact) | (fact == NOTHING)
        return loss / len(FACT_SIZES), right.float().mean().item()

    def loss_of(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes = world.draw_scenes(TRAIN_SCENES, rng, 96, alone=0.15)
        captions = [world.caption(s, rng) for s in scenes]
        length = TEXT_TOKENS if rng.random() < 0.9 else int(rng.choice([32, 64]))
        clip_BL, t5_BL = tokens(captions, length)
        facts = torch.tensor([facts_of(s, c) for s, c in zip(scenes, captions, strict=True)])
        pooled_BD = clip(input_ids=clip_BL).pooler_output
        hidden_BLD = t5(input_ids=t5_BL)[0]
        clip_loss, clip_right = reading_loss(readers["clip"](pooled_BD)[:, None], facts[:, None])
        words = t5_BL != 0  # every word has to tell the whole scene
        per_word = facts[:, None].expand(-1, length, -1)[words]
        t5_loss, t5_right = reading_loss(readers["t5"](hidden_BLD[words])[:, None], per_word[:, None])
        return clip_loss + t5_loss, {
            "clip": clip_loss.item(),
            "clip_right": clip_right,
            "t5": t5_loss.item(),
            "t5_right": t5_right,
        }

    train("text", model, loss_of, work=work, steps=steps, lr=2e-3, ema=0.99)
    clip.save_pretrained(work / "text_encoder")
    t5.save_pretrained(work / "text_encoder_2")


# -- transformer ------------------------------------------------------------------


def build_transformer() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(3)
    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            # adaLN-Zero (Peebles & Xie 2022): every block starts as the identity
            if (
                name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
                or name == "proj_out"
            ):
                nn.init.zeros_(module.weight)
    return model


def pack(z_BCHW: Tensor) -> Tensor:
    """Latents -> image tokens of 2x2 latents (B, N, 4C), channel-major inside a token as diffusers packs them."""
    B, C, H, W = z_BCHW.shape
    tiles = z_BCHW.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(B, H * W // 4, 4 * C)


def _image_ids(side: int) -> Tensor:
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None]
    return ids.reshape(-1, 3)


def train_flow(work: Path, steps: int) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, T5EncoderModel

    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    clip = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
    t5 = T5EncoderModel.from_pretrained(work / "text_encoder_2").eval()
    tokens, model = Tokens(work), build_transformer()
    scenes, latents_MNC = _latent_pool(vae, work / "latents.pt")
    alone = torch.tensor([len(s.things) == 1 for s in scenes])
    pools = [torch.nonzero(~alone).flatten(), torch.nonzero(alone).flatten()]
    side = world.SIZE // 16
    image_ids = _image_ids(side)

    @torch.no_grad()
    def encode(captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        clip_BL, t5_BL = tokens(captions, length)
        return clip(input_ids=clip_BL).pooler_output, t5(input_ids=t5_BL)[0]

    def velocity(x_BNC: Tensor, sigma_B: Tensor, pooled_BD: Tensor, text_BLD: Tensor) -> Tensor:
        return model(
            hidden_states=x_BNC,
            timestep=sigma_B,
            pooled_projections=pooled_BD,
            encoder_hidden_states=text_BLD,
            txt_ids=torch.zeros(text_BLD.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def loss_of(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        B = 64
        is_alone = rng.random(B) < 0.15
        index = [int(rng.choice(pools[int(a)])) for a in is_alone]
        drop = rng.random(B) < 0.05  # for true classifier-free guidance
        captions = ["" if d else world.caption(scenes[i], rng) for i, d in zip(index, drop, strict=True)]
        # now and then a long padded prompt, so that max_sequence_length may be raised
        length = TEXT_TOKENS if rng.random() < 0.97 else int(rng.choice([32, 64, 128]))
        pooled_BD, text_BLD = encode(captions, length)
        x0 = latents_MNC[index]
        # stratified logit-normal times, leaning to high noise where the layout is decided
        u = (torch.randperm(B) + torch.rand(B)) / B
        sigma = torch.sigmoid(0.5 + 1.2 * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        noise = torch.randn_like(x0)
        x = torch.lerp(x0, noise, sigma[:, None, None])
        v = velocity(x, sigma, pooled_BD, text_BLD)
        loss = F.mse_loss(v, noise - x0)
        return loss, {"mse": loss.item()}

    @torch.no_grad()
    def report(step: int) -> str:
        test = world.draw_scenes(TEST_SCENES, np.random.default_rng(1), 50)
        pooled_BD, text_BLD = encode([world.caption(s) for s in test], TEXT_TOKENS)
        x = torch.randn(len(test), side * side, 4 * LATENT_CHANNELS, generator=torch.Generator().manual_seed(0))
        sigmas = torch.linspace(1, 0, 21)
        for s, s_next in zip(sigmas, sigmas[1:], strict=False):
            x = x + (s_next - s) * velocity(x, s.expand(len(test)), pooled_BD, text_BLD)
        z = (
            x.view(-1, side, side, LATENT_CHANNELS, 2, 2)
            .permute(0, 3, 1, 4, 2, 5)
            .reshape(-1, LATENT_CHANNELS, 2 * side, 2 * side)
        )
        z = z / vae.config.scaling_factor + vae.config.shift_factor
        pictures = vae.decode(z, return_dict=False)[0].numpy()
        _save_sheet(pictures[:32], work / f"flow_{step:06d}.png")
        return str(world.score(pictures, test))

    train(
        "flow",
        model,
        loss_of,
        work=work,
        steps=steps,
        lr=2e-3,
        ema=0.999,
        decay_from=0.4,
        report=report,
    )
    model.save_pretrained(work / "transformer")


@torch.no_grad()
def _latent_pool(vae: nn.Module, cache: Path) -> tuple[list[world.Scene], Tensor]:
    """LATENT_POOL training scenes and their packed, normalised latents (LATENT_POOL, N, 4C)."""
    rng = np.random.default_rng(5)
    scenes = world.draw_scenes(TRAIN_SCENES, rng, LATENT_POOL, alone=0.1)
    if cache.exists():
        return scenes, torch.load(cache, weights_only=True)
    packed = []
    for start in range(0, LATENT_POOL, 200):
        x = torch.from_numpy(np.stack([world.render(s, rng) for s in scenes[start : start + 200]]))
        mean = vae.encoder(x).chunk(2, 1)[0]
        packed.append(pack((mean - vae.config.shift_factor) * vae.config.scaling_factor))
    latents_MNC = torch.cat(packed)
    torch.save(latents_MNC, cache)
    return scenes, latents_MNC


def _save_sheet(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    from PIL import Image

    rows = [np.concatenate(list(pictures[i : i + columns]), 2) for i in range(0, len(pictures), columns)]
    sheet = ((np.concatenate(rows, 1).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    Image.fromarray(sheet.transpose(1, 2, 0)).save(path)


# -- export and score ---------------------------------------------------------------


def export(work: Path, out: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextModel, T5EncoderModel

    tokens = Tokens(work)
    pipeline = FluxPipeline(
        # 16 image tokens lie below the range dynamic shifting is defined for: a fixed shift of one
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=AutoencoderKL.from_pretrained(work / "vae").half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder").half(),
        tokenizer=tokens.clip,
        text_encoder_2=T5EncoderModel.from_pretrained(work / "text_encoder_2").half(),
        tokenizer_2=tokens.t5,
        transformer=FluxTransformer2DModel.from_pretrained(work / "transformer").half(),
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, out / "tokenizer" / name)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads in the dtype named here and diffusers in float32: name the same one
        file = out / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    (out / "sampling_defaults.json").write_text(json.dumps(SAMPLING_DEFAULTS, indent=2) + "\n")


def score(checkpoint: Path, count: int) -> None:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes = world.draw_scenes(TEST_SCENES, np.random.default_rng(2), count)
    pictures: list[np.ndarray] = []
    for start in range(0, count, 25):
        batch = scenes[start : start + 25]
        images = pipeline(
            [world.caption(s) for s in batch],
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
            output_type="pt",
            **SAMPLING_DEFAULTS,
        ).images
        pictures += list((images * 2 - 1).numpy())
    print(json.dumps(world.score(pictures, scenes)))


def _stages() -> Iterator[str]:
    yield from ("tokenizers", "vae", "text", "flow", "export", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *_stages()])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and parts")
    parser.add_argument("--out", type=Path, help="folder of the exported pipeline (default: WORK/checkpoint)")
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--text-steps", type=int, default=800)
    parser.add_argument("--flow-steps", type=int, default=2200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    out = args.out or args.work / "checkpoint"
    run = {
        "tokenizers": lambda: build_tokenizers(args.work),
        "vae": lambda: train_vae(args.work, args.vae_steps),
        "text": lambda: train_text(args.work, args.text_steps),
        "flow": lambda: train_flow(args.work, args.flow_steps),
        "export": lambda: export(args.work, out),
        "score": lambda: score(out, 100),
    }
    for stage in _stages() if args.stage == "all" else [args.stage]:
        run[stage]()


if __name__ == "__main__":
    main()
