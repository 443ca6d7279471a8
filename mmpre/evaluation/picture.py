"""A picture of what an image-text network has learned: transport from words to regions, what hidden names are read
from, and retrieval."""
# W tokens or names of a caption, R regions, P pool size

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float

from mmpre.data.sample import Sample
from mmpre.data.units import Units
from mmpre.evaluation.grounding import Grounding
from mmpre.evaluation.reading import Reading
from mmpre.evaluation.retrieval import PairRetrieval
from mmpre.objectives.transport import transport
from mmpre.processes.processes import Processes

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes too
SHOWN = 2  # samples with their transport
QUERIES, BEST = 4, 4  # captions, and pictures found for each


def draw(
    path: Path, units: Units, grounding: Grounding, reading: Reading, retrieval: PairRetrieval, processes: Processes,
    *, title: str, credit: str = "",
) -> Path:  # fmt: skip
    """Write a PNG: on the left, samples with boxes, the transport from words to regions, and which regions hidden names
    are read from; on the right, captions and the pictures that score highest for each, the right one framed."""
    samples = [units.sample(i) for i in range(min(retrieval.rows, len(units)))]
    score_PP = retrieval.scores(samples, processes).numpy()
    figure = plt.figure(figsize=(17, 8.4), facecolor="white", layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    _draw_words(left, samples, grounding, reading, processes)
    _draw_retrieval(right, samples, score_PP)
    figure.suptitle(title, fontsize=13)
    if credit:
        figure.text(0.005, 0.002, credit, ha="left", va="bottom", fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_words(
    figure, samples: Sequence[Sample], grounding: Grounding, reading: Reading, processes: Processes
) -> None:
    axes = figure.subplots(SHOWN, 3, width_ratios=[1, 1.25, 1.25])
    figure.suptitle("words and regions (frames: the truth)", fontsize=11)
    states = grounding.states(samples[:SHOWN], processes)
    for (sample, word_WD, region_RD), (shown, moved, read) in zip(_in_order(states, samples), axes, strict=False):
        image, boxes = sample.image(), [region["box"] for region in sample.json()["regions"]]
        shown.imshow(image)
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=2.5, edgecolor=_colour(number))
            shown.add_patch(frame)
        shown.set_axis_off()
        shown.set_title(_wrapped(sample.text(), 30), fontsize=9, loc="left")
        words, named = _words(sample, grounding)[1:-1], [[t - 1 for t in one] for one in grounding.named(sample)]
        plan_WR = transport(word_WD, region_RD).numpy()[1:-1]
        _draw_shares(moved, plan_WR, words, named, "where each word's mass goes")
        named_W, cost_WR = reading.costs(sample, processes)
        regions, cost_WR = named_W.tolist(), cost_WR.clamp(min=0).numpy()
        names = [" ".join(words[t] for t in named[region]) for region in regions]
        own = [[n for n, one in enumerate(regions) if one == region] for region in range(cost_WR.shape[1])]
        _draw_shares(read, cost_WR, names, own, "what a hidden name is read from")


def _draw_shares(
    axis, value_WR: Float[np.ndarray, "W R"], words: Sequence[str], named: Sequence[Sequence[int]], title: str
) -> None:
    share_WR = value_WR / np.maximum(value_WR.sum(1, keepdims=True), 1e-9)
    axis.imshow(share_WR, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axis.set_yticks(range(len(words)), words, fontsize=9)
    axis.set_xticks(range(share_WR.shape[1]), [f"region {n + 1}" for n in range(share_WR.shape[1])], fontsize=8)
    for number, label in enumerate(axis.get_xticklabels()):
        label.set_color(_colour(number))
        label.set_weight("bold")
    for number, places in enumerate(named):
        for word in places:
            axis.get_yticklabels()[word].set_color(_colour(number))
            axis.get_yticklabels()[word].set_weight("bold")
            axis.add_patch(Rectangle((number - 0.5, word - 0.5), 1, 1, fill=False, lw=2, edgecolor=_colour(number)))
    axis.set_title(title, fontsize=9)


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
