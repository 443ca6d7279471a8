"""Are some words, hidden one at a time, known from the rest of the row: from what a text goes with, say?"""
# W occurrences of words, M hidden tokens

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmpre.batch import Picked, Row, pack
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.results import Result, mean
from mmpre.heads.vocabulary import Vocabulary
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.processes.processes import Processes

CHUNK = 32  # rows encoded at a time


@dataclass(frozen=True)
class HiddenWords:
    """Of all places of `words` in the texts of the first `rows` units: are all tokens of the word the likeliest ones?

    The text's reader must have `spans(sample)`, the characters that each token stands for. How many tokens a word has
    is seen, so a tokenizer should have each of the words as one. Chance is that of drawing among them. Data without
    any of them gives no result. Where words tell what moves which way, no single frame of a clip answers.
    """

    network: Network
    head: Vocabulary
    readers: Mapping[str, Reader]
    words: tuple[str, ...]
    text: str = "text"
    rows: int = 200
    name: str = "hidden words"

    @torch.no_grad()
    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        waiting, right = list(self._rows(units)), []
        for start in range(0, len(waiting), CHUNK):
            batch = pack(waiting[start : start + CHUNK], self.network.attend.plan).to(processes.device)
            picked = batch.picked["word"]
            place_M = batch.layout.at(self.text, picked.seen_M)
            id_M = batch.clean[self.text][self.head.field][picked.clean_M]
            wrong_M = self.head.scores(self.network(batch, at=place_M)).argmax(1) != id_M
            wrong_W = torch.zeros(len(batch.layout)).index_add(
                0, batch.layout.row_N[place_M].cpu(), wrong_M.float().cpu()
            )
            right += (wrong_W == 0).float().tolist()
        return [mean(f"{self.name} ({', '.join(self.words)})", right, chance=1 / len(self.words))] if right else []

    def _rows(self, units: Units) -> Iterator[Row]:
        """Each sample once for each place of a word, where it is hidden."""
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, self.words))})\b", re.IGNORECASE)
        for i in range(min(self.rows, len(units))):
            try:
                sample: Sample = units.sample(i)
                draw = Draw.row(0, 0, 0, epoch=0, unit=i)
                roles = {role: reader.tokenize(sample, draw) for role, reader in self.readers.items()}
            except (BadMember, CorruptSample):
                continue
            reader = self.readers[self.text]
            spans = reader.spans(sample)
            for place in pattern.finditer(sample.text(reader.suffixes)):
                index = [n for n, (a, b) in enumerate(spans) if a < place.end() and b > place.start()]
                if index:  # the text was not cut before it
                    index_M = torch.tensor(index)
                    hidden = {role: torch.zeros(len(one), dtype=torch.bool) for role, one in roles.items()}
                    hidden[self.text][index_M] = True
                    yield Row(
                        f"{i} {place.start()}", roles, roles, hidden, {"word": Picked(self.text, index_M, index_M)}
                    )
