"""What can be read from fixed vectors by simple means: linear probes, nearest neighbours, few labels."""
# S samples, L layers, D width, C classes

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from mmpre.draw import hashed
from mmpre.evaluation.results import Result, mean, statistic

STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # C of logistic regression that are tried on valid
PENALTIES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)  # alpha of ridge regression, likewise
ITERATIONS = 200  # of its solver at most
LAYER_ROWS = 4_000  # of train that the choice of the layer is made with
NEIGHBOURS = 20
SHOTS, DRAWS = 10, 5  # labelled samples of a class, and how often they are drawn


@dataclass(frozen=True)
class Known:
    """Vectors after each layer (or one kind of vectors, dense or sparse), and what is known of their samples."""

    layers: Sequence[Any]
    y_S: np.ndarray
    group_S: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y_S)

    def layer(self, number: int, rows: np.ndarray | slice = slice(None)) -> Any:
        return self.layers[number][rows]


def scaled(x_SD: Any, like_SD: Any) -> Any:
    """Each value less its mean over the training rows, divided by its deviation there; sparse counts stay."""
    if scipy.sparse.issparse(x_SD):
        return x_SD
    return (x_SD - like_SD.mean(0)) / (like_SD.std(0) + 1e-6)


def classify(name: str, train: Known, valid: Known, test: Known) -> list[Result]:
    """Right answers of a linear probe, of the nearest neighbours, and of a linear probe with few labels.

    Layer and strength are chosen on valid alone: the layer with C = 1 on at most 4,000 rows, then C on all of them.
    """
    some = _some(len(train), LAYER_ROWS, name)
    right = [
        logistic(train, layer, 1.0, some).score(scaled(valid.layer(layer), train.layer(layer)), valid.y_S)
        for layer in range(len(train.layers))
    ]
    layer = int(np.argmax(right))
    like = train.layer(layer)
    x_valid, x_test = scaled(valid.layer(layer), like), scaled(test.layer(layer), like)
    fits = [logistic(train, layer, strength) for strength in STRENGTHS]
    best = int(np.argmax([fit.score(x_valid, valid.y_S) for fit in fits]))
    told = {"layer": layer, "train rows": len(train), "valid rows": len(valid)}
    guess = float((test.y_S == _commonest(train.y_S)).mean())
    linear = fits[best].predict(x_test) == test.y_S
    results = [mean(f"{name}: linear probe", linear, chance=guess, protocol=told | {"C": STRENGTHS[best]})]
    if scipy.sparse.issparse(like):
        return results  # what counts of pieces can do is told by the linear probe
    near = KNeighborsClassifier(min(NEIGHBOURS, len(train)), metric="cosine", weights="distance")
    near.fit(scaled(like, like), train.y_S)
    knn = near.predict(x_test) == test.y_S
    results.append(mean(f"{name}: {NEIGHBOURS} neighbours", knn, chance=guess, protocol=told))
    few = np.mean([_few(name, draw, train, layer, STRENGTHS[best], x_test) == test.y_S for draw in range(DRAWS)], 0)
    more = {"C": STRENGTHS[best], "draws": DRAWS}
    results.append(mean(f"{name}: {SHOTS} of a class", few, chance=guess, protocol=told | more))
    return results


def regress(name: str, train: Known, valid: Known, test: Known) -> list[Result]:
    """The mean error and the rank correlation of ridge regression, and the error of groups' means where there are any.

    Layer and penalty are chosen on valid alone.
    """
    tried = {}
    for layer in range(len(train.layers)):
        like = train.layer(layer)
        for penalty in PENALTIES:
            fit = Ridge(penalty).fit(scaled(like, like), train.y_S)
            tried[layer, penalty] = np.abs(fit.predict(scaled(valid.layer(layer), like)) - valid.y_S).mean()
    layer, penalty = min(tried, key=tried.__getitem__)
    like = train.layer(layer)
    told_S = Ridge(penalty).fit(scaled(like, like), train.y_S).predict(scaled(test.layer(layer), like))
    told = {"layer": layer, "alpha": penalty, "train rows": len(train), "valid rows": len(valid)}
    truth_S, constant = test.y_S, float(np.median(train.y_S))
    if test.group_S is not None:
        told_S, truth_S = (_by_group(one, test.group_S) for one in (told_S, truth_S))
    guess = float(np.abs(truth_S - constant).mean())
    error = mean(f"{name}: mean error", np.abs(told_S - truth_S), chance=guess, less=True, protocol=told)
    rank = statistic(f"{name}: Spearman", spearman, told_S, truth_S, chance=0.0, protocol=told)
    return [error, rank]


def spearman(a_S: np.ndarray, b_S: np.ndarray) -> float:
    return float(spearmanr(a_S, b_S).statistic) if len(set(a_S)) > 1 and len(set(b_S)) > 1 else float("nan")


def _by_group(x_S: np.ndarray, group_S: np.ndarray) -> np.ndarray:
    return np.array([x_S[group_S == one].mean() for one in np.unique(group_S)])


def logistic(train: Known, layer: int, strength: float, rows: np.ndarray | slice = slice(None)) -> LogisticRegression:
    like = train.layer(layer)
    return fitted(scaled(train.layer(layer, rows), like), train.y_S[rows], strength)


def fitted(x_SD: Any, y_S: np.ndarray, strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is a choice, the same for every network
        warnings.filterwarnings("ignore", "The number of unique classes is greater")  # so it is with one of a class
        return LogisticRegression(C=strength, max_iter=ITERATIONS, tol=1e-3).fit(x_SD, y_S)


def _few(name: str, draw: int, train: Known, layer: int, strength: float, x_test: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(hashed("few", name, draw))
    each = [np.flatnonzero(train.y_S == one) for one in np.unique(train.y_S)]
    rows = np.concatenate([rng.permutation(some)[:SHOTS] for some in each])
    return logistic(train, layer, strength, rows).predict(x_test)


def _some(count: int, most: int, name: str) -> np.ndarray | slice:
    if count <= most:
        return slice(None)
    return np.sort(np.random.default_rng(hashed("layer", name)).choice(count, most, replace=False))


def _commonest(y_S: np.ndarray) -> Any:
    values, counts = np.unique(y_S, return_counts=True)
    return values[counts.argmax()]
