"""UNITER as it is written with padding: transformers' BertModel over padded captions and regions.

Captions and regions are padded each to the longest of the batch and embedded, then joined so that padding stands at the
end (the authors' gather index). Heads run at picked places only, as in the authors' code, and are the recipe's own.
"""
# B rows, T caption tokens and R regions of the longest ones, L tokens of the longest row, D model width

from dataclasses import dataclass, replace

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mmpre.batch import Batch, Picked
from mmpre.data.loader import MicroBatch, Slot
from mmpre.draw import Draw
from mmpre.heads.matching import Matching
from mmpre.heads.region import ClassScores, RegionClassKL, RegionFeature
from mmpre.heads.vocabulary import Vocabulary
from mmpre.objectives.loss import Loss
from mmpre.objectives.one_pass import Align, Match, Predict, Readout
from mmpre.tokens import Ragged, Tokens


@dataclass(frozen=True)
class Padded:
    """A batch as the padded model wants it. `batch` keeps labels, and of the clean tokens only the picked ones."""

    ids_BT: Int[Tensor, "B T"]
    features_BRE: Float[Tensor, "B R E"]
    box_BR7: Float[Tensor, "B R 7"]
    replaced_BR: Bool[Tensor, "B R"]
    source_BL: Int[Tensor, "B L"]  # of each place, in the caption followed by the regions
    valid_BL: Bool[Tensor, "B L"]
    place_N: Int[Tensor, "N"]  # of each token that is no padding
    batch: Batch


class PaddedBatches(Dataset):
    """Pads what another source makes, in the loading worker."""

    def __init__(self, source: Dataset) -> None:
        self.source = source

    def __getitem__(self, slot: Slot) -> MicroBatch:
        made = self.source[slot]
        return replace(made, parts=[pad(part) for part in made.parts])


def pad(batch: Batch) -> Padded:
    """Pad a packed batch of roles text and image."""
    text_B, regions_B = batch.layout.lengths["text"], batch.layout.lengths["image"]
    length_B = batch.layout.lengths_B

    def rows(values: Tensor, counts_B: Tensor) -> Tensor:
        return pad_sequence(list(values.split(counts_B.tolist())), batch_first=True)

    ids_BT = rows(batch.seen["text"]["ids"], text_B)
    offset_L = torch.arange(int(length_B.max()))
    valid_BL = offset_L < length_B[:, None]
    after_BL = offset_L + (ids_BT.shape[1] - text_B)[:, None]  # where a region stands behind the padded caption
    source_BL = torch.where(offset_L < text_B[:, None], offset_L, after_BL).masked_fill(~valid_BL, 0)
    return Padded(
        ids_BT, rows(batch.seen["image"]["features"], regions_B), rows(batch.seen["image"]["box"], regions_B),
        rows(batch.replaced["image"], regions_B), source_BL, valid_BL, valid_BL.flatten().nonzero().squeeze(1),
        _targets(batch),
    )  # fmt: skip


def _targets(batch: Batch) -> Batch:
    clean, picked = {}, {}
    for name, one in batch.picked.items():
        tokens, count = batch.clean[one.role], torch.tensor([len(one)])
        fields = {key: Ragged(field.values[one.clean_M], count) for key, field in tokens.fields.items()}
        clean[one.role] = Tokens(tokens.special_N[one.clean_M], count, fields)
        picked[name] = Picked(one.role, torch.arange(len(one)), one.seen_M)
    return replace(batch, clean=clean, picked=picked, seen={}, replaced={}, plan=None)


class PaddedUniter(nn.Module):
    """The model with the recipe's four tasks, `readouts` by task."""

    def __init__(
        self, *, width: int, depth: int, heads: int, vocabulary: int, features: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
            intermediate_size=4 * width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            max_position_embeddings=513,
        )  # fmt: skip
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        words = self.bert.embeddings.word_embeddings
        self.no_position = 512  # regions have none: a row of the table that begins as zeros
        nn.init.zeros_(self.bert.embeddings.position_embeddings.weight[self.no_position])
        self.project, self.project_norm = nn.Linear(features, width), nn.LayerNorm(width, eps=1e-12)
        self.place, self.place_norm = nn.Linear(7, width), nn.LayerNorm(width, eps=1e-12)
        self.mask_E = nn.Parameter(torch.randn(features) * 0.02)
        tasks = {
            "itm": [Match("text", Matching(width)), Align(("text", "image"))],
            "mlm": [Predict("word", Vocabulary(words), name="mlm")],
            "mrfr": [Predict("region", RegionFeature(self.project), name="mrfr")],
            "mrckl": [Predict("region", RegionClassKL(ClassScores(width, classes)), name="mrckl")],
        }
        self.readouts = nn.ModuleDict({task: nn.ModuleList(some) for task, some in tasks.items()})

    def forward(self, task: str, padded: Padded, draw: Draw) -> Loss:
        state_XD = self.states(padded).flatten(0, 1)
        losses = [self._read(readout, state_XD, padded, draw) for readout in self.readouts[task]]
        return Loss([term for loss in losses for term in loss.terms])

    def states(self, padded: Padded) -> Float[Tensor, "B L D"]:
        text_BTD = self.bert.embeddings.word_embeddings(padded.ids_BT)
        feature_BRE = padded.features_BRE.to(self.mask_E.dtype)
        shown_BRE = torch.where(padded.replaced_BR[:, :, None], self.mask_E, feature_BRE)
        what_BRD = self.project_norm(self.project(shown_BRE))
        joint_BSD = torch.cat([text_BTD, what_BRD + self.place_norm(self.place(padded.box_BR7))], dim=1)
        source_BL, caption = padded.source_BL, padded.ids_BT.shape[1]
        embeds_BLD = joint_BSD.gather(1, source_BL[:, :, None].expand(-1, -1, joint_BSD.shape[2]))
        return self.bert(
            inputs_embeds=embeds_BLD,
            attention_mask=padded.valid_BL,
            token_type_ids=(source_BL >= caption).long(),
            position_ids=torch.where(source_BL < caption, source_BL, self.no_position),
        ).last_hidden_state

    def _read(self, readout: Readout, state_XD: Tensor, padded: Padded, draw: Draw) -> Loss:
        places_M = readout.places(padded.batch)
        index_M = padded.place_N if places_M is None else padded.place_N[places_M]
        return readout.read(state_XD.index_select(0, index_M), padded.batch, draw)
