"""What FLUX.2 reads of a prompt: hidden states of three layers of a language model, side by side, of a chat about it.

A prompt is padded, and the transformer sees the padding, as it did in training: what the language model makes of it
without looking at it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sgl_diffusion.models.family import Execute
from sgl_diffusion.models.text import PromptTooLong, language_states

MISTRAL_LAYERS = (10, 20, 30)
QWEN_LAYERS = (9, 18, 27)
IMAGE_TOKEN = "[IMG]"  # means a picture to Mistral's processor, which is given none
# word by word what the model was trained with (`SYSTEM_MESSAGE` of diffusers' `pipelines/flux2/system_messages.py`)
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object"
    " relationships, object\nattribution and actions without speculation."
)


def mistral_states(tokenizer: Any, encoder: Any, prompt: str, length: int, execute: Execute) -> Tensor:
    """(1, length, 3 C) of a conversation that opens with the system message, without the beginning of an answer.

    Raises:
        PromptTooLong: it has more than `length` tokens.
    """
    said = (("system", SYSTEM_MESSAGE), ("user", prompt.replace(IMAGE_TOKEN, "")))
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    # the template begins with the token that a tokenizer would put there
    return _states(tokenizer, encoder, text, length, MISTRAL_LAYERS, execute, add_special_tokens=False)


def qwen_states(tokenizer: Any, encoder: Any, prompt: str, length: int, execute: Execute) -> Tensor:
    """(1, length, 3 C) of a user's message, up to where an answer without a thought would begin.

    Raises:
        PromptTooLong: it has more than `length` tokens.
    """
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )  # fmt: skip
    return _states(tokenizer, encoder, text, length, QWEN_LAYERS, execute)


def _states(
    tokenizer: Any, encoder: Any, text: str, length: int, layers: tuple[int, ...], execute: Execute, **options: Any
) -> Tensor:
    tokens = tokenizer(text, truncation=False, **options).input_ids
    if len(tokens) > length:
        raise PromptTooLong(
            f"max_sequence_length={length}: the prompt has {len(tokens)} tokens with its template; "
            f"this would be lost: {tokenizer.decode(tokens[length:])!r}"
        )
    batch = tokenizer(
        [text], padding="max_length", max_length=length, return_attention_mask=True, return_tensors="pt", **options
    )
    return language_states(encoder, batch.input_ids, layers, execute, batch.attention_mask)
