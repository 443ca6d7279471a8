"""What a loading worker hands over, in two pieces: all tensors in one buffer, and a pickle of the rest.

A tensor that crosses from process to process takes a shared memory, a file descriptor and a connection of its own. For
the dozens of small ones that a micro-batch of texts has, that takes longer than to make them.
"""

import io
import math
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

_ALIGNED = 64  # bytes, where tensors begin

Place = tuple[int, torch.dtype, Sequence[int]]  # the first byte, the type and the shape of a tensor in the buffer


class Parcel(NamedTuple):
    """`rest` says where in the buffer its tensors are."""

    rest: bytes
    buffer_X: UInt8[Tensor, "X"]


def wrap(made: Any) -> Parcel:
    """Copy all plain tensors of a thing into one shared memory; others are pickled."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(made)
    memory = torch.UntypedStorage._new_shared(max(packer.size, 1))
    buffer_X = torch.empty(0, dtype=torch.uint8).set_(memory, 0, (packer.size,), (1,))
    for tensor, place in packer.placed.values():
        _at(buffer_X, place).copy_(tensor)
    return Parcel(file.getvalue(), buffer_X)


def unwrap(parcel: Parcel) -> Any:
    """The thing again; its tensors are views of the buffer."""
    return _Unpacker(io.BytesIO(parcel.rest), parcel.buffer_X).load()


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.placed: dict[int, tuple[Tensor, Place]] = {}  # by the tensor's id, which stays while it is held here
        self.size = 0

    def persistent_id(self, one: Any) -> Place | None:
        if type(one) is not Tensor or one.layout != torch.strided or one.device.type != "cpu" or one.requires_grad:
            return None
        if id(one) not in self.placed:
            self.placed[id(one)] = one, (self.size, one.dtype, tuple(one.shape))
            self.size += -(-one.numel() * one.element_size() // _ALIGNED) * _ALIGNED
        return self.placed[id(one)][1]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffer_X: UInt8[Tensor, "X"]) -> None:
        super().__init__(file)
        self.buffer_X = buffer_X

    def persistent_load(self, place: Place) -> Tensor:
        return _at(self.buffer_X, place)


def _at(buffer_X: UInt8[Tensor, "X"], place: Place) -> Tensor:
    start, dtype, shape = place
    return buffer_X[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
