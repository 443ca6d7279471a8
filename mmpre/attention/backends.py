"""Attention over a packed batch: one function for each way to compute it, and `attend`, which chooses one.

groups    one call per run of rows of equal length; CPU, and everywhere that the others do not serve
xformers  memory_efficient_attention; CUDA, where it has a bias object for the plan
varlen    torch's own varlen attention; CUDA in half precision, full and causal, where xFormers is missing
flex      torch's flex_attention, which is compiled for the plan and the bias; CUDA, for all that the two above lack
dense     row by row with an explicit softmax, in float32 or better; what the others are tested against

The environment variable MMPRE_ATTENTION forces one of them by name. A token that may see no one reads zeros.
"""
# N tokens of the packed batch, M that are read (N in self-attention), H heads, K width of a head
# g rows of n tokens that read m

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from mmpre.attention import Plan
from mmpre.attention.bias import Bias
from mmpre.attention.explicit import Explicit
from mmpre.attention.rules import CAUSAL, EVERYONE

HALF = (torch.bfloat16, torch.float16)
_watching: list[list[list[Tensor]]] = []  # lists that get the weights of every call, while somebody looks
_meant: list[str] = []  # devices that `as_on` names, the innermost last
_summing: list[list[Tensor]] = []  # the same, of how much each token is read
LONGEST_EXPLICIT = 1024  # beyond it the scores of a group cost more memory than they save time


def attend(
    q_NHK: Float[Tensor, "N H K"],
    k_MHK: Float[Tensor, "M H K"],
    v_MHK: Float[Tensor, "M H K"],
    plan: Plan,
    *,
    bias: Bias | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "N H K"]:
    """Let each token read the others of its row, as the plan allows; scores are divided by the root of K.

    `bias` is added to the scores after that. `dropout` is the share of attention weights set to 0: pass 0 outside of
    training.
    """
    if plan.layers:
        raise ValueError("attend: this plan differs by layer; take one by plan.of_layer, as Encoder does")
    if bias is not None and plan.keys is not None:
        raise ValueError("attend: a bias needs distances, which two sequences do not have; use bias=None here")
    if not plan.groups or not len(k_MHK):  # no token at all
        return q_NHK * 0 + 0 * (k_MHK.sum() + v_MHK.sum())  # zeros, with gradients
    forced = os.environ.get("MMPRE_ATTENTION")
    if forced and forced not in BACKENDS:
        raise ValueError(f"MMPRE_ATTENTION: must be one of {', '.join(BACKENDS)}, or unset, got {forced!r}")
    for seen in _watching:
        seen.append(attention_probabilities(q_NHK, k_MHK, plan, bias))
    for read in _summing:
        read.append(attention_received(q_NHK, k_MHK, plan, bias))
    name = forced or _best(q_NHK, plan, bias, dropout)
    return BACKENDS[name](q_NHK, k_MHK, v_MHK, plan, bias, dropout)


@contextmanager
def watched() -> Iterator[list[list[Float[Tensor, "H n m"]]]]:
    """Within, the list gets what `attention_probabilities` says of each call of `attend`, in their order (slow)."""
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Within, tensors without numbers (of the device "meta") go the way that those of a kind of device go."""
    _meant.append(device)
    try:
        yield
    finally:
        _meant.pop()


def _device(x: Tensor) -> str:
    return _meant[-1] if _meant and x.device.type == "meta" else x.device.type


@contextmanager
def received() -> Iterator[list[Float[Tensor, "M"]]]:
    """Within, the list gets what `attention_received` says of each call of `attend`, in their order."""
    _summing.append([])
    try:
        yield _summing[-1]
    finally:
        _summing.pop()


def attention_received(
    q_NHK: Float[Tensor, "N H K"], k_MHK: Float[Tensor, "M H K"], plan: Plan, bias: Bias | None = None
) -> Float[Tensor, "M"]:
    """Return how much each token is read: its attention weights, the mean over heads, summed over its row's tokens.

    Rows of equal length at a time, so it may be asked while training.
    """
    read = []
    with torch.autocast(q_NHK.device.type, enabled=False):
        q_NHK, k_MHK = q_NHK.float(), k_MHK.float()
        groups = zip(plan.groups, *_split(plan, q_NHK, k_MHK), strict=True)
        for i, ((rows, _, _), *qk) in enumerate(groups):
            q_gHnK, k_gHmK = (rearrange(x, "(g t) h k -> g h t k", g=rows) for x in qk)
            score_gHnm, mask = q_gHnK @ k_gHmK.mT * q_gHnK.shape[-1] ** -0.5, plan.masks[i]
            if bias is not None:
                score_gHnm = score_gHnm + bias.added(q_gHnK, k_gHmK, plan.distances[i])
            if mask is not None:
                score_gHnm = score_gHnm.masked_fill(~mask, torch.finfo(torch.float32).min)
            weight_gHnm = score_gHnm.softmax(-1)
            if mask is not None:
                weight_gHnm = weight_gHnm * mask  # a token that may see no one reads nothing
            read.append(weight_gHnm.mean(1).sum(1).flatten())
    return torch.cat(read)


def attention_probabilities(
    q_NHK: Float[Tensor, "N H K"], k_MHK: Float[Tensor, "M H K"], plan: Plan, bias: Bias | None = None
) -> list[Float[Tensor, "H n m"]]:
    """Return each row's attention weights (slow: for pictures and tests); who may not attend gets 0."""
    with torch.autocast(q_NHK.device.type, enabled=False):
        return [_weights(q_NHK[n], k_MHK[m], plan, bias, row) for row, (n, m) in enumerate(_rows(plan))]


def _best(q_NHK: Tensor, plan: Plan, bias: Bias | None, dropout: float) -> str:
    if q_NHK.device.type != "cuda":
        return "groups"
    plain = bias is None and plan.counts_M is None
    if plain and _has_xformers() and plan.xformers_bias is not None:
        return "xformers"
    if plain and plan.rule in (EVERYONE, CAUSAL) and q_NHK.dtype in HALF and not dropout:
        return "varlen"
    # flex_attention has no dropout
    return "groups" if dropout or (plain and plan.rule in (EVERYONE, CAUSAL)) else "flex"


@cache
def _has_xformers() -> bool:
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        return False
    return True


def _groups(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, plan: Plan, bias: Bias | None, dropout: float) -> Tensor:
    # On a CPU torch's fused kernel refuses dropout, and in half precision its backward pass takes two to four times
    # as long as the scores written out; in float32 it is the faster one (measured at 20 to 512 tokens, torch 2.10).
    short = max(max(n, m) for _, n, m in plan.groups) <= LONGEST_EXPLICIT
    if _device(q_NHK) == "cpu" and (dropout or (q_NHK.dtype in HALF and short)):
        return _groups_explicit(q_NHK, k_MHK, v_MHK, plan, bias, dropout)
    causal = bias is None and plan.counts_M is None and plan.rule == CAUSAL  # the kernel's own, without a mask
    y = []
    for i, ((rows, _, _), *qkv) in enumerate(zip(plan.groups, *_split(plan, q_NHK, k_MHK, v_MHK), strict=True)):
        # views, not einops: with many short rows its lookups take as long as the kernel
        q_gHnK, k_gHmK, v_gHmK = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in qkv)
        mask = None if causal else plan.masks[i]
        if (added := _added(bias, q_gHnK, k_gHmK, plan, i)) is not None:
            mask = added if mask is None else torch.where(mask, added, -torch.inf)
        y_gHnK = F.scaled_dot_product_attention(
            q_gHnK, k_gHmK, v_gHmK, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        y.append(y_gHnK.transpose(1, 2).flatten(0, 1))
    return y[0] if len(y) == 1 else torch.cat(y)


def _added(bias: Bias | None, q_gHnK: Tensor, k_gHmK: Tensor, plan: Plan, i: int) -> Float[Tensor, "_ _ n m"] | None:
    """What is added to the scores of group i, by distance and for tokens that count as several; None: nothing."""
    parts = [] if plan.crowds[i] is None else [plan.crowds[i]]
    if bias is not None:
        parts.append(bias.added(q_gHnK, k_gHmK, plan.distances[i]))
    return sum(parts[1:], parts[0]).to(q_gHnK.dtype) if parts else None


def _groups_explicit(
    q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, plan: Plan, bias: Bias | None, dropout: float
) -> Tensor:
    added = []
    if bias is not None or plan.counts_M is not None:
        for i, ((rows, *_), q, k) in enumerate(zip(plan.groups, *_split(plan, q_NHK, k_MHK), strict=True)):
            q_gHnK, k_gHmK = (rearrange(x, "(g t) h k -> g h t k", g=rows) for x in (q, k))
            added.append(_added(bias, q_gHnK, k_gHmK, plan, i))
    like = not added and q_NHK.device.type == "cpu"  # what is planned without numbers counts real tokens alone
    return Explicit.apply(q_NHK, k_MHK, v_MHK, plan.runs(q_NHK.shape[1], like=like), dropout, *added)


def _split(plan: Plan, q: Tensor, *read: Tensor) -> list[tuple[Tensor, ...]]:
    sizes_n, sizes_m = [rows * n for rows, n, _ in plan.groups], [rows * m for rows, _, m in plan.groups]
    return [q.split(sizes_n), *(x.split(sizes_m) for x in read)]


def _xformers(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, plan: Plan, bias: Bias | None, dropout: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if bias is not None or plan.xformers_bias is None:
        raise ValueError(
            "xformers attention: has full, causal and causal window attention without a bias, got "
            f"{_told(plan, bias)}; unset MMPRE_ATTENTION"
        )
    q_1NHK, k_1MHK, v_1MHK = (x.unsqueeze(0) for x in (q_NHK, k_MHK, v_MHK))
    y_1NHK = memory_efficient_attention(q_1NHK, k_1MHK, v_1MHK, attn_bias=plan.xformers_bias, p=dropout)
    return y_1NHK.squeeze(0)


def _varlen(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, plan: Plan, bias: Bias | None, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if bias is not None or plan.counts_M is not None or plan.rule not in (EVERYONE, CAUSAL):
        raise ValueError(
            f"varlen attention: is full or causal and has no bias, got {_told(plan, bias)}; unset MMPRE_ATTENTION"
        )
    if dropout or q_NHK.dtype not in HALF:
        raise ValueError(
            f"varlen attention: has no dropout and works in bfloat16 or float16, got dropout {dropout} and "
            f"{q_NHK.dtype}; unset MMPRE_ATTENTION, or train in bfloat16 with an attention dropout of 0"
        )
    (start_q, longest_q), (start_k, longest_k) = plan.starts
    return varlen_attn(q_NHK, k_MHK, v_MHK, start_q, start_k, longest_q, longest_k, is_causal=plan.rule == CAUSAL)


def _told(plan: Plan, bias: Bias | None) -> str:
    """What of a call a backend may lack."""
    if bias is not None:
        return type(bias).__name__
    return str(plan.rule) if plan.counts_M is None else "merged tokens that count as several"


def _flex(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, plan: Plan, bias: Bias | None, dropout: float) -> Tensor:
    if dropout:
        raise ValueError(f"flex attention: has no dropout, got {dropout}; unset MMPRE_ATTENTION, or train without it")
    score_mod = None
    if bias is not None or plan.counts_M is not None:
        by_place = None if bias is None else bias.by_place(q_NHK, k_MHK, plan.position_N)
        score_mod = _adding(by_place, None if plan.counts_M is None else plan.counts_M.log().to(q_NHK.dtype))
    q_1HNK, k_1HMK, v_1HMK = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHK, k_MHK, v_MHK))
    flex = _compiled_flex() if q_NHK.device.type == "cuda" else flex_attention
    y_1HNK = flex(q_1HNK, k_1HMK, v_1HMK, score_mod=score_mod, block_mask=plan.block_mask)
    return y_1HNK.squeeze(0).transpose(0, 1)


def _adding(by_place: Callable[..., Tensor] | None, log_M: Float[Tensor, "M"] | None) -> Callable[..., Tensor]:
    if log_M is None:
        return lambda score, b, h, q, k: score + by_place(h, q, k)
    if by_place is None:
        return lambda score, b, h, q, k: score + log_M[k]
    return lambda score, b, h, q, k: score + log_M[k] + by_place(h, q, k)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)  # without it, all scores of all pairs of rows would be written out


def _dense(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, plan: Plan, bias: Bias | None, dropout: float) -> Tensor:
    y = []
    with torch.autocast(q_NHK.device.type, enabled=False):
        for row, (n, m) in enumerate(_rows(plan)):
            weight_Hnm = F.dropout(_weights(q_NHK[n], k_MHK[m], plan, bias, row), dropout)
            y.append(torch.einsum("hqk,khd->qhd", weight_Hnm, v_MHK[m].to(weight_Hnm.dtype)))
    return torch.cat(y).to(q_NHK.dtype)


def _weights(q_nHK: Tensor, k_mHK: Tensor, plan: Plan, bias: Bias | None, row: int) -> Tensor:
    dtype = torch.promote_types(q_nHK.dtype, torch.float32)
    q_nHK = q_nHK.to(dtype)
    score_Hnm = torch.einsum("qhd,khd->hqk", q_nHK, k_mHK.to(dtype)) / q_nHK.shape[2] ** 0.5
    if bias is not None:
        start = int(plan.layout.starts_B[row])
        position_n = plan.position_N[start : start + len(q_nHK)]
        h, q, k = (torch.arange(size, device=q_nHK.device) for size in score_Hnm.shape)
        score_Hnm = score_Hnm + bias.by_place(q_nHK, k_mHK, position_n)(h[:, None, None], q[:, None], k)
    if plan.counts_M is not None:
        first = int(plan.read.starts_B[row])
        score_Hnm = score_Hnm + plan.counts_M[first : first + len(k_mHK)].log().to(dtype)
    allowed_nm = plan.dense(row)
    # a token that may see no one reads zeros, so its scores must stay numbers
    lowest = torch.finfo(dtype).min
    return score_Hnm.masked_fill(~allowed_nm, lowest).softmax(-1) * allowed_nm


def _rows(plan: Plan) -> Iterator[tuple[slice, slice]]:
    n, m = 0, 0
    for length, read in zip(plan.layout.lengths_B.tolist(), plan.read.lengths_B.tolist(), strict=True):
        yield slice(n, n + length), slice(m, m + read)
        n, m = n + length, m + read


BACKENDS = {"groups": _groups, "xformers": _xformers, "varlen": _varlen, "flex": _flex, "dense": _dense}
