"""Discrete codes of tokens: what a network's states are rounded to, learned with it or by k-means afterwards.

Source: VQ-VAE, van den Oord et al. 2017, arXiv:1711.00937; codes of few values and of length 1, which keeps most of
them in use, as in ViT-VQGAN, Yu et al. 2021, arXiv:2110.04627.
"""
# N tokens of the packed batch, K codes, C values of a code, D model width, E values of a token's features

from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from mmpre.batch import Batch
from mmpre.data.codes import NEVER as NEVER
from mmpre.draw import hashed
from mmpre.network import Network
from mmpre.training.gradients import full, like


class Codebook(nn.Module):
    """`codes` vectors of `size` values, all of length 1; a vector's code is the one of the smallest angle.

    A code that no token had in `patience` steps is put beside one that is in use (`after_step`). Which ones are in use
    is read from the gradients, which are the same on all processes.
    """

    def __init__(self, codes: int, size: int, *, patience: int = 50) -> None:
        super().__init__()
        if codes < 2 or size < 2:
            raise ValueError(f"Codebook: needs at least 2 codes of at least 2 values, got {codes} of {size}")
        self.patience = patience
        self.vector_KC = nn.Parameter(F.normalize(torch.randn(codes, size), dim=1))
        self.register_buffer("idle_K", torch.zeros(codes, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.vector_KC)

    def vectors(self) -> Float[Tensor, "K C"]:
        return F.normalize(self.vector_KC.float(), dim=1)

    @torch.no_grad()
    def nearest(self, z_NC: Float[Tensor, "N C"]) -> Int[Tensor, "N"]:
        """The codes of vectors of length 1."""
        with torch.autocast(z_NC.device.type, enabled=False):  # in half precision many would be equally near
            return (z_NC.float() @ self.vectors().mT).argmax(1)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.vector_KC.grad is None:
            return
        whole = full({"vector": self.vector_KC, "gradient": self.vector_KC.grad})  # of what processes may share
        vector_KC, gradient_KC = whole["vector"].clone(), whole["gradient"]
        used_K = gradient_KC.abs().sum(1) > 0
        self.idle_K.copy_(torch.where(used_K, 0, self.idle_K + 1))
        moved = (self.idle_K >= self.patience).nonzero().squeeze(1)
        used = used_K.nonzero().squeeze(1)
        if len(moved) and len(used):
            rng = torch.Generator().manual_seed(hashed("codebook", step))
            beside = used[torch.randint(len(used), (len(moved),), generator=rng).to(used.device)]
            noise = torch.randn(len(moved), vector_KC.shape[1], generator=rng) * 0.02
            vector_KC[moved] = F.normalize(vector_KC[beside].float(), dim=1).to(vector_KC) + noise.to(vector_KC)
            self.vector_KC.copy_(like(vector_KC, self.vector_KC))
            self.idle_K[moved] = 0


class Coder(nn.Module):
    """A network, a linear map of its states to few values, and the codebook that those are rounded to."""

    def __init__(self, net: Network, book: Codebook, *, width: int) -> None:
        super().__init__()
        self.net, self.book = net, book
        self.down = nn.Linear(width, book.vector_KC.shape[1])
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def latent(self, batch: Batch) -> Float[Tensor, "N C"]:
        """Vectors of length 1, one for each token of the batch's layout."""
        return F.normalize(self.down(self.net(batch)).float(), dim=1)

    def codes(self, batch: Batch) -> Int[Tensor, "N"]:
        return self.book.nearest(self.latent(batch))


class Centres:
    """k-means centres: the code of a token is the number of the nearest (Euclid) to its features or states."""

    def __init__(self, centre_KE: Float[Tensor, "K E"]) -> None:
        self.centre_KE = centre_KE.float()

    def __len__(self) -> int:
        return len(self.centre_KE)

    @classmethod
    def fit(cls, parts: Callable[[], Iterable[Float[Tensor, "n E"]]], codes: int, *, passes: int = 3) -> "Centres":
        """Fit them by scikit-learn's MiniBatchKMeans; `parts()` gives the vectors again for each pass, in parts."""
        means = MiniBatchKMeans(codes, n_init=3, random_state=0, batch_size=4 * max(codes, 256))
        for _ in range(passes):
            waiting, count = [], 0
            for part_nE in parts():
                waiting.append(part_nE)
                count += len(part_nE)
                if count >= means.batch_size:
                    means.partial_fit(torch.cat(waiting).float().cpu().numpy())
                    waiting, count = [], 0
            if count >= codes:  # a first part must hold at least as many vectors as there are codes
                means.partial_fit(torch.cat(waiting).float().cpu().numpy())
        if not hasattr(means, "cluster_centers_"):
            raise ValueError(f"Centres: {codes} codes need at least as many vectors, got {count}; ask for fewer codes")
        return cls(torch.from_numpy(means.cluster_centers_))

    def save(self, path: Path) -> None:
        safetensors.torch.save_file({"centres": self.centre_KE.contiguous()}, path)

    @classmethod
    def load(cls, path: Path) -> "Centres":
        tensors = safetensors.torch.load_file(path)
        if "centres" not in tensors or tensors["centres"].ndim != 2:
            raise ValueError(f"Centres: {path} must hold a matrix `centres`, it holds {sorted(tensors)}; fit it again")
        return cls(tensors["centres"])

    def nearest(self, f_NE: Float[Tensor, "N E"]) -> Int[Tensor, "N"]:
        if f_NE.shape[1] != self.centre_KE.shape[1]:
            raise ValueError(
                f"Centres: were fitted to vectors of {self.centre_KE.shape[1]} values, got {f_NE.shape[1]}; fit them "
                "to what is to be coded"
            )
        return torch.cdist(f_NE.float(), self.centre_KE.to(f_NE.device)).argmin(1)


def use(count_K: Int[Tensor, "K"]) -> tuple[float, float]:
    """Perplexity of codes, of which each was taken so many times, and the share of them that was taken at all.

    Perplexity is e to their entropy: K where all are taken alike, 1 where it is always the same.
    """
    share_K = count_K.double() / count_K.sum().clamp(min=1)
    return torch.special.entr(share_K).sum().exp().item(), (count_K > 0).double().mean().item()
