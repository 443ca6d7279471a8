"""Modalities, the order in which a row lays out their roles, and the encoder that reads them all."""
# N tokens of the packed batch, M places asked for, D model width

from collections.abc import Collection, Mapping
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.absent import Absent
from mmpre.attention import Attend, Full, Plan
from mmpre.batch import Batch
from mmpre.blocks import Encoder, States
from mmpre.layout import Layout
from mmpre.modality import Modality, Reader
from mmpre.sublayers.protocol import Places


class Network(nn.Module):
    """One modality for each role (`{"query": text, "code": text}` shares one) and the encoder they feed.

    `attend` says who sees whom in rows that no view of a task makes, such as those that are evaluated; by default all
    tokens of a row see each other.
    """

    def __init__(self, modalities: Mapping[str, Modality], encoder: Encoder, *, attend: Attend | None = None) -> None:
        super().__init__()
        if not modalities:
            raise ValueError("Network: needs at least one modality, such as {'text': Text(...)}, got none")
        self.modalities = nn.ModuleDict(modalities)
        self.encoder = encoder
        self.attend = attend or Full()

    @property
    def readers(self) -> dict[str, Reader]:
        return {role: modality.reader for role, modality in self.modalities.items()}

    @overload
    def forward(self, batch: Batch, at: Places = None, read: None = None) -> Tensor: ...

    @overload
    def forward(self, batch: Batch, at: Places = None, *, read: Collection[int]) -> States: ...

    def forward(
        self, batch: Batch, at: Places = None, read: Collection[int] | None = None
    ) -> Float[Tensor, "_ D"] | States:
        """Embed what may be seen and encode it: the states of all tokens, or of those at the places `at`."""
        return self.encoder(self.embed(batch), batch.layout, batch.plan, at=at, read=read)

    def embed(self, batch: Batch, *, clean: bool = False) -> Float[Tensor, "N D"]:
        """Return the encoder's input: of the tokens that may be seen, or of the clean ones with nothing replaced."""
        x = []
        for role in batch.layout.roles:
            if role not in self.modalities:
                raise Absent(f"Network: no modality for role {role!r}; it has {', '.join(self.modalities)}")
            tokens, replaced = batch.seen[role], batch.replaced[role]
            if clean:
                tokens, replaced = batch.clean[role], torch.zeros_like(replaced)
                if not torch.equal(tokens.lengths_B, batch.layout.lengths[role]):
                    raise ValueError(
                        f"Network.embed: the clean rows of role {role!r} have other lengths than those seen, so they "
                        "do not fit the batch's layout; make the clean batch with a view that corrupts nothing"
                    )
            modality = self.modalities[role]
            x.append(modality.embed(modality.features(tokens), tokens, replaced))
        if len(x) == 1:
            return x[0]
        return torch.cat(x).index_select(0, batch.layout.source_N)

    def encode(
        self,
        x_ND: Float[Tensor, "N D"],
        layout: Layout,
        plan: Plan,
        *,
        at: Places = None,
        read: Collection[int] | None = None,
    ) -> Float[Tensor, "_ D"] | States:
        """Encode vectors that were embedded (and perhaps changed) before."""
        return self.encoder(x_ND, layout, plan, at=at, read=read)
