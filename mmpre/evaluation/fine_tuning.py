"""A whole network trained on a few labels: the parts that its tasks share, and classification."""
# N tokens of the packed batch, B rows, n outputs of one row, D model width, C classes

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.batch import Batch, Row, pack
from mmpre.data.loader import MicroBatch, Slot
from mmpre.data.sample import Sample
from mmpre.draw import Draw, hashed
from mmpre.evaluation.cards import CardTask
from mmpre.evaluation.features import role_of, tokenized
from mmpre.evaluation.probe import Known, classify
from mmpre.evaluation.results import NotMeasured, Result, mean
from mmpre.evaluation.subject import Subject, title, valid_of
from mmpre.masking.protocol import untouched
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term
from mmpre.processes.processes import Processes
from mmpre.recipe import Stage, Task
from mmpre.schedules import Linear
from mmpre.tokens import Tokens
from mmpre.training.loop import Context, steps
from mmpre.training.optim import AdamW
from mmpre.view import View

MOST = {"train": 2_000, "valid": 500, "test": 2_000}  # samples, and then windows of them
RATES = (2e-4, 1e-3)  # peaks of the learning rate that are tried on valid
BATCH, SEED = 16, 0

Measure = Callable[[Float[Tensor, "n C"], Tensor], Float[Tensor, ""]]


@dataclass(frozen=True)
class Example:
    """A window of a sample, and what is to be said of it."""

    number: int
    tokens: Tokens
    target: Tensor


class Tuned(nn.Module):
    """A network, and a linear map of its states: of their mean, or of each ordinary token's. The map begins at zero.

    As an objective it is trained on rows whose keys are numbers of `examples`, by the mean over rows of `loss`.
    """

    def __init__(
        self, net: Network, role: str, examples: Sequence[Example], *, outputs: int, pool: bool, loss: Measure
    ) -> None:
        super().__init__()
        self.net = net
        self.role, self.targets, self.pool, self.loss = role, [one.target for one in examples], pool, loss
        device = next(net.parameters()).device
        with torch.no_grad():
            width = net(pack([_row(0, role, examples[0])], net.attend.plan).to(device)).shape[1]
        self.head = nn.Linear(width, outputs, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {self.role: self.net.readers[self.role]}

    def scores(self, batch: Batch) -> list[Float[Tensor, "n C"]]:
        """Each row's scores, one or one a token, in the order of the batch's keys."""
        ordinary_N = batch.seen[self.role].special_N < 0
        state_nD, row_n = self.net(batch)[ordinary_N], batch.layout.row_N[ordinary_N]
        count_B = torch.bincount(row_n, minlength=len(batch.layout))
        if self.pool:
            sum_BD = state_nD.new_zeros(len(count_B), state_nD.shape[1]).index_add(0, row_n, state_nD)
            return list(self.head(sum_BD / count_B.clamp(min=1)[:, None]).split(1))
        return list(self.head(state_nD).split(count_B.tolist()))

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        targets = [self.targets[int(key)].to(self.head.weight.device) for key in batch.keys]
        losses = [self.loss(s.float(), t) for s, t in zip(self.scores(batch), targets, strict=True)]
        return Loss([Term("fine-tuning", torch.stack(losses).sum(), "rows")])


def fine_tuned(task: CardTask, subject: Subject) -> list[Result]:
    """Right answers of the whole network, trained with a linear head on its mean state; windows of a sample vote."""
    reader_of(task, subject)
    values = {part: {n: str(v) for n, _, v in labelled(task, part)} for part in MOST}
    labels = sorted(set(values["train"].values()))
    number_of = {label: i for i, label in enumerate(labels)}

    def target(sample: Sample, windows: Sequence[Tokens], value: Any) -> list[Tensor]:
        return [torch.tensor([number_of.get(str(value), -1)])] * len(windows)

    def right(part: str, scores: Sequence[Tensor]) -> np.ndarray:
        votes: dict[int, Tensor] = {}
        for example, score_1C in zip(parts[part], scores, strict=True):
            votes[example.number] = votes.get(example.number, 0) + F.log_softmax(score_1C[0], 0)
        return np.array([labels[int(vote_C.argmax())] == values[part][n] for n, vote_C in sorted(votes.items())])

    parts = {part: examples(task, subject, part, target) for part in MOST}
    if len(labels) < 2:
        raise NotMeasured(f"fine-tuning: wanted samples of two classes in {task.train}, got {labels}; look at the card")
    best, told = train(
        task, subject, parts, lambda scores: right("valid", scores).mean(), outputs=len(labels), pool=True,
        loss=lambda score_1C, target_1: F.cross_entropy(score_1C, target_1),
    )  # fmt: skip
    commonest = max(labels, key=list(values["train"].values()).count)
    guess = float(np.mean([value == commonest for value in values["test"].values()]))
    found = right("test", read(best, parts["test"]))
    return [mean(f"{title(task)}: fine-tuned", found, chance=guess, protocol=told)]


def of_bags(name: str, train: Known, valid: Known, test: Known) -> list[Result]:
    """What stands beside a fine-tuned network: the linear probe of bags of pieces."""
    return [replace(classify(name, train, valid, test)[0], name=f"{name}: fine-tuned")]


def reader_of(task: CardTask, subject: Subject) -> Reader:
    """What reads a task's input. Raises NotMeasured where the run has no such reader."""
    if not subject.reads(task.input):
        raise NotMeasured(
            f"{task.kind}: wanted a reader of .{task.input}, the run reads {', '.join(subject.suffixes)}; measure a "
            "run that reads it"
        )
    return subject.network.readers[role_of(subject.network.readers, task.input)]


def labelled(task: CardTask, part: str) -> Iterator[tuple[int, Sample, Any]]:
    """Samples of a part (train, valid or test) with their targets."""
    split = {"train": task.train, "valid": valid_of(task), "test": task.split}[part]
    for number, sample in task.samples(split, MOST[part]):
        value = task.field(sample, task.target)
        if value is not None:
            yield number, sample, value


def examples(
    task: CardTask, subject: Subject, part: str, target: Callable[[Sample, Sequence[Tokens], Any], list[Tensor]],
    *, whole: bool = False,
) -> list[Example]:  # fmt: skip
    """The windows of a part's samples, with the targets that `target` makes of them (for none, a sample is left out).

    Where there are too many windows, some are drawn from the set's name alone; samples, where they are to stay `whole`.
    """
    reader, found = reader_of(task, subject), []
    for number, sample, value in labelled(task, part):
        windows = [tokens for _, tokens in tokenized(reader, task.input, [(number, sample)])]
        targets = target(sample, windows, value) if windows else []
        found += [Example(number, *one) for one in zip(windows, targets, strict=bool(targets))]
    if len(found) > MOST[part]:
        rng = np.random.default_rng(hashed("fine-tuning", task.set, part))
        unit = np.array([one.number if whole else i for i, one in enumerate(found)])
        place = {one: i for i, one in enumerate(rng.permutation(np.unique(unit)).tolist())}
        order = sorted(range(len(found)), key=lambda i: place[unit[i]])  # keeps the order within a sample
        found = [found[i] for i in order[: MOST[part]] if not whole or unit[i] != unit[order[MOST[part]]]]
    if not found:
        raise NotMeasured(f"{task.kind}: {part} has no sample with .{task.input} and {task.target} that can be used")
    return found


def train(
    task: CardTask, subject: Subject, parts: Mapping[str, Sequence[Example]],
    good: Callable[[Sequence[Tensor]], float], **head: Any,
) -> tuple[Tuned, dict[str, Any]]:  # fmt: skip
    """The network trained with the learning rate by which `good` of its scores of valid is highest; and the protocol.

    Each training begins at the subject's own weights, which it leaves as they are; a frozen front stays frozen.
    """
    tried = {}
    for rate in RATES:
        one = _trained(task, subject, parts["train"], rate, head)
        tried[rate] = float(good(read(one, parts["valid"]))), one
    rate = max(tried, key=lambda one: tried[one][0])
    told = {"epochs": task.epochs, "batch": BATCH, "lr": rate, "of": list(RATES), "seed": SEED,
            "optimizer": "AdamW, a tenth of the steps to the peak, then falling to 0"}  # fmt: skip
    return tried[rate][1], told | {f"{part} windows": len(some) for part, some in parts.items()}


@torch.inference_mode()
def read(tuned: Tuned, some: Sequence[Example]) -> list[Float[Tensor, "n C"]]:
    """The scores of examples, in their order."""
    tuned.eval()
    device, found = tuned.head.weight.device, {}
    for start in range(0, len(some), BATCH):
        rows = [_row(i, tuned.role, some[i]) for i in range(start, min(start + BATCH, len(some)))]
        batch = pack(rows, tuned.net.attend.plan).to(device)
        found |= dict(zip(map(int, batch.keys), [one.float().cpu() for one in tuned.scores(batch)], strict=True))
    return [found[i] for i in range(len(some))]


def _trained(task: CardTask, subject: Subject, some: Sequence[Example], rate: float, head: Mapping[str, Any]) -> Tuned:
    role = role_of(subject.network.readers, task.input)
    net = copy.deepcopy(subject.network)
    if not any(parameter.requires_grad for parameter in net.parameters()):  # an average, which no stage trains
        net.requires_grad_(True)
    tuned = Tuned(net, role, some, **head)
    each = -(-len(some) // BATCH)
    count = task.epochs * each
    stage = Stage(
        tasks=[Task("fine-tuning", View(), tuned)], data=(), steps=count, batch=BATCH, clip=1.0,
        optimizer=AdamW(lr=rate, weight_decay=0.01, schedule=Linear(warmup=count // 10, total=count)),
    )  # fmt: skip

    def batches() -> Iterator[MicroBatch]:
        for step in range(count):
            epoch, place = divmod(step, each)
            order = np.random.default_rng(hashed("fine-tuning", SEED, epoch)).permutation(len(some))
            rows = [_row(i, role, some[i]) for i in order[place * BATCH : (place + 1) * BATCH].tolist()]
            packed = pack(rows, tuned.net.attend.plan)
            yield MicroBatch(Slot(step, 0, "fine-tuning", step * BATCH, len(rows)), [packed], [], [])

    optimizer = stage.optimizer.build((n, p) for n, p in tuned.named_parameters() if p.requires_grad)
    context = Context(SEED, 0, Processes(device=tuned.head.weight.device))
    for _ in steps(stage, tuned, optimizer, batches(), context, first=0, last=count):
        pass
    return tuned


def _row(number: int, role: str, one: Example) -> Row:
    roles = {role: one.tokens}
    return Row(str(number), roles, roles, {role: untouched(one.tokens).replaced_N}, {})
