"""What the exporters share: how an encoder differs from a plain one, its numbers, and made rows to compare on."""
# n tokens of a row

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
import transformers
from torch import nn

from mmpre.attention import Full
from mmpre.batch import Batch, Row, pack
from mmpre.blocks import Encoder
from mmpre.masking.protocol import untouched
from mmpre.recipe import Recipe
from mmpre.sublayers.attention import Attention
from mmpre.sublayers.feed_forward import FeedForward
from mmpre.sublayers.residual import PostNorm, PreNorm
from mmpre.tokens import Tokens

LIMIT = 1e-5  # largest difference between states in float32


@dataclass(frozen=True)
class Numbers:
    """Sizes of a plain encoder."""

    width: int
    depth: int
    heads: int
    hidden: int
    eps: float
    dropout: float
    attention_dropout: float


def differences(encoder: Encoder, residual: type[PostNorm] | type[PreNorm]) -> list[str]:
    """What keeps an encoder from being attention and a GELU feed-forward in each layer, with LayerNorms placed so."""
    told: list[str] = []
    for block in encoder.blocks:
        if not hasattr(block, "sublayers") or len(block.sublayers) != 2:
            return [
                f"a layer has {len(getattr(block, 'sublayers', ()))} sublayers, it has attention and a feed-forward"
            ]
        for wrapped, kind in zip(block.sublayers, (Attention, FeedForward), strict=True):
            if type(wrapped) is not residual:
                told.append(f"norms are placed by {type(wrapped).__name__}, there by {residual.__name__}")
            elif not _affine(wrapped.norm):
                told.append("a norm is no LayerNorm with weight and bias")
            inner = getattr(wrapped, "sublayer", None)
            if type(inner) is not kind:
                told.append(f"it has {type(inner).__name__} where the class has {kind.__name__}")
            elif kind is Attention:
                told += _attention(inner)
            elif inner.activation is not F.gelu:
                told.append("its activation is not gelu")
    told = list(dict.fromkeys(told))
    if (encoder.norm is None) != (residual is PostNorm):
        told.append(f"it has {'no' if encoder.norm is None else 'a'} closing norm")
    elif encoder.norm is not None and not _affine(encoder.norm):
        told.append("its closing norm is no LayerNorm with weight and bias")
    if not told and any(len(some) > 1 for some in _sizes(encoder)):
        told.append("its layers or norms differ in their sizes, dropout or eps")
    return told


def looks_elsewhere(recipe: Recipe) -> list[str]:
    """Whether the network was trained to see less than whole rows."""
    seen = []
    for task in recipe.stages[-1].tasks:
        views = task.view.values() if isinstance(task.view, Mapping) else [task.view]
        seen += [view.attend for view in views]
    if any(isinstance(attend, Full) for attend in seen):
        return []
    return [f"it was trained with {type(seen[0]).__name__} attention, the class sees whole rows"]


def numbers(encoder: Encoder) -> Numbers:
    (heads,), (hidden,), (eps,), (dropout,), (attention_dropout,) = map(tuple, _sizes(encoder))
    width = encoder.blocks[0].sublayers[0].sublayer.out.out_features
    return Numbers(width, len(encoder.blocks), heads, hidden, eps, dropout, attention_dropout)


def batch_of(role: str, rows: list[Tokens]) -> Batch:
    """Rows that nothing hides, packed."""
    made = [
        Row(str(i), {role: tokens}, {role: tokens}, {role: untouched(tokens).replaced_N}, {})
        for i, tokens in enumerate(rows)
    ]
    return pack(made, Full().plan)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars and warnings: what matters of them is checked."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def loaded(
    kind: type[transformers.PreTrainedModel], folder: object, **settings: object
) -> transformers.PreTrainedModel:
    """A folder's model, by its class. Raises ValueError where the class lacks or does not know one of its tensors."""
    with quietly():
        model, told = kind.from_pretrained(folder, output_loading_info=True, dtype="float32", **settings)
    if wrong := {what: sorted(map(str, some)) for what, some in told.items() if some}:
        raise ValueError(f"{kind.__name__} does not load what was written for it: {wrong}; transformers has changed")
    return model.eval()


def _attention(attention: Attention) -> list[str]:
    told = []
    if attention.bias is not None:
        told.append(f"{type(attention.bias).__name__} is added to attention's scores, the class adds nothing to them")
    if attention.rotary is not None:
        told.append("its queries and keys are turned (Rotary)")
    if attention.within is not None:
        told.append(f"its attention is narrowed ({type(attention.within).__name__})")
    if attention.kv_heads != attention.heads:
        told.append("its heads share keys and values")
    if attention.qkv.bias is None:
        told.append("its attention has no biases")
    return told


def _affine(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None


def _sizes(encoder: Encoder) -> tuple[set, ...]:
    def of(get: Callable[[nn.Module], object], i: int | None = None) -> set:
        sublayers = [one for block in encoder.blocks for one in block.sublayers]
        return {get(one) for one in (sublayers if i is None else sublayers[i::2])}

    eps = of(lambda one: one.norm.eps) | ({encoder.norm.eps} if encoder.norm is not None else set())
    return (
        of(lambda one: one.sublayer.heads, 0), of(lambda one: one.sublayer.up.out_features, 1), eps,
        of(lambda one: one.dropout.p), of(lambda one: one.sublayer.dropout, 0),
    )  # fmt: skip
