"""Have vectors collapsed? How many directions they use, and how far they lie from each other."""
# S samples, D width

import numpy as np
from jaxtyping import Float

from mmpre.evaluation.results import Result, statistic

ROWS, RESAMPLES = 2_048, 100


def collapse(name: str, x_SD: Float[np.ndarray, "S D"]) -> list[Result]:
    """RankMe (Garrido et al. 2022, arXiv:2210.02885) of centred vectors; the deviation of their directions, 1 where
    they are spread over all of the sphere, 0 where all are one; and the variance of a value, the mean over the width.
    Nothing of fewer than two vectors, which tell nothing of it.
    """
    if len(x_SD) < 2:
        return []
    x_SD = x_SD[:ROWS].astype(np.float64)
    told = {"rows": len(x_SD), "width": x_SD.shape[1]}
    return [
        statistic(f"{name}: RankMe", rank_me, x_SD, resamples=RESAMPLES, centred=True, protocol=told),
        statistic(f"{name}: spread", spread, x_SD, resamples=RESAMPLES, centred=True, protocol=told),
        statistic(f"{name}: variance", variance, x_SD, resamples=RESAMPLES, centred=True, protocol=told),
    ]


def rank_me(x_SD: Float[np.ndarray, "S D"]) -> float:
    """The exponent of the entropy of the singular values, each as a share of their sum."""
    x_SD = x_SD - x_SD.mean(0)
    value_D = np.sqrt(np.linalg.eigvalsh(x_SD.T @ x_SD).clip(0))
    share_D = value_D[value_D > value_D.max() * 1e-7] / max(value_D.sum(), 1e-12)
    return float(np.exp(-(share_D * np.log(share_D)).sum())) if len(share_D) else 0.0


def spread(x_SD: Float[np.ndarray, "S D"]) -> float:
    unit_SD = x_SD / np.linalg.norm(x_SD, axis=1, keepdims=True).clip(1e-12)
    return float(np.sqrt(unit_SD.var(0).sum()))


def variance(x_SD: Float[np.ndarray, "S D"]) -> float:
    return float(x_SD.var(0).mean())
