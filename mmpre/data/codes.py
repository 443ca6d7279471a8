"""Codes of a sample's tokens from a sidecar, beside the tokens themselves."""
# N tokens of one row, M of the row that was coded, n ordinary ones

from dataclasses import dataclass, replace

import safetensors.torch
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.modality import Reader, still
from mmpre.show import show_row
from mmpre.tokens import Ragged, Tokens

NEVER = -1  # the code of a special token


@dataclass(frozen=True)
class WithCodes:
    """A reader whose tokens get a field `field` with their codes, as `mmpre data derive` wrote them: -1 if special.

    It goes into a view: `View(readers={"video": WithCodes(video.reader, codes=512)})`. `reader` must read the same
    tokens every time, as it did then: no random crops or frames. What wrote the codes may have read larger or smaller
    patches, or other special tokens, as long as the ordinary ones are as many, in the same order. A sample whose codes
    are missing or of another number than its tokens raises BadMember.
    """

    reader: Reader
    codes: int
    suffix: str = "derived.safetensors"
    field: str = "code"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.reader.suffixes

    @property
    def windowed(self) -> bool:
        return getattr(self.reader, "windowed", False)

    @property
    def digest(self) -> str:
        return self.reader.digest

    def windows(self, sample: Sample) -> list[int]:
        return self.reader.windows(sample)

    def made(self) -> dict[str, bytes]:
        """What the reader makes up, and a code of 0 for each of its ordinary tokens."""
        members = self.reader.made()
        tokens = self.reader.tokenize(Sample("made up", "", "", members), Draw.row(0, 0, 0, epoch=0, unit=0))
        code_N = torch.where(tokens.special_N < 0, 0, NEVER)
        told = {"codes": code_N.int(), "lengths": torch.tensor([len(code_N)])}
        return members | {self.suffix: safetensors.torch.save(told)}

    def still(self) -> "WithCodes":
        return replace(self, reader=still(self.reader))

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        return show_row(self.reader, tokens, hidden_N, sample)

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        tokens = self.reader.tokenize(sample, draw)
        told = sample.tensors((self.suffix,))
        if not {"codes", "lengths"} <= told.keys() or any(told[name].ndim != 1 for name in ("codes", "lengths")):
            detail = f"wanted the lists codes and lengths, got {sorted(told)[:8]}; derive it again"
            raise BadMember("codes incomplete", self.suffix, detail)
        kinds, lengths = [told[name].dtype for name in ("codes", "lengths")], told["lengths"].tolist()
        fractions = any(kind.is_floating_point or kind.is_complex or kind == torch.bool for kind in kinds)
        if fractions or any(length < 0 for length in lengths):
            detail = f"wanted whole numbers, lengths not negative, got {kinds} and lengths {lengths[:8]}"
            raise BadMember("codes of another type", self.suffix, f"{detail}; derive it again")
        whole = sum(lengths) == len(told["codes"]) and sample.window < len(lengths)
        code_N = told["codes"].split(lengths)[sample.window].long() if whole else told["codes"][:0].long()
        if whole and len(code_N) != len(tokens):
            code_N = _of_ordinary(code_N, tokens)
        if len(code_N) != len(tokens):
            detail = f"codes of {lengths[:8]} tokens for a row of {len(tokens)}; read as when they were derived"
            raise BadMember("codes of other tokens", self.suffix, detail)
        if ((code_N < 0) & (tokens.special_N < 0)).any() or code_N.max() >= self.codes:
            detail = f"codes must lie in 0 to {self.codes - 1}, got {int(code_N.min())} to {int(code_N.max())}"
            raise BadMember("codes out of range", self.suffix, detail)
        fields = dict(tokens.fields) | {self.field: Ragged(code_N, torch.tensor([len(code_N)]))}
        return Tokens(tokens.special_N, tokens.lengths_B, fields)


def _of_ordinary(code_M: Int[Tensor, "M"], tokens: Tokens) -> Int[Tensor, "_"]:
    """Codes of as many ordinary tokens, put where these stand here; as they came where they are not as many."""
    own_n, ordinary_N = code_M[code_M != NEVER], tokens.special_N < 0
    if len(own_n) != int(ordinary_N.sum()):
        return code_M
    return torch.full((len(tokens),), NEVER).masked_scatter(ordinary_N, own_n)
