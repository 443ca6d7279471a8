"""Text networks as transformers' BertForMaskedLM (or BertModel, where no head predicts words), with a tokenizer."""
# D model width, n tokens of a row

from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from mmpre.data.vocabulary import Bytes, Pieces
from mmpre.exchange.export import Check
from mmpre.exchange.imports import heads_of
from mmpre.exchange.key_table import to_theirs, under
from mmpre.heads.transform import Transform
from mmpre.heads.vocabulary import Vocabulary
from mmpre.modalities.text import Text
from mmpre.network import Network
from mmpre.recipe import Recipe
from mmpre.recipes.exports.encoders import LIMIT, batch_of, differences, loaded, looks_elsewhere, numbers, quietly
from mmpre.recipes.imports.bert import EMBEDDINGS, HEADS, PADDING, layers
from mmpre.sublayers.residual import PostNorm

LONGEST = 128  # tokens of the rows that are compared, at most
TEXTS = ("Good morning.", "naïve café: 2 x 3 = 6\n\tand  so on", "日本語 and русский 🙂", "a")
CLASSES = {  # configuration, with a head, without one
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, transformers.RobertaModel),
    "electra": (transformers.ElectraConfig, transformers.ElectraForMaskedLM, transformers.ElectraModel),
}


class BertLike:
    """BERT and the two that differ from it in names and in where positions begin."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.config, self.with_head, self.without = CLASSES[kind]
        self.target = f"{self.with_head.__name__} of transformers"

    def differs(self, recipe: Recipe) -> list[str] | None:
        net = recipe.network
        if not isinstance(net, Network) or not any(isinstance(one, Text) for one in net.modalities.values()):
            return None
        if len(net.modalities) > 1:
            return [f"its rows hold {' and '.join(net.modalities)}, the class reads text alone"]
        text, told = text_of(net), differences(net.encoder, PostNorm)
        if text.positions is None:
            told.append("no positions are added to its input, the class learns them")
        if text.types is None:
            told.append("no type is added to its input, the class has a vector of it")
        if self.kind == "roberta" and pad_of(text) != PADDING - 1:
            told.append(f"its tokenizer has no padding at id {PADDING - 1}, from which the class counts positions")
        return told + looks_elsewhere(recipe)

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        text, heads = text_of(recipe.network), self._heads(recipe)
        sizes, vocabulary = numbers(recipe.network.encoder), text.reader.vocabulary
        first = PADDING if self.kind == "roberta" else 0
        kind = self.with_head if len(heads) == 1 else self.without
        more = {"embedding_size": sizes.width} if self.kind == "electra" else {}
        config = self.config(
            vocab_size=text.table.num_embeddings, hidden_size=sizes.width, num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads, intermediate_size=sizes.hidden, hidden_act="gelu",
            hidden_dropout_prob=sizes.dropout, attention_probs_dropout_prob=sizes.attention_dropout,
            max_position_embeddings=text.longest + first, type_vocab_size=text.types.num_embeddings,
            layer_norm_eps=sizes.eps, pad_token_id=pad_of(text), bos_token_id=vocabulary.cls,
            eos_token_id=vocabulary.sep, architectures=[kind.__name__], dtype="float32", **more,
        )  # fmt: skip
        config.save_pretrained(folder)
        at = f"{self.kind}." if kind is self.with_head else ""
        own = dict(text.state_dict())
        own["positions.weight"] = self._positions(text)
        found = to_theirs(under("", f"{at}embeddings.", EMBEDDINGS), own)
        found |= to_theirs(layers(f"{at}encoder.layer.", sizes.depth), recipe.network.encoder.state_dict())
        if kind is self.with_head:
            found |= to_theirs(HEADS[self.kind], heads[0].state_dict())
        found = {name: tensor.float().contiguous().clone() for name, tensor in found.items()}
        save_file(found, folder / "model.safetensors", {"format": "pt"})
        tokenizer_of(text).save_pretrained(folder)
        note = f"{len(heads)} heads predict words, a {kind.__name__} has none: none was taken"
        return [note] if len(heads) > 1 else []

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        net, heads = recipe.network, self._heads(recipe)
        text, ((role, _),) = text_of(net), net.modalities.items()
        head = heads[0] if len(heads) == 1 else None
        if head is not None:
            whole = loaded(self.with_head, folder)
            model = getattr(whole, whole.base_model_prefix)
        else:
            settings = {} if self.kind == "electra" else {"add_pooling_layer": False}
            model = loaded(self.without, folder, **settings)
        batch = batch_of(role, [text.reader.row(ids_W, torch.zeros_like(ids_W)) for ids_W in made_rows(text)])
        ids_Bn, valid_Bn = padded(batch.seen[role]["ids"], batch.layout.lengths_B, pad_of(text))
        ours_ND = net(batch)
        theirs_ND = model(input_ids=ids_Bn, attention_mask=valid_Bn.long()).last_hidden_state[valid_Bn]
        what = f"states of {len(ids_Bn)} made rows of 3 to {ids_Bn.shape[1]} tokens"
        checks = [Check(what, apart(ours_ND, theirs_ND), LIMIT)]
        if head is not None:
            scores = whole(input_ids=ids_Bn, attention_mask=valid_Bn.long()).logits[valid_Bn]
            ours = head.scores(ours_ND)
            checks.append(Check("scores of words", apart(ours, scores), LIMIT * max(1.0, float(ours.abs().max()))))
        return [*checks, same_ids(text, folder)]

    def _heads(self, recipe: Recipe) -> list[Vocabulary]:
        """Those that read the network's states; ELECTRA's generator has one for its own."""
        width, heads = numbers(recipe.network.encoder).width, heads_of(recipe.module(), recipe.network, Vocabulary)
        return [one for one in heads if not isinstance(one.transform, Transform) or one.transform.width == width]

    def _positions(self, text: Text) -> Tensor:
        """The rows that are used, behind as many unused ones as the class counts from."""
        used_PD = text.positions.weight[text.first_position :]
        first = PADDING if self.kind == "roberta" else 0
        return torch.cat([used_PD.new_zeros(first, used_PD.shape[1]), used_PD])


exporter = BertLike("bert")


def text_of(net: Network) -> Text:
    (text,) = net.modalities.values()
    return text


def pad_of(text: Text) -> int:
    """The id that fills rows up; where the tokenizer has none, any will do: attention is told."""
    vocabulary = text.reader.vocabulary
    if isinstance(vocabulary, Pieces):
        for name in ("[PAD]", "<pad>"):
            if (found := vocabulary.backend.token_to_id(name)) is not None:
                return found
    return vocabulary.sep


def made_rows(text: Text) -> list[Tensor]:
    """Ids without special ones, for rows of 3 tokens to the longest."""
    g, (low, high) = torch.Generator().manual_seed(0), text.reader.vocabulary.free
    longest = min(LONGEST, text.reader.max_length)
    lengths = sorted({3, min(4, longest), (3 + longest) // 2, longest - 1, longest} - {2})
    return [torch.randint(low, high, (length - 2,), generator=g, dtype=torch.int32) for length in lengths]


def padded(ids_N: Tensor, lengths_B: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    rows = ids_N.split(lengths_B.tolist())
    ids_Bn = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
    return ids_Bn, torch.arange(ids_Bn.shape[1]) < lengths_B[:, None]


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def tokenizer_of(text: Text) -> transformers.PreTrainedTokenizerFast:
    """The reader's tokenizer: [CLS] before and [SEP] behind the pieces, as its rows are."""
    vocabulary = text.reader.vocabulary
    backend = tokenizers.Tokenizer.from_str(vocabulary.source) if isinstance(vocabulary, Pieces) else _bytes()
    backend.no_padding()
    backend.no_truncation()
    cls, sep, mask, pad = (
        backend.id_to_token(i) for i in (vocabulary.cls, vocabulary.sep, vocabulary.mask, pad_of(text))
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary.cls), (sep, vocabulary.sep)],
    )  # fmt: skip
    unknown = getattr(backend.model, "unk_token", None)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token=cls, sep_token=sep, mask_token=mask, pad_token=pad, unk_token=unknown,
        model_max_length=text.reader.max_length, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _bytes() -> tokenizers.Tokenizer:
    """`Bytes` as a tokenizer.json: each byte has its own value as id."""
    names = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # what the library calls a byte: itself where it can be printed, in order, the others from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    backend = tokenizers.Tokenizer(models.BPE(dict(sorted(letters.items(), key=lambda one: one[1])), []))
    backend.pre_tokenizer, backend.decoder = names, decoders.ByteLevel()
    for name, i in (("[CLS]", Bytes.cls), ("[SEP]", Bytes.sep), ("[MASK]", Bytes.mask)):
        backend.add_special_tokens([name])
        if backend.token_to_id(name) != i:
            raise ValueError(f"the tokenizers library gave {name} the id {backend.token_to_id(name)}, wanted {i}")
    return backend


def same_ids(text: Text, folder: Path) -> Check:
    """How many texts the exported tokenizer cuts otherwise."""
    with quietly():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary, different = text.reader.vocabulary, 0
    texts = list(TEXTS)
    if isinstance(vocabulary, Pieces):
        texts += [vocabulary.backend.decode(ids_W.tolist()) for ids_W in made_rows(text)]
    for one in texts:
        ours = [vocabulary.cls, *vocabulary.cut(one)[0].tolist(), vocabulary.sep]
        different += tokenizer(one)["input_ids"] != ours
    return Check(f"texts of {len(texts)} that the tokenizer cuts otherwise", float(different), 0.0)
