"""w2v-BERT 2.0 as transformers saves it (Wav2Vec2Bert), into recipes with a role `speech`, and back.

The recipe's layers must look back alone in their convolutions, as scale v2 of w2v_bert does: no tensor tells that. The
way back is recipes/exports/wav2vec2_bert.py, by the same tables.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmpre.exchange.imports import Foreign, ImportedError, Source
from mmpre.exchange.key_table import Table, linear, to_ours, under

FRONT: Table = {
    **linear("norm", "feature_projection.layer_norm"),
    **linear("project", "feature_projection.projection"),
}
HIDDEN = "masked_spec_embed"  # what stands for a hidden frame
LAYER: Table = {
    **linear("0.norm", "ffn1_layer_norm"),
    **linear("0.sublayer.sublayer.up", "ffn1.intermediate_dense"),
    **linear("0.sublayer.sublayer.down", "ffn1.output_dense"),
    **linear("1.norm", "self_attn_layer_norm"),
    **linear("1.sublayer.qkv", *(f"self_attn.linear_{name}" for name in "qkv")),
    **linear("1.sublayer.out", "self_attn.linear_out"),
    "1.sublayer.bias.table.weight": "self_attn.distance_embedding.weight",
    **linear("2.norm", "conv_module.layer_norm"),
    "2.sublayer.gate.weight": "conv_module.pointwise_conv1.weight",
    "2.sublayer.depthwise.weight": "conv_module.depthwise_conv.weight",
    **linear("2.sublayer.norm", "conv_module.depthwise_layer_norm"),
    "2.sublayer.out.weight": "conv_module.pointwise_conv2.weight",
    **linear("3.norm", "ffn2_layer_norm"),
    **linear("3.sublayer.sublayer.up", "ffn2.intermediate_dense"),
    **linear("3.sublayer.sublayer.down", "ffn2.output_dense"),
    **linear("4.norm", "final_layer_norm"),
}
POINTWISE = re.compile(r"\.pointwise_conv[12]\.weight$")  # convolutions of one place there, linear maps here


def layers(at: str, depth: int) -> Table:
    """The table of an encoder, whose layers they call `at` and a number."""
    found: dict[str, str | tuple[str, ...]] = {}
    for i in range(depth):
        found |= under(f"blocks.{i}.sublayers.", f"{at}{i}.", LAYER)
    return found


def accepts(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "wav2vec2-bert"


def translate(source: Source) -> Foreign:
    config = source.config
    wanted = {"position_embeddings_type": "relative_key", "hidden_act": "swish", "add_adapter": False}
    if other := {name: config[name] for name, value in wanted.items() if config.get(name, value) != value}:
        raise ImportedError(f"{source.folder}: it has {other}, ours { ({name: wanted[name] for name in other}) }")
    at = "wav2vec2_bert." if f"wav2vec2_bert.{FRONT['project.weight'][0]}" in source else ""

    def take(name: str) -> Tensor:
        return source.take(name).squeeze(2) if POINTWISE.search(name) else source.take(name)

    modality = to_ours(under("", at, FRONT), take)
    if f"{at}{HIDDEN}" in source:
        modality["mask_D"] = take(f"{at}{HIDDEN}")
    table = layers(f"{at}encoder.layers.", source.number("num_hidden_layers"))
    foreign = Foreign(
        role="speech", modality=modality, encoder=to_ours(table, take), pre_norm=True,
        attention_heads=source.number("num_attention_heads"), eps=config.get("layer_norm_eps", 1e-5),
        causal_convolutions=True,
    )  # fmt: skip
    source.expect_left("lm_head.", "classifier.", "projector.")
    return foreign
