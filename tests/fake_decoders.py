"""Decoders that misbehave by what their file says, for tests of the process that holds them."""

import os
import signal
import time

import numpy as np

_kept = []


def decode(data, scale=1):
    word, _, rest = data.partition(b" ")
    if word == b"hang":
        time.sleep(1e9)
    if word == b"segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"exit":
        os._exit(0)
    if word == b"raise":
        raise ValueError("no such codec")
    if word == b"print":
        print("a decoder that talks on stdout")
        os.write(1, b"and below Python")
    if word == b"bomb":
        return np.ones(1 << 40, np.uint8)
    if word == b"grow":  # in small steps, as native code does that no limit of Python's sees
        while True:
            _kept.append(np.ones(1 << 22))
            time.sleep(0.005)
    if word == b"leak":
        _kept.append(np.ones(10 << 20, np.uint8))
    if word == b"pickle":
        return np.array([object()])
    if word == b"two":
        return {"frames": np.arange(6).reshape(2, 3) * scale, "times": np.array([0.5, 1.5])}
    return np.frombuffer(rest, np.uint8) * scale


def once(data, flag=""):
    """Crashes at the first try alone."""
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGABRT)
    return np.array([7])
