"""What a step computes and keeps, found by running it on the meta device: shapes without numbers, no data, no GPU.

On a GPU attention is taken to be fused: its scores are not kept. On a CPU it is so in float32, and written out in
bfloat16 or with dropout, as attention/backends.py does it. Autocast, which torch has not on the meta device, is done
here by torch's own rule for the device: matrix products in bfloat16, losses in float32; norms and softmax in float32 on
a GPU, and in what comes in on a CPU.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmpre.attention.backends import as_on

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LOW = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.einsum, F.conv1d,
       F.conv2d, F.conv3d}  # fmt: skip
LOSSES = {F.cross_entropy, F.nll_loss, F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.cosine_embedding_loss,
          F.binary_cross_entropy_with_logits}  # fmt: skip
FULL = {  # by the kind of device
    "cpu": LOSSES,
    "cuda": LOSSES | {F.layer_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax,
                      Tensor.log_softmax, F.normalize, torch.exp, Tensor.exp},
}  # fmt: skip


class Fused(TorchFunctionMode):
    """Attention by a fused kernel; in bf16, autocast's rule."""

    def __init__(self, *, bf16: bool, device: str) -> None:
        super().__init__()
        self.bf16, self.full = bf16, FULL[device]
        self.cast: dict[int, Tensor] = {}  # parameters are cast once a pass, as autocast does

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.bf16 and function in LOW:
            args, kwargs = tree_map_only(Tensor, self._low, (args, kwargs))
        elif self.bf16 and function in self.full:
            args, kwargs = tree_map_only(Tensor, _full, (args, kwargs))
        return function(*args, **kwargs)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> Tensor:  # fmt: skip
        q, k, v = (self._low(x) if self.bf16 else x for x in (q, k, v))
        if attn_mask is not None:
            if attn_mask.requires_grad:  # scores with learned parts have to be written out
                return F.scaled_dot_product_attention(q, k, v, attn_mask.to(q.dtype), dropout_p, is_causal, **more)
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
            attn_mask = attn_mask.to(q.dtype)
        return FUSED(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]

    def _low(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if not isinstance(x, nn.Parameter):
            return x.to(torch.bfloat16)
        if id(x) not in self.cast:
            self.cast[id(x)] = x.to(torch.bfloat16)
        return self.cast[id(x)]


class Memory(TorchDispatchMode):
    """Bytes of the tensors that live at once, beside those that were there before."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {one.untyped_storage()._cdata for one in tree_leaves(before) if isinstance(one, Tensor)}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **kwargs or {})
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._see(one.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters of the right shapes that take no memory; readers are made as ever."""
    register = nn.Module.register_parameter

    def empty(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def trace(step: Callable[[], None], before: Any, *, bf16: bool, device: str) -> tuple[int, int]:
    """FLOPs of a pass forward and backward on a kind of device ("cpu" or "cuda"), and the bytes that it makes beside
    `before`, at their peak."""
    flops = FlopCounterMode(display=False, custom_mapping=_COUNTS)
    memory, fused = Memory(before), Fused(bf16=bf16, device=device)
    with fused, flops, memory, _autocast_of(fused), as_on(device):
        step()
    return flops.get_total_flops(), memory.peak


@contextmanager
def _autocast_of(fused: Fused) -> Iterator[None]:
    """Let `torch.autocast("meta", enabled=False)` do what it says."""
    real = torch.autocast

    @contextmanager
    def autocast(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Iterator[None]:
        if device_type != "meta":
            with real(device_type, *args, enabled=enabled, **kwargs):
                yield
            return
        before, fused.bf16 = fused.bf16, fused.bf16 and enabled
        try:
            yield
        finally:
            fused.bf16 = before

    torch.autocast = autocast
    try:
        yield
    finally:
        torch.autocast = real


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


_COUNTS: Mapping[Any, Any] = {FUSED: _attention_flops, FUSED_BACKWARD: _attention_backward_flops}


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
