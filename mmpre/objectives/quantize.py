"""Learn codes: round states to a codebook and restore the tokens from what is left."""
# N tokens of one role, M ordinary ones, C values of a code, W the decoder's width

from collections.abc import Callable, Iterator, Mapping

from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.absent import Absent
from mmpre.attention import Attend, Full
from mmpre.batch import Batch, Picked
from mmpre.blocks import Encoder
from mmpre.codes import Coder
from mmpre.draw import Draw
from mmpre.heads.guess import Guess, Guesses
from mmpre.heads.protocol import Head
from mmpre.modality import Reader
from mmpre.objectives.loss import Loss, Term
from mmpre.tokens import Tokens


class Quantize(nn.Module):
    """Restore the tokens of a pick (all of them: `Everything`, hidden by nothing) from their codes and their places.

    What the decoder reads is the code's vector, with the gradient of the vector that was rounded. Codes move towards
    what they stand for, and that, by `commit`, towards them. All terms are per picked token.
    Source: van den Oord et al. 2017, arXiv:1711.00937, section 3.2.
    """

    def __init__(
        self,
        coder: Coder,
        pick: str,
        *,
        decoder: Encoder,
        decoder_width: int,
        places: Callable[[Tokens], Float[Tensor, "N W"]],
        head: Head,
        commit: float = 0.25,
        attend: Attend | None = None,
        name: str = "pixels",
    ) -> None:
        super().__init__()
        self.coder, self.decoder, self.places, self.head = coder, decoder, places, head
        self.pick, self.commit, self.attend, self.name = pick, commit, attend or Full(), name
        self.widen = nn.Linear(coder.book.vector_KC.shape[1], decoder_width)
        nn.init.xavier_uniform_(self.widen.weight)
        nn.init.zeros_(self.widen.bias)

    @property
    def readers(self) -> Mapping[str, Reader]:
        return self.coder.net.readers

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        picked, per = self._picked(batch), f"picked:{self.pick}"
        z_NC, code_N = self._rounded(batch)
        vector_NC = self.coder.book.vectors()[code_N]
        state_MW = self._decoded(z_NC + (vector_NC - z_NC).detach(), batch, picked)
        loss_M, also = self.head.measured(state_MW, batch.clean[picked.role], picked.clean_M)
        z_MC, vector_MC = (one.index_select(0, picked.seen_M) for one in (z_NC, vector_NC))
        book = (vector_MC - z_MC.detach()).square().sum()
        commit = (z_MC - vector_MC.detach()).square().sum()
        metrics = {f"{self.name}_{name}": (value_M.sum(), per) for name, value_M in also.items()}
        return Loss(
            [Term(self.name, loss_M.float().sum(), per), Term("codebook", book, per),
             Term("commitment", commit, per, self.commit)], metrics,
        )  # fmt: skip

    def after_step(self, step: int) -> None:
        self.coder.book.after_step(step)

    def guesses(self, batch: Batch) -> Iterator[tuple[str, Guess]]:
        """What the head restores from the codes."""
        if isinstance(self.head, Guesses):
            picked = self._picked(batch)
            vector_NC = self.coder.book.vectors()[self._rounded(batch)[1]]
            state_MW = self._decoded(vector_NC, batch, picked)
            yield self.pick, self.head.guess(state_MW, batch.clean[picked.role], picked.clean_M)

    def _rounded(self, batch: Batch) -> tuple[Float[Tensor, "N C"], Int[Tensor, "N"]]:
        z_NC = self.coder.latent(batch)
        return z_NC, self.coder.book.nearest(z_NC.detach())

    def _decoded(self, vector_NC: Float[Tensor, "N C"], batch: Batch, picked: Picked) -> Float[Tensor, "M W"]:
        x_NW = self.widen(vector_NC.to(self.widen.weight.dtype)) + self.places(batch.clean[picked.role])
        return self.decoder(x_NW, batch.layout, self.attend.plan(batch.layout).to(x_NW.device), at=picked.seen_M)

    def _picked(self, batch: Batch) -> Picked:
        if self.pick not in batch.picked or len(batch.layout.roles) != 1:
            raise Absent(
                f"Quantize: wanted one role and a pick {self.pick!r}, got roles {', '.join(batch.layout.roles)} and "
                f"picks {sorted(batch.picked)}; give the view picks={{{self.pick!r}: Everything(role=...)}}"
            )
        return batch.picked[self.pick]
