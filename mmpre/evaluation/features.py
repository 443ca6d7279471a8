"""Vectors of samples: the means of a network's states, after every layer, or what a tower makes of them."""
# N tokens of the packed batch, S samples, L layers, D width

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.batch import Batch, Row, pack
from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.evaluation.results import NotMeasured
from mmpre.heads.pool import Tower
from mmpre.masking.protocol import untouched
from mmpre.modality import Reader, still
from mmpre.network import Network
from mmpre.tokens import Tokens

CHUNK_TOKENS = 16_384  # encoded at a time


@dataclass(frozen=True)
class Vectors:
    """Vectors of the samples that could be read, by the samples' numbers."""

    number_S: Int[np.ndarray, "S"]
    x_LSD: Float[np.ndarray, "L S D"]


def role_of(readers: Mapping[str, Reader], member: str) -> str | None:
    """The role that reads a member ("ogg|wav": or one of several), None where none does."""
    return next((role for role, one in readers.items() if set(member.split("|")) & set(one.suffixes)), None)


def pooled(network: Network, member: str, samples: Iterable[tuple[int, Sample]], *, period: int = 1) -> Vectors:
    """The mean state over a sample's ordinary tokens, those of all of its windows, after each layer (0: what comes in;
    the last one after the closing norm). With a `period` above 1 there is a mean for each number of a token in its row,
    special ones counted, modulo it; they are laid side by side, and each is of as many tokens as fall to it."""
    role = role_of(network.readers, member)
    depth = len(network.encoder.blocks)

    def sums(batch: Batch) -> tuple[Tensor, Tensor]:
        states = network(batch, read=range(depth))
        place_n = (batch.seen[role].special_N < 0).nonzero().squeeze(1)
        row_N, rows = batch.layout.row_N, len(batch.layout)
        number_N = torch.arange(batch.layout.size, device=row_N.device) - batch.layout.first(role)[row_N]
        part_n = (row_N * period + number_N % period)[place_n]  # a row's tokens are dealt to its parts
        layers = [states.layer[layer] for layer in range(depth)] + [states.last]
        sum_LBX = torch.stack([
            one.new_zeros(rows * period, one.shape[1]).index_add(0, part_n, one.index_select(0, place_n)).view(rows, -1)
            for one in layers
        ])  # fmt: skip
        count_BP = torch.bincount(part_n, minlength=rows * period).view(rows, period)
        return sum_LBX, count_BP.repeat_interleave(sum_LBX.shape[2] // period, dim=1)

    return _over(network, network, role, member, samples, sums)


def towered(tower: Tower, role: str, member: str, samples: Iterable[tuple[int, Sample]]) -> Vectors:
    """What a tower makes of each sample, the mean over its windows, of length 1; a single layer."""

    def sums(batch: Batch) -> tuple[Tensor, Tensor]:
        x_BD = F.normalize(tower(batch).float(), dim=-1)
        return x_BD[None], torch.ones(len(x_BD), 1, device=x_BD.device)

    found = _over(tower, tower.net, role, member, samples, sums)
    return replace(found, x_LSD=found.x_LSD / np.linalg.norm(found.x_LSD, axis=-1, keepdims=True).clip(1e-9))


@torch.inference_mode()
def _over(module: nn.Module, net: Network, role: str, member: str, samples, sums) -> Vectors:
    device = next(module.parameters()).device
    module.eval()
    numbers, totals, counts, place = [], [], [], {}
    for batch in chunks(net, role, member, samples):
        sum_LBD, count_BX = (one.float().cpu().numpy() for one in sums(batch.to(device)))
        for row, key in enumerate(batch.keys):
            number = int(key)
            if number in place:  # another window of it
                totals[place[number]] += sum_LBD[:, row]
                counts[place[number]] += count_BX[row]
                continue
            place[number] = len(numbers)
            numbers.append(number)
            totals.append(sum_LBD[:, row].copy())
            counts.append(count_BX[row].copy())
    if not numbers:
        raise NotMeasured(
            f"no sample has a .{member} that role {role!r} can read; look at the shards with `mmpre data inspect`"
        )
    order_S = np.argsort(numbers)
    x_SLD = np.stack(totals) / np.maximum(np.stack(counts), 1)[:, None]
    return Vectors(np.array(numbers)[order_S], x_SLD[order_S].transpose(1, 0, 2))


def chunks(net: Network, role: str, member: str, samples: Iterable[tuple[int, Sample]]) -> Iterator[Batch]:
    """Clean rows of the samples, packed; keys are the samples' numbers."""
    rows: list[Row] = []
    for number, tokens in tokenized(net.readers[role], member, samples):
        roles = {role: tokens}
        rows.append(Row(str(number), roles, roles, {role: untouched(tokens).replaced_N}, {}))
        if sum(one.length for one in rows) >= CHUNK_TOKENS:
            yield pack(rows, net.attend.plan)
            rows = []
    if rows:
        yield pack(rows, net.attend.plan)


def tokenized(reader: Reader, member: str, samples: Iterable[tuple[int, Sample]]) -> Iterator[tuple[int, Tokens]]:
    """The tokens of each window of each sample's member, read without chance; what cannot be read is left out."""
    reader = still(reader)
    for number, sample in samples:
        others = set(reader.suffixes) - set(member.split("|"))
        sample = replace(sample, members={k: v for k, v in sample.members.items() if k not in others})
        try:
            windows = len(reader.windows(sample)) if getattr(reader, "windowed", False) else 1
            for window in range(windows):
                yield number, reader.tokenize(sample.at_window(window), _draw())
        except BadMember:
            continue


def _draw() -> Draw:
    return Draw.row(0, 0, 0, epoch=0, unit=0)
