"""Random changes of bytes, words and JSON, the same for a seed: what nobody thought of."""

import copy
import json
import random
from typing import Any

ODD = [None, True, -1, 0, 1 << 70, 1e308, 1e-400, float("nan"), "", "1e-4", "nan", "../..", "a" * 3000, "\x1b[31m", [],
       {}, [[]], {"a": 1}, "os.system", "\u0000", "\ud800", [1, "x"]]  # fmt: skip


def of_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to five changes: a flipped bit, another byte, a cut, a piece taken out, doubled or moved."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 5)):
        if not data:
            break
        place, end = sorted((dice.randrange(len(data)), dice.randrange(len(data))))
        end = min(end, place + 64)
        match dice.randrange(6):
            case 0:
                data[place] ^= 1 << dice.randrange(8)
            case 1:
                data[place] = dice.randrange(256)
            case 2:
                del data[max(1, dice.randrange(len(data))) :]
            case 3:
                del data[place:end]
            case 4:
                data[place:place] = data[place:end]
            case 5:
                data[place : place + 4] = dice.choice([b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"{[({"])
    return bytes(data)


def of_json(record: Any, dice: random.Random) -> bytes:
    """A record with a value, a name or a place of it changed, or its text."""
    if dice.random() < 0.3:
        return of_bytes(json.dumps(record).encode(), dice)
    changed = copy.deepcopy(record)
    for _ in range(dice.randint(1, 2)):
        place, parent = changed, None
        while isinstance(place, dict | list) and place and (parent is None or dice.random() < 0.8):
            key = dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
            parent, place = (place, key), place[key]
        if parent is None:
            continue
        where, key = parent
        match dice.randrange(4):
            case 0 | 1:
                where[key] = dice.choice(ODD)
            case 2:
                del where[key]
            case 3 if isinstance(where, dict):
                where[str(key) + dice.choice(["x", "_", ""])] = dice.choice(ODD)
    return json.dumps(changed).encode()


def of_words(words: list[str], dice: random.Random) -> list[str]:
    """A command line with words changed, doubled, left out or put elsewhere."""
    words = list(words)
    for _ in range(dice.randint(1, 3)):
        i = dice.randrange(len(words)) if words else 0
        match dice.randrange(5):
            case 0 if words:
                odd = [str(one) for one in ODD if one != "\u0000"]
                words[i] = dice.choice([*odd, "--", "-", "--=", "1e3", "99999999999999999999", "-5"])
            case 1 if words:
                text = words[i] or "x"
                at = dice.randrange(len(text))
                words[i] = text[:at] + dice.choice(["", "-", "=", text[at] * 2, "q", "\u202e"]) + text[at + 1 :]
            case 2 if words:
                del words[i]
            case 3 if words:
                words.insert(dice.randrange(len(words)), words[i])
            case 4:
                dice.shuffle(words)
    return [word.replace("\x00", "") for word in words]
