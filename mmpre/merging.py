"""Merging tokens of a packed batch: which become one, what the one is, and how each of them gets it back.

Which went where is a number for each token, not a matrix: rows stay packed, and merges follow each other by indexing.
How many each row loses is said on the CPU, so no device is waited for.

Source: ToMe, Bolya et al. 2022, arXiv:2210.09461 (halves matched, means weighted by size); neighbours and their gate as
in MergeDNA, Li et al. 2025, arXiv:2511.14806, and DTEM, Lee & Hong 2024.
"""
# N tokens of the packed batch, n of them left, B rows, W windows, P pairs of neighbours in the longest row, D width

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.layout import Layout

ROLE = "merged"  # of the tokens that are left


@dataclass(frozen=True)
class Merge:
    """For each token, the number of the one that it went into; `layout` says where rows of what is left end."""

    source_N: Int[Tensor, "N"]
    layout: Layout

    @staticmethod
    def none(layout: Layout, device: torch.device | str = "cpu") -> "Merge":
        """Every token stays by itself."""
        return Merge(torch.arange(layout.size, device=device), Layout({ROLE: layout.lengths_B}))

    def then(self, later: "Merge") -> "Merge":
        """Both as one."""
        return replace(later, source_N=later.source_N.index_select(0, self.source_N))

    def sum(self, x_N: Tensor) -> Tensor:
        """The sum of values over the tokens that became one, such as sizes."""
        return x_N.new_zeros(self.layout.size, *x_N.shape[1:]).index_add(0, self.source_N, x_N)

    def first(self, x_N: Int[Tensor, "N"]) -> Int[Tensor, "n"]:
        """The least value of the tokens that became one, such as where the first of them stands."""
        least_n = x_N.new_full((self.layout.size,), torch.iinfo(x_N.dtype).max)
        return least_n.scatter_reduce(0, self.source_N, x_N, "amin")

    def mean(self, x_ND: Float[Tensor, "N D"], weight_N: Float[Tensor, "N"]) -> Float[Tensor, "n D"]:
        """The mean of vectors over the tokens that became one, by their weights."""
        weight_N1 = weight_N[:, None].to(x_ND.dtype)
        return self.sum(x_ND * weight_N1) / self.sum(weight_N1)

    def back(self, x_nD: Tensor) -> Tensor:
        """Unmerge: each token gets what stands for the one that it went into."""
        return x_nD.index_select(0, self.source_N)


def merge_neighbours(
    similar_N: Float[Tensor, "N"], layout: Layout, fewer_B: Int[Tensor, "B"], *, temperature: float = 0.1
) -> tuple[Merge, Float[Tensor, "N"]]:
    """Merge the most similar pairs of neighbours: in each row the best pair, then the best that shares no token with
    it, and so on, `fewer_B` pairs in all. Order is kept.

    `similar_N` has for each token how similar its right neighbour is; a row's last one is not read. The second result
    is a gate for the weights of means: 1 for every token, but for one that went to its left neighbour with the gradient
    of the chance that a softmax over the pairs still open, at `temperature`, gives its pair; so that what made the
    similarities learns. Raises ValueError where a row may not have so many pairs apart (a third of its tokens, rounded
    up, less one that has no neighbour, always do).
    """
    lengths_B = layout.lengths_B
    if bool((fewer_B > most_neighbours(lengths_B)).any()):
        row = int((fewer_B > most_neighbours(lengths_B)).nonzero()[0])
        raise ValueError(
            f"merge_neighbours: of {int(lengths_B[row])} tokens at most {int(most_neighbours(lengths_B)[row])} can "
            f"surely be merged with a neighbour at once, got {int(fewer_B[row])}; merge fewer in more layers"
        )
    device, rounds, longest = similar_N.device, _most(fewer_B), _most(lengths_B)
    if not rounds:
        return Merge.none(layout, device), torch.ones_like(similar_N)
    pair_P = torch.arange(longest - 1)
    index_BP = (layout.starts_B[:, None] + pair_P).clamp(max=layout.size - 1).to(device, non_blocking=True)
    open_BP = (pair_P < lengths_B[:, None] - 1).to(device, non_blocking=True)
    going_RB = (torch.arange(rounds)[:, None] < fewer_B).to(device, non_blocking=True)
    pair_P = pair_P.to(device, non_blocking=True)
    score_BP = similar_N[index_BP] / temperature
    joined_BP, chance_BP = torch.zeros_like(open_BP), torch.zeros_like(score_BP)
    for going_B in going_RB:
        # not infinity: where no pair is open any more the softmax must stay a number
        still_BP = score_BP.masked_fill(~open_BP, torch.finfo(score_BP.dtype).min / 2)
        best_B1 = still_BP.detach().max(1, keepdim=True).indices
        taken_BP = (pair_P == best_B1) & going_B[:, None]
        joined_BP = joined_BP | taken_BP
        chance_BP = torch.where(taken_BP, still_BP.softmax(1), chance_BP)
        open_BP = open_BP & ~(((pair_P - best_B1).abs() <= 1) & going_B[:, None])
    # pairs that do not exist add nothing, wherever their index was moved to
    right_X = (index_BP + 1).clamp(max=layout.size - 1).flatten()
    joined_N = torch.zeros(layout.size, dtype=torch.int64, device=device).index_add(
        0, right_X, joined_BP.long().flatten()
    )
    chance_N = torch.zeros_like(similar_N).index_add(0, right_X, chance_BP.flatten())
    merge = Merge((1 - joined_N).cumsum(0) - 1, Layout({ROLE: lengths_B - fewer_B}))
    return merge, 1 + (chance_N - chance_N.detach())


def most_neighbours(lengths_B: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """How many pairs of neighbours apart from each other a row has, however they are chosen one after the other."""
    return (lengths_B + 1).div(3, rounding_mode="floor")


@torch.no_grad()
def merge_halves(x_ND: Float[Tensor, "N D"], layout: Layout, fewer_B: Int[Tensor, "B"]) -> Merge:
    """Merge tokens into similar ones anywhere in their row: every other token, from the first on, has the most similar
    of the rest (by cosine) as its partner, and the `fewer_B` most similar of each row go into theirs.

    What is left stands in the order of the tokens that took others in or stayed alone; several may go into one. Raises
    ValueError where more than half of a row's tokens, rounded down, are to go.
    """
    if bool((fewer_B > most_halves(layout.lengths_B)).any()):
        row = int((fewer_B > most_halves(layout.lengths_B)).nonzero()[0])
        raise ValueError(
            f"merge_halves: at most half of a row's tokens can go at once, got {int(fewer_B[row])} of "
            f"{int(layout.lengths_B[row])}; merge fewer in more layers"
        )
    every_N = torch.arange(layout.size, device=x_ND.device)
    parts, start = [], 0
    runs, counts = torch.unique_consecutive(torch.stack([layout.lengths_B, fewer_B], 1), return_counts=True, dim=0)
    for rows, (n, fewer) in zip(counts.tolist(), runs.tolist(), strict=True):
        goal_gn = every_N[start : start + rows * n].view(rows, n)
        if fewer:
            x_gnD = F.normalize(x_ND[start : start + rows * n].float(), dim=-1).view(rows, n, -1)
            with torch.autocast(x_ND.device.type, enabled=False):  # in half precision many would be equally near
                best_ga, partner_ga = (x_gnD[:, ::2] @ x_gnD[:, 1::2].mT).max(-1)
            from_gf = best_ga.topk(fewer, dim=1).indices
            to_gf = goal_gn.gather(1, 2 * partner_ga.gather(1, from_gf) + 1)
            goal_gn = goal_gn.scatter(1, 2 * from_gf, to_gf)
        parts.append(goal_gn.flatten())
        start += rows * n
    goal_N = torch.cat(parts) if parts else every_N
    number_N = (goal_N == every_N).cumsum(0) - 1
    return Merge(number_N.index_select(0, goal_N), Layout({ROLE: layout.lengths_B - fewer_B}))


def most_halves(lengths_B: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """How many tokens of a row can go into others at once."""
    return lengths_B.div(2, rounding_mode="floor")


def by_layers(
    lengths_B: Int[Tensor, "B"], goal_B: Int[Tensor, "B"], layers: int, most: Callable[[Tensor], Tensor]
) -> list[Int[Tensor, "B"]]:
    """How many tokens go in each of some layers, about as many in each, so that rows of `lengths_B` end at `goal_B`.

    `most(lengths_B)` says how many can go at once. Raises ValueError where the layers do not suffice.
    """
    made, now_B = [], lengths_B
    for i in range(layers):
        wanted_B = (now_B - goal_B).clamp(min=0)
        share_B = -(-wanted_B).div(layers - i, rounding_mode="floor")
        made.append(torch.minimum(share_B, most(now_B)))
        now_B = now_B - made[-1]
    if bool((now_B > goal_B).any()):
        row = int((now_B > goal_B).nonzero()[0])
        raise ValueError(
            f"merging: {layers} layers cannot bring {int(lengths_B[row])} tokens to {int(goal_B[row])}, only to "
            f"{int(now_B[row])}; give it more layers, or keep a larger share"
        )
    return made


@dataclass(frozen=True)
class Windows:
    """Rows cut into windows of `width` tokens, the last of a row maybe shorter, and those of equal size laid together.

    `layout` has a window in the place of each row, `place_N` is where each of its tokens stands in the rows, `back_N`
    where each token of the rows stands in it, `position_N` its place in its row; `goal_W` is how many tokens of each
    window are to be left of it. `order_W` has the windows' numbers in the order of the rows,
    and `row_W`, in that order, the row of each. All on the CPU.
    """

    rows: Layout
    layout: Layout
    place_N: Int[Tensor, "N"]
    back_N: Int[Tensor, "N"]
    position_N: Int[Tensor, "N"]
    goal_W: Int[Tensor, "W"]
    order_W: Int[Tensor, "W"]
    row_W: Int[Tensor, "W"]

    @staticmethod
    def of(rows: Layout, width: int, share: float = 1.0) -> "Windows":
        """Cut rows. Of a row of L tokens, `share` x L are to be left, rounded, as evenly over its windows as can be,
        and at least one of each window."""
        lengths_B = rows.lengths_B
        windows_B = -(-lengths_B).div(width, rounding_mode="floor")
        row_W = torch.repeat_interleave(torch.arange(len(lengths_B)), windows_B)
        first_W = (torch.arange(len(row_W)) - (windows_B.cumsum(0) - windows_B)[row_W]) * width
        last_W = torch.minimum(first_W + width, lengths_B[row_W])
        goal_W = ((last_W.double() * share).round() - (first_W.double() * share).round()).long().clamp(min=1)
        size_W = last_W - first_W
        order_W = (size_W * (width + 1) + goal_W).argsort(stable=True)
        start_W = rows.starts_B[row_W] + first_W
        place_N = spans(start_W[order_W], size_W[order_W])
        back_N = torch.empty_like(place_N)
        back_N[place_N] = torch.arange(rows.size)
        layout = Layout({ROLE: size_W[order_W]})
        position_N = spans(first_W[order_W], size_W[order_W])
        return Windows(rows, layout, place_N, back_N, position_N, goal_W[order_W], order_W, row_W)

    def together(self, merge: Merge) -> tuple[Merge, Int[Tensor, "n"]]:
        """A merge of the windows' tokens as one of the rows' tokens, and where each token that it leaves stands among
        those of the windows."""
        device, kept = merge.source_N.device, merge.layout
        start_W, size_W = torch.empty_like(self.order_W), torch.empty_like(self.order_W)
        start_W[self.order_W], size_W[self.order_W] = kept.starts_B, kept.lengths_B
        place_n = spans(start_W, size_W)
        number_n = torch.empty_like(place_n)
        number_n[place_n] = torch.arange(len(place_n))
        lengths_B = torch.zeros_like(self.rows.lengths_B).index_add(0, self.row_W, size_W)
        source_N = merge.source_N.index_select(0, self.back_N.to(device, non_blocking=True))
        source_N = number_n.to(device, non_blocking=True).index_select(0, source_N)
        return Merge(source_N, Layout({ROLE: lengths_B})), place_n.to(device, non_blocking=True)


def spans(start_W: Int[Tensor, "W"], size_W: Int[Tensor, "W"]) -> Int[Tensor, "N"]:
    """Numbers from each start on, as many as its size."""
    total = int(size_W.sum())
    shift_W = start_W - (size_W.cumsum(0) - size_W)
    return torch.arange(total) + torch.repeat_interleave(shift_W, size_W, output_size=total)


def _most(count_B: Int[Tensor, "B"]) -> int:
    return int(count_B.max()) if len(count_B) else 0
