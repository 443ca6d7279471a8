"""Weights of transformers' BERT-like models in ours, and small samples of text and regions, for tests."""

import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from mmpre.batch import Batch, pack
from mmpre.blocks import Encoder
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.heads.vocabulary import Vocabulary
from mmpre.modalities.text import Text
from mmpre.recipe import Recipe
from mmpre.view import View

WORDS = [f"w{i}" for i in range(60)]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(size: int = len(SPECIALS) + len(WORDS), *, roberta: bool = False) -> Tokenizer:
    """A tokenizer of whole words w0, w1 ..., with BERT's special tokens, or RoBERTa's in RoBERTa's order."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else SPECIALS
    names = specials + [f"w{i}" for i in range(size - len(specials))]
    unknown = specials[3 if roberta else 1]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(specials)
    return backend


def some_samples(count: int, *, features: int = 16, classes: int = 7, most: int = 12, seed: int = 0) -> list[Sample]:
    """Captions of 2 to `most` words and pictures of 1 to 6 regions."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        words, regions = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, most + 1), (1, 7)))
        text = " ".join(WORDS[int(w)] for w in torch.randint(len(WORDS), (words,), generator=g))
        low, size = (torch.rand(regions, 2, generator=g) * 0.4 + 0.1 for _ in range(2))
        tensors = {
            "features": torch.randn(regions, features, generator=g).half(),
            "boxes": torch.cat([low, low + size, size, size.prod(1, keepdim=True)], 1),
            "soft": torch.randn(regions, classes, generator=g).mul(3).softmax(1),
        }
        members = {"txt": text.encode(), "regions.safetensors": safetensors.torch.save(tensors)}
        made.append(Sample(f"{i:03d}", "shard", "digest", members))
    return made


def some_batch(
    view: View, readers: dict, samples: list[Sample], *, seed: int = 0, epoch: int = 0, first: int = 0
) -> Batch:
    """The samples, as units `first`, `first` + 1 ..., as a view makes them, with one another as donors."""
    rows = []
    for i, sample in enumerate(samples):

        def donor(role: str, k: int, own: int = i) -> Sample:
            return samples[(own + k + 1) % len(samples)]

        rows.append(view.row(sample, readers, Draw.row(seed, 0, 0, epoch=epoch, unit=first + i), donor))
    return pack(rows, view.attend.plan)


def losses_of(recipe: Recipe, samples: list[Sample], steps: int, *, lr: float = 3e-3) -> list[float]:
    """The losses of plain steps on the same samples, masked anew in each."""
    task = recipe.stages[0].tasks[0]
    optimizer = torch.optim.AdamW(recipe.module().parameters(), lr=lr)
    losses = []
    for step in range(steps):
        batch = some_batch(task.view, task.objective.readers, samples, epoch=step)
        loss = task.objective(batch, Draw.micro_batch(0, 0, 0, 0)).total(batch.counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class AsUnits:
    """Samples as the units that evaluations read."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, i: int) -> Sample:
        return self.samples[i]


def padded(batch: Batch, state_ND: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids (or states) of a batch of text alone as transformers wants them, with the mask of what is no padding."""
    values = batch.seen["text"]["ids"] if state_ND is None else state_ND
    rows = values.split(batch.layout.lengths_B.tolist())
    full = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return full, torch.arange(full.shape[1]) < batch.layout.lengths_B[:, None]


@torch.no_grad()
def copy_embeddings(text: Text, theirs: nn.Module) -> None:
    text.table.weight.copy_(theirs.word_embeddings.weight)
    text.positions.weight.copy_(theirs.position_embeddings.weight[: len(text.positions.weight)])
    text.types.weight[0].copy_(theirs.token_type_embeddings.weight[0])
    text.norm.load_state_dict(theirs.LayerNorm.state_dict())


@torch.no_grad()
def copy_encoder(encoder: Encoder, theirs: nn.Module) -> None:
    for block, layer in zip(encoder.blocks, theirs.layer, strict=True):
        attention, feed_forward = block.sublayers
        parts = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
        attention.sublayer.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        attention.sublayer.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        attention.sublayer.out.load_state_dict(layer.attention.output.dense.state_dict())
        attention.norm.load_state_dict(layer.attention.output.LayerNorm.state_dict())
        feed_forward.sublayer.up.load_state_dict(layer.intermediate.dense.state_dict())
        feed_forward.sublayer.down.load_state_dict(layer.output.dense.state_dict())
        feed_forward.norm.load_state_dict(layer.output.LayerNorm.state_dict())


@torch.no_grad()
def copy_head(head: Vocabulary, theirs: nn.Module) -> None:
    head.transform.dense.load_state_dict(theirs.transform.dense.state_dict())
    head.transform.norm.load_state_dict(theirs.transform.LayerNorm.state_dict())
    head.bias.copy_(theirs.bias)


def vary(module: nn.Module, seed: int = 0) -> None:
    """Move every weight from its start, so that biases and norms that are mixed up do not go unseen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
