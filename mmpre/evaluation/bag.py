"""What needs no network: counts of the pieces that a reader makes, or the mean and deviation of what it reads."""
# S samples, N tokens, E values of a token

from collections.abc import Iterable

import numpy as np
import scipy.sparse
import torch
from sklearn.preprocessing import normalize

from mmpre.data.sample import Sample
from mmpre.evaluation.features import role_of, tokenized
from mmpre.evaluation.results import NotMeasured
from mmpre.network import Network
from mmpre.tokens import Tokens

BINS = 4_096  # that pieces, pairs and triples of them are hashed to
LONGEST = 3  # neighbouring pieces


def bag(network: Network, member: str, samples: Iterable[tuple[int, Sample]]) -> tuple[np.ndarray, object]:
    """The samples' numbers, and a vector of each: of ids, logarithms of counts of pieces and of runs of up to three, of
    length 1; of anything else, mean and deviation of each value over the tokens. Order is lost, but for the runs."""
    role = role_of(network.readers, member)
    modality = network.modalities[role]
    found: dict[int, list[Tokens]] = {}
    for number, tokens in tokenized(modality.reader, member, samples):
        found.setdefault(number, []).append(tokens)
    if not found:
        raise NotMeasured(f"no sample has a .{member} that role {role!r} can read")
    discrete = all("ids" in tokens.fields for some in found.values() for tokens in some)
    rows = [_counts(some) if discrete else _moments(modality, some) for some in found.values()]
    if not discrete:
        return np.array(list(found)), np.stack(rows)
    columns, values = zip(*rows, strict=True)
    starts = np.cumsum([0, *(len(one) for one in columns)])
    x_SE = scipy.sparse.csr_matrix(
        (np.concatenate(values), np.concatenate(columns), starts), shape=(len(rows), BINS), dtype=np.float64
    )
    return np.array(list(found)), normalize(x_SE)


def _counts(windows: list[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    hashes = []
    for tokens in windows:
        id_N = tokens["ids"][tokens.special_N < 0].numpy().astype(np.uint64)
        for length in range(1, LONGEST + 1):
            key = np.zeros(max(0, len(id_N) - length + 1), dtype=np.uint64)
            for i in range(length):
                key = key * np.uint64(1_000_003) + id_N[i : i + len(key)] + np.uint64(length)
            hashes.append((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - 12))
    column, count = np.unique(np.concatenate(hashes).astype(np.int64), return_counts=True)
    return column, np.log1p(count)


@torch.inference_mode()
def _moments(modality: torch.nn.Module, windows: list[Tokens]) -> np.ndarray:
    device = next(modality.parameters()).device
    value_NE = torch.cat([modality.features(one.to(device))[(one.special_N < 0).to(device)] for one in windows]).float()
    return torch.cat([value_NE.mean(0), value_NE.std(0, correction=0)]).cpu().numpy()
