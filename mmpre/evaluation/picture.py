"""A picture of what an image-text network has learned: transport from words to regions, and retrieval."""
# W tokens of a caption, R regions, P pool size

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float

from mmpre.data.sample import Sample
from mmpre.data.units import Units
from mmpre.evaluation.grounding import Grounding
from mmpre.evaluation.retrieval import PairRetrieval
from mmpre.objectives.transport import transport
from mmpre.processes import Processes

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes too
SHOWN = 2  # samples with their transport
QUERIES, BEST = 4, 4  # captions, and pictures found for each


def draw(
    path: Path, units: Units, grounding: Grounding, retrieval: PairRetrieval, processes: Processes, *, title: str,
    credit: str = "",
) -> Path:  # fmt: skip
    """Write a PNG: on the left, samples with boxes and the transport from words to regions; on the right, captions and
    the pictures that score highest for each, the right one framed."""
    samples = [units.sample(i) for i in range(min(retrieval.rows, len(units)))]
    score_PP = retrieval.scores(samples, processes).numpy()
    figure = plt.figure(figsize=(15, 8.4), facecolor="white", layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.05])
    _draw_transport(left, samples, grounding, processes)
    _draw_retrieval(right, samples, score_PP)
    figure.suptitle(title, fontsize=13)
    if credit:
        figure.text(0.995, 0.002, credit, ha="right", va="bottom", fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_transport(figure, samples: Sequence[Sample], grounding: Grounding, processes: Processes) -> None:
    axes = figure.subplots(SHOWN, 2, width_ratios=[1, 1.5])
    figure.suptitle("transport from words to regions", fontsize=11)
    states = grounding.states(samples[:SHOWN], processes)
    for (sample, word_WD, region_RD), (shown, matrix) in zip(_in_order(states, samples), axes, strict=False):
        image, boxes = sample.image(), [region["box"] for region in sample.json()["regions"]]
        shown.imshow(image)
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=2.5, edgecolor=_colour(number))
            shown.add_patch(frame)
        shown.set_axis_off()
        shown.set_title(_wrapped(sample.text(), 38), fontsize=9, loc="left")
        plan_WR = transport(word_WD, region_RD).numpy()
        words = _words(sample, grounding)
        _draw_plan(matrix, plan_WR[1:-1], words[1:-1], sample, grounding)


def _draw_plan(
    axis, plan_WR: Float[np.ndarray, "W R"], words: Sequence[str], sample: Sample, grounding: Grounding
) -> None:
    share_WR = plan_WR / plan_WR.sum(1, keepdims=True)
    axis.imshow(share_WR, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axis.set_yticks(range(len(words)), words, fontsize=9)
    axis.set_xticks(range(share_WR.shape[1]), [f"region {n + 1}" for n in range(share_WR.shape[1])], fontsize=9)
    for number, label in enumerate(axis.get_xticklabels()):
        label.set_color(_colour(number))
        label.set_weight("bold")
    for number, tokens in enumerate(grounding.named(sample)):
        for token in tokens:
            axis.get_yticklabels()[token - 1].set_color(_colour(number))
            axis.get_yticklabels()[token - 1].set_weight("bold")
            axis.add_patch(Rectangle((number - 0.5, token - 1.5), 1, 1, fill=False, lw=2, edgecolor=_colour(number)))
    axis.set_title("share of each word's mass (frames: the truth)", fontsize=9)


def _draw_retrieval(figure, samples: Sequence[Sample], score_PP: Float[np.ndarray, "P P"]) -> None:
    axes = figure.subplots(QUERIES, BEST, gridspec_kw={"hspace": 0.02})
    figure.suptitle(f"the {BEST} best of {len(samples)} pictures for a caption (green: the right one)", fontsize=11)
    for query, row in enumerate(axes):
        for place, (item, axis) in enumerate(zip(np.argsort(-score_PP[query])[:BEST], row, strict=True)):
            axis.imshow(samples[item].image())
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set(linewidth=4 if item == query else 0.8, color="#2ca02c" if item == query else "#bbbbbb")
            if place == 0:
                axis.set_title(_wrapped(samples[query].text(), 90), fontsize=9, loc="left")


def _in_order(states, samples: Sequence[Sample]):
    """Packing sorts rows by length; a picture keeps the order of the samples."""
    place = {sample.key: n for n, sample in enumerate(samples)}
    return sorted(states, key=lambda one: place[one[0].key])


def _words(sample: Sample, grounding: Grounding) -> list[str]:
    text = sample.text()
    return [text[a:b] for a, b in grounding.readers[grounding.text].spans(sample)]


def _wrapped(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) + 1 > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
