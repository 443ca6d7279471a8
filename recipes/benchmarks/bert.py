"""BERT's training step on ragged text, packed, against transformers' BertForMaskedLM as people run it today.

All contenders have the same sizes, dropout, masking rate, optimizer (torch's fused AdamW, the gradient's norm clipped)
and one loading worker. They read rows that were cut in the same way, in the same order; only the layout differs:

    packed    mmpre: no padding, the vocabulary head at hidden tokens only
    padded    BertForMaskedLM, DataCollatorForLanguageModeling, padded to the longest row; the same rows in each step
    grouped   the same, rows of like length put together (the Trainer's `group_by_length`, over its 50 batches)
    full      BertForMaskedLM on the same rows joined and cut to full length: no padding, borders of texts lost; as
              many tokens in a step as packed
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatches, load, slots
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.data.units import measure as cut
from mmpre.draw import Draw
from mmpre.processes.processes import Processes
from mmpre.recipe import Recipe
from mmpre.recipes.benchmarks.harness import quantiles, serve, take_turns, timed
from mmpre.recipes.benchmarks.texts import find_texts, tokenizer_of
from mmpre.recipes.bert import bert
from mmpre.training.loop import Context, Step
from mmpre.training.loop import steps as train_steps

description = "BERT on ragged text against transformers' BertForMaskedLM: padded, grouped by length, full-length"

AHEAD = 8  # steps that are loaded beyond the last one, so that loading goes on while the last ones are timed
POOL = 50  # batches that the Trainer sorts by length together


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and settings that all contenders share. `batch` rows of at most `length` tokens make a step."""

    data: str
    tokenizer: str
    width: int
    depth: int
    length: int = 256
    batch: int = 32
    dropout: float = 0.1
    bf16: bool = False
    steps: int
    warmup: int = 2
    micro_batches: int = 1

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)


SIZES = {"6 x 256": dict(width=256, depth=6, vocab=16_000, steps=8),
         "12 x 768": dict(width=768, depth=12, vocab=30_522, steps=3, warmup=1)}  # fmt: skip
USUAL = {("6 x 256", "float32", 0.1), ("12 x 768", "bfloat16", 0.1)}  # what is run where no case is asked for


def cases(settings: Settings, folder: Path, sizes: Iterable[str] = tuple(SIZES)) -> Iterator[tuple[str, Case]]:
    """Title and case for all data sets, sizes, precisions and dropouts that are asked for, or else the usual ones.

    Tokenizers are made in `folder`.
    """
    choices = itertools.product(find_texts(settings), sizes, ("float32", "bfloat16"), (0.0, 0.1))
    for data, size, precision, dropout in choices:
        numbers = dict(SIZES[size])
        vocab = numbers.pop("vocab")
        title = f"{data.name}, {size}, vocabulary {vocab:,}, {precision}, dropout {dropout}"
        if settings.cases not in title or not (settings.cases or (size, precision, dropout) in USUAL):
            continue
        numbers["steps"] = settings.steps or numbers["steps"]
        tokenizer = tokenizer_of(data, vocab, folder)
        yield title, Case(
            data=str(data / "train"), tokenizer=str(tokenizer), bf16=precision == "bfloat16", dropout=dropout, **numbers
        )  # fmt: skip


def run(settings: Settings) -> Iterator[Comparison]:
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        for title, case in cases(settings, Path(folder)):
            turns = take_turns(__spec__.name, list(CONTENDERS), asdict(case), settings, title)
            about = {k: v for k, v in asdict(case).items() if k not in ("data", "tokenizer")}
            yield Comparison(title=title, unit="real tokens", turns=turns, about=about)


def packed(**numbers: object) -> Turn:
    case = Case(**numbers)
    with closing(training(case)) as steps:
        tokens = (step.counts["tokens"] for step in steps)
        return timed(tokens, warmup=case.warmup, count=case.steps, more={"padding %": 0.0})


def training(case: Case, *, exact: bool = False, processes: Processes | None = None) -> Iterator[Step]:
    """mmpre's own loop on the case's recipe, with one loading worker."""
    recipe, total, processes = recipe_of(case), case.warmup + case.steps, processes or Processes()
    stage, module, source = recipe.stages[0], recipe.module(), source_of(case, recipe)
    optimizer = stage.optimizer.build(module.named_parameters())
    context = Context(0, 0, processes, bf16=case.bf16, exact=exact)
    order = slots(stage, 0, 0, total + AHEAD, processes.rank, processes.world)
    with closing(load(source, order, workers=1)) as batches:
        yield from train_steps(stage, module, optimizer, batches, context, first=0, last=total)


def recipe_of(case: Case) -> Recipe:
    torch.manual_seed(0)
    return bert(
        data=(case.data,), tokenizer=case.tokenizer, width=case.width, depth=case.depth, heads=case.heads,
        length=case.length, batch=case.batch, micro_batches=case.micro_batches, steps=case.warmup + case.steps + AHEAD,
        warmup=0, dropout=case.dropout,
    )  # fmt: skip


def source_of(case: Case, recipe: Recipe) -> MicroBatches:
    """What makes the micro-batches of a step."""
    stage = recipe.stages[0]
    (task,) = stage.tasks
    shards = open_shards(stage.data)
    units = cut(Units(ShardReader(shards)), task.objective.readers.values(), shards.cache)
    return MicroBatches.of(stage, units, seed=0, number=0)


def rows_of(case: Case, count: int) -> list[list[int]]:
    """The ids of the first `count` rows in the order that packed reads them."""
    recipe = recipe_of(case)
    source, reader = source_of(case, recipe), recipe.network.readers["text"]
    units = source.order.units(np.arange(count)).tolist()
    draw = Draw.row(0, 0, 0, epoch=0, unit=0)  # the reader draws nothing from it
    return [reader.tokenize(source.units.sample(unit), draw)["ids"].tolist() for unit in units]


def padded(**numbers: object) -> Turn:
    case = Case(**numbers)
    rows = rows_of(case, case.batch * (case.warmup + case.steps + AHEAD))
    return _theirs(case, rows, _in_turn(len(rows), case.batch))


def grouped(**numbers: object) -> Turn:
    case = Case(**numbers)
    rows = rows_of(case, case.batch * max(POOL, case.steps))
    batches = by_length([len(row) for row in rows], case.batch)
    chosen = quantiles(case.warmup, case.warmup + case.steps, AHEAD)
    return _theirs(case, rows, [batches[int(quantile * len(batches))] for quantile in chosen])


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """The Trainer's batches of rows of like length, all sorted together."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    rng = torch.Generator().manual_seed(0)
    order = get_length_grouped_indices(list(lengths), batch, mega_batch_mult=len(lengths) // batch, generator=rng)
    return [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]


def full(**numbers: object) -> Turn:
    case = Case(**numbers)
    steps = case.warmup + case.steps + AHEAD
    joined = list(itertools.chain.from_iterable(rows_of(case, case.batch * steps)))
    batch = max(1, round(len(joined) / steps / case.length))
    rows = [joined[i : i + case.length] for i in range(0, len(joined) - case.length + 1, case.length)]
    batches = _in_turn(len(rows), batch)
    return _theirs(case, rows, (batches * (steps // len(batches) + 1))[:steps])


def _in_turn(count: int, batch: int) -> list[list[int]]:
    return [list(range(i, i + batch)) for i in range(0, count - batch + 1, batch)]


def _theirs(case: Case, rows: Sequence[list[int]], batches: Sequence[Sequence[int]]) -> Turn:
    """Train BertForMaskedLM on rows in these batches, by a plain loop, as their examples do."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=case.tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=case.width, num_hidden_layers=case.depth, num_attention_heads=case.heads,
        intermediate_size=4 * case.width, max_position_embeddings=case.length, hidden_dropout_prob=case.dropout,
        attention_probs_dropout_prob=case.dropout,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6, weight_decay=0.01, fused=True)
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    loader = torch.utils.data.DataLoader(
        [{"input_ids": row, "special_tokens_mask": [int(i in special) for i in row]} for row in rows],
        batch_sampler=batches, num_workers=1, prefetch_factor=4,
        collate_fn=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )  # fmt: skip
    sizes = []

    def steps() -> Iterator[int]:
        for batch in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.bf16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            real = int(batch["attention_mask"].sum())
            sizes.append((real, batch["attention_mask"].numel()))
            yield real

    turn = timed(steps(), warmup=case.warmup, count=case.steps)
    real, places = (sum(column) for column in zip(*sizes[case.warmup :], strict=True))
    return replace(turn, more={"padding %": 100 * (1 - real / places)})


CONTENDERS = {"packed": packed, "padded": padded, "grouped": grouped, "full": full}

if __name__ == "__main__":
    serve(CONTENDERS)
