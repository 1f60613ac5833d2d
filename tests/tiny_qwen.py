"""Tiny random checkpoints of Qwen-Image and its editing models, built with diffusers' own classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tiny_checkpoints import randomise
from tokenizers import AddedToken, pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from sgl_diffusion.models.qwen_image.text import DRAWING, EDITING

TEXT_WIDTH = 48
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
            "<|image_pad|>", "<|video_pad|>")  # fmt: skip
# words that are one token each, as in the published vocabulary: what is dropped is then what comes before a prompt
WORDS = sorted({word for template in (DRAWING, EDITING) for word in re.findall(r" ?\w+", template.task)})
SCHEDULE = {
    "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "shift_terminal": 0.02,
}  # fmt: skip
LIGHTNING = {**SCHEDULE, "base_shift": 1.0986122886681098, "max_shift": 1.0986122886681098, "shift_terminal": None}


def tokenizer() -> Any:
    """Without merges: every byte is a token, but for the words of the templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    whole = [AddedToken(token, special=False, normalized=False) for token in ("system", "user", "assistant", *WORDS)]
    return transformers.Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(alphabet)}, merges=[], unk_token="<|endoftext|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>", model_max_length=4096, padding_side="right",
        added_tokens_decoder={len(alphabet) + i: token for i, token in enumerate([*special, *whole])},
    )  # fmt: skip


def text_encoder(tokens: Any) -> Any:
    ids = {f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"),
    )}  # fmt: skip
    text = {
        "vocab_size": len(tokens) // 8 * 8 + 8, "hidden_size": TEXT_WIDTH, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 68, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), "text_encoder")


def vae() -> Any:
    return randomise(diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1), "vae")


def transformer(**config: Any) -> Any:
    shape = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "axes_dims_rope": (8, 12, 12)}
    model = diffusers.QwenImageTransformer2DModel(
        **{**shape, "in_channels": 64, "out_channels": 16, "joint_attention_dim": TEXT_WIDTH, **config}
    )
    return randomise(model, "transformer")


def _parts(**config: Any) -> dict[str, Any]:
    tokens = tokenizer()
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        "vae": vae(),
        "text_encoder": text_encoder(tokens),
        "tokenizer": tokens,
        "transformer": transformer(**config),
    }


def build_qwen(path: Path) -> Path:
    diffusers.QwenImagePipeline(**_parts()).save_pretrained(path)
    return path


def build_qwen_lightning(path: Path) -> Path:
    parts = _parts() | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**LIGHTNING)}
    diffusers.QwenImagePipeline(**parts).save_pretrained(path)
    return path


def _editing(path: Path, pipeline: Any, **config: Any) -> Path:
    """With a processor's folder as it is published, which its own class cannot write without torchvision."""
    parts = _parts(**config)
    pipeline(**parts, processor=None).save_pretrained(path)
    parts["tokenizer"].save_pretrained(path / "processor")
    Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056}).save_pretrained(path / "processor")
    index = json.loads((path / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def build_qwen_edit(path: Path) -> Path:
    return _editing(path, diffusers.QwenImageEditPipeline)


def build_qwen_edit_plus(path: Path) -> Path:
    return _editing(path, diffusers.QwenImageEditPlusPipeline)


def build_qwen_edit_2511(path: Path) -> Path:
    return _editing(path, diffusers.QwenImageEditPlusPipeline, zero_cond_t=True)


class Processor(transformers.Qwen2VLProcessor):  # type: ignore[misc] # transformers' is untyped
    """What diffusers' editing pipelines ask of theirs, which needs torchvision: that resizes bytes as PyTorch does."""

    def __init__(self, folder: Path) -> None:
        self.words = transformers.AutoTokenizer.from_pretrained(folder)
        self.pictures = Qwen2VLImageProcessorPil.from_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path, *, subfolder: str = "", **options: Any) -> Processor:
        return cls(Path(folder) / subfolder)

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        images, options = images if isinstance(images, list) else [images], self.pictures
        resized = []
        for image in images:
            limits = {"min_pixels": options.size["shortest_edge"], "max_pixels": options.size["longest_edge"]}
            size = smart_resize(image.height, image.width, options.patch_size * options.merge_size, **limits)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            resized.append(F.interpolate(pixels, size, mode="bicubic", antialias=True)[0].numpy())
        seen = options(images=resized, do_resize=False, input_data_format="channels_first", return_tensors="pt")
        for *_, rows, columns in seen["image_grid_thw"].tolist():
            tokens = rows * columns // options.merge_size**2
            text = [t.replace("<|image_pad|>", "<|taken|>" * tokens, 1) for t in text]
        words = self.words(
            [t.replace("<|taken|>", "<|image_pad|>") for t in text], padding=padding, return_tensors="pt"
        )
        return transformers.BatchFeature({**words, **seen})
