"""Source code as pieces of its tokens, followed by the nodes of its data flow.

Source: GraphCodeBERT, Guo et al. 2020, arXiv:2009.08366; nodes as in the authors' code, see also mmpre/data/code.py.
"""
# N tokens of the packed batch, W pieces of one program, V nodes, E edges, L links, D model width

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mmpre.attention import Attend
from mmpre.attention.by_tokens import Graph
from mmpre.data.code import LANGUAGES, Code, Language, read_code
from mmpre.data.sample import BadMember, Sample
from mmpre.data.vocabulary import open_vocabulary
from mmpre.draw import Draw
from mmpre.dropout import Dropout
from mmpre.lookup import vector
from mmpre.masking.corrupt import BertReplace
from mmpre.masking.rows import row_numbers
from mmpre.show import HIDDEN, Box, cells
from mmpre.tokens import Ragged, Tokens

CLS, SEP, NODE = 0, 1, 2  # kinds of special token, in Tokens.special_N
COLOURS = {"comment": "#dfe9d3", "node": "#cfdcf3"}  # in pictures


class CodeReader:
    """Reads a program as [CLS] pieces [SEP] nodes, at most `max_length` tokens and then at most `max_nodes` nodes.

    A piece belongs to one token of the code; a node is the occurrence of a variable or literal that its value comes
    from somewhere, or goes somewhere. What passes `max_length` is cut off, at a token of the code, with its nodes. With
    `comments` those of the program stand first, as [CLS] comments [SEP] pieces [SEP] nodes, with at most `max_comment`
    pieces; otherwise they are left out. A text of its own that says what the program does, a member with a suffix of
    `about`, stands there too, before them; a sample may then have that text alone, as [CLS] text [SEP]. Nodes are
    special tokens: masks of tokens do not pick them.
    Languages are known by suffix. What does not parse raises BadMember (see `read_code`), and so does a program of more
    than `most_bytes`.
    Fields, one entry a token: ids (of a node that of the mask); word, the number of its token among those of the row
    that have pieces, counted on over the words of comments, -1 for CLS and SEP; position, 0 for nodes and counted from
    1; node and code, whether it is a node or a piece of code. Pairs of tokens of the row: edge [E, 2], a node and one
    that its value comes from; link [L, 2], a node and a piece of its token.
    """

    def __init__(
        self,
        tokenizer: str | Path | tokenizers.Tokenizer = "bytes",
        *,
        max_length: int = 512,
        max_nodes: int = 128,
        comments: bool = False,
        about: Sequence[str] = (),
        max_comment: int = 128,
        languages: Sequence[Language] = LANGUAGES,
        most_bytes: int = 128 << 10,
        most_errors: float = 0.1,
        specials: Sequence[str] | None = None,
    ) -> None:
        taken = 3 + (comments or bool(about)) * (max_comment + 1)
        if max_length < taken or max_nodes < 0 or max_comment < 1 or not 0 <= most_errors <= 1:
            raise ValueError(
                f"CodeReader: wanted max_length of at least {taken} (CLS, comments and SEP, a piece, SEP), max_nodes "
                f"not negative, max_comment at least 1 and most_errors as a share, got max_length {max_length}, "
                f"max_nodes {max_nodes}, max_comment {max_comment}, most_errors {most_errors}"
            )
        self.vocabulary = open_vocabulary(tokenizer, specials)
        self.max_length, self.max_nodes = max_length, max_nodes
        self.comments, self.max_comment = comments, max_comment
        self.languages = {language.suffix: language for language in languages}
        self.about, self.suffixes = tuple(about), (*self.languages, *about)
        self.most_bytes, self.most_errors = most_bytes, most_errors

    def code(self, sample: Sample) -> Code:
        """A sample's program: its tokens, comments and data flow."""
        suffix, data = sample.bytes(tuple(self.languages))
        if len(data) > self.most_bytes:
            detail = f"{len(data):,} bytes, at most {self.most_bytes:,} are read; cut it into functions"
            raise BadMember("code too long", suffix, detail)
        return read_code(sample.text((suffix,)), self.languages[suffix], most_errors=self.most_errors)

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        has_text = any(suffix in sample.members for suffix in self.about)
        has_code = not has_text or any(suffix in sample.members for suffix in self.languages)
        code = self.code(sample) if has_code else Code((), (), ())
        texts = [sample.text(self.about).strip()] if has_text else []
        if self.comments:  # a docstring that holds the text too would tell its hidden words
            said = [" ".join(text.split()) for text in texts]
            texts += [one for one in code.comments if not any(text in " ".join(one.split()) for text in said)]
        said_W = spoken_W = np.zeros(0, dtype=np.int64)
        if texts:
            cut = self.vocabulary.cut("\n".join(texts))
            said_W, spoken_W = (part.numpy()[: self.max_comment].astype(np.int64) for part in cut)
        before = 1 + len(said_W) + (len(said_W) > 0)  # CLS, and comments with a SEP
        ids_W, word_W = (part.numpy().astype(np.int64) for part in self.vocabulary.cut_words(code.tokens))
        if not len(ids_W if has_code else said_W):
            raise BadMember("empty text", sample.bytes(self.suffixes)[0], "the tokenizer finds no piece in it")
        kept = min(len(ids_W), self.max_length - before - 1)
        if kept < len(ids_W) and word_W[kept] != word_W[0]:  # the first token alone may be cut
            kept = int(np.searchsorted(word_W, word_W[kept]))
        ids_W, word_W = ids_W[:kept], word_W[:kept]

        flow_E2 = np.array(code.flow, dtype=np.int64).reshape(-1, 2)
        flow_E2 = flow_E2[np.isin(flow_E2, word_W).all(1)]
        known, word_W = np.unique(word_W, return_inverse=True)  # a token may have no piece
        flow_E2 = np.searchsorted(known, flow_E2)
        node_V = np.unique(flow_E2)[: self.max_nodes]
        flow_E2 = flow_E2[np.isin(flow_E2, node_V).all(1)]
        nodes_at = before + kept + has_code
        edge_E2 = nodes_at + np.searchsorted(node_V, flow_E2)
        first_V, last_V = (before + np.searchsorted(word_W, node_V, side) for side in ("left", "right"))
        count_V = last_V - first_V
        step_L = np.arange(count_V.sum()) - np.repeat(count_V.cumsum() - count_V, count_V)
        link_L2 = np.stack(
            [nodes_at + np.repeat(np.arange(len(node_V)), count_V), np.repeat(first_V, count_V) + step_L], 1
        )

        length = nodes_at + len(node_V)
        ids_N, number_N, special_N = (np.full(length, value) for value in (self.vocabulary.mask, -1, -1))
        ids_N[0], special_N[0] = self.vocabulary.cls, CLS
        ids_N[1 : 1 + len(said_W)] = said_W
        numbers_W = len(known) + spoken_W - spoken_W.min(initial=len(spoken_W), where=spoken_W >= 0)
        number_N[1 : 1 + len(said_W)] = np.where(spoken_W < 0, -1, numbers_W)
        for end in {before - 1, nodes_at - 1} - {0}:
            ids_N[end], special_N[end] = self.vocabulary.sep, SEP
        ids_N[before : before + kept], number_N[before : before + kept] = ids_W, word_W
        number_N[nodes_at:], special_N[nodes_at:] = node_V, NODE
        place_N, fields = np.arange(1, length + 1), (ids_N, number_N, special_N)
        place_N[nodes_at:] = 0
        ids, word, special = map(torch.from_numpy, fields)
        is_code = torch.zeros(length, dtype=torch.bool)
        is_code[before : before + kept] = True
        return Tokens.of_row(
            special, ids=ids, word=word, position=torch.from_numpy(place_N), node=special == NODE, code=is_code,
            edge=_pairs(edge_E2), link=_pairs(link_L2),
        )  # fmt: skip

    def made(self) -> dict[str, bytes]:
        """A program of one variable that fills a row, and a text that does so."""
        lines = max(self.max_length, self.max_nodes)
        members = {next(iter(self.languages)): b"a = a;\n" * lines}
        return members | {suffix: b"a " * self.max_comment for suffix in self.about[:1]}

    def replacement(self, mask: float = 0.8, random: float = 0.1) -> BertReplace:
        """BERT's corruption with this vocabulary's mask and its range of ordinary ids."""
        return BertReplace(mask_id=self.vocabulary.mask, random_ids=self.vocabulary.free, mask=mask, random=random)

    def texts(self, tokens: Tokens) -> list[str]:
        """What each token stands for, by itself; nodes have no letters of their own."""
        return [
            ("[CLS]", "[SEP]", "")[kind] if kind >= 0 else self.vocabulary.written([i])
            for i, kind in zip(tokens["ids"].tolist(), tokens.special_N.tolist(), strict=True)
        ]

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """A picture of a row: comments and code token by token, and an arc to each from those its value comes from."""
        ids, word, special = tokens["ids"].tolist(), tokens["word"].tolist(), tokens.special_N.tolist()
        is_code = tokens["code"].tolist()
        named = {word[i] for i in tokens["node"].nonzero().squeeze(1).tolist()}
        hidden, said, grounds, cell_of = hidden_N.tolist(), [], [], {}
        parts: list[list[int]] = []  # tokens that are shown in one cell
        for i in (~tokens["node"]).nonzero().squeeze(1).tolist():
            last = parts[-1][-1] if parts else i
            alike = last < i and special[i] < 0 > special[last] and word[i] == word[last] and hidden[i] == hidden[last]
            parts[-1].append(i) if alike else parts.append([i])
        for part in parts:
            first = part[0]
            cell_of.setdefault(word[first], len(said))
            written = self.vocabulary.written([ids[i] for i in part])
            said.append(("[CLS]", "[SEP]")[special[first]] if special[first] >= 0 else written)
            is_comment = special[first] < 0 and not is_code[first]
            grounds.append(COLOURS["node"] if word[first] in named else COLOURS["comment"] if is_comment else None)
        firsts = [part[0] for part in parts]

        def arcs(pen: ImageDraw.ImageDraw, boxes: Sequence[Box]) -> None:
            for i, j in tokens["edge"].tolist():
                colour = HIDDEN if hidden[i] or hidden[j] else "#3b66b0"
                _arc(pen, boxes[cell_of[word[j]]], boxes[cell_of[word[i]]], colour)

        return cells(
            said, hidden_N[firsts], special=tokens.special_N[firsts] >= 0, colours=grounds, above_px=14, under=arcs
        )[0]


def _pairs(pair_E2: Int64[np.ndarray, "E 2"]) -> Ragged:
    return Ragged(torch.from_numpy(np.ascontiguousarray(pair_E2)), torch.tensor([len(pair_E2)]), "tokens")


def _arc(pen: ImageDraw.ImageDraw, start: Box, end: Box, colour: str) -> None:
    """An arc over the cells of one line, a stroke from line to line; a dot at its end."""
    (x1, y1), (x2, y2) = (((box[0] + box[2]) // 2, box[1]) for box in (start, end))
    if y1 == y2:
        left, right = sorted((x1, x2)) if x1 != x2 else (x1 - 5, x1 + 5)
        high = min(12, 4 + (right - left) // 24)
        pen.arc((left, y1 - high, right, y1 + high), 180, 360, fill=colour)
    else:
        pen.line((x1, y1, x2, y2), fill=colour)
    pen.ellipse((x2 - 2, y2 - 2, x2 + 2, y2 + 2), fill=colour)


def plain_reader(sample: Sample) -> CodeReader:
    """A reader of ordinary settings, for `mmpre data inspect`."""
    return CodeReader("bytes", comments=True, max_length=1024)


def corpus(sample: Sample) -> Iterator[str]:
    """Texts to train a tokenizer on: comments, and the tokens of the code with a space between them."""
    code = CodeReader().code(sample)
    yield from code.comments
    yield " ".join(code.tokens)


def same_words(tokens: Tokens, pair_P2: Int64[Tensor, "P 2"]) -> Float[Tensor, "P"]:
    """1 for pairs of nodes or pieces whose tokens of the code are written alike: what equal names alone tell of edges.

    A token that begins the program is not alike to others where the tokenizer marks the space before a word.
    """
    row, word, ids = (one.tolist() for one in (row_numbers(tokens), tokens["word"], tokens["ids"]))
    pieces: dict[tuple[int, int], list[int]] = {}
    for i in tokens["code"].nonzero().squeeze(1).tolist():
        pieces.setdefault((row[i], word[i]), []).append(ids[i])
    written = [[pieces.get((row[i], word[i])) for i in pair] for pair in pair_P2.tolist()]
    return torch.tensor([float(one == other) for one, other in written])


def graph_attend(role: str) -> Attend:
    """Who sees whom in a row with code: nodes see, and are seen by, the pieces of their token; they see themselves and
    the nodes that their value comes from; special tokens of all roles see, and are seen by, everyone; pieces and the
    tokens of other roles see each other.

    In the authors' code special tokens see nodes, but nodes do not see special tokens nor themselves.
    """
    return Graph(role, edges="edge", nodes="node", links={role: "link"}, special=True)


class CodeGraph(nn.Module):
    """Dropout(LayerNorm(word + position)), where a node's word is the mean of those that its token's pieces show.

    A piece that is hidden shows the mask to its node as well, so a node does not tell what is hidden. `table` (the word
    vectors) may be shared with heads and a text of the same vocabulary.
    """

    def __init__(
        self, reader: CodeReader, *, width: int, table: nn.Embedding | None = None, dropout: float = 0.1,
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        if table is not None and (table.num_embeddings < reader.vocabulary.size or table.embedding_dim != width):
            raise ValueError(
                f"CodeGraph: table must hold {reader.vocabulary.size} vectors of width {width}, one a piece, got "
                f"{table.num_embeddings} of {table.embedding_dim}"
            )
        self.reader = reader
        self.table = table if table is not None else nn.Embedding(reader.vocabulary.size, width)
        self.positions = nn.Embedding(reader.max_length + 1, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)
        for one in (self.positions, *([self.table] if table is None else [])):
            nn.init.normal_(one.weight, std=0.02)

    def features(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """The word vectors, before nodes get theirs."""
        return self.table(tokens["ids"])

    def embed(self, f_NE: Float[Tensor, "N D"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        x_ND = torch.where(replaced_N[:, None], vector(self.table, self.reader.vocabulary.mask), f_NE)
        length_B = tokens.lengths_B
        start_B = (length_B.cumsum(0) - length_B).to(x_ND.device, non_blocking=True)
        # tokens of the code are numbered within the row, and each has a piece of its own: no two rows share a number
        group_N = (start_B[row_numbers(tokens)] + tokens["word"]).clamp(min=0)
        is_piece_N1 = tokens["code"][:, None].to(x_ND.dtype)
        sum_ND = torch.zeros_like(x_ND).index_add(0, group_N, x_ND * is_piece_N1)
        count_N1 = torch.zeros_like(is_piece_N1).index_add(0, group_N, is_piece_N1).clamp(min=1)
        mean_ND = (sum_ND / count_N1).index_select(0, group_N)
        x_ND = torch.where(tokens["node"][:, None], mean_ND, x_ND)
        return self.dropout(self.norm(x_ND + self.positions(tokens["position"])))
