"""Are some words, hidden one at a time, known from the rest of the row: from what a text goes with, say?"""
# W words, M hidden tokens, m of one row, V ids

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
    """Of all places of `words` in the texts of the first `rows` units: is the word likelier than the others of them?

    The text's reader must have `spans(sample)`, the characters that each token stands for. How many tokens a word has
    is seen, so a word is asked for among those of as many tokens, and not at all where it is the only one; chance is
    that of drawing among them. Data without any of them gives no result. Where words tell what moves which way, no
    single frame of a clip answers.
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
        rows = list(self._rows(units))
        asked: dict[str, tuple[int, ...]] = {}
        for row in rows:
            ids_N = row.clean[self.text][self.head.field]
            asked[row.key] = tuple(ids_N[row.picked["word"].clean_M].tolist())
        among: dict[int, list[tuple[int, ...]]] = {}
        for ids in sorted(set(asked.values())):
            among.setdefault(len(ids), []).append(ids)
        waiting = [row for row in rows if len(among[len(asked[row.key])]) > 1]
        right, chance = [], []
        for start in range(0, len(waiting), CHUNK):
            batch = pack(waiting[start : start + CHUNK], self.network.attend.plan).to(processes.device)
            place_M = batch.layout.at(self.text, batch.picked["word"].seen_M)
            log_MV = self.head.scores(self.network(batch, at=place_M)).float().log_softmax(1)
            lengths = [len(asked[key]) for key in batch.keys]
            for key, log_mV in zip(batch.keys, log_MV.split(lengths), strict=True):
                words = among[len(asked[key])]
                id_Wm = torch.tensor(words, device=log_mV.device)
                log_W = log_mV.gather(1, id_Wm.T).sum(0)
                right.append(float(words[int(log_W.argmax())] == asked[key]))
                chance.append(1 / len(words))
        told = {"among": [len(words) for words in among.values()]}
        name = f"{self.name} ({', '.join(self.words)})"
        return [mean(name, right, chance=sum(chance) / len(chance), protocol=told)] if right else []

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
