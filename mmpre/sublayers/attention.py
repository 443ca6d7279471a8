"""Attention among the tokens of a row, and to another sequence of the same rows."""
# N tokens of the packed batch, M tokens of a memory, D model width, H heads, G of keys and values, K width of a head

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.attention import Attend, Plan
from mmpre.attention.backends import attend
from mmpre.attention.bias import Bias, Disentangled, LogBuckets, Rotary, turned
from mmpre.dropout import DropHeads, Dropout
from mmpre.layout import Layout
from mmpre.sublayers.protocol import Places, narrowed


class Attention(nn.Module):
    """Multi-head self-attention. `dropout` is the share of attention weights set to 0 while training.

    `within` narrows what the batch's plan allows, in this sublayer alone. `bias` is added to the scores, `rotary`
    turns queries and keys. With fewer `kv_heads` than heads, neighbouring heads share keys and values (grouped-query
    attention, Ainslie et al. 2023, arXiv:2305.13245). `linear_bias` is for the maps in and out. `head_dropout` is the
    chance of a whole head to be left out of a row while training.
    """

    mixes = True

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        *,
        within: Attend | None = None,
        bias: Bias | None = None,
        rotary: Rotary | None = None,
        kv_heads: int | None = None,
        linear_bias: bool = True,
        head_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _check("Attention", width, heads, dropout)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"Attention: heads must be a multiple of kv_heads, got {heads} heads and {kv_heads}")
        self.heads, self.kv_heads, self.head_width, self.dropout = heads, kv_heads, width // heads, dropout
        self.within, self.bias, self.rotary = within, bias, rotary
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=linear_bias)  # queries, keys, values
        self.out = nn.Linear(width, width, bias=linear_bias)
        self.drop_heads = DropHeads(head_dropout)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        counts = [self.heads, self.kv_heads, self.kv_heads]
        q_NHK, k_NGK, v_NGK = self.qkv(x_ND).unflatten(1, (-1, self.head_width)).split(counts, dim=1)
        if self.rotary is not None:
            kind = Rotary, self.rotary.theta, self.head_width, q_NHK.dtype
            angles = plan.shared(kind, lambda: self.rotary.angles(plan.position_N, q_NHK.dtype))
            q_NHK, k_NGK = turned(q_NHK, *angles), turned(k_NGK, *angles)
        if self.kv_heads != self.heads:
            k_NGK, v_NGK = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k_NGK, v_NGK))
        dropout = self.dropout if self.training else 0.0
        y_NHK = attend(q_NHK, k_NGK, v_NGK, plan.also(self.within), bias=self.bias, dropout=dropout)
        if self.drop_heads.p:
            y_NHK = self.drop_heads(y_NHK, layout.row_N, len(layout))
        return self.out(narrowed(y_NHK.flatten(1), at))


class GatedAttention(nn.Module):
    """Self-attention whose result is multiplied by a gate of the input and normed before the map out.

    `distances`, which layers may share, are mapped to queries and keys as the input is; the sum of three products is
    divided by the root of three times a head's width. Norms have no weights.
    Source: GPT-BERT, Charpentier & Samuel 2024, arXiv:2410.24159, after LTG-BERT and DeBERTa.
    """

    mixes = True

    def __init__(
        self, width: int, heads: int, distances: LogBuckets, dropout: float = 0.0, *, eps: float = 1e-5
    ) -> None:
        super().__init__()
        _check("GatedAttention", width, heads, dropout)
        self.heads, self.dropout, self.distances = heads, dropout, distances
        self.qk = nn.Linear(width, 2 * width)
        self.vg = nn.Linear(width, 2 * width)  # values, gates
        self.norm = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.out = nn.Linear(width, width)
        self.drop_distances = Dropout(dropout)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        q_NHK, k_NHK = self._heads(x_ND)
        q_RHK, k_RHK = self._heads(self.drop_distances(self.distances()).to(x_ND.dtype))
        q_NHK, q_RHK = q_NHK * 3**-0.5, q_RHK * 3**-0.5
        bias = Disentangled(q_RHK.transpose(0, 1), k_RHK.transpose(0, 1), self.distances.bucket)
        v_ND, gate_ND = self.vg(x_ND).chunk(2, dim=1)
        v_NHK = v_ND.unflatten(1, (self.heads, -1))
        y_NHK = attend(q_NHK, k_NHK, v_NHK, plan, bias=bias, dropout=self.dropout if self.training else 0.0)
        return self.out(self.norm(narrowed(y_NHK.flatten(1) * F.gelu(gate_ND), at)))

    def _heads(self, x_ND: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor]:
        return self.qk(x_ND).unflatten(1, (2, self.heads, -1)).unbind(1)


class CrossAttention(nn.Module):
    """Attention to the states of another sequence of the same rows, `plan.reading(state_MD, layout)`.

    `memory_width` is the width of these states, where it is another one.
    """

    mixes = True

    def __init__(self, width: int, heads: int, dropout: float = 0.0, *, memory_width: int | None = None) -> None:
        super().__init__()
        _check("CrossAttention", width, heads, dropout)
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width or width, 2 * width)  # keys, values
        self.out = nn.Linear(width, width)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        if plan.memory is None:
            raise ValueError(
                "CrossAttention: has nothing to read; give the encoder plan.reading(states, layout) of what it reads"
            )
        q_NHK = self.q(x_ND).unflatten(1, (self.heads, -1))
        k_MHK, v_MHK = self.kv(plan.memory.state_MD).unflatten(1, (2, self.heads, -1)).unbind(1)
        dropout = self.dropout if self.training else 0.0
        y_NHK = attend(q_NHK, k_MHK, v_MHK, plan.memory.plan, dropout=dropout)
        return self.out(narrowed(y_NHK.flatten(1), at))


def _check(who: str, width: int, heads: int, dropout: float) -> None:
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"{who}: width must be a multiple of heads, got width {width} and {heads} heads")
    if not 0 <= dropout < 1:
        raise ValueError(f"{who}: dropout must be at least 0 and below 1, got {dropout}; a tenth is 0.1")
