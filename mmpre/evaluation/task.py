"""What a data set's card says that a network can be measured by."""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """What a model can be evaluated by on held-out samples of a set.

    `input` and `target` name members of a sample, such as "txt" or, where sets differ, "ogg|wav", or fields of its
    JSON, such as "json:year". Samples whose `group` is equal are right answers of each other. A probe is fitted on
    `train` and chosen on `valid`; splits may be those of another set that stands beside this one ("../other/train").
    `labels` limits a task to samples with these targets. `other` is the second side of a pair: of similarity, or the
    wrong one of a minimal pair, where `target` is not read. `prompts` are texts that name a class at {}, `epochs` how
    often a network that is trained on the labels sees them. With a `period` a probe reads a sample's mean states at
    each place modulo it, side by side: a mean over all would lose what place they have in something that repeats.
    `baseline` is what is known of simple methods and of chance, in plain words.
    """

    kind: Literal[
        "classification", "few-shot", "zero-shot", "fine-tuning", "sequence labelling", "retrieval", "regression",
        "similarity", "minimal pairs", "transcription", "detection", "link prediction",
    ]  # fmt: skip
    about: str
    input: str
    target: str
    group: str | None = None
    split: str = "test"
    train: str = "train"
    valid: str = "valid"
    labels: tuple[str, ...] = ()
    other: str | None = None
    prompts: tuple[str, ...] = ("{}",)
    epochs: int = 3
    period: int = 1
    baseline: str | None = None

    def told(self) -> dict[str, Any]:
        """What stands in a card: all but what is as it is unless said otherwise."""
        usual = {one.name: one.default for one in fields(EvalTask) if one.default is not MISSING}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}
