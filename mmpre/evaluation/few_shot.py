"""How far a few labelled samples of each class go: a linear probe on frozen vectors."""
# S samples of the test, R draws

from typing import Any

import numpy as np

from mmpre.draw import hashed
from mmpre.evaluation.probe import STRENGTHS, Known, fitted, scaled
from mmpre.evaluation.results import RESAMPLES, Result

SHOTS = (1, 5, 10)  # labelled samples of a class
DRAWS, TRIED = 10, 3  # of them, and how many of these choose the layer and the strength
VALID, TEST = 1, 2


def few_shot(name: str, train: Known, valid: Known, test: Known) -> list[Result]:
    """For each number of shots, right answers on test, the mean over draws of the labelled samples.

    A class with fewer samples gives all it has. Layer (with C = 1) and then C are chosen on valid, by their mean over
    the first draws. Intervals are over draws and test rows both. Vectors are scaled by all of train,
    without its labels.
    """
    values, counts = np.unique(train.y_S, return_counts=True)
    guess = float((test.y_S == values[counts.argmax()]).mean())
    layers = range(len(train.layers))
    scaled_L = [[scaled(one.layer(layer), train.layer(layer)) for one in (train, valid, test)] for layer in layers]
    results = []
    for shots in SHOTS:
        rows = [_rows(name, draw, train.y_S, shots) for draw in range(DRAWS)]

        def right(layer: int, strength: float, on: int, drawn: list[np.ndarray]) -> np.ndarray:
            x_train, y_S = scaled_L[layer][0], (train, valid, test)[on].y_S
            fits = (fitted(x_train[some], train.y_S[some], strength) for some in drawn)
            return np.stack([fit.predict(scaled_L[layer][on]) == y_S for fit in fits])

        tried = rows[:TRIED]
        layer = max(layers, key=lambda one: right(one, 1.0, VALID, tried).mean())
        strength = max(STRENGTHS, key=lambda one: right(layer, one, VALID, tried).mean())
        told = {"layer": layer, "C": strength, "draws": DRAWS, "least of a class": int(min(shots, counts.min())),
                "valid rows": len(valid)}  # fmt: skip
        results.append(_over_draws(f"{name}: {shots}-shot", right(layer, strength, TEST, rows), guess, told))
    return results


def _rows(name: str, draw: int, y_S: np.ndarray, shots: int) -> np.ndarray:
    """Some rows of each class, the first of one order: fewer shots are among more."""
    rng = np.random.default_rng(hashed("few-shot", name, draw))
    return np.concatenate([rng.permutation(np.flatnonzero(y_S == one))[:shots] for one in np.unique(y_S)])


def _over_draws(name: str, right_RS: np.ndarray, chance: float, protocol: dict[str, Any]) -> Result:
    rng, (draws, rows) = np.random.default_rng(hashed("bootstrap", name)), right_RS.shape
    means = []
    for _ in range(RESAMPLES):
        of_S = right_RS[rng.integers(0, draws, draws)].mean(0)
        means.append(of_S[rng.integers(0, rows, rows)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return Result(name, float(right_RS.mean()), float(low), float(high), rows, chance, protocol=protocol,
                  rows=right_RS.mean(0))  # fmt: skip
