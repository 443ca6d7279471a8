"""The other side of `decoder.py`: a process that decodes one file after the other until its parent ends."""

import importlib
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import numpy as np

from mmpre.plugins import load_again
from mmpre.processes.stopping import die_with_parent

_HEAD = struct.Struct("<QQ")


def serve() -> None:
    """Answer over the pipes that stdin and stdout were; what a decoder prints goes to stderr."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's business
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    module, path, name, max_bytes = json.loads(_receive(source)[0])
    try:
        function = getattr(_module(module, path), name)
        _limit(max_bytes)
        _answer(sink, {})
    except Exception as e:
        _answer(sink, {"cause": "", "error": f"{type(e).__name__}: {e}"})
        return
    while True:
        try:
            settings, data = _receive(source)
        except EOFError:
            return
        try:
            made = function(data, **json.loads(settings))
            named = made if isinstance(made, dict) else {"": made}
            arrays = {key: np.ascontiguousarray(value) for key, value in named.items()}
            if any(value.dtype.hasobject for value in arrays.values()):
                raise TypeError(f"{name} must return arrays of numbers")
            about = [[key, value.dtype.str, value.shape] for key, value in arrays.items()]
            _answer(sink, {"arrays": about}, b"".join(value.tobytes() for value in arrays.values()))
        except MemoryError:
            detail = f"the decoder wanted more than {max_bytes:,} bytes of memory"
            _answer(sink, {"cause": "decoder out of memory", "error": detail})
        except Exception as e:
            cause = getattr(e, "cause", None)  # a function may name its own
            error = {"error": str(e)} if cause else {"error": f"{type(e).__name__}: {e}"}
            _answer(sink, {"cause": cause or "cannot be decoded", **error})


def _limit(more: int) -> None:
    """Let this process allocate so many bytes more than it has, for the parent only looks now and then (Linux)."""
    if not os.path.exists("/proc/self/status"):
        return
    with open("/proc/self/status") as file:
        data = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, data + more))


def _module(name: str, path: str) -> Any:
    return load_again(name, path) if name.startswith(("mmpre_file_", "__m")) else importlib.import_module(name)


def _receive(file: BinaryIO) -> tuple[bytes, bytes]:
    words, data = _HEAD.unpack(_exactly(file, _HEAD.size))
    return _exactly(file, words), _exactly(file, data)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _answer(file: BinaryIO, told: dict[str, Any], data: bytes = b"") -> None:
    words = json.dumps(told | {"rss": _rss()}).encode()
    file.write(_HEAD.pack(len(words), len(data)) + words)
    file.write(data)
    file.flush()


def _rss() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(serve())
