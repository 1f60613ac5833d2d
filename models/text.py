"""Encoding of prompts and pictures with encoders of transformers: ids, padding and which output a model reads."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ftfy
import torch
from PIL.Image import Image
from torch import Tensor

from sgl_diffusion.models.family import Execute, Spread, inputs, outputs


@dataclass(frozen=True)
class Shared:
    """How ranks share a module of transformers, as `models.family.Spread`.

    Attributes:
        layers: those that it has of these.
        head_dim: attribute with the width of a head, which is not cut; None where there are no heads.
        counts: attributes that are numbers of heads.
    """

    layers: Mapping[str, Spread]
    head_dim: str | None = None
    counts: tuple[str, ...] = ()


def _attention(q: str, k: str, v: str, out: str) -> Shared:
    return Shared({q: outputs(), k: outputs(), v: outputs(), out: inputs()}, "head_dim")


_T5_ATTENTION = Shared(
    {"q": outputs(), "k": outputs(), "v": outputs(), "o": inputs(), "relative_attention_bias": outputs()},
    "key_value_proj_dim",
    ("n_heads",),
)
_T5_MLP = Shared({"wi": outputs(), "wi_0": outputs(), "wi_1": outputs(), "wo": inputs()})
_GATED_MLP = Shared({"gate_proj": outputs(), "up_proj": outputs(), "down_proj": inputs()})

SHARED: Mapping[str, Shared] = {
    "T5Attention": _T5_ATTENTION,
    "T5DenseActDense": _T5_MLP,
    "T5DenseGatedActDense": _T5_MLP,
    "UMT5Attention": _T5_ATTENTION,
    "UMT5DenseActDense": _T5_MLP,
    "UMT5DenseGatedActDense": _T5_MLP,
    "CLIPAttention": _attention("q_proj", "k_proj", "v_proj", "out_proj"),
    "CLIPMLP": Shared({"fc1": outputs(), "fc2": inputs()}),
    "Qwen2_5_VLAttention": _attention("q_proj", "k_proj", "v_proj", "o_proj"),
    "Qwen2MLP": _GATED_MLP,
    "Qwen3Attention": _attention("q_proj", "k_proj", "v_proj", "o_proj"),
    "Qwen3MLP": _GATED_MLP,
    "MistralAttention": _attention("q_proj", "k_proj", "v_proj", "o_proj"),
    "MistralMLP": _GATED_MLP,
}
"""By the class of a module in an encoder of transformers. Vision towers of language models, which read no prompt, are
not among them."""


class PromptTooLong(ValueError):
    """A prompt has more tokens than the encoder reads; what would be cut off is named."""


@dataclass(frozen=True)
class Pooled:
    """A pure function of token ids on the encoder's device, equal for one encoder: it can be captured."""

    encoder: Any

    def __call__(self, ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(input_ids=ids).pooler_output,)


@dataclass(frozen=True)
class Hidden:
    """As `Pooled`, for the last hidden states."""

    encoder: Any

    def __call__(self, ids: Tensor) -> tuple[Tensor]:
        return (self.encoder(input_ids=ids)[0],)


@dataclass(frozen=True)
class MaskedHidden:
    """As `Hidden`, of an encoder that does not see the padding; its states there are zeros."""

    encoder: Any

    def __call__(self, ids: Tensor, mask_BT: Tensor) -> tuple[Tensor]:
        """`mask_BT` is 1 for tokens and 0 for padding."""
        dtype = self.encoder.dtype
        # spelled out as what is added to the scores: of a plain mask, transformers asks whether it hides anything,
        # for which a GPU has to be waited for
        added = (1 - mask_BT[:, None, None].to(dtype)) * torch.finfo(dtype).min
        seen = added.expand(-1, -1, mask_BT.shape[1], -1)
        return (self.encoder(input_ids=ids, attention_mask=seen)[0] * mask_BT[..., None],)


@dataclass(frozen=True)
class LayerStates:
    """A pure function of token ids: what a causal language model has after some of its layers, side by side.

    `layers` count from 0, the embedded tokens, to -1, the last layer that is loaded, with the model's final norm where
    all are (`Family.language_models`).
    """

    language_model: Any
    layers: tuple[int, ...]

    def __call__(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor]:
        """(B, T, layers * C). `mask_BT` is 1 for tokens and 0 for padding, which nothing sees."""
        # spelled out, as in `MaskedHidden`: without a mask, transformers looks for several texts in one
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        T, dtype = ids_BT.shape[1], self.language_model.dtype
        seen = mask_BT[:, None, None].bool().expand(-1, 1, T, T).tril()
        # padding before the prompt sees nothing at all: of that, PyTorch's attention makes zeros, eager a mean
        if self.language_model.config._attn_implementation != "sdpa":
            seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        states = self.language_model(
            input_ids=ids_BT, attention_mask=seen, use_cache=False, output_hidden_states=True
        ).hidden_states
        return (torch.cat([states[layer] for layer in self.layers], dim=-1),)


@dataclass(frozen=True)
class Vision:
    """A pure function of pixels on the encoder's device: the hidden states before the last layer."""

    encoder: Any

    def __call__(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.encoder(pixels, output_hidden_states=True).hidden_states[-2],)


def clip_pooled(tokenizer: Any, encoder: Any, prompt: str, execute: Execute) -> Tensor:
    """Pooled CLIP vector (1, C) of a prompt, padded to the tokenizer's length and without a mask.

    A longer prompt is cut at that length, as diffusers does: the pooled vector is a summary, and every family that
    reads it also reads the whole prompt through a second encoder.
    """
    ids = _ids(tokenizer, prompt, tokenizer.model_max_length)
    return execute(Pooled(encoder), ids.to(encoder.device))[0]


def t5_hidden(tokenizer: Any, encoder: Any, prompt: str, length: int, execute: Execute) -> Tensor:
    """Last hidden states (1, length, C) of T5, padded to `length` and without a mask: padding is seen, as in training.

    Raises:
        PromptTooLong: the prompt has more than `length` tokens.
    """
    _demand_fit(tokenizer, prompt, length)
    ids = _ids(tokenizer, prompt, length)
    return execute(Hidden(encoder), ids.to(encoder.device))[0]


def umt5_hidden(tokenizer: Any, encoder: Any, prompt: str, length: int, execute: Execute) -> Tensor:
    """Last hidden states (1, length, C) of UMT5, which does not see padding; zeros there.

    The prompt is cleaned first: mended encodings, no HTML entities, single spaces (`prompt_clean` of diffusers).

    Raises:
        PromptTooLong: the prompt has more than `length` tokens.
    """
    prompt = clean(prompt)
    _demand_fit(tokenizer, prompt, length)
    batch = tokenizer(
        [prompt], padding="max_length", max_length=length, truncation=True, return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip
    ids, mask = batch.input_ids.to(encoder.device), batch.attention_mask.to(encoder.device)
    return execute(MaskedHidden(encoder), ids, mask)[0]


def chat_ids(tokenizer: Any, prompt: str, length: int, **template: Any) -> Tensor:
    """Token ids (1, T) of a prompt as a user's message, up to where the answer would begin.

    Args:
        template: what else the tokenizer's chat template asks for.
    Raises:
        PromptTooLong: the message has more than `length` tokens, those of the template counted.
    """
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
    ids: Tensor = tokenizer([text], return_tensors="pt").input_ids
    if (over := ids.shape[1] - length) > 0:
        lost = tokenizer.decode(tokenizer(prompt).input_ids[-over:])
        raise PromptTooLong(
            f"max_sequence_length={length}: the prompt has {ids.shape[1]} tokens with its template; "
            f"this would be lost: {lost!r}"
        )
    return ids


def language_states(
    encoder: Any, ids_BT: Tensor, layers: Sequence[int], execute: Execute, mask_BT: Tensor | None = None
) -> Tensor:
    """As `LayerStates`, of an encoder that may have a head for next tokens, which is not computed."""
    given = [ids_BT] if mask_BT is None else [ids_BT, mask_BT]
    return execute(LayerStates(encoder.base_model, tuple(layers)), *(tensor.to(encoder.device) for tensor in given))[0]


def clean(prompt: str) -> str:
    """The text that is meant: mended, entities as characters (they may have been escaped twice), single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def vision_hidden(processor: Any, encoder: Any, pictures: Sequence[Image], execute: Execute) -> Tensor:
    """Hidden states (pictures, tokens, C) of a CLIP vision encoder before its last layer."""
    pixels = processor(images=list(pictures), return_tensors="pt").pixel_values
    return execute(Vision(encoder), pixels.to(encoder.device, encoder.dtype))[0]


def _demand_fit(tokenizer: Any, prompt: str, length: int) -> None:
    tokens = tokenizer(prompt, truncation=False).input_ids
    if len(tokens) > length:
        lost = tokenizer.decode(tokens[length - 1 : -1])
        raise PromptTooLong(
            f"max_sequence_length={length}: the prompt has {len(tokens)} tokens; this would be lost: {lost!r}"
        )


def _ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
    batch = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


class HashTokenizer:
    """Stands in for a tokenizer where dummy weights leave nothing to spell: words become ids by a fixed hash.

    It answers what our families and diffusers' pipelines ask of one.
    """

    added_tokens_encoder: Mapping[str, int] = {}

    def __init__(self, vocabulary: int, model_max_length: int) -> None:
        self.vocabulary, self.model_max_length = vocabulary, model_max_length

    @classmethod
    def beside(cls, key: str, configs: Mapping[str, Mapping[str, Any]]) -> HashTokenizer:
        """For the tokenizer with this key, one that fits its text encoder's `config.json`."""
        config = configs[key.replace("tokenizer", "text_encoder")]
        config = config.get("text_config", config)
        return cls(config["vocab_size"], config.get("max_position_embeddings", 512))

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        if isinstance(text, str):
            if options.get("return_tensors") is None:
                return _Batch([self._word(w) for w in self.tokenize(text)])
            text = [text]
        words = [[self._word(w) for w in self.tokenize(t)] for t in text]
        length = options.get("max_length") or max(map(len, words))
        lengths = torch.tensor([min(len(row), length) for row in words])
        ids = torch.tensor([(row + [1] * length)[:length] for row in words])
        return _Batch(ids, (torch.arange(length) < lengths[:, None]).long())

    def tokenize(self, text: str) -> list[str]:
        """Words, and every other character but spaces."""
        return re.findall(r"\w+|[^\w\s]", text)

    def apply_chat_template(self, messages: Sequence[Any], *, tokenize: bool = False, **options: Any) -> Any:
        """The text of a conversation, with as many tokens around each message as chat templates commonly have; or the
        tokens of several conversations."""
        if tokenize:
            return self([self.apply_chat_template(each) for each in messages], **options)
        contents = [m["content"] if isinstance(m["content"], str) else m["content"][0]["text"] for m in messages]
        said = zip(messages, contents, strict=True)
        return "".join(f"<|{m['role']}|> {content} <|end|>" for m, content in said)

    def _word(self, word: str) -> int:
        return 3 + sum(ord(c) * 31**i for i, c in enumerate(word)) % (self.vocabulary - 4)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids)

    def batch_decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(row) for row in ids]


@dataclass(frozen=True)
class _Batch:
    input_ids: Any
    attention_mask: Any = None

    def to(self, device: torch.device) -> _Batch:
        return _Batch(self.input_ids.to(device), self.attention_mask.to(device))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
