"""Attention over a packed batch: one function for each way to compute it, and `attend`, which chooses one.

groups    one call per run of rows of equal length; CPU, and everywhere that the others do not serve
xformers  memory_efficient_attention; CUDA
varlen    torch's own varlen attention; CUDA in half precision, where xFormers is missing
dense     row by row with an explicit softmax, in float32 or better; what the others are tested against

The environment variable MMPRE_ATTENTION forces one of them by name.
"""
# N tokens of the packed batch, H heads, K width of a head, n tokens of one row, g rows of equal length t

import os
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mmpre.attention import Plan
from mmpre.dropout import keep_like

HALF = (torch.bfloat16, torch.float16)
LONGEST_EXPLICIT = 1024  # beyond it the scores of a group cost more memory than they save time


def attend(
    q_NHK: Float[Tensor, "N H K"],
    k_NHK: Float[Tensor, "N H K"],
    v_NHK: Float[Tensor, "N H K"],
    plan: Plan,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "N H K"]:
    """Let each token read the others of its row, as the plan allows; scores are divided by the root of K.

    `dropout` is the share of attention weights set to 0: pass 0 outside of training.
    """
    if not plan.groups:  # no token at all
        return v_NHK
    forced = os.environ.get("MMPRE_ATTENTION")
    if forced and forced not in BACKENDS:
        raise ValueError(f"MMPRE_ATTENTION: must be one of {', '.join(BACKENDS)}, or unset, got {forced!r}")
    name = forced or _best(q_NHK, dropout)
    return BACKENDS[name](q_NHK, k_NHK, v_NHK, plan, dropout)


def attention_probabilities(
    q_NHK: Float[Tensor, "N H K"], k_NHK: Float[Tensor, "N H K"], plan: Plan
) -> list[Float[Tensor, "H n n"]]:
    """Return each row's attention weights (slow: for pictures and tests); who may not attend gets 0."""
    with torch.autocast(q_NHK.device.type, enabled=False):
        return [_weights(q_NHK[row], k_NHK[row], plan, i) for i, row in enumerate(_rows(plan))]


def _best(q_NHK: Tensor, dropout: float) -> str:
    if q_NHK.device.type != "cuda":
        return "groups"
    if _has_xformers():
        return "xformers"
    return "varlen" if q_NHK.dtype in HALF and not dropout else "groups"


@cache
def _has_xformers() -> bool:
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        return False
    return True


def _groups(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, plan: Plan, dropout: float) -> Tensor:
    # On a CPU torch's fused kernel refuses dropout, and in half precision its backward pass takes two to four times
    # as long as the scores written out; in float32 it is the faster one (measured at 20 to 512 tokens, torch 2.10).
    short = max(length for _, length in plan.groups) <= LONGEST_EXPLICIT
    if q_NHK.device.type == "cpu" and (dropout or (q_NHK.dtype in HALF and short)):
        return _groups_explicit(q_NHK, k_NHK, v_NHK, plan, dropout)
    sizes = [rows * length for rows, length in plan.groups]
    y = []
    for (rows, _), *qkv in zip(plan.groups, *(x.split(sizes) for x in (q_NHK, k_NHK, v_NHK)), strict=True):
        q_gHtK, k_gHtK, v_gHtK = (rearrange(x, "(g t) h k -> g h t k", g=rows) for x in qkv)
        y_gHtK = F.scaled_dot_product_attention(q_gHtK, k_gHtK, v_gHtK, dropout_p=dropout, is_causal=plan.causal)
        y.append(rearrange(y_gHtK, "g h t k -> (g t) h k"))
    return y[0] if len(y) == 1 else torch.cat(y)


def _groups_explicit(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, plan: Plan, dropout: float) -> Tensor:
    sizes = [rows * length for rows, length in plan.groups]
    scale = q_NHK.shape[2] ** -0.5
    heads = (x.transpose(0, 1).contiguous().split(sizes, dim=1) for x in (q_NHK, k_NHK, v_NHK))
    y = []
    for (rows, length), *qkv in zip(plan.groups, *heads, strict=True):
        # a head's rows lie end to end, so this is a view
        q_XtK, k_XtK, v_XtK = (rearrange(x, "h (g t) k -> (h g) t k", g=rows) for x in qkv)
        bias, beta = q_XtK.new_zeros(()), 0
        if plan.causal:
            bias, beta = q_XtK.new_full((length, length), -torch.inf).triu(1), 1
        score_Xtt = torch.baddbmm(bias, q_XtK, k_XtK.transpose(1, 2), beta=beta, alpha=scale)
        weight_Xtt = score_Xtt.softmax(-1)
        if dropout:
            keep_Xtt, up = keep_like(weight_Xtt, dropout)
            weight_Xtt, v_XtK = weight_Xtt * keep_Xtt, v_XtK * up
        y.append(rearrange(weight_Xtt @ v_XtK, "(h g) t k -> h (g t) k", g=rows))
    return torch.cat(y, dim=1).transpose(0, 1)


def _xformers(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, plan: Plan, dropout: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q_1NHK, k_1NHK, v_1NHK = (x.unsqueeze(0) for x in (q_NHK, k_NHK, v_NHK))
    y_1NHK = memory_efficient_attention(q_1NHK, k_1NHK, v_1NHK, attn_bias=plan.xformers_bias, p=dropout)
    return y_1NHK.squeeze(0)


def _varlen(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, plan: Plan, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout or q_NHK.dtype not in HALF:
        raise ValueError(
            f"varlen attention: has no dropout and works in bfloat16 or float16, got dropout {dropout} and "
            f"{q_NHK.dtype}; unset MMPRE_ATTENTION, or train in bfloat16 with an attention dropout of 0"
        )
    longest = max(plan.lengths)
    return varlen_attn(q_NHK, k_NHK, v_NHK, plan.starts, plan.starts, longest, longest, is_causal=plan.causal)


def _dense(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, plan: Plan, dropout: float) -> Tensor:
    y = []
    with torch.autocast(q_NHK.device.type, enabled=False):
        for i, row in enumerate(_rows(plan)):
            weight_Hnn = F.dropout(_weights(q_NHK[row], k_NHK[row], plan, i), dropout)
            y.append(torch.einsum("hqk,khd->qhd", weight_Hnn, v_NHK[row].to(weight_Hnn.dtype)))
    return torch.cat(y).to(q_NHK.dtype)


def _weights(q_nHK: Tensor, k_nHK: Tensor, plan: Plan, row: int) -> Tensor:
    dtype = torch.promote_types(q_nHK.dtype, torch.float32)
    score_Hnn = torch.einsum("qhd,khd->hqk", q_nHK.to(dtype), k_nHK.to(dtype)) / q_nHK.shape[2] ** 0.5
    attend_nn = plan.attend.dense(plan.layout, row).to(q_nHK.device)
    return score_Hnn.masked_fill(~attend_nn, -torch.inf).softmax(-1)


def _rows(plan: Plan) -> Iterator[slice]:
    start = 0
    for length in plan.layout.lengths_B.tolist():
        yield slice(start, start + length)
        start += length


BACKENDS = {"groups": _groups, "xformers": _xformers, "varlen": _varlen, "dense": _dense}
