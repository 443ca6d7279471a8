"""Do words point at what they name? Needs captions whose names and regions are known to belong together."""
# W tokens of a caption, R regions, D model width

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmpre.batch import Row, pack
from mmpre.data.sample import BadMember, Sample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.results import NotMeasured, Result, mean
from mmpre.evaluation.rows import readable
from mmpre.masking.protocol import untouched
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.processes.processes import Processes

CHUNK = 64  # samples encoded at a time


@dataclass(frozen=True)
class Grounding:
    """For each name in a caption, is the region with the highest cosine to it the one it names?

    A sample's `json` member says which: `regions[r]["span"]` are the characters of the caption that name region r.
    The text's reader must have `spans(sample)`, the characters that each token stands for.
    """

    network: Network
    readers: Mapping[str, Reader]
    text: str = "text"
    item: str = "image"
    rows: int = 200
    name: str = "word to region accuracy"

    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        right, chances = [], []
        samples = readable(units, self.rows, self.readers)
        for sample, word_WD, region_RD in self.states(samples, processes):
            for wanted, tokens in enumerate(self.named(sample)):
                if tokens and len(region_RD) > wanted:
                    name_D = F.normalize(word_WD[tokens].mean(0), dim=0)
                    right.append(float((F.normalize(region_RD, dim=1) @ name_D).argmax() == wanted))
                    chances.append(1 / len(region_RD))
        return [mean(self.name, right, chance=sum(chances) / max(len(chances), 1))]

    @torch.no_grad()
    def states(
        self, samples: Sequence[Sample], processes: Processes
    ) -> Iterator[tuple[Sample, Float[Tensor, "W D"], Float[Tensor, "R D"]]]:
        """The final states of each sample's words and regions, in float32."""
        for start in range(0, len(samples), CHUNK):
            some = samples[start : start + CHUNK]
            batch = pack([self._row(str(i), sample) for i, sample in enumerate(some)], self.network.attend.plan)
            state_ND = self.network(batch.to(processes.device)).float().cpu()
            parts = {
                role: state_ND[batch.layout.index[role]].split(batch.layout.lengths[role].tolist())
                for role in (self.text, self.item)
            }
            for row, key in enumerate(batch.keys):
                yield some[int(key)], parts[self.text][row], parts[self.item][row]

    def named(self, sample: Sample) -> list[list[int]]:
        """For each region, the caption's tokens that name it (none where the caption was cut before it)."""
        return named(self.readers[self.text], sample, self.name)

    def _row(self, key: str, sample: Sample) -> Row:
        draw = Draw.row(0, 0, 0, epoch=0, unit=0)
        roles = {role: reader.tokenize(sample, draw) for role, reader in self.readers.items()}
        return Row(key, roles, roles, {role: untouched(tokens).replaced_N for role, tokens in roles.items()}, {})


def named(reader: Reader, sample: Sample, who: str) -> list[list[int]]:
    """For each region, the caption's tokens that name it. Raises NotMeasured where the sample does not say."""
    try:
        wanted = [region["span"] for region in sample.json()["regions"]]
    except (BadMember, KeyError, TypeError) as e:
        raise NotMeasured(f"{who}: sample {sample.key} does not say which words name its regions ({e!r})") from None
    spans = reader.spans(sample)
    return [[n for n, (a, b) in enumerate(spans) if a < end and b > start] for start, end in wanted]
