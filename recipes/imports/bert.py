"""BERT, RoBERTa and ELECTRA as transformers saves them, into recipes with a text role and BERT's encoder, and back.

ELECTRA's where its tables are as wide as its states (base, large). A pooler and heads that mmpre has not are left.
The way back is recipes/exports/bert.py, by the same tables.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmpre.exchange.imports import Foreign, ImportedError, Source
from mmpre.exchange.key_table import Table, linear, to_ours, under
from mmpre.heads.vocabulary import Vocabulary

PADDING = 2  # rows of RoBERTa's position table before the first token's
EMBEDDINGS: Table = {
    "table.weight": "word_embeddings.weight",
    "positions.weight": "position_embeddings.weight",
    "types.weight": "token_type_embeddings.weight",
    **linear("norm", "LayerNorm"),
}
LAYER: Table = {
    **linear("0.sublayer.qkv", "attention.self.query", "attention.self.key", "attention.self.value"),
    **linear("0.sublayer.out", "attention.output.dense"),
    **linear("0.norm", "attention.output.LayerNorm"),
    **linear("1.sublayer.up", "intermediate.dense"),
    **linear("1.sublayer.down", "output.dense"),
    **linear("1.norm", "output.LayerNorm"),
}
HEADS: Mapping[str, Table] = {
    "bert": {
        "bias": "cls.predictions.bias",
        **linear("transform.dense", "cls.predictions.transform.dense"),
        **linear("transform.norm", "cls.predictions.transform.LayerNorm"),
    },
    "roberta": {
        "bias": "lm_head.bias",
        **linear("transform.dense", "lm_head.dense"),
        **linear("transform.norm", "lm_head.layer_norm"),
    },
    "electra": {
        "bias": "generator_lm_head.bias",
        **linear("transform.dense", "generator_predictions.dense"),
        **linear("transform.norm", "generator_predictions.LayerNorm"),
    },
}
DECODERS = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "electra": "generator_lm_head"}


def layers(at: str, depth: int) -> Table:
    """The table of the encoder, whose layers they call `at` and a number."""
    found: dict[str, str | tuple[str, ...]] = {}
    for i in range(depth):
        found |= under(f"blocks.{i}.sublayers.", f"{at}{i}.", LAYER)
    return found


def accepts(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("bert", "roberta", "electra")


def translate(source: Source) -> Foreign:
    config = source.config
    kind = config["model_type"]
    problems = []
    if config.get("hidden_act", "gelu") != "gelu":
        problems.append(f"its activation is {config['hidden_act']}, ours gelu")
    if config.get("position_embedding_type", "absolute") != "absolute":
        problems.append(f"its positions are {config['position_embedding_type']}, ours absolute")
    if config.get("embedding_size", source.number("hidden_size")) != config["hidden_size"]:
        problems.append(f"its tables have width {config['embedding_size']}, its states {config['hidden_size']}")
    if problems:
        raise ImportedError(f"{source.folder}: {'; '.join(problems)}")
    at = f"{kind}." if f"{kind}.embeddings.word_embeddings.weight" in source else ""
    foreign = Foreign(
        role="text",
        modality=_embeddings(source, f"{at}embeddings.", roberta=kind == "roberta"),
        encoder=to_ours(layers(f"{at}encoder.layer.", source.number("num_hidden_layers")), source.take),
        heads=_vocabulary(source, kind, f"{at}embeddings.word_embeddings.weight"),
        tables=frozenset({"table.weight", "positions.weight", "bias"}),
        attention_heads=source.number("num_attention_heads"),
        eps=config.get("layer_norm_eps", 1e-12),
        pre_norm=False,
    )
    heads = ("cls.", "lm_head.", "generator_", "discriminator_", "classifier.", "qa_outputs.", "classification_head.")
    source.expect_left(f"{at}pooler.", *heads)
    return foreign


def _embeddings(source: Source, at: str, *, roberta: bool) -> dict[str, Tensor]:
    for name in ("position_ids", "token_type_ids"):  # older files hold these numbers
        if at + name in source:
            source.take(at + name)
    found = to_ours(under("", at, EMBEDDINGS), source.take)
    if roberta:
        found["positions.weight"] = found["positions.weight"][PADDING:]
    types_TD = found["types.weight"]
    # RoBERTa has one type; a second one, which no text uses, is the same
    return found | {"types.weight": types_TD.expand(2, -1) if len(types_TD) == 1 else types_TD}


def _vocabulary(source: Source, kind: str, table: str) -> dict[type, dict[str, Tensor]]:
    """The head that predicts words, where there is one; its decoder must be the table of words."""
    decoder = DECODERS[kind]
    if HEADS[kind]["bias"] not in source:
        return {}
    if f"{decoder}.weight" in source and not torch.equal(source.take(f"{decoder}.weight"), source.take(table)):
        raise ImportedError(f"{source.folder}: {decoder}.weight is not the table of words; ours is tied to it")
    if f"{decoder}.bias" in source:
        source.take(f"{decoder}.bias")
    return {Vocabulary: to_ours(HEADS[kind], source.take)}
