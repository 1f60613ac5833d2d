"""Tiny random FLUX.2 checkpoints, dev and klein, and tiny autoencoders, built with diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tiny_checkpoints import FLUX_SCHEDULE, randomise
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

HEADS, HEAD_DIM = 2, 32
MISTRAL_WIDTH, QWEN_WIDTH = 24, 32
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
# as in the published tokenizers: what stands around the messages of a chat
MISTRAL_CHAT = (
    "{{- bos_token }}{%- for m in messages %}{%- set text = m.content if m.content is string else m.content[0].text %}"
    "{%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + text + '[/INST]' }}{%- endif %}{%- endfor %}"
)
QWEN_CHAT = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


# -- components -----------------------------------------------------------------------


def _tokenizer(specials: list[str], words: list[str], **options: Any) -> Any:
    """Whole words that are known, and bytes."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    known = {word for text in words for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*specials, *BYTES, *sorted(known)]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **options)


def mistral_tokenizer() -> Any:
    specials = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    tokenizer = _tokenizer(
        specials, [SYSTEM_MESSAGE], unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def qwen_tokenizer() -> Any:
    tokenizer = _tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["user\nassistant\n<think>\n\n</think>\n\n"],
        eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def mistral_encoder(tokenizer: Any, component: str = "text_encoder") -> Any:
    text = {
        "model_type": "mistral", "vocab_size": len(tokenizer) // 8 * 8 + 8, "hidden_size": MISTRAL_WIDTH,
        "intermediate_size": 32, "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}, "sliding_window": None,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 56,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=8)
    return randomise(transformers.Mistral3ForConditionalGeneration(config), component)


def qwen_encoder(tokenizer: Any, component: str = "text_encoder") -> Any:
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer) // 8 * 8 + 8, hidden_size=QWEN_WIDTH, intermediate_size=48, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    return randomise(transformers.Qwen3ForCausalLM(config), component)


def transformer(joint: int, *, guidance: bool, seed: int = 0, **config: Any) -> Any:
    shape = {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS,
        "axes_dims_rope": (4, 8, 12, 8), "in_channels": 128,
    }  # fmt: skip
    model = diffusers.Flux2Transformer2DModel(
        **{**shape, "joint_attention_dim": joint, "guidance_embeds": guidance, **config}
    )
    return randomise(model, "transformer", seed)


def vae(**config: Any) -> Any:
    shape = {
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 128,
    }  # fmt: skip
    model = randomise(diffusers.AutoencoderKLFlux2(**{**shape, **config}), "vae")
    draw = torch.Generator().manual_seed(5)
    model.bn.running_mean.copy_(0.3 * torch.randn(128, generator=draw))
    model.bn.running_var.copy_(0.5 + torch.rand(128, generator=draw))
    return model


# -- checkpoints ----------------------------------------------------------------------


def build_flux2(path: Path, **config: Any) -> Path:
    """FLUX.2 dev. The published tokenizer is a processor of pictures, too; its tokenizer alone is written here."""
    tokenizer = mistral_tokenizer()
    diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE),
        vae=vae(),
        text_encoder=mistral_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer(3 * MISTRAL_WIDTH, guidance=True, **config),
    ).save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def build_flux2_klein(path: Path, *, distilled: bool = True, **config: Any) -> Path:
    tokenizer = qwen_tokenizer()
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE),
        vae=vae(decoder_block_out_channels=(8, 16, 16, 24)),
        text_encoder=qwen_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer(3 * QWEN_WIDTH, guidance=False, **config),
        is_distilled=distilled,
    ).save_pretrained(path)
    return path


def build_flux2_klein_base(path: Path) -> Path:
    return build_flux2_klein(path, distilled=False)


def build_flux2_tiny_vae(path: Path, latent_channels: int = 32) -> Path:
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=latent_channels,
        num_encoder_blocks=(1, 1, 2, 1), num_decoder_blocks=(2, 1, 1, 1),
    )  # fmt: skip
    randomise(model, "vae").save_pretrained(path)
    return path
