"""ModernBERT as transformers saves it, into recipes with a text role and ModernBERT's encoder, and back.

What tensors do not tell (windows, bases of the rotary embeddings) must be the recipe's too. The way back is
recipes/exports/modernbert.py, by the same tables.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from mmpre.attention import Window
from mmpre.exchange.imports import Foreign, ImportedError, Source, sees
from mmpre.exchange.key_table import Table, to_ours, under
from mmpre.heads.vocabulary import Vocabulary

EMBEDDINGS: Table = {"table.weight": "tok_embeddings.weight", "norm.weight": "norm.weight"}
LAYER: Table = {
    "0.norm.weight": "attn_norm.weight",
    "0.sublayer.qkv.weight": "attn.Wqkv.weight",
    "0.sublayer.out.weight": "attn.Wo.weight",
    "1.norm.weight": "mlp_norm.weight",
    "1.sublayer.up.weight": "mlp.Wi.weight",
    "1.sublayer.down.weight": "mlp.Wo.weight",
}
HEAD: Table = {
    "bias": "decoder.bias", "transform.dense.weight": "head.dense.weight", "transform.norm.weight": "head.norm.weight",
}  # fmt: skip
WHOLE, LOCAL = "full_attention", "sliding_attention"


def layers(at: str, depth: int) -> Table:
    """The table of the encoder, whose parts they call `at` and a name; the first attention has no norm."""
    found: dict[str, str | tuple[str, ...]] = {"norm.weight": f"{at}final_norm.weight"}
    for i in range(depth):
        found |= under(f"blocks.{i}.sublayers.", f"{at}layers.{i}.", LAYER)
    del found["blocks.0.sublayers.0.norm.weight"]
    return found


def accepts(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "modernbert"


def translate(source: Source) -> Foreign:
    config = transformers.ModernBertConfig(**source.config)
    problems = [
        f"its {name} is {value!r}, ours {wanted!r}"
        for name, wanted in (("hidden_activation", "gelu"), ("classifier_activation", "gelu"), ("norm_bias", False),
                             ("attention_bias", False), ("mlp_bias", False), ("classifier_bias", False))
        if (value := getattr(config, name)) != wanted
    ]  # fmt: skip
    kinds = [config.rope_parameters[kind].get("rope_type", "default") for kind in (WHOLE, LOCAL)]
    problems += [f"its rotary embeddings are {kind}, ours default" for kind in kinds if kind != "default"]
    if problems:
        raise ImportedError(f"{source.folder}: {'; '.join(problems)}")
    at = "model." if "model.embeddings.tok_embeddings.weight" in source else ""
    theta = {kind: config.rope_parameters[kind]["rope_theta"] for kind in (WHOLE, LOCAL)}
    within = {WHOLE: None, LOCAL: Window(config.local_attention // 2)}
    foreign = Foreign(
        role="text",
        modality=to_ours(under("", f"{at}embeddings.", EMBEDDINGS), source.take),
        encoder=to_ours(layers(at, config.num_hidden_layers), source.take),
        heads=_vocabulary(source, f"{at}embeddings.tok_embeddings.weight"),
        tables=frozenset({"table.weight", "bias"}),
        attention_heads=config.num_attention_heads,
        eps=config.norm_eps,
        pre_norm=True,
        sees=[sees(within[kind], theta[kind]) for kind in config.layer_types],
    )
    source.expect_left("head.", "classifier.")
    return foreign


def _vocabulary(source: Source, table: str) -> dict[type, dict[str, torch.Tensor]]:
    """The head that predicts words, where there is one; its decoder must be the table of words."""
    if "decoder.bias" not in source:
        return {}
    if "decoder.weight" in source and not torch.equal(source.take("decoder.weight"), source.take(table)):
        raise ImportedError(f"{source.folder}: decoder.weight is not the table of words; ours is tied to it")
    return {Vocabulary: to_ours(HEAD, source.take)}
