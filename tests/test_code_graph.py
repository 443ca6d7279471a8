"""Rows of code with their graph: pieces and nodes, who sees whom, what is hidden, and the questions on pairs."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from masking import row
from tokenizers import models, pre_tokenizers

from mmpre.attention import Full
from mmpre.batch import pack
from mmpre.data.code import JAVA
from mmpre.data.sample import BadMember, Sample
from mmpre.data.vocabulary import Bytes
from mmpre.encoder import bert_encoder
from mmpre.evaluation.features import pooled
from mmpre.heads.pairs import PairScores
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import HideAll
from mmpre.masking.pairs import Asked, AskPairs
from mmpre.masking.units import WholeUnits
from mmpre.modalities.code_graph import CLS, NODE, SEP, CodeGraph, CodeReader, corpus, graph_attend
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.view import View

TEXT = "def f(a, bb):\n    # sum of both\n    c = a + bb\n    c += a\n    return c\n"
OTHERS = ("x = y\nz = x\n", "def loop(items):\n    s = 0\n    for i in items:\n        s = s + i\n    return s\n", TEXT)


def sample(text, key="a"):
    return Sample(key, "shard", "digest", {"py": text.encode(), "txt": b"what it does"})


def read(text=TEXT, **more):
    return CodeReader("bytes", **more).tokenize(sample(text), row(0))


def pieces(tokens, i):
    """What token i of a row shows, and what a node's pieces show."""
    linked = [k for n, k in tokens["link"].tolist() if n == i] if tokens["node"][i] else [i]
    return bytes(tokens["ids"][linked].tolist()).decode().strip()


def some_net(text=False):
    torch.manual_seed(0)
    code = CodeGraph(CodeReader("bytes", max_length=200), width=32, dropout=0.0)
    roles = {"code": code}
    if text:
        roles = {"text": Text(TextReader("bytes"), width=32, dropout=0.0), **roles}
    torch.nn.init.normal_(code.table.weight)
    return Network(roles, bert_encoder(32, 2, 2, dropout=0.0, attention_dropout=0.0)).eval()


def no_donor(role, k):
    raise AssertionError


def rows(view, net, texts=OTHERS):
    return [view.row(sample(text, str(i)), net.readers, row(i), no_donor) for i, text in enumerate(texts)]


def test_a_row_is_pieces_and_nodes_that_know_their_pieces_and_sources():
    tokens = read()
    code, nodes = tokens["code"].nonzero().squeeze(1), tokens["node"].nonzero().squeeze(1)
    assert bytes(tokens["ids"][code].tolist()).decode() == "def f ( a , bb ) : c = a + bb c += a return c"
    assert [pieces(tokens, i) for i in nodes.tolist()] == ["a", "bb", "c", "a", "bb", "c", "a", "c"]
    edges = {(int(nodes.tolist().index(i)), int(nodes.tolist().index(j))) for i, j in tokens["edge"].tolist()}
    assert edges == {(2, 3), (2, 4), (3, 0), (4, 1), (5, 6), (6, 0), (7, 5)}
    assert tokens["position"][nodes].eq(0).all() and tokens["position"][: nodes[0]].tolist() == list(
        range(1, 1 + nodes[0])
    )
    kinds = tokens.special_N.tolist()
    assert kinds[0] == CLS and kinds[int(nodes[0]) - 1] == SEP and set(kinds[int(nodes[0]) :]) == {NODE}


def test_comments_stand_apart_before_the_code():
    with_, without = read(comments=True), read()
    count = len("sum of both")
    assert bytes(with_["ids"][1 : 1 + count].tolist()).decode() == "sum of both"
    assert with_.special_N[1 + count] == SEP
    assert with_["word"][: 2 + count].unique_consecutive(return_counts=True)[1].tolist() == [1, 3, 3, 5, 1]
    assert with_["word"][1 : 1 + count].min() > with_["word"][2 + count :].max(), "their words are not the code's"
    code, same = with_["code"].nonzero().squeeze(1), without["code"].nonzero().squeeze(1)
    assert torch.equal(with_["ids"][code], without["ids"][same])
    assert torch.equal(with_["edge"] - len(with_), without["edge"] - len(without))
    assert len(read("x = y\n", comments=True)) == len(read("x = y\n"))
    assert (read(comments=True, max_comment=3).special_N == SEP).nonzero()[0] == 4


def test_a_comment_that_says_nothing_is_left_out():
    assert torch.equal(read("#\nx = y\n", comments=True)["ids"], read("x = y\n")["ids"])
    assert torch.equal(read("#\nx = y  # z\n", comments=True)["ids"], read("x = y  # z\n", comments=True)["ids"])
    for none in (Bytes().cut(""), Bytes().cut_words([""]), Bytes().cut_words([])):
        assert [len(part) for part in none] == [0, 0]


@pytest.mark.parametrize(
    "text",
    ["x = RUN\n", "@(lambda f, x=RUN: f)\ndef f():\n    return 1\n", "def f(a=RUN):\n    return a\n"],
    ids=["import", "decorator", "default"],
)
def test_a_program_is_read_and_never_run(text, tmp_path):
    text = text.replace("RUN", f"open({str(tmp_path / 'marker')!r}, 'w')")
    reader = CodeReader(comments=True)
    tokens = reader.tokenize(sample(text), row(0))
    reader.show(tokens, torch.zeros(len(tokens), dtype=torch.bool))
    assert list(corpus(sample(text))) and not (tmp_path / "marker").exists()
    exec(text, {})
    assert (tmp_path / "marker").exists()


def test_a_text_about_the_code_stands_where_comments_do():
    both, code = read(about=("txt",)), read()
    said = bytes(both["ids"][1 : 1 + len("what it does")].tolist()).decode()
    assert said == "what it does" and torch.equal(both["ids"][-len(code) + 1 :], code["ids"][1:])
    assert torch.equal(both["edge"] - len(both), code["edge"] - len(code))
    more = read(about=("txt",), comments=True)
    end = int((more.special_N == SEP).nonzero()[0])
    assert bytes(more["ids"][1:end].tolist()).decode() == "what it does\nsum of both"
    assert (read(about=("txt",), max_comment=4).special_N == SEP).nonzero()[0] == 5
    with pytest.raises(ValueError, match="CodeReader: wanted max_length of at least 132"):
        CodeReader(about=("txt",), max_length=100)


def test_a_text_or_a_program_may_stand_alone_in_one_space():
    reader = CodeReader(about=("txt",))
    assert reader.suffixes == ("py", "java", "js", "txt")
    text = reader.tokenize(Sample("a", "shard", "digest", {"txt": b"of two"}), row(0))
    assert text.special_N.tolist() == [CLS, *[-1] * 6, SEP] and not text["node"].any() and not text["code"].any()
    assert text["position"].tolist() == list(range(1, 9)) and len(text["edge"]) == len(text["link"]) == 0
    alone = reader.tokenize(Sample("a", "shard", "digest", {"py": TEXT.encode()}), row(0))
    assert torch.equal(alone["ids"], read()["ids"])
    with pytest.raises(BadMember, match=r"wanted .py or .java or .js, the sample has json"):
        reader.tokenize(Sample("a", "shard", "digest", {"json": b"{}"}), row(0))
    net = some_net()
    made = [View().row(sample(TEXT, "0"), {"code": reader}, row(0), no_donor)]
    made += [replace(made[0], key="1", clean={"code": one}, seen={"code": one},
                     replaced={"code": torch.zeros(len(one), dtype=torch.bool)}) for one in (text, alone)]  # fmt: skip
    assert net(pack(made, graph_attend("code").plan)).isfinite().all()


@pytest.mark.parametrize(
    "more",
    [{}, {"about": ("txt",), "max_comment": 20}, {"max_nodes": 5}, {"languages": (JAVA,)}],
    ids=["plain", "comment", "few nodes", "java"],
)
def test_a_made_program_fills_a_row(more):
    reader = CodeReader(max_length=200, **more)
    tokens = reader.tokenize(Sample("a", "shard", "digest", reader.made()), row(0))
    nodes = int(tokens["node"].sum())
    assert nodes >= min(reader.max_nodes, 40) and 196 <= len(tokens) - nodes <= 200
    assert int((tokens.special_N == SEP).sum()) == 1 + bool(reader.about)


@pytest.mark.parametrize("most", [8, 14, 21, 30, 45])
def test_a_long_program_is_cut_at_a_token_with_its_nodes(most):
    whole, cut = read(), read(max_length=most)
    code = cut["code"].nonzero().squeeze(1)
    assert len(cut) - int(cut["node"].sum()) <= most
    assert torch.equal(cut["ids"][code], whole["ids"][code])
    assert cut["word"][code[-1]] != whole["word"][code[-1] + 1], "no token is cut in two"
    assert len(read(max_nodes=3)["node"].nonzero()) == 3 and len(read(max_nodes=0)["edge"]) == 0
    for tokens in (cut, read(max_nodes=3)):
        nodes = set(tokens["node"].nonzero().squeeze(1).tolist())
        assert set(tokens["edge"].flatten().tolist()) <= nodes == set(tokens["link"][:, 0].tolist()) | nodes
        assert all(pieces(tokens, i) in ("a", "bb", "c") for i in nodes)


def test_a_first_token_that_is_longer_than_the_row_is_cut():
    tokens = read("a" * 50 + " = 1\n", max_length=20)
    assert int(tokens["code"].sum()) == 18 and tokens["word"][1:19].eq(0).all()


def test_any_tokenizer_links_pieces_to_tokens():
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "def", "f", "re", "##turn", "a", "##bc", "(", ")", ":", "="]
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokens = CodeReader(made).tokenize(sample("def f(abc):\n    return abc\n"), row(0))
    assert [words[i] for i in tokens["ids"].tolist()] == [
        "[CLS]", "def", "f", "(", "a", "##bc", ")", ":", "re", "##turn", "a", "##bc", "[SEP]", "[MASK]", "[MASK]",
    ]  # fmt: skip
    assert tokens["link"].tolist() == [[13, 4], [13, 5], [14, 10], [14, 11]] and tokens["edge"].tolist() == [[14, 13]]
    assert tokens["word"].tolist() == [-1, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7, -1, 3, 7]


def test_what_is_too_long_or_of_no_language_is_a_bad_member():
    with pytest.raises(BadMember, match="200 bytes, at most 100 are read; cut it into functions"):
        CodeReader(most_bytes=100).tokenize(sample("x = 1\n" * 33 + "# "), row(0))
    with pytest.raises(BadMember, match=r"wanted .py or .java or .js, the sample has txt"):
        CodeReader().tokenize(Sample("a", "shard", "digest", {"txt": b"x"}), row(0))
    with pytest.raises(ValueError, match="CodeReader: wanted max_length of at least 132"):
        CodeReader(max_length=100, comments=True)
    with pytest.raises(ValueError, match="CodeGraph: table must hold 259 vectors of width 8"):
        CodeGraph(CodeReader(), width=8, table=torch.nn.Embedding(259, 4))


def allowed(batch, number):
    """Who sees whom in a row of text and code, spelled out."""
    tokens, special, kind, linked, sources = batch.seen["code"], [], [], [], []
    text = batch.seen["text"]
    at = {role: int(batch.layout.lengths[role][:number].sum()) for role in ("text", "code")}
    for role, one in (("text", text), ("code", tokens)):
        for i in range(at[role], at[role] + int(batch.layout.lengths[role][number])):
            special.append(int(one.special_N[i]) >= 0)
            kind.append((role, i, role == "code" and bool(tokens["node"][i])))
    linked = {tuple(pair) for pair in tokens["link"].tolist()}
    sources = {tuple(pair) for pair in tokens["edge"].tolist()}
    made = torch.zeros(len(kind), len(kind), dtype=torch.bool)
    for q, (_, i, node) in enumerate(kind):
        for k, (_, j, other) in enumerate(kind):
            if node and other:
                made[q, k] = i == j or (i, j) in sources
            elif node or other:
                ends = (i, j) if node else (j, i)
                role, is_special = (kind[k][0], special[k]) if node else (kind[q][0], special[q])
                made[q, k] = is_special or (role == "code" and ends in linked)
            else:
                made[q, k] = True
    return made


def test_nodes_see_their_pieces_and_sources_and_the_rest_sees_itself():
    net = some_net(text=True)
    made = rows(View(attend=graph_attend("code")), net)
    batch = pack(made, graph_attend("code").plan)
    for number in range(len(made)):
        assert torch.equal(batch.plan.dense(number), allowed(batch, number))


@torch.no_grad()
def test_packed_rows_are_as_they_are_alone_and_none_sees_another():
    net, attend = some_net(), graph_attend("code")
    made = rows(View(attend=attend), net)
    batch = pack(made, attend.plan)
    together = net(batch).split(batch.layout.lengths_B.tolist())
    for state_ND, key in zip(together, batch.keys, strict=True):
        alone_ND = net(pack([made[int(key)]], attend.plan))
        torch.testing.assert_close(state_ND, alone_ND, atol=1e-5, rtol=1e-5)
    assert (net(pack(made[:1], attend.plan)) - net(pack(made[:1], Full().plan))).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_evaluated_is_attended_to_as_the_network_says():
    net = some_net()
    made = View().row(sample(TEXT, "0"), net.readers, row(0), no_donor)
    ordinary_N, means = made.seen["code"].special_N < 0, []
    for attend in (Full(), graph_attend("code")):
        net.attend = attend
        (found_D,) = pooled(net, "py", [(0, sample(TEXT))]).x_LSD[-1]
        means.append(net(pack([made], attend.plan))[ordinary_N].mean(0))
        np.testing.assert_allclose(found_D, means[-1], atol=1e-5)
    assert (means[0] - means[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_hidden_token_is_told_neither_by_its_pieces_nor_by_its_nodes():
    net, attend = some_net(), graph_attend("code")
    view = View(picks={"mlm": WholeUnits(role="code", share=0.4, unit="word")}, corruption=HideAll(), attend=attend)
    made = view.row(sample(TEXT), net.readers, row(1), no_donor)
    hidden_N = made.replaced["code"]
    nodes = made.clean["code"]["link"][hidden_N[made.clean["code"]["link"][:, 1]], 0].unique()
    assert len(nodes) >= 2, "some nodes stand for hidden tokens"
    seen = made.seen["code"]
    ids_N = torch.where(hidden_N, (seen["ids"] + 7) % 250, seen["ids"])
    other = type(made)(**{**made.__dict__, "seen": {"code": seen.with_values(ids=ids_N)}})
    assert torch.equal(net(pack([made], attend.plan)), net(pack([other], attend.plan)))
    nothing = {"code": torch.zeros_like(hidden_N)}
    open_, changed = (type(made)(**{**one.__dict__, "replaced": nothing}) for one in (made, other))
    states = [net(pack([one], attend.plan)) for one in (open_, changed)]
    assert (states[0] - states[1])[nodes].abs().max() > 1e-3, "the change shows where nothing is hidden"


@pytest.mark.parametrize("field, others", [("edge", None), ("link", "code")])
def test_asked_pairs_are_hidden_and_half_of_them_are_none(field, others):
    net, attend = some_net(), graph_attend("code")
    ask = AskPairs(field=field, others=others, share=0.3)
    view = View(cuts={"code": ask}, picks={"ask": Asked(role="code", field=field)}, attend=attend)
    seen_some = 0
    for unit in range(40):
        made = view.row(sample(OTHERS[unit % 3]), net.readers, row(unit), no_donor)
        tokens, whole = made.clean["code"], net.readers["code"].tokenize(sample(OTHERS[unit % 3]), row(unit))
        before, left = ({tuple(pair) for pair in one[field].tolist()} for one in (whole, tokens))
        asked, true = tokens[f"{field}_asked"].tolist(), tokens[f"{field}_true"].tolist()
        yes, no = ({tuple(pair) for pair, t in zip(asked, true, strict=True) if t == is_} for is_ in (1, 0))
        assert yes == {pair for pair in before - left if pair[0] != pair[1]} and not no & before
        assert len(yes) >= len(no) and (len(no) == len(yes) or field == "edge")
        drawn = {i for i, _ in yes | no} if others else None
        assert others is None or not {i for i, _ in left} & drawn, "no link of a drawn node is left"
        assert made.picked["ask"].clean_M.tolist() == [i for pair in asked for i in pair]
        allowed_NN = pack([made], attend.plan).plan.dense(0)
        for i, j in asked:
            assert not allowed_NN[i, j] and (field == "edge" or not allowed_NN[j, i])
        seen_some += len(yes)
    assert seen_some > 60
    again = view.row(sample(OTHERS[0]), net.readers, row(39), no_donor).clean["code"][f"{field}_asked"].tolist()
    assert again == asked


def test_a_share_of_the_nodes_is_drawn_and_strange_pairs_are_refused():
    net = some_net()
    tokens = net.readers["code"].tokenize(sample(TEXT), row(0))
    ask = AskPairs(field="link", others="code", share=0.2)
    counts = [len({i for i, _ in ask(tokens, row(unit))["link_asked"].tolist()}) for unit in range(300)]
    assert abs(np.mean(counts) - 0.2 * 8) < 0.1 and set(counts) == {1, 2}
    with pytest.raises(ValueError, match="AskPairs: field 'link' must hold pairs of a token that 'node' marks"):
        AskPairs(field="link")(tokens, row(0))
    with pytest.raises(ValueError, match=r"share must lie above 0 and reach to 1, got 20; a fifth is 0.2"):
        AskPairs(share=20)
    with pytest.raises(ValueError, match=r"have fields .'link_asked', 'link_true'. already"):
        ask(ask(tokens, row(0)), row(0))
    nothing = net.readers["code"].tokenize(sample("f()\n"), row(0))
    assert len(AskPairs()(nothing, row(0))["edge_asked"]) == 0


@pytest.mark.parametrize("scaled", [True, False])
def test_pair_scores_equal_a_dense_table(scaled):
    net, attend = some_net(), graph_attend("code")
    view = View(cuts={"code": AskPairs(share=0.5)}, picks={"edge": Asked(role="code")}, attend=attend)
    batch = pack(rows(view, net), attend.plan)
    objective = OnePass(net, [Predict("edge", PairScores(scaled=scaled))])
    loss = objective(batch, row(0))
    state_ND, tokens = net(batch), batch.clean["code"]
    dense_NN = state_ND @ state_ND.T / (32**0.5 if scaled else 1)
    q_P, k_P = tokens["edge_asked"].unbind(1)
    expected = F.binary_cross_entropy_with_logits(dense_NN[q_P, k_P], tokens["edge_true"].float(), reduction="sum")
    assert len(q_P) > 4 and batch.counts["picked:edge"] == 2 * len(q_P)
    torch.testing.assert_close(loss.terms[0].sum, 2 * expected, rtol=1e-4, atol=1e-4)
    right = ((dense_NN[q_P, k_P] > 0) == (tokens["edge_true"] > 0)).sum()
    assert loss.metrics["edge_accuracy"][0] == 2 * right


def test_the_three_objectives_learn_together():
    torch.manual_seed(0)
    net = Network({"code": CodeGraph(CodeReader("bytes", max_length=200), width=32, dropout=0.0)},
                  bert_encoder(32, 2, 2, dropout=0.0, attention_dropout=0.0))  # fmt: skip
    attend = graph_attend("code")
    heads = {"mlm": Vocabulary(net.modalities["code"].table), "link": PairScores(field="link")}
    view = View(
        cuts={"code": AskPairs(field="link", others="code", share=0.5)}, attend=attend, corruption={"mlm": HideAll()},
        picks={"mlm": WholeUnits(role="code", share=0.15, unit="word"), "link": Asked(role="code", field="link")},
    )  # fmt: skip
    objective = OnePass(net, [Predict(name, head) for name, head in heads.items()])
    optimizer, seen = torch.optim.AdamW(objective.parameters(), 3e-3), []
    for step in range(60):
        made = [view.row(sample(text), net.readers, row(step * 3 + i), no_donor) for i, text in enumerate(OTHERS)]
        batch = pack(made, attend.plan)
        loss = objective(batch, row(step))
        seen.append([float(term.sum.detach()) / batch.counts[term.per] for term in loss.terms])
        sum(term.sum / batch.counts[term.per] for term in loss.terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, last = np.mean(seen[:5], 0), np.mean(seen[-5:], 0)
    assert (last < 0.7 * first).all(), (first, last)


def test_a_reader_goes_to_workers():
    reader = pickle.loads(pickle.dumps(CodeReader("bytes")))
    assert torch.equal(reader.tokenize(sample(TEXT), row(0))["edge"], read()["edge"])


def test_a_docstring_that_is_the_text_too_is_read_once():
    reader = CodeReader("bytes", comments=True, about=("txt",), max_length=200, max_comment=120)

    def spoken(text):
        program = b'def f(a):\n    """Adds one\n    to a."""\n    # as ever\n    return a + 1\n'
        made = Sample("0", "shard", "digest", {"py": program, "txt": text.encode()})
        tokens = reader.tokenize(made, row(0))
        return bytes(one for one in tokens["ids"].tolist() if one < 256).decode()

    assert spoken("Adds one to\na.").startswith("Adds one to\na.\nas everdef")
    assert spoken("Another text.").startswith("Another text.\nAdds one\n    to a.\nas everdef")
