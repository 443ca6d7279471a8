"""All the core knows of a modality. Implementations live in modalities/ or in a file outside this package."""
# N tokens of the packed batch, E values of a token's clean features, D model width

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.tokens import Tokens


@runtime_checkable
class Reader(Protocol):
    """Turns a sample into tokens, in loading workers: picklable, without weights.

    `suffixes` names the sample's members it reads. A reader that cuts samples into windows (512 tokens, 15 s) says so
    by `windowed = True`, and has `windows(sample) -> list[int]`, the model tokens in each window, and `digest`, a text
    that changes with everything the lengths depend on; `sample.window` then says which window to read. A reader whose
    rows have at most `sample.most` tokens, where that is a number, says so by `shortens = True`. A reader that augments
    also has `still() -> Reader`, the same without chance, for features. For plans without data it may have `made() ->
    dict[str, bytes]`: by suffix, the members of a sample whose row is as long as its rows get.

    It may draw its rows too: `show(tokens, hidden_N, sample=None) -> PIL.Image.Image`, tokens of one row and which of
    them to show as hidden (see mmpre/show.py).
    """

    suffixes: tuple[str, ...]

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens: ...


@runtime_checkable
class Modality(Protocol):
    """An nn.Module that owns a modality's tables and special vectors. It knows no loss."""

    reader: Reader

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        """The clean front end; quantizers and targets read it too."""
        ...

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Vectors for the encoder; a replaced token must not show what it replaces."""
        ...


def still(reader: Reader) -> Reader:
    """The reader without what it draws by chance, where it has such a thing."""
    return reader.still() if hasattr(reader, "still") else reader
