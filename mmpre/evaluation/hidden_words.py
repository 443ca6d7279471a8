"""Are some words, hidden one at a time, known from the rest of the row: from what a text goes with, say?"""
# W ways to write words, M hidden tokens, m of one row, V ids

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
        written: dict[int, dict[tuple[int, ...], str]] = {}  # by the number of tokens: ids, and the word that they are
        for row, word in rows:
            ids = self._asked(row)
            written.setdefault(len(ids), {})[ids] = word
        waiting = [(row, word) for row, word in rows if len(set(written[len(self._asked(row))].values())) > 1]
        right, chance = [], []
        for start in range(0, len(waiting), CHUNK):
            some = {row.key: (row, word) for row, word in waiting[start : start + CHUNK]}
            batch = pack([row for row, _ in some.values()], self.network.attend.plan).to(processes.device)
            place_M = batch.layout.at(self.text, batch.picked["word"].seen_M)
            log_MV = self.head.scores(self.network(batch, at=place_M)).float().log_softmax(1)
            lengths = [len(self._asked(some[key][0])) for key in batch.keys]
            for key, log_mV in zip(batch.keys, log_MV.split(lengths), strict=True):
                among = written[len(log_mV)]
                id_Wm = torch.tensor(list(among), device=log_mV.device)
                log_W = log_mV.gather(1, id_Wm.T).sum(0)
                right.append(float(list(among.values())[int(log_W.argmax())] == some[key][1]))
                chance.append(1 / len(set(among.values())))
        name = f"{self.name} ({', '.join(self.words)})"
        return [mean(name, right, chance=sum(chance) / len(chance))] if right else []

    def _asked(self, row: Row) -> tuple[int, ...]:
        return tuple(row.clean[self.text][self.head.field][row.picked["word"].clean_M].tolist())

    def _rows(self, units: Units) -> Iterator[tuple[Row, str]]:
        """Each sample once for each place of a word, where it is hidden, with the word in lower case."""
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
                if index and spans[index[-1]][1] >= place.end():  # the text was not cut before its end
                    index_M = torch.tensor(index)
                    hidden = {role: torch.zeros(len(one), dtype=torch.bool) for role, one in roles.items()}
                    hidden[self.text][index_M] = True
                    picked = {"word": Picked(self.text, index_M, index_M)}
                    yield Row(f"{i} {place.start()}", roles, roles, hidden, picked), place[0].lower()
