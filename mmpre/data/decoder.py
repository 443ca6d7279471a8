"""Decode a file in a process of its own, which may hang, crash or eat memory without taking the run with it.

For decoders that nobody vouches for (video, rare pictures): the child has a deadline for each file and a limit of
memory, is started again where it ended, and costs the sample alone. It answers in plain bytes: nothing is unpickled.
"""

import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmpre.data.sample import BadMember

START_SECONDS = 120.0  # for a child's imports, on a busy machine
_HEAD = struct.Struct("<QQ")  # bytes of JSON, bytes of data
_MAX_TOLD = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}


class Decoder:
    """Calls `function(data, **settings)` in a child process; it returns an array, or a dict of arrays by name.

    `function` is one that stands at the top of a module; the settings must be JSON. A file gets `seconds`, and the
    child may hold `max_bytes` of memory. A file that ends the child or its time is tried once more, in a fresh child,
    and then raises BadMember ("decoder hangs", "decoder crashed", "decoder out of memory"); an exception of the
    function's raises BadMember at once ("cannot be decoded", or what its `cause` says). A child that has grown past
    `recycle_bytes` is replaced between two files. What is decoded, and in which order, depends on none of this.
    Picklable: the child stays behind, as it does in a fork.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        seconds: float = 30.0,
        max_bytes: int = 2 << 30,
        recycle_bytes: int = 1 << 30,
    ) -> None:
        module, name = sys.modules[function.__module__], function.__qualname__
        if getattr(module, name, None) is not function:
            raise ValueError(f"Decoder: {name} must stand at the top of its module, for another process to find it")
        if not 0 < seconds < float("inf") or max_bytes < 1 or recycle_bytes > max_bytes:
            raise ValueError(
                f"Decoder: seconds must be above 0 and recycle_bytes at most max_bytes, got {seconds} s, "
                f"{recycle_bytes:,} and {max_bytes:,} bytes"
            )
        self.where = [module.__name__, str(Path(module.__file__).resolve()), name]
        self.seconds, self.max_bytes, self.recycle_bytes = seconds, max_bytes, recycle_bytes
        self.started = 0  # children so far
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_child": None, "started": 0}

    def __call__(self, data: bytes, member: str, **settings: Any) -> dict[str, np.ndarray]:
        """The arrays of a file, by name ("" for a single one); `member` is its suffix, for messages."""
        try:
            return self._ask(data, member, settings)
        except _ChildEndedError:
            try:  # only what fails twice is the file's fault
                return self._ask(data, member, settings)
            except _ChildEndedError as e:
                raise BadMember(e.cause, member, e.detail) from None

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            if self._owner == os.getpid():  # not a fork's to end
                self._child.kill()
                self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                pipe.close()
            self._child = None

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # the interpreter is ending
            pass

    def _ask(self, data: bytes, member: str, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if self._owner != os.getpid():
            self.close()
        if self._child is None:
            self._start()
        told, arrays = self._exchange(json.dumps(settings).encode(), data, self.seconds)
        if told["rss"] > self.recycle_bytes:
            self.close()
        if "error" in told:
            raise BadMember(told["cause"], member, str(told["error"])[:300])
        return _arrays(told["arrays"], arrays)

    def _start(self) -> None:
        self._owner = os.getpid()
        environment = os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._child = subprocess.Popen(  # -P: neither this folder nor a file's joins the import path
            [sys.executable, "-P", "-m", "mmpre.data.decoder_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.started += 1
        try:
            told, _ = self._exchange(json.dumps([*self.where, self.max_bytes]).encode(), b"", START_SECONDS)
        except _ChildEndedError as e:
            raise RuntimeError(f"Decoder: {self.where[2]} cannot be started: {e.detail}") from None
        if "error" in told:
            self.close()
            raise RuntimeError(f"Decoder: {self.where[2]} of {self.where[1]} cannot be loaded: {told['error']}")

    def _exchange(self, words: bytes, data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        child, deadline = self._child, time.monotonic() + seconds
        os.set_blocking(child.stdin.fileno(), False)
        os.set_blocking(child.stdout.fileno(), False)
        send, got = memoryview(_HEAD.pack(len(words), len(data)) + words + data), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            selector.register(child.stdin, selectors.EVENT_WRITE)
            while True:
                for key, _ in selector.select(0.05):
                    if key.fileobj is child.stdin:
                        send = self._send(send)
                        if not send:
                            selector.unregister(child.stdin)
                    elif not self._receive(got):
                        self._ended()
                size = sum(_HEAD.unpack(got[: _HEAD.size])) + _HEAD.size if len(got) >= _HEAD.size else None
                if size is not None and size > self.max_bytes:
                    self._end("decoder out of memory", f"its answer has {size:,} bytes, at most {self.max_bytes:,}")
                if size is not None and len(got) >= size:
                    break
                if _rss(child.pid) > self.max_bytes:
                    self._end("decoder out of memory", f"the decoder took more than {self.max_bytes:,} bytes of memory")
                if time.monotonic() > deadline:
                    self._end("decoder hangs", f"the decoder gave no answer within {seconds:g} s")
        count = _HEAD.unpack(got[: _HEAD.size])[0]
        try:
            told = json.loads(bytes(got[_HEAD.size : _HEAD.size + min(count, _MAX_TOLD)]))
        except ValueError:
            self._end("decoder crashed", "the decoder's answer is damaged")
        return told, bytes(got[_HEAD.size + count :])

    def _send(self, send: memoryview) -> memoryview:
        try:
            return send[os.write(self._child.stdin.fileno(), send[: 1 << 16]) :]
        except BlockingIOError:
            return send
        except OSError:  # it has ended, which reading tells
            return memoryview(b"")

    def _receive(self, got: bytearray) -> bool:
        try:
            part = os.read(self._child.stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return True
        got += part
        return bool(part)

    def _ended(self) -> None:
        code = self._child.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._end("decoder crashed", f"the decoder ended with {how}")

    def _end(self, cause: str, detail: str) -> None:
        self.close()
        raise _ChildEndedError(cause, f"{detail}; leave the file out, or write it again")


class _ChildEndedError(Exception):
    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail


def _arrays(about: Any, data: bytes) -> dict[str, np.ndarray]:
    """Arrays from their names, types and shapes and their bytes, one after the other."""
    found, at = {}, 0
    for name, kind, shape in about:
        count = int(np.prod(shape, dtype=np.int64))
        found[name] = np.frombuffer(data, np.dtype(kind), count, at).reshape(shape)
        at += found[name].nbytes
    return found


def _rss(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):  # it has ended, or the system has no /proc
        return 0
