"""Which split a group of samples belongs to: a function of the group's name alone, without seed or state."""

import hashlib
from typing import Literal

RULE = "int(sha1(key)[:8 hex digits], 16) % 100: test below 10, valid below 20, else train"


def split_of(key: str) -> Literal["train", "valid", "test"]:
    """The split of everything that shares `key`: about 80, 10 and 10 percent of the keys.

    The key names a group (a speech, a caption, a set of concepts), never a file, or near-duplicates would stand on
    both sides.
    """
    value = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) % 100
    return "test" if value < 10 else "valid" if value < 20 else "train"
