"""The words around a prompt, and what the language model makes of them with or without pictures.

Templates are those the models were trained with (`QwenImagePipeline` and the editing pipelines of diffusers); what the
language model has to say of their first tokens is the same for all prompts, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from sgl_diffusion.models.family import Execute
from sgl_diffusion.models.qwen_image.vision import Patches, states_with_pictures
from sgl_diffusion.models.text import PromptTooLong, language_states

PICTURE = "<|image_pad|>"  # a picture's tokens stand in its place


@dataclass(frozen=True)
class Template:
    """Of a conversation that ends where an answer would begin.

    Attributes:
        task: what the system says.
        dropped: tokens at the beginning that the denoiser is not told of.
        before: of every picture, ahead of the prompt; {n} is its number.
    """

    task: str
    dropped: int
    before: str = ""

    def around(self, prompt: str, pictures: int) -> list[str]:
        """The text before, between and after the pictures. Where it is cut, tokens end."""
        seen = "".join(self.before.format(n=n + 1) for n in range(pictures))
        text = f"<|im_start|>system\n{self.task}<|im_end|>\n<|im_start|>user\n{seen}"
        *runs, last = text.split(PICTURE)
        return [*runs, f"{last}{prompt}<|im_end|>\n<|im_start|>assistant\n"]


DRAWING = Template(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    dropped=34,
)
_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
EDITING = Template(_EDIT, dropped=64, before=f"<|vision_start|>{PICTURE}<|vision_end|>")
EDITING_SEVERAL = Template(_EDIT, dropped=64, before=f"Picture {{n}}: <|vision_start|>{PICTURE}<|vision_end|>")


def drawing_states(tokenizer: Any, encoder: Any, prompt: str, length: int, execute: Execute) -> Tensor:
    """Last hidden states (1, T, C) of a prompt and the template's end.

    Raises:
        PromptTooLong: T would be more than `length`.
    """
    (text,) = DRAWING.around(prompt, 0)
    ids = tokenizer(text, truncation=False).input_ids
    _demand_fit(tokenizer, ids[DRAWING.dropped :], length)
    return language_states(encoder, torch.tensor([ids], device="cpu"), (-1,), execute)[:, DRAWING.dropped :]


def editing_states(
    tokenizer: Any,
    encoder: Any,
    patches: Patches,
    template: Template,
    prompt: str,
    pictures: Sequence[Image],
    length: int,
) -> Tensor:
    """Last hidden states (1, T, C) of pictures, a prompt and the template's end.

    Raises:
        PromptTooLong: the prompt, what closes the last picture and the template's end are more than `length` tokens.
    """
    texts = [tokenizer(text, truncation=False).input_ids for text in template.around(prompt, len(pictures))]
    _demand_fit(tokenizer, texts[-1], length)
    states = states_with_pictures(encoder, texts, [patches(picture) for picture in pictures])
    return states[:, template.dropped :]


def _demand_fit(tokenizer: Any, ids: Sequence[int], length: int) -> None:
    if len(ids) > length:
        raise PromptTooLong(
            f"max_sequence_length={length}: the prompt has {len(ids)} tokens, with the end of the template; "
            f"this would be lost: {tokenizer.decode(ids[length:])!r}"
        )
