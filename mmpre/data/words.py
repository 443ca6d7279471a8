"""Texts cut into pieces word by word: what stands between two spaces is cut once and then remembered.

A language says most of what it says with the same words. Where a tokenizer looks at each for itself, to look up how one
was cut before gives the same pieces as to cut the whole text, about eight times as fast.
"""

# W pieces and w words of a text

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

MOST_PARTS = 1 << 16  # are remembered, about 25 MB; the commonest come first
LONGEST = 32  # characters of a part that is remembered
# what turns each letter into others without a look beyond the spaces around it, and what splits at every space
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}


class Words:
    """Cuts texts by a tokenizer whose pieces end with their words (`apart`)."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.known: dict[str, tuple[bytes, bytes]] = {}  # ids and sizes of each part, to be joined

    def cut(self, text: str) -> tuple[Int[np.ndarray, "W"], Int[np.ndarray, "w"]]:
        """Ids of the pieces, and how many of them each word has."""
        known = self.known.get
        parts = [known(part) or self._cut(part) for part in text.split(" ")]
        ids, sizes = (bytearray().join(some) for some in zip(*parts, strict=True))
        return np.frombuffer(ids, np.int32), np.frombuffer(sizes, np.int32)

    def _cut(self, part: str) -> tuple[bytes, bytes]:
        made = self.backend.encode(part, add_special_tokens=False)
        sizes = np.bincount(made.word_ids) if made.ids else []
        cut = np.array(made.ids, np.int32).tobytes(), np.array(sizes, np.int32).tobytes()
        if len(self.known) < MOST_PARTS and len(part) <= LONGEST:
            self.known[part] = cut
        return cut


def apart(source: str) -> bool:
    """Whether a tokenizer.json cuts what stands between two spaces as if it stood alone: BERT's and its kin."""
    made = json.loads(source)
    return (
        made["model"].get("type") == "WordPiece"
        and _names(made["normalizer"]) <= NORMALIZERS
        and bool(_names(made["pre_tokenizer"]) & SPLITTERS)
        and _names(made["pre_tokenizer"]) <= SPLITTERS
        and all(token["special"] for token in made["added_tokens"])
    )


def _names(step: Mapping[str, Any] | None) -> set[str]:
    if step is None:
        return set()
    inner = step.get("normalizers", step.get("pretokenizers"))
    return {step["type"]} if inner is None else {name for one in inner for name in _names(one)}
