"""Sublayers of a role's own."""
# N tokens of the packed batch, n tokens of one role, D model width

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from mmpre.attention import Plan
from mmpre.layout import Layout
from mmpre.sublayers.protocol import Places, Sublayer, narrowed


class ByRole(nn.Module):
    """Each role's tokens go through their own sublayer (or block), as if no other role were in the batch.

    Roles that are not named pass unchanged. LXMERT's layers before text and picture meet, for example, are
    ByRole({"text": Block(...), "image": Block(...)}), or ByRole({"text": Block(...)}) where text has more of them;
    where they meet, Attention(within=Roles({"text": ("image",), "image": ("text",)})) reads across.
    """

    mixes = True

    def __init__(self, sublayers: Mapping[str, Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleDict(sublayers)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        y_ND = x_ND
        for role, sublayer in self.sublayers.items():
            if role in layout.roles:
                place_n = layout.index[role]
                y_nD = sublayer(x_ND.index_select(0, place_n), layout.only(role), plan.only(role, layout))
                y_ND = y_ND.index_copy(0, place_n, y_nD.to(y_ND.dtype))
        return narrowed(y_ND, at)
