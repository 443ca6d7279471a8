"""Text networks as a folder of sentence-transformers: one vector a text, from transformers' BertModel and a pooling.

The pooling is that of the recipe's tower, where it has one that the library knows, and the mean over all tokens
otherwise. A projector is left out, as it is where such networks are evaluated.
"""
# B texts, D model width

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from mmpre.exchange.export import Check
from mmpre.heads.pool import First, Mean, Tower
from mmpre.heads.vocabulary import Vocabulary
from mmpre.recipe import Recipe
from mmpre.recipes.exports.bert import BertLike, made_rows, text_of
from mmpre.recipes.exports.encoders import LIMIT, batch_of, quietly


class Sentences(BertLike):
    def __init__(self) -> None:
        super().__init__("bert")
        self.target = "SentenceTransformer of sentence-transformers"

    def differs(self, recipe: Recipe) -> list[str] | None:
        told = super().differs(recipe)
        if told is not None and find_spec("sentence_transformers") is None:
            told.append("the package sentence-transformers is missing; pip install mmpre[sentences]")
        return told

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        notes = super().write(recipe, folder / "made")
        text, (mode, note) = text_of(recipe.network), _pooling(recipe)
        with quietly():
            transformer = Transformer(str(folder / "made"), max_seq_length=text.reader.max_length)
            pooling = Pooling(recipe.network.encoder.blocks[0].sublayers[0].sublayer.out.out_features, mode)
            SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder), create_model_card=False)
        for path in (folder / "made").iterdir():
            path.replace(folder / path.name)  # as the exporter wrote them
        (folder / "made").rmdir()
        return [*notes, note]

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        from sentence_transformers import SentenceTransformer

        checks = super().check(recipe, folder)
        net, text = recipe.network, text_of(recipe.network)
        ((role, _),) = net.modalities.items()
        with quietly():
            model = SentenceTransformer(str(folder), device="cpu")
        texts = [text.reader.vocabulary.backend.decode(ids_W.tolist()) for ids_W in made_rows(text)] \
            if hasattr(text.reader.vocabulary, "backend") else ["Good morning.", "naïve café", "ab"]  # fmt: skip
        rows = []
        for one in texts:
            ids_W, word_W = text.reader.vocabulary.cut(one)
            most = text.reader.max_length - 2
            rows.append(text.reader.row(ids_W[:most], word_W[:most]))
        batch = batch_of(role, rows)
        states = net(batch).split(batch.layout.lengths_B.tolist())
        first = _pooling(recipe)[0] == "cls"
        ours = torch.stack([state_nD[0] if first else state_nD.mean(0) for state_nD in states])
        theirs: Tensor = model.encode([texts[int(key)] for key in batch.keys], convert_to_tensor=True)
        return [*checks, Check(f"vectors of {len(texts)} texts", float((ours - theirs).abs().max()), LIMIT)]

    def _heads(self, recipe: Recipe) -> list[Vocabulary]:
        return []  # no head that predicts words is wanted


exporter = Sentences()


def _pooling(recipe: Recipe) -> tuple[str, str]:
    """The library's name of the pooling, and what to know about it."""
    towers = [one for one in recipe.module().modules() if isinstance(one, Tower) and one.net is recipe.network]
    pools = {type(one.pool): one.pool for one in towers}
    if set(pools) == {First}:
        return "cls", "pooled by the first token, as in training"
    if set(pools) == {Mean} and pools[Mean].special:
        return "mean", "pooled by the mean over all tokens, as in training"
    trained = "in training special tokens were left out" if Mean in pools else "the recipe pools nothing"
    return "mean", f"pooled by the mean over all tokens; {trained}"
