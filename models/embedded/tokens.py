"""The embedded model's tokenizers: CLIP byte-level BPE and T5 unigram, every word of the world a single token."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from sgl_diffusion.models.embedded import world

TEXT_TOKENS = 24  # of the T5 side; the longest caption has 19


def build_tokenizers(work: Path) -> None:
    from transformers import CLIPTokenizer, T5TokenizerFast

    words = world.vocabulary()
    vocab, merges = _byte_pair_merges(words)
    clip_dir = work / "tokenizer"
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77).save_pretrained(clip_dir)
    # transformers 5 writes tokenizer.json only; readers of the published layout want these two
    (clip_dir / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (clip_dir / "merges.txt").write_text("\n".join(lines) + "\n")

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [("\u2581" + w, -2.0) for w in words]
    pieces += [("\u2581" + w.capitalize(), -3.0) for w in words]
    pieces += [(chr(c), -8.0) for c in range(33, 127)]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    t5.save_pretrained(work / "tokenizer_2")


def _byte_pair_merges(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges, learnt until every word is a single token."""
    spelled = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while any(len(s) > 1 for s in spelled.values()):
        counts: dict[tuple[str, str], int] = {}
        for symbols in spelled.values():
            for pair in zip(symbols, symbols[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda p: (-counts[p], p))
        merges.append(best)
        spelled = {w: _merge(symbols, best) for w, symbols in spelled.items()}
    letters = _byte_letters()
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {t: i for i, t in enumerate(dict.fromkeys(tokens))}, merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _byte_letters() -> list[str]:
    """The printable character CLIP and GPT-2 write for each of the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


class Tokens:
    """Captions -> (CLIP ids, T5 ids), padded as the pipeline pads them."""

    def __init__(self, work: Path) -> None:
        from transformers import CLIPTokenizer, T5TokenizerFast

        self.clip = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.t5 = T5TokenizerFast.from_pretrained(work / "tokenizer_2")

    def __call__(self, captions: list[str], length: int = TEXT_TOKENS) -> tuple[Tensor, Tensor]:
        pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip_BL = self.clip(captions, max_length=TEXT_TOKENS + 2, **pad).input_ids
        return clip_BL, self.t5(captions, max_length=length, **pad).input_ids
