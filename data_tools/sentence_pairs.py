"""Sentences beside the same with one thing wrong, made by rules from plain text: which one does a model find likelier?

Verbs and determiners in the other number ("they was"), and two neighbouring words exchanged. As in BLiMP (Warstadt et
al. 2020, arXiv:1912.00582) both sentences of a pair have the same words but for what is wrong; here they are from
running text, and a rule may miss what is right in some dialect or sense.
"""

import hashlib
import re
from collections.abc import Iterator

NUMBER = {"is": "are", "was": "were", "has": "have", "does": "do", "this": "these"}
OTHER = NUMBER | {b: a for a, b in NUMBER.items()}
WORDS = range(4, 13)  # in a sentence


def sentences(text: str) -> Iterator[str]:
    """The plain ones of a text: 4 to 12 words, from a capital letter to a full stop, no figures or quotation marks."""
    for one in re.split(r"(?<=[.!?])\s+", text.replace("\n", " ")):
        if re.fullmatch(r"[A-Z][A-Za-z',; -]*\.", one) and len(one.split()) in WORDS:
            yield one


def spoiled(sentence: str) -> dict[str, str]:
    """The sentence with a word in the wrong number (`number`) and with two words exchanged (`order`), where it has
    such words; which, is drawn from the sentence."""
    words, found = sentence.split(" "), {}
    draw = int(hashlib.sha1(sentence.encode()).hexdigest()[:8], 16)
    if places := [i for i, word in enumerate(words) if word in OTHER]:
        i = places[draw % len(places)]
        found["number"] = " ".join([*words[:i], OTHER[words[i]], *words[i + 1 :]])
    plain = [bool(re.fullmatch("[a-z]+", word)) for word in words]
    if places := [i for i in range(len(words) - 1) if plain[i] and plain[i + 1] and words[i] != words[i + 1]]:
        i = places[draw % len(places)]
        found["order"] = " ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]])
    return found
