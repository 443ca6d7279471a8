"""The letters of DNA as numbers."""
# L bases

import numpy as np
from jaxtyping import UInt8

from mmpre.data.sample import BadMember

LETTERS = "ACGTN"
UNKNOWN, LOWER, WRONG = 4, 8, 255  # the code of N, what a lower-case letter adds to its code, and no letter of DNA

_codes = np.full(256, WRONG, dtype=np.uint8)
for _letter in "RYSWKMBDHVN":  # one of several bases
    _codes[ord(_letter)] = UNKNOWN
for _code, _letter in enumerate("ACGT"):
    _codes[ord(_letter)] = _code
_codes[ord("U")] = LETTERS.index("T")
_codes[ord("a") : ord("z") + 1] = np.where(_codes[65:91] == WRONG, WRONG, _codes[65:91] + LOWER)
_complement = np.array([3, 2, 1, 0, 4, 0, 0, 0, 11, 10, 9, 8, 12], dtype=np.uint8)


def codes_of(letters: bytes, member: str) -> UInt8[np.ndarray, "L"]:
    """A, C, G, T, N as 0 to 4, lower case 8 more; U is T, letters for several bases are N. Others raise BadMember."""
    code_L = _codes[np.frombuffer(letters, dtype=np.uint8)]
    if len(code_L) and code_L.max() == WRONG:
        place = int(code_L.argmax())
        wrong = chr(letters[place])
        raise BadMember("not DNA", member, f"wanted A, C, G, T, N and their like, base {place + 1} is {wrong!r}")
    return code_L


def letters_of(code_L: UInt8[np.ndarray, "L"]) -> str:
    return np.frombuffer(b"ACGTN---acgtn", dtype="S1")[code_L].tobytes().decode()


def reverse_complement(code_L: UInt8[np.ndarray, "L"]) -> UInt8[np.ndarray, "L"]:
    """The other strand, read in its own direction."""
    return _complement[code_L][::-1]
