"""LXMERT as transformers saves it, into the recipe of that name, and back (recipes/exports/lxmert.py)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmpre.exchange.imports import Foreign, HeadKind, ImportedError, Source
from mmpre.exchange.key_table import Table, linear, to_ours, under
from mmpre.heads.answers import Answers
from mmpre.heads.detected import SmoothFeature, SureLabel
from mmpre.heads.matching import Matching
from mmpre.heads.vocabulary import Vocabulary
from mmpre.recipes.imports.bert import EMBEDDINGS, LAYER

REGIONS: Table = {
    **linear("project", "visn_fc"),
    **linear("project_norm", "visn_layer_norm"),
    **linear("place", "box_fc"),
    **linear("place_norm", "box_layer_norm"),
}
ACROSS: Table = {
    **linear("0.sublayer.qkv", *(f"visual_attention.att.{one}" for one in ("query", "key", "value"))),
    **linear("0.sublayer.out", "visual_attention.output.dense"),
    **linear("0.norm", "visual_attention.output.LayerNorm"),
}
TRANSFORM: Table = {
    **linear("dense", "obj_predict_head.transform.dense"),
    **linear("norm", "obj_predict_head.transform.LayerNorm"),
}
MATCHING: Table = {**linear("pool", "lxmert.pooler.dense"), **linear("classify", "cls.seq_relationship")}
HEADS: Mapping[HeadKind, Table] = {
    Vocabulary: {
        "bias": "cls.predictions.bias",
        **linear("transform.dense", "cls.predictions.transform.dense"),
        **linear("transform.norm", "cls.predictions.transform.LayerNorm"),
    },
    Matching: MATCHING,
    (SureLabel, "object"): {
        **under("scores.transform.", "", TRANSFORM),
        **linear("scores.classify", "obj_predict_head.decoder_dict.obj"),
    },
    (SureLabel, "attribute"): {
        **under("scores.transform.", "", TRANSFORM),
        **linear("scores.classify", "obj_predict_head.decoder_dict.attr"),
    },
    SmoothFeature: {
        **under("transform.", "", TRANSFORM),
        **linear("project", "obj_predict_head.decoder_dict.feat"),
    },
    Answers: {
        **linear("dense", "answer_head.logit_fc.0"),
        **linear("norm", "answer_head.logit_fc.2"),
        **linear("answer", "answer_head.logit_fc.3"),
    },
}  # fmt: skip


def layers(language: int, relations: int, cross: int) -> Table:
    """The table of the encoder."""
    found: dict[str, str | tuple[str, ...]] = {}
    for role, theirs, depth in (("text", "layer", language), ("image", "r_layers", relations)):
        for i in range(depth):
            found |= under(f"blocks.{i}.sublayers.{role}.sublayers.", f"lxmert.encoder.{theirs}.{i}.", LAYER)
    for i in range(cross):
        ours, at = f"blocks.{max(language, relations) + i}.sublayers.", f"lxmert.encoder.x_layers.{i}."
        found |= under(ours, at, ACROSS)
        for role, name in (("text", "lang"), ("image", "visn")):
            found |= under(f"{ours}1.sublayers.{role}.sublayers.", f"{at}{name}_", own_layer())
    return found


def own_layer() -> Table:
    """A side's own layer behind the attention across."""
    return {
        **linear("0.sublayer.qkv", *(f"self_att.self.{one}" for one in ("query", "key", "value"))),
        **linear("0.sublayer.out", "self_att.output.dense"),
        **linear("0.norm", "self_att.output.LayerNorm"),
        **linear("1.sublayer.up", "inter.dense"),
        **linear("1.sublayer.down", "output.dense"),
        **linear("1.norm", "output.LayerNorm"),
    }


def accepts(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "lxmert"


def translate(source: Source) -> Foreign:
    config = source.config
    if config.get("hidden_act", "gelu") != "gelu" or config.get("visual_pos_dim", 4) != 4:
        raise ImportedError(
            f"{source.folder}: its activation is {config.get('hidden_act')} and boxes have "
            f"{config.get('visual_pos_dim')} numbers, ours gelu and 4"
        )
    depths = (source.number(f"{one}_layers") for one in "lrx")
    foreign = Foreign(
        role="text",
        modality=to_ours(under("", "lxmert.embeddings.", EMBEDDINGS), source.take),
        others={"image": to_ours(under("", "lxmert.encoder.visn_fc.", REGIONS), source.take)},
        encoder=to_ours(layers(*depths), source.take),
        heads=_heads(source),
        tables=frozenset({"table.weight", "positions.weight", "bias"}),
        attention_heads=source.number("num_attention_heads"),
        eps=1e-12,
        pre_norm=False,
    )
    source.expect_left("obj_predict_head.", "answer_head.", "cls.", "lxmert.pooler.")
    return foreign


def _heads(source: Source) -> dict[HeadKind, dict[str, Tensor]]:
    """Those that are there; the decoder of words must be the table of words."""
    decoder = "cls.predictions.decoder.weight"
    if decoder in source and not torch.equal(
        source.take(decoder), source.take("lxmert.embeddings.word_embeddings.weight")
    ):
        raise ImportedError(f"{source.folder}: {decoder} is not the table of words; ours is tied to it")
    found: dict[HeadKind, dict[str, Tensor]] = {}
    for kind, table in HEADS.items():
        names = [name for some in table.values() for name in ((some,) if isinstance(some, str) else some)]
        if all(name in source for name in names):
            found[kind] = to_ours(table, source.take)
    return found
