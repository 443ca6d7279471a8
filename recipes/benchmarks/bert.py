"""BERT's training step on ragged text, packed, against transformers' BertForMaskedLM as people run it today.

All contenders have the same sizes, as many rows of the same texts in a step, the same masking rate, torch's fused
AdamW and one loading worker; they differ in how a batch is laid out:

    packed    mmpre: no padding, the vocabulary head at hidden tokens only
    padded    BertForMaskedLM, DataCollatorForLanguageModeling, dynamic padding to the longest row
    grouped   the same, rows of like length put together (transformers' LengthGroupedSampler)
    full      BertForMaskedLM on texts joined and cut to full length: no padding at all, borders lost
"""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch

from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatches, load, slots
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.data.units import measure as cut
from mmpre.loop import Context
from mmpre.loop import steps as train_steps
from mmpre.processes import Processes
from mmpre.recipes.benchmarks.harness import measure
from mmpre.recipes.bert import bert

contenders = ("packed", "padded", "grouped", "full")


def main() -> None:
    """One turn of one contender; `mmpre bench` calls it in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=contenders)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    asked = parser.parse_args()
    torch.manual_seed(0)
    step = packed(asked) if asked.contender == "packed" else padded(asked)
    measure(step, warmup=asked.warmup, steps=asked.steps)


def packed(asked: argparse.Namespace) -> Callable[[], int]:
    total = asked.steps + asked.warmup
    recipe = bert(
        data=tuple(asked.data), tokenizer=asked.tokenizer, width=asked.width, depth=asked.depth,
        heads=asked.width // 64, length=asked.length, batch=asked.batch, micro_batches=1, steps=total, warmup=0,
        dropout=0.0,
    )  # fmt: skip
    stage, module = recipe.stages[0], recipe.module()
    (task,) = stage.tasks
    shards = open_shards(stage.data)
    units = cut(Units(ShardReader(shards)), task.objective.readers.values(), shards.cache)
    source = MicroBatches.of(stage, units, seed=0, number=0)
    batches = load(source, slots(stage, 0, 0, total, 0, 1), workers=1)
    optimizer = stage.optimizer.build(module.named_parameters())
    done = train_steps(
        stage, module, optimizer, batches, Context(0, 0, Processes(), bf16=asked.bf16), first=0, last=total
    )
    return lambda: next(done).counts["tokens"]


def padded(asked: argparse.Namespace) -> Callable[[], int]:
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=asked.tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=asked.width, num_hidden_layers=asked.depth,
        num_attention_heads=asked.width // 64, intermediate_size=4 * asked.width, max_position_embeddings=asked.length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, fused=True
    )
    batches = _batches(asked, tokenizer)

    def step() -> int:
        batch = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=asked.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(batch["attention_mask"].sum())

    return step


def _batches(asked: argparse.Namespace, tokenizer) -> Iterator[dict]:
    """Texts cut beforehand, as `datasets.map` would, then torch's DataLoader with transformers' collator."""
    import transformers

    shards = open_shards(asked.data)
    reader = ShardReader(shards)
    wanted = asked.batch * (asked.steps + asked.warmup)
    texts = [reader.read(i)["txt"].decode() for i in range(min(len(shards), 4 * wanted))]
    rows = tokenizer(texts, truncation=asked.contender != "full", max_length=asked.length, return_attention_mask=False)[
        "input_ids"
    ]
    if asked.contender == "full":
        joined = list(itertools.chain.from_iterable(rows))
        rows = [joined[i : i + asked.length] for i in range(0, len(joined) - asked.length + 1, asked.length)]
    data = [{"input_ids": row} for row in rows]
    sampler = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(0))
    if asked.contender == "grouped":
        from transformers.trainer_pt_utils import LengthGroupedSampler

        sampler = LengthGroupedSampler(
            asked.batch, lengths=[len(row) for row in rows], generator=torch.Generator().manual_seed(0)
        )
    loader = torch.utils.data.DataLoader(
        data, batch_size=asked.batch, sampler=sampler, num_workers=1, drop_last=True, prefetch_factor=4,
        collate_fn=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )  # fmt: skip
    while True:
        yield from loader


if __name__ == "__main__":
    main()
