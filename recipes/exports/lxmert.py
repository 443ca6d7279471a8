"""Networks of words and regions that are read apart and then across, as transformers' LxmertForPreTraining."""
# D model width, T words and R regions of a row

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpre.attention import Full
from mmpre.attention.by_tokens import Roles
from mmpre.batch import Batch, Row, pack
from mmpre.blocks import Block, Encoder
from mmpre.exchange.export import Check
from mmpre.exchange.imports import HeadKind, heads_of
from mmpre.exchange.key_table import to_theirs, under
from mmpre.heads.answers import Answers
from mmpre.heads.detected import SmoothFeature, SureLabel
from mmpre.heads.matching import Matching
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.protocol import untouched
from mmpre.modalities.regions import BoxedRegions
from mmpre.modalities.text import Text
from mmpre.network import Network
from mmpre.recipe import Recipe
from mmpre.recipes.exports.bert import made_rows, pad_of, same_ids, tokenizer_of
from mmpre.recipes.exports.encoders import LIMIT, differences, loaded, looks_elsewhere, numbers
from mmpre.recipes.imports.lxmert import EMBEDDINGS, HEADS, REGIONS, layers
from mmpre.sublayers.attention import Attention
from mmpre.sublayers.by_role import ByRole
from mmpre.sublayers.residual import PostNorm
from mmpre.tokens import Tokens

ROLES = ("text", "image")
LOST = {  # what a run may have left out, and how the class is told so
    (SureLabel, "object"): "visual_obj_loss",
    (SureLabel, "attribute"): "visual_attr_loss",
    SmoothFeature: "visual_feat_loss",
    Answers: "task_qa",
}


class Lxmert:
    target = "LxmertForPreTraining of transformers"

    def differs(self, recipe: Recipe) -> list[str] | None:
        net = recipe.network
        if not isinstance(net, Network) or not any(isinstance(one, BoxedRegions) for one in net.modalities.values()):
            return None
        kinds = {role: type(one) for role, one in net.modalities.items()}
        if kinds != dict(zip(ROLES, (Text, BoxedRegions), strict=True)):
            told = ", ".join(f"{role} ({kind.__name__})" for role, kind in kinds.items())
            return [f"its rows hold {told}, the class reads text (Text) and image (BoxedRegions)"]
        text = net.modalities["text"]
        told = [] if text.positions is not None else ["no positions are added to its input, the class learns them"]
        if text.first_position:
            told.append(f"positions are counted from {text.first_position}, the class counts from 0")
        found = heads(recipe)
        told += [
            f"it has {len(found.get(kind, ()))} heads of {kind.__name__}, the class has one"
            for kind in (Vocabulary, Matching)
            if len(found.get(kind, ())) != 1
        ]
        if any(one.pool.in_features != one.pool.out_features for one in found.get(Matching, ())):
            told.append("it pools other states than the first word's")
        return told + _encoder(net.encoder) + looks_elsewhere(recipe)

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        net, found = recipe.network, heads(recipe)
        text, image, depths = net.modalities["text"], net.modalities["image"], _depths(net.encoder)
        sizes, labels = numbers(_stack(net.encoder, "text")), image.reader.labels
        answers = [one.answer.out_features for one in found.get(Answers, ())]
        vision = [kind for kind in (*LOST,) if kind is not Answers]
        left = {name: bool(found.get(kind)) for kind, name in LOST.items()}
        config = transformers.LxmertConfig(
            vocab_size=text.table.num_embeddings, hidden_size=sizes.width, num_attention_heads=sizes.heads,
            intermediate_size=sizes.hidden, hidden_act="gelu", hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=sizes.attention_dropout, max_position_embeddings=text.longest,
            type_vocab_size=text.types.num_embeddings, l_layers=depths[0], r_layers=depths[1], x_layers=depths[2],
            visual_feat_dim=image.reader.features, visual_pos_dim=4, num_object_labels=labels.get("object", 2),
            num_attr_labels=labels.get("attribute", 2), num_qa_labels=answers[0] if answers else 2,
            task_obj_predict=any(found.get(kind) for kind in vision), pad_token_id=pad_of(text),
            architectures=["LxmertForPreTraining"], dtype="float32", **left,
        )  # fmt: skip
        config.save_pretrained(folder)
        tensors = to_theirs(under("", "lxmert.embeddings.", EMBEDDINGS), text.state_dict())
        tensors |= to_theirs(under("", "lxmert.encoder.visn_fc.", REGIONS), image.state_dict())
        tensors |= to_theirs(layers(*depths), net.encoder.state_dict())
        for kind, table in HEADS.items():
            for one in found.get(kind, ()):
                tensors |= to_theirs(table, one.state_dict())
        written = {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}
        save_file(written, folder / "model.safetensors", {"format": "pt"})
        tokenizer_of(text).save_pretrained(folder)
        return ["boxes are given as x1, y1, x2, y2, shares of the picture's; features as the run's data had them"]

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        model, net, found = loaded(transformers.LxmertForPreTraining, folder), recipe.network, heads(recipe)
        text = net.modalities["text"]
        batch = _made(net)
        given, valid = _as_theirs(batch, pad_of(text))
        theirs, want = model.lxmert(**given), model(**given)
        ours_ND = net(batch)
        states = {role: ours_ND[batch.layout.index[role]] for role in ROLES}
        first_BD = ours_ND[batch.layout.first("text")]
        pairs = {
            f"states of {len(batch.keys)} made rows' words": (states["text"], theirs.language_output[valid["text"]]),
            "states of their regions": (states["image"], theirs.vision_output[valid["image"]]),
            "scores of words": (found[Vocabulary][0].scores(states["text"]), want.prediction_logits[valid["text"]]),
            "scores of matching": (found[Matching][0](first_BD), want.cross_relationship_score),
        }
        if Answers in found:
            pairs["scores of answers"] = found[Answers][0](first_BD), want.question_answering_score
        seen = model.obj_predict_head(theirs.vision_output) if model.config.task_obj_predict else {}
        for name, kind in (("obj", (SureLabel, "object")), ("attr", (SureLabel, "attribute")), ("feat", SmoothFeature)):
            if name in seen:
                head = found[kind][0]
                ours = head.predict(states["image"]) if kind is SmoothFeature else head.scores(states["image"])
                pairs[f"what is said of regions ({name})"] = ours, seen[name][valid["image"]]
        checks = [
            Check(what, float((ours - other).abs().max()), LIMIT * max(1.0, float(ours.abs().max())))
            for what, (ours, other) in pairs.items()
        ]
        return [*checks, same_ids(text, folder)]


exporter = Lxmert()


def heads(recipe: Recipe) -> dict[HeadKind, list[nn.Module]]:
    """The heads that the class has a place for, by kind."""
    found = {kind: heads_of(recipe.module(), recipe.network, kind) for kind in HEADS}
    return {kind: some for kind, some in found.items() if some}


def _depths(encoder: Encoder) -> tuple[int, int, int]:
    """How many layers the words, the regions and both together have."""
    own = [block for block in encoder.blocks if isinstance(block, ByRole)]
    counts = [sum(role in block.sublayers for block in own) for role in ROLES]
    return counts[0], counts[1], len(encoder.blocks) - len(own)


def _stack(encoder: Encoder, role: str) -> Encoder:
    """A role's own layers as an encoder by itself."""
    parts = [block if isinstance(block, ByRole) else block.sublayers[1] for block in encoder.blocks]
    return Encoder([part.sublayers[role] for part in parts if role in part.sublayers])


def _encoder(encoder: Encoder) -> list[str]:
    """What keeps an encoder from being layers of each role's own and then such as read across."""
    shape = "its layers are not of each side's own and then such as read across"
    joint = [not isinstance(block, ByRole) for block in encoder.blocks]
    if joint != sorted(joint) or not any(joint):
        return [shape]
    for block in encoder.blocks:
        if isinstance(block, ByRole):
            continue
        if not isinstance(block, Block) or len(block.sublayers) != 2 or not isinstance(block.sublayers[1], ByRole):
            return [shape]
        across = getattr(block.sublayers[0], "sublayer", None)
        reads = Roles({"text": ("image",), "image": ("text",)})
        if type(block.sublayers[0]) is not PostNorm or type(across) is not Attention or across.within != reads:
            return [shape]
    told = [one for role in ROLES for one in differences(_stack(encoder, role), PostNorm)]
    if not told and numbers(_stack(encoder, "text")) != _same_depth(encoder):
        told.append("its sides differ in their sizes, dropout or eps")
    return list(dict.fromkeys(told))


def _same_depth(encoder: Encoder) -> object:
    """The numbers of the regions' layers, told as if they were as many as the words'."""
    text, image = (numbers(_stack(encoder, role)) for role in ROLES)
    return type(image)(**{**image.__dict__, "depth": text.depth})


def _made(net: Network) -> Batch:
    """Rows of several lengths that nothing hides: random words, regions of noise at random places."""
    text, image = (net.modalities[role] for role in ROLES)
    g, rows = torch.Generator().manual_seed(0), []
    for i, ids_W in enumerate(made_rows(text)):
        regions = min(image.reader.max_regions, 3 + 4 * i)
        low_R2 = torch.rand(regions, 2, generator=g) * 0.5
        size_R2 = torch.rand(regions, 2, generator=g) * 0.5
        box_R7 = torch.cat([low_R2, low_R2 + size_R2, size_R2, size_R2.prod(1, keepdim=True)], dim=1)
        feature_RE = torch.randn(regions, image.reader.features, generator=g)
        tokens = {
            "text": text.reader.row(ids_W, torch.zeros_like(ids_W)),
            "image": Tokens.of_row(torch.full((regions,), -1), features=feature_RE, box=box_R7),
        }
        rows.append(Row(str(i), tokens, tokens, {role: untouched(one).replaced_N for role, one in tokens.items()}, {}))
    return pack(rows, Full().plan)


def _as_theirs(batch: Batch, pad: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batch padded, as the class takes it, and what of each role is no padding."""

    def rows(role: str, values: Tensor, fill: float = 0) -> Tensor:
        parts = values.split(batch.layout.lengths[role].tolist())
        return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)

    valid = {role: rows(role, torch.ones(len(batch.seen[role]), dtype=torch.bool)) for role in ROLES}
    image = batch.seen["image"]
    given = {
        "input_ids": rows("text", batch.seen["text"]["ids"], pad), "attention_mask": valid["text"].long(),
        "visual_feats": rows("image", image["features"]), "visual_pos": rows("image", image["box"][:, :4]),
        "visual_attention_mask": valid["image"].long(),
    }  # fmt: skip
    return given, valid
