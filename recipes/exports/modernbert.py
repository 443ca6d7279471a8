"""Text networks as transformers' ModernBertForMaskedLM (ModernBertModel, where no head predicts words).

The folder holds the tokenizer too.
"""
# n tokens of a row

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

from mmpre.attention import Window
from mmpre.blocks import Encoder
from mmpre.exchange.export import Check
from mmpre.exchange.imports import heads_of
from mmpre.exchange.key_table import to_theirs, under
from mmpre.heads.transform import Transform
from mmpre.heads.vocabulary import Vocabulary
from mmpre.modalities.text import Text
from mmpre.network import Network
from mmpre.recipe import Recipe
from mmpre.recipes.exports.bert import apart, made_rows, pad_of, padded, same_ids, text_of, tokenizer_of
from mmpre.recipes.exports.encoders import LIMIT, batch_of, loaded, looks_elsewhere
from mmpre.recipes.imports.modernbert import EMBEDDINGS, HEAD, LOCAL, WHOLE, layers
from mmpre.sublayers.attention import Attention
from mmpre.sublayers.feed_forward import GatedFeedForward
from mmpre.sublayers.residual import PreNorm


class ModernBert:
    target = "ModernBertForMaskedLM of transformers"

    def differs(self, recipe: Recipe) -> list[str] | None:
        net = recipe.network
        if not isinstance(net, Network) or not any(isinstance(one, Text) for one in net.modalities.values()):
            return None
        if len(net.modalities) > 1:
            return [f"its rows hold {' and '.join(net.modalities)}, the class reads text alone"]
        text, told = text_of(net), _differences(net.encoder)
        if text.positions is not None or text.types is not None:
            told.append("positions or types are added to its input, the class adds none")
        if not told and {text.norm.eps} != _eps(net.encoder):
            told.append("its norms differ in eps")
        if not _plain(text.norm):
            told.append("the norm of its input is no LayerNorm with weight and without bias")
        if heads := [one for one in self._heads(recipe) if not _same(one)]:
            told.append(f"its head has {type(heads[0].transform).__name__} with biases, the class has none there")
        return told + looks_elsewhere(recipe)

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        net, text, heads = recipe.network, text_of(recipe.network), self._heads(recipe)
        vocabulary, sublayers = text.reader.vocabulary, [block.sublayers for block in net.encoder.blocks]
        attentions, gated = [one[0].sublayer for one in sublayers], sublayers[0][1].sublayer
        theta = {LOCAL if one.within else WHOLE: one.rotary.theta for one in reversed(attentions)}
        kind = transformers.ModernBertForMaskedLM if len(heads) == 1 else transformers.ModernBertModel
        reach = next((one.within.reach for one in attentions if one.within), 64)
        config = transformers.ModernBertConfig(
            vocab_size=text.table.num_embeddings, hidden_size=text.table.embedding_dim,
            intermediate_size=gated.down.in_features, num_hidden_layers=len(sublayers),
            num_attention_heads=attentions[0].heads, max_position_embeddings=text.reader.max_length,
            norm_eps=text.norm.eps, attention_dropout=attentions[0].dropout, mlp_dropout=gated.dropout.p,
            embedding_dropout=text.dropout.p, local_attention=2 * reach,
            layer_types=[LOCAL if one.within else WHOLE for one in attentions],
            rope_parameters={
                name: {"rope_type": "default", "rope_theta": theta.get(name, next(iter(theta.values())))}
                for name in (WHOLE, LOCAL)
            },
            pad_token_id=pad_of(text), bos_token_id=vocabulary.cls, cls_token_id=vocabulary.cls,
            eos_token_id=vocabulary.sep, sep_token_id=vocabulary.sep, architectures=[kind.__name__], dtype="float32",
        )  # fmt: skip
        config.save_pretrained(folder)
        at = "model." if len(heads) == 1 else ""
        found = to_theirs(under("", f"{at}embeddings.", EMBEDDINGS), text.state_dict())
        found |= to_theirs(layers(at, len(sublayers)), net.encoder.state_dict())
        if len(heads) == 1:
            found |= to_theirs(HEAD, heads[0].state_dict())
        found = {name: tensor.float().contiguous().clone() for name, tensor in found.items()}
        save_file(found, folder / "model.safetensors", {"format": "pt"})
        tokenizer_of(text).save_pretrained(folder)
        notes = (
            [f"{len(heads)} heads predict words, {kind.__name__} has none: none was taken"] if len(heads) > 1 else []
        )
        if dropped := sublayers[0][0].dropout.p:
            notes.append(f"dropout of {dropped} behind attention, where training goes on there: the class has none")
        return notes

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        net, heads = recipe.network, self._heads(recipe)
        text, ((role, _),) = text_of(net), net.modalities.items()
        kind = transformers.ModernBertForMaskedLM if len(heads) == 1 else transformers.ModernBertModel
        whole = loaded(kind, folder)
        batch = batch_of(role, [text.reader.row(ids_W, torch.zeros_like(ids_W)) for ids_W in made_rows(text)])
        ids_Bn, valid_Bn = padded(batch.seen[role]["ids"], batch.layout.lengths_B, pad_of(text))
        model, ours_ND = whole.model if len(heads) == 1 else whole, net(batch)
        theirs_ND = model(input_ids=ids_Bn, attention_mask=valid_Bn.long()).last_hidden_state[valid_Bn]
        what = f"states of {len(ids_Bn)} made rows of 3 to {ids_Bn.shape[1]} tokens"
        checks = [Check(what, apart(ours_ND, theirs_ND), LIMIT)]
        if len(heads) == 1:
            scores, ours = (
                whole(input_ids=ids_Bn, attention_mask=valid_Bn.long()).logits[valid_Bn],
                heads[0].scores(ours_ND),
            )
            checks.append(Check("scores of words", apart(ours, scores), LIMIT * max(1.0, float(ours.abs().max()))))
        return [*checks, same_ids(text, folder)]

    def _heads(self, recipe: Recipe) -> list[Vocabulary]:
        return heads_of(recipe.module(), recipe.network, Vocabulary)


exporter = ModernBert()


def _differences(encoder: Encoder) -> list[str]:
    """What keeps an encoder from being rotary attention and a GeGLU in each layer, with LayerNorms before them."""
    told: list[str] = []
    attentions: list[Attention] = []
    for number, block in enumerate(encoder.blocks):
        parts = [getattr(one, "sublayer", None) for one in getattr(block, "sublayers", ())]
        if [type(one) for one in parts] != [Attention, GatedFeedForward]:
            has = " and ".join(type(one).__name__ for one in parts) or type(block).__name__
            return [f"a layer has {has}, the class has Attention and GatedFeedForward"]
        attention, gated = parts
        attentions.append(attention)
        for i, wrapped in enumerate(block.sublayers):
            if type(wrapped) is not PreNorm:
                told.append(f"norms are placed by {type(wrapped).__name__}, there by PreNorm")
            elif number == i == 0:
                told += [] if type(wrapped.norm) is nn.Identity else ["its first attention has a norm of its own"]
            elif not _plain(wrapped.norm):
                told.append("a norm is no LayerNorm with weight and without bias")
        if gated.activation is not F.gelu or gated.norm is not None:
            told.append("its feed-forwards are not GeGLU alone")
        told += _attention(attention)
        if any(linear.bias is not None for linear in (attention.qkv, attention.out, gated.up, gated.down)):
            told.append("its linear maps have biases")
    if encoder.norm is None or not _plain(encoder.norm):
        told.append("its closing norm is no LayerNorm with weight and without bias")
    told = list(dict.fromkeys(told))
    if not told:
        seen = {(bool(one.within), one.within, one.rotary.theta) for one in attentions}
        sizes = {(one.heads, one.dropout) for one in attentions}
        inner = {(one.sublayers[1].sublayer.down.in_features, one.sublayers[1].sublayer.dropout.p)
                 for one in encoder.blocks}  # fmt: skip
        if len({local for local, _, _ in seen}) != len(seen) or len(sizes) > 1 or len(inner) > 1:
            told.append("its layers differ in sizes, dropout, reach or rotary embeddings, beside being local or not")
        if len(_eps(encoder)) > 1:
            told.append("its norms differ in eps")
    return told


def _attention(attention: Attention) -> list[str]:
    told = []
    if attention.rotary is None:
        told.append("its queries and keys are not turned (Rotary)")
    if attention.bias is not None:
        told.append(f"{type(attention.bias).__name__} is added to attention's scores, the class adds nothing to them")
    if not isinstance(attention.within, Window | None):
        told.append(f"its attention is narrowed by {type(attention.within).__name__}, there by Window")
    if attention.kv_heads != attention.heads:
        told.append("its heads share keys and values")
    return told


def _plain(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is None


def _same(head: Vocabulary) -> bool:
    return type(head.transform) is Transform and head.transform.dense.bias is None and _plain(head.transform.norm)


def _eps(encoder: Encoder) -> set[float]:
    return {one.eps for one in encoder.modules() if isinstance(one, nn.LayerNorm)}
