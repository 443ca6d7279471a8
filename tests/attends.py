"""Rows for tests of attention: text with marks and positions, nodes with edges and links; every attend and bias, each
beside its definition for one row, written out pair by pair."""

import math

import torch

from mmpre.attention import Causal, Full, Together, Window
from mmpre.attention.bias import ALiBi, RelativeKey, T5Buckets
from mmpre.attention.by_tokens import Graph, PerRow, Positions, Prefix, Roles, Slots
from mmpre.batch import Batch, Row, pack
from mmpre.tokens import Ragged, Tokens

# texts and nodes of each row
SIZES = [(3, 2), (5, 0), (0, 5), (1, 0), (5, 4), (5, 4), (0, 0)]


def some_row(number: int, texts: int, nodes: int) -> Row:
    g = torch.Generator().manual_seed(number)

    def chosen(*shape, share=0.4):
        return torch.rand(*shape, generator=g) < share

    edge_E2 = chosen(nodes, nodes, share=0.3).nonzero()
    link_E2 = chosen(nodes, texts, share=0.3).nonzero()
    tokens = {
        "text": Tokens.of_row(
            torch.arange(texts).eq(0).long() - 1, mark=chosen(texts), place=torch.randperm(texts, generator=g) * 2,
        ),
        "node": Tokens.of_row(
            torch.full((nodes,), -1), links=link_E2, local=edge_E2,
            edges=Ragged(edge_E2, torch.tensor([len(edge_E2)]), refers_to="tokens"),
        ),
    }  # fmt: skip
    nothing = {role: torch.zeros(len(one), dtype=torch.bool) for role, one in tokens.items()}
    labels = {"causal": torch.tensor(number % 2)}
    return Row(str(number), clean=tokens, seen=tokens, replaced=nothing, picked={}, labels=labels)


def some_batch(who, sizes=SIZES) -> Batch:
    return pack([some_row(i, *size) for i, size in enumerate(sizes)], who.plan)


class Facts:
    """One row, for the definitions."""

    def __init__(self, key: str, sizes=SIZES) -> None:
        self.row = some_row(int(key), *sizes[int(key)])
        self.texts, self.nodes = sizes[int(key)]
        text, node = self.row.seen["text"], self.row.seen["node"]
        self.mark = text["mark"].tolist() + [False] * self.nodes
        self.is_node = [i >= self.texts for i in range(self.texts + self.nodes)]
        self.edges = {(self.texts + i, self.texts + j) for i, j in node["local"].tolist()}
        links = [(self.texts + i, j) for i, j in node["links"].tolist()]
        self.links = {*links, *((j, i) for i, j in links)}
        self.causal = bool(self.row.labels["causal"])
        self.place = [*text["place"].tolist(), *range(self.texts, self.texts + self.nodes)]


def graph(f, i, j, links=True):
    joined = (i, j) in f.edges or (links and (i, j) in f.links)
    return i == j or joined or not (f.is_node[i] or f.is_node[j])


ATTENDS = {
    "full": (Full(), lambda f, i, j: True),
    "causal": (Causal(), lambda f, i, j: j <= i),
    "window": (Window(2), lambda f, i, j: abs(i - j) <= 2),
    "causal window": (Together(Causal(), Window(1)), lambda f, i, j: 0 <= i - j <= 1),
    "prefix": (Prefix("text"), lambda f, i, j: j <= i or not (f.is_node[i] or f.is_node[j])),
    "prefix field": (Prefix("text", "mark"), lambda f, i, j: j <= i or (f.mark[i] and f.mark[j])),
    "slots": (Slots("node"), lambda f, i, j: i == j or not f.is_node[j]),
    "slots field": (Slots("text", "mark"), lambda f, i, j: i == j or not f.mark[j]),
    "across": (Roles({"text": ("node",), "node": ("text",)}), lambda f, i, j: f.is_node[i] != f.is_node[j]),
    "hidden": (Roles({"text": ("text",)}), lambda f, i, j: f.is_node[i] or not f.is_node[j]),
    "graph": (Graph("node", links={"text": "links"}), graph),
    "graph within": (Graph("node", "local"), lambda f, i, j: graph(f, i, j, links=False)),
    "graph special": (
        Graph("node", links={"text": "links"}, special=True),
        lambda f, i, j: graph(f, i, j) or (f.texts > 0 and 0 in (i, j)),
    ),
    "graph nodes": (Graph("text", None, nodes="mark"), lambda f, i, j: i == j or not (f.mark[i] or f.mark[j])),
    "per row": (PerRow((Full(), Causal()), "causal"), lambda f, i, j: j <= i or not f.causal),
    "together": (
        Together(Graph("node", links={"text": "links"}), Window(3), Roles({"text": ("text",)})),
        lambda f, i, j: graph(f, i, j) and abs(i - j) <= 3 and (f.is_node[i] or not f.is_node[j]),
    ),
    "positions": (Positions({"text": "place"}, Causal()), lambda f, i, j: j <= i),
}  # fmt: skip


def some_bias(name: str, heads: int = 2, width: int = 8):
    """A bias, and what it adds by its definition: f(h, q_HK, distance)."""
    torch.manual_seed(3)
    if name == "alibi":
        return ALiBi(heads).double(), lambda h, q_HK, d: -(2.0 ** (-8 * (h + 1) / heads)) * abs(d)
    if name == "t5":
        bias = T5Buckets(heads, buckets=8, longest=10).double()
        return bias, lambda h, q_HK, d: bias.table.weight[int(bias.bucket(torch.tensor(d))), h]
    bias = RelativeKey(width, left=3, right=1).double()
    return bias, lambda h, q_HK, d: q_HK[h] @ bias.table.weight[min(max(d, -3), 1) + 3] / math.sqrt(width)


def by_hand(batch: Batch, allows, qkv_N3HK, added=None, *, sizes=SIZES, placed=False) -> torch.Tensor:
    """Attention as it is defined, in plain loops."""
    y, start = [], 0
    for key in batch.keys:
        f = Facts(key, sizes)
        n = f.texts + f.nodes
        place = f.place if placed else range(n)
        q, k, v = qkv_N3HK[start : start + n].unbind(1)
        for i in range(n):
            seen = [j for j in range(n) if allows(f, i, j)]
            if not seen:
                y.append(torch.zeros_like(v[i]))
                continue
            heads = []
            for h in range(q.shape[1]):
                score = q[i, h] @ k[seen, h].T / math.sqrt(q.shape[2])
                if added is not None:
                    score = score + torch.stack([torch.as_tensor(added(h, q[i], place[j] - place[i])) for j in seen])
                heads.append(score.softmax(-1) @ v[seen, h])
            y.append(torch.stack(heads))
        start += n
    return torch.stack(y)
