"""BERT, RoBERTa and ELECTRA as transformers saves them, into recipes with a text role and BERT's encoder.

ELECTRA's where its tables are as wide as its states (base, large). A pooler and heads that mmpre has not are left.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmpre.heads.vocabulary import Vocabulary
from mmpre.imports import Foreign, ImportedError, Source

PADDING = 2  # rows of RoBERTa's position table before the first token's


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
    if config.get("embedding_size", config["hidden_size"]) != config["hidden_size"]:
        problems.append(f"its tables have width {config['embedding_size']}, its states {config['hidden_size']}")
    if problems:
        raise ImportedError(f"{source.folder}: {'; '.join(problems)}")
    at = f"{kind}." if f"{kind}.embeddings.word_embeddings.weight" in source else ""
    foreign = Foreign(
        role="text",
        modality=_embeddings(source, f"{at}embeddings.", roberta=kind == "roberta"),
        encoder=_encoder(source, f"{at}encoder.layer.", config["num_hidden_layers"]),
        heads=_vocabulary(source, kind, f"{at}embeddings.word_embeddings.weight"),
        tables=frozenset({"table.weight", "positions.weight", "bias"}),
        attention_heads=config["num_attention_heads"],
        eps=config.get("layer_norm_eps", 1e-12),
        pre_norm=False,
    )
    heads = ("cls.", "lm_head.", "generator_", "discriminator_", "classifier.", "qa_outputs.", "classification_head.")
    source.expect_left(f"{at}pooler.", *heads)
    return foreign


def _embeddings(source: Source, at: str, *, roberta: bool) -> dict[str, Tensor]:
    types_TD = source.take(f"{at}token_type_embeddings.weight")
    for name in ("position_ids", "token_type_ids"):  # older files hold these numbers
        if at + name in source:
            source.take(at + name)
    return {
        "table.weight": source.take(f"{at}word_embeddings.weight"),
        "positions.weight": source.take(f"{at}position_embeddings.weight")[PADDING if roberta else 0 :],
        # RoBERTa has one type; a second one, which no text uses, is the same
        "types.weight": types_TD.expand(2, -1) if len(types_TD) == 1 else types_TD,
        "norm.weight": source.take(f"{at}LayerNorm.weight"),
        "norm.bias": source.take(f"{at}LayerNorm.bias"),
    }


def _encoder(source: Source, at: str, depth: int) -> dict[str, Tensor]:
    found = {}
    for i in range(depth):
        layer, ours = f"{at}{i}.", f"blocks.{i}.sublayers."
        for kind in ("weight", "bias"):
            parts = [source.take(f"{layer}attention.self.{name}.{kind}") for name in ("query", "key", "value")]
            found[f"{ours}0.sublayer.qkv.{kind}"] = torch.cat(parts)
            found[f"{ours}0.sublayer.out.{kind}"] = source.take(f"{layer}attention.output.dense.{kind}")
            found[f"{ours}0.norm.{kind}"] = source.take(f"{layer}attention.output.LayerNorm.{kind}")
            found[f"{ours}1.sublayer.up.{kind}"] = source.take(f"{layer}intermediate.dense.{kind}")
            found[f"{ours}1.sublayer.down.{kind}"] = source.take(f"{layer}output.dense.{kind}")
            found[f"{ours}1.norm.{kind}"] = source.take(f"{layer}output.LayerNorm.{kind}")
    return found


def _vocabulary(source: Source, kind: str, table: str) -> dict[type, dict[str, Tensor]]:
    """The head that predicts words, where there is one; its decoder must be the table of words."""
    dense, norm, bias, decoder = {
        "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
                 "cls.predictions.decoder"),
        "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"),
        "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias",
                    "generator_lm_head"),
    }[kind]  # fmt: skip
    if bias not in source:
        return {}
    if f"{decoder}.weight" in source and not torch.equal(source.take(f"{decoder}.weight"), source.take(table)):
        raise ImportedError(f"{source.folder}: {decoder}.weight is not the table of words; ours is tied to it")
    if f"{decoder}.bias" in source:
        source.take(f"{decoder}.bias")
    head = {"bias": source.take(bias)}
    for ending in ("weight", "bias"):
        head[f"transform.dense.{ending}"] = source.take(f"{dense}.{ending}")
        head[f"transform.norm.{ending}"] = source.take(f"{norm}.{ending}")
    return {Vocabulary: head}
