"""Encode what a mask has left, decode everything from it."""
# N tokens of one role, n of them seen, M picked tokens, D the encoder's width, W the decoder's

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmpre.absent import Absent
from mmpre.attention import Attend, Full
from mmpre.batch import Batch, Picked
from mmpre.blocks import Encoder
from mmpre.draw import Draw
from mmpre.heads.guess import Guess, Guesses
from mmpre.heads.protocol import Head
from mmpre.layout import Layout
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term
from mmpre.tokens import Tokens


class Autoencode(nn.Module):
    """Predict the tokens of a pick that the view drops (`Drop`), by a decoder over all tokens of their role.

    The decoder reads, at the place of each token that was seen, its state in the decoder's width, and at the place of
    each that was dropped one learned vector; `places` gives every clean token the vector that says where it stands,
    and must not look at what it shows. The term is called `name`, by default like the pick, and divided by the
    number of picked tokens.
    Source: the masked autoencoder of He et al. 2021, arXiv:2111.06377.
    """

    def __init__(
        self,
        net: Network,
        pick: str,
        *,
        width: int,
        decoder: Encoder,
        decoder_width: int,
        places: Callable[[Tokens], Float[Tensor, "N W"]],
        head: Head,
        attend: Attend | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.net, self.decoder, self.places, self.head = net, decoder, places, head
        self.pick, self.name, self.attend = pick, name or pick, attend or Full()
        self.narrow = nn.Linear(width, decoder_width)
        self.missing_W = nn.Parameter(torch.empty(decoder_width))
        nn.init.xavier_uniform_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)
        nn.init.normal_(self.missing_W, std=0.02)

    @property
    def readers(self) -> Mapping[str, Reader]:
        return self.net.readers

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        picked, per = self._picked(batch), f"picked:{self.pick}"
        clean = batch.clean[picked.role]
        loss_M, also = self.head.measured(self.states(batch), clean, picked.clean_M)
        metrics = {f"{self.name}_{name}": (value_M.sum(), per) for name, value_M in also.items()}
        return Loss([Term(self.name, loss_M.float().sum(), per)], metrics)

    def states(self, batch: Batch) -> Float[Tensor, "M W"]:
        """The decoder's states at the places of the picked tokens."""
        picked = self._picked(batch)
        clean, only = batch.clean[picked.role], len(batch.layout.roles) == 1
        seen_nD = self.net(batch, at=None if only else batch.layout.index[picked.role])
        full_NW = _put_back(self.narrow(seen_nD), self._kept(batch, picked), self.missing_W)
        full_NW = full_NW + self.places(clean)
        layout = Layout({picked.role: clean.lengths_B}, full_NW.device)
        plan = self.attend.plan(layout).to(full_NW.device)
        return self.decoder(full_NW, layout, plan, at=picked.clean_M)

    def guesses(self, batch: Batch) -> Iterator[tuple[str, Guess]]:
        """What the head takes the dropped tokens for."""
        if isinstance(self.head, Guesses):
            picked = self._picked(batch)
            yield self.pick, self.head.guess(self.states(batch), batch.clean[picked.role], picked.clean_M)

    def _picked(self, batch: Batch) -> Picked:
        if self.pick not in batch.picked:
            raise Absent(
                f"Autoencode: no pick {self.pick!r} in the batch; the task's view makes {sorted(batch.picked)}"
            )
        return batch.picked[self.pick]

    def _kept(self, batch: Batch, picked: Picked) -> Bool[Tensor, "N"]:
        """Which clean tokens were seen; counted by lengths alone, without asking the device."""
        clean, seen = len(batch.clean[picked.role]), len(batch.seen[picked.role])
        if seen + len(picked) != clean:
            raise ValueError(
                f"Autoencode: the view must drop what {self.pick!r} picks and nothing else, got {clean} clean tokens, "
                f"{len(picked)} picked and {seen} seen; give the view corruption=Drop()"
            )
        kept_N = torch.ones(clean, dtype=torch.bool, device=picked.clean_M.device)
        return kept_N.index_fill(0, picked.clean_M, False)


def _put_back(
    seen_nW: Float[Tensor, "n W"], kept_N: Bool[Tensor, "N"], missing_W: Float[Tensor, "W"]
) -> Float[Tensor, "N W"]:
    """Lay seen vectors at the places that were kept, in their order, and one vector at all others."""
    # shapes do not depend on which places were kept, so a device need not be waited for
    source_N = torch.where(kept_N, kept_N.cumsum(0) - 1, len(seen_nW))
    return torch.cat([seen_nW, missing_W[None].to(seen_nW.dtype)]).index_select(0, source_N)
