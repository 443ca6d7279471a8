"""What is added to attention scores by distance, and rotary embeddings of queries and keys.

A distance is the key's position less the query's; a position is the token's place in its row, unless the plan was told
otherwise (`Positions`).
"""
# N tokens of the packed batch, H heads, K width of a head, F half of it, g rows of n tokens, R distances told apart

import math
from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Angles = tuple[Float[Tensor, "N 1 F"], Float[Tensor, "N 1 F"]]


class Bias(Protocol):
    """An nn.Module. Both methods say the same: one for rows of equal length, one token by token."""

    def added(
        self, q_gHnK: Float[Tensor, "g H n K"], k_gHnK: Float[Tensor, "g H n K"], distance_gnn: Int[Tensor, "_ n n"]
    ) -> Float[Tensor, "_ H n n"]:
        """What is added to the scores of a group of rows; the first dimension is g or 1, as that of the distances."""
        ...

    def by_place(
        self, q_NHK: Float[Tensor, "N H K"], k_NHK: Float[Tensor, "N H K"], position_N: Int[Tensor, "N"]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return f(h, q, k): what is added for head h at the places q and k (numbers, as tensors)."""
        ...


class ALiBi(nn.Module):
    """Less attention the farther away, each head with a slope of its own; nothing is learned.

    Symmetric, for encoders (MosaicBERT, Portes et al. 2023, arXiv:2312.17482); under `Causal` it is the original of
    Press et al. 2021, arXiv:2108.12409.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("slope_H", torch.tensor(slopes(heads)), persistent=False)

    def added(
        self, q_gHnK: Float[Tensor, "g H n K"], k_gHnK: Float[Tensor, "g H n K"], distance_gnn: Int[Tensor, "_ n n"]
    ) -> Float[Tensor, "_ H n n"]:
        return -self.slope_H[:, None, None] * distance_gnn[:, None].abs()

    def by_place(
        self, q_NHK: Float[Tensor, "N H K"], k_NHK: Float[Tensor, "N H K"], position_N: Int[Tensor, "N"]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda h, q, k: -self.slope_H[h] * (position_N[k] - position_N[q]).abs()


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes: 2 ** (-8 h / heads), h = 1 ... heads, where `heads` is a power of two.

    Otherwise those of the power of two below, then every second one of the next power of two.
    """
    below = 2 ** int(math.log2(heads))
    own = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    return own if below == heads else own + slopes(2 * below)[::2][: heads - below]


class T5Buckets(nn.Module):
    """A learned number per head and distance; distances are told apart exactly when small, then in ever wider buckets.

    `table` may be given, to share one between layers as T5 does: T5Buckets(heads, table=first.table).
    Source: Raffel et al. 2019, arXiv:1910.10683, without their dropping of the score's scale.
    """

    def __init__(
        self,
        heads: int,
        *,
        buckets: int = 32,
        longest: int = 128,
        both_ways: bool = True,
        table: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        exact = buckets // (4 if both_ways else 2)
        if exact < 1 or longest <= exact:
            raise ValueError(
                f"T5Buckets: wanted at least {4 if both_ways else 2} buckets and a longest distance above those told "
                f"apart exactly, got {buckets} buckets, longest {longest}"
            )
        self.buckets, self.longest, self.both_ways = buckets, longest, both_ways
        self.table = _table(buckets, heads) if table is None else table

    def added(
        self, q_gHnK: Float[Tensor, "g H n K"], k_gHnK: Float[Tensor, "g H n K"], distance_gnn: Int[Tensor, "_ n n"]
    ) -> Float[Tensor, "_ H n n"]:
        return self.table(self.bucket(distance_gnn)).movedim(-1, 1)

    def by_place(
        self, q_NHK: Float[Tensor, "N H K"], k_NHK: Float[Tensor, "N H K"], position_N: Int[Tensor, "N"]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        table_RH = self.table.weight
        return lambda h, q, k: table_RH[self.bucket(position_N[k] - position_N[q]), h]

    def bucket(self, distance: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        count = self.buckets // 2 if self.both_ways else self.buckets
        after = (distance > 0) * count if self.both_ways else 0
        away = distance.abs() if self.both_ways else (-distance).clamp(min=0)
        exact = count // 2
        share = torch.log(away.clamp(min=1) / exact) / math.log(self.longest / exact)
        wide = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
        return after + torch.where(away < exact, away, wide)


class RelativeKey(nn.Module):
    """The query's product with a learned vector per distance, one for all heads, scaled as scores are.

    Distances beyond `left` before the query and `right` after it count as these.
    Source: `relative_key` of transformers' Wav2Vec2Bert; Shaw et al. 2018, arXiv:1803.02155.
    """

    def __init__(self, head_width: int, *, left: int = 64, right: int = 8) -> None:
        super().__init__()
        if left < 0 or right < 0:
            raise ValueError(f"RelativeKey: left and right must be at least 0, got {left} and {right}")
        self.left, self.right = left, right
        self.table = _table(left + right + 1, head_width)

    def added(
        self, q_gHnK: Float[Tensor, "g H n K"], k_gHnK: Float[Tensor, "g H n K"], distance_gnn: Int[Tensor, "_ n n"]
    ) -> Float[Tensor, "g H n n"]:
        score_gHnR = self._scores(q_gHnK)
        index_g1nn = self._index(distance_gnn)[:, None]
        return score_gHnR.gather(-1, index_g1nn.expand(*score_gHnR.shape[:3], index_g1nn.shape[-1]))

    def by_place(
        self, q_NHK: Float[Tensor, "N H K"], k_NHK: Float[Tensor, "N H K"], position_N: Int[Tensor, "N"]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        score_NHR = self._scores(q_NHK)
        return lambda h, q, k: score_NHR[q, h, self._index(position_N[k] - position_N[q])]

    def _scores(self, q: Float[Tensor, "... K"]) -> Float[Tensor, "... R"]:
        return q @ self.table.weight.to(q.dtype).T * q.shape[-1] ** -0.5

    def _index(self, distance: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        return distance.clamp(-self.left, self.right) + self.left


class LogBuckets(nn.Module):
    """Learned vectors of distances, exact when small, then in ever wider buckets; normed, one table for all layers.

    A layer projects them by its own maps to queries and keys, and adds the query's product with the distance's key to
    that of the distance's query with the key (`Disentangled`).
    Source: DeBERTa, He et al. 2020, arXiv:2006.03654, with the buckets of LTG-BERT, Samuel et al. 2023,
    arXiv:2303.09859.
    """

    def __init__(self, width: int, *, buckets: int = 32, longest: int = 512, eps: float = 1e-5) -> None:
        super().__init__()
        if not 4 <= buckets < longest:
            raise ValueError(f"LogBuckets: wanted 4 <= buckets < longest, got {buckets} and {longest}")
        self.buckets, self.longest = buckets, longest
        self.table = _table(2 * buckets - 1, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self) -> Float[Tensor, "R D"]:
        return self.norm(self.table.weight)

    def bucket(self, distance: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The row of a distance; the query's place less the key's is what the authors count."""
        back, middle = -distance, self.buckets // 2
        away = back.abs().clamp(max=self.longest - 1)
        share = (away.clamp(min=middle) / middle).log() / math.log((self.longest - 1) / middle)
        wide = (share * (middle - 1)).ceil().long() + middle
        return torch.where(away <= middle, back, back.sign() * wide) + self.buckets - 1


class Disentangled:
    """A `Bias` of one call, from the queries and keys of distances in one layer."""

    def __init__(
        self, q_HRK: Float[Tensor, "H R K"], k_HRK: Float[Tensor, "H R K"], bucket: Callable[[Tensor], Tensor]
    ) -> None:
        self.q_HRK, self.k_HRK, self.bucket = q_HRK, k_HRK, bucket

    def added(
        self, q_gHnK: Float[Tensor, "g H n K"], k_gHnK: Float[Tensor, "g H n K"], distance_gnn: Int[Tensor, "_ n n"]
    ) -> Float[Tensor, "g H n n"]:
        index_g1nn = self.bucket(distance_gnn)[:, None]
        shape = *q_gHnK.shape[:3], index_g1nn.shape[-1]
        one_gHnn = (q_gHnK @ self.k_HRK.to(q_gHnK.dtype).mT).gather(-1, index_g1nn.expand(shape))
        other_gHnn = (k_gHnK @ self.q_HRK.to(k_gHnK.dtype).mT).gather(-1, index_g1nn.mT.expand(shape)).mT
        return (one_gHnn + other_gHnn) * q_gHnK.shape[-1] ** -0.5

    def by_place(
        self, q_NHK: Float[Tensor, "N H K"], k_NHK: Float[Tensor, "N H K"], position_N: Int[Tensor, "N"]
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        scale = q_NHK.shape[-1] ** -0.5
        one_NHR = torch.einsum("nhk,hrk->nhr", q_NHK, self.k_HRK.to(q_NHK.dtype)) * scale
        other_NHR = torch.einsum("nhk,hrk->nhr", k_NHK, self.q_HRK.to(k_NHK.dtype)) * scale

        def added(h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row = self.bucket(position_N[k] - position_N[q])
            return one_NHR[q, h, row] + other_NHR[k, h, row]

        return added


class Rotary(nn.Module):
    """Turn each pair (i, i + K / 2) of a head's values by position / theta ** (2 i / K), in queries and keys alike.

    Source: Su et al. 2021, arXiv:2104.09864, with the pairs as GPT-NeoX and Llama take them.
    """

    def __init__(self, head_width: int, theta: float = 10_000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"Rotary: wanted heads of an even width, got {head_width}")
        self.theta = theta
        frequency_F = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        self.register_buffer("frequency_F", frequency_F, persistent=False)

    def forward(self, x_NHK: Float[Tensor, "N H K"], position_N: Int[Tensor, "N"]) -> Float[Tensor, "N H K"]:
        return turned(x_NHK, *self.angles(position_N, x_NHK.dtype))

    def angles(self, position_N: Int[Tensor, "N"], dtype: torch.dtype) -> Angles:
        """Cosine and sine of each position's angles, which all layers of one `theta` share."""
        # in float32 at least: in half precision neighbours far from the start would fall together
        angle_N1F = (position_N[:, None] * self.frequency_F)[:, None]
        return angle_N1F.cos().to(dtype), angle_N1F.sin().to(dtype)


def turned(x_NHK: Float[Tensor, "N H K"], cos_N1F: Tensor, sin_N1F: Tensor) -> Float[Tensor, "N H K"]:
    """Vectors turned by these angles."""
    return _Turned.apply(x_NHK, cos_N1F, sin_N1F)


class _Turned(torch.autograd.Function):
    """Two products for each half, in place, where autograd would keep seven tensors; backwards it turns back."""

    @staticmethod
    def forward(ctx, x_NHK: Tensor, cos_N1F: Tensor, sin_N1F: Tensor) -> Tensor:
        ctx.save_for_backward(cos_N1F, sin_N1F)
        return _turn(x_NHK, cos_N1F, sin_N1F, 1)

    @staticmethod
    def backward(ctx, grad_NHK: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad_NHK, *ctx.saved_tensors, -1), None, None


def _turn(x_NHK: Tensor, cos_N1F: Tensor, sin_N1F: Tensor, way: int) -> Tensor:
    (one, other), out_NHK = x_NHK.chunk(2, dim=-1), torch.empty_like(x_NHK, memory_format=torch.contiguous_format)
    first, second = out_NHK.chunk(2, dim=-1)
    torch.mul(one, cos_N1F, out=first).addcmul_(other, sin_N1F, value=-way)
    torch.mul(other, cos_N1F, out=second).addcmul_(one, sin_N1F, value=way)
    return out_NHK


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.02)  # near 0: at first, all distances count alike
    return table
