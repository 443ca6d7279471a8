"""Tars for tests: plain, long-named, interleaved and damaged ones, with members whose content says whose they are."""

import io
import tarfile

import numpy as np

SUFFIXES = ("jpg", "json", "txt")


def content(key, suffix, size=700):
    """Bytes that name their sample and differ for every member; the last is not zero."""
    start = f"{key}.{suffix}|".encode()
    rng = np.random.default_rng(list(start))
    return start + rng.bytes(rng.integers(0, size)) + b"."


def samples(count=8, name="s{:04d}", suffixes=SUFFIXES, size=700):
    return {name.format(i): {s: content(name.format(i), s, size) for s in suffixes} for i in range(count)}


def entry(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def entries(made):
    return [entry(f"{key}.{suffix}", data) for key, members in made.items() for suffix, data in members.items()]


def tar(all_entries, format=tarfile.USTAR_FORMAT, **options):
    """The bytes of a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **options) as file:
        for info, data in all_entries:
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def headers(data):
    """(place, type, size of what follows) of every header of an undamaged tar."""
    found, place = [], 0
    while data[place : place + 512].strip(b"\0"):
        size = int(data[place + 124 : place + 135].strip(b"\0 ") or b"0", 8)
        found.append((place, data[place + 156 : place + 157], size))
        place += 512 + size + -size % 512
    return found


def flip(data, place, bit=0):
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
