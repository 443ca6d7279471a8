"""GraphCodeBERT against transformers' RobertaModel given the same graph, what its mask hides, and that it learns."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import transformers
from masking import row
from parity_text import AsUnits, copy_encoder, some_batch, vary, word_tokenizer
from sklearn.metrics import roc_auc_score
from torch import nn

from mmpre.batch import pack
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.evaluation.pair_ranking import PairRanking, auc
from mmpre.masking.corrupt import HideAll
from mmpre.masking.pairs import AskPairs, ShufflePairs
from mmpre.masking.units import InTurn
from mmpre.modalities.code_graph import CodeReader, same_words
from mmpre.plan import plan
from mmpre.processes.processes import Processes
from mmpre.recipes.graphcodebert import graphcodebert, scales
from mmpre.training.optim import set_learning_rate
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    width=32, depth=2, heads=4, length=160, comment=24, nodes=40, batch=8, micro_batches=1, steps=10, warmup=1,
    dropout=0.0,
)  # fmt: skip
PROGRAMS = [
    ("adds up", "def total(items):\n    s = 0\n    for i in items:\n        s = s + i\n    return s\n"),
    ("the larger one", "def most(a, b):\n    x = a\n    if b > a:\n        x = b\n    return x\n"),
    ("both", "def pair(a, b):\n    c = a\n    d = b, c\n    return d\n"),
    ("prints it", "def show(it):\n    print(it)\n"),
]


def some_samples(count=8, named=False):
    """Programs with a text; with `named` their variables have names of their own."""
    made = []
    for i in range(count):
        about, code = PROGRAMS[i % len(PROGRAMS)]
        if named:
            code = code.replace("s", f"s{i % 5}").replace(" x", f" x{i % 7}")
        made.append(Sample(f"{i:03d}", "shard", "digest", {"txt": about.encode(), "py": code.encode()}))
    return made


def some_recipe(**numbers):
    torch.manual_seed(0)
    return graphcodebert(**SMALL | numbers)


def task_of(recipe, name):
    return next(task for task in recipe.stages[0].tasks if task.name == name)


def batch_of(view, recipe, samples, **more):
    return some_batch(view, recipe.network.readers, samples, **more)


def full(values, lengths, value=0):
    return nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=value)


@torch.no_grad()
def test_states_equal_those_of_transformers_roberta_given_the_graph(tmp_path):
    """Places and nodes are given as by the authors' fine-tuning code; the mask is the paper's."""
    word_tokenizer(roberta=True).save(str(tmp_path / "tokenizer.json"))
    recipe = some_recipe(tokenizer=str(tmp_path))
    net, code = recipe.network.eval(), recipe.network.modalities["code"]
    size, length = code.reader.vocabulary.size, code.reader.max_length
    config = transformers.RobertaConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=length + 2, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.RobertaModel(config).eval()
    vary(theirs)
    copy_encoder(net.encoder, theirs.encoder)
    places = theirs.embeddings.position_embeddings.weight
    code.table.weight.copy_(theirs.embeddings.word_embeddings.weight)
    code.positions.weight[0] = places[0] + theirs.embeddings.token_type_embeddings.weight[0]
    code.positions.weight[1:] = places[2 : length + 2] + theirs.embeddings.token_type_embeddings.weight[0]
    code.norm.load_state_dict(theirs.embeddings.LayerNorm.state_dict())

    words = " ".join("w1 = w2 ; w3 = w1 + w2 ; if w3 : w1 = w4 ; w5 = w1 ;".split())
    texts = [words, "w7 = w8\nw9 = w7\n", "w1 = w1 + w2\n" * 4, "w3 ( w4 )\n"]
    samples = [
        Sample(f"{i}", "", "", {"py": t.replace(" ; ", "\n").encode(), "txt": b"w6 w7"}) for i, t in enumerate(texts)
    ]
    view = task_of(recipe, "edge").view
    batch = batch_of(view, recipe, samples)
    tokens, lengths = batch.seen["code"], batch.layout.lengths_B.tolist()
    assert len(set(lengths)) == 4 and tokens["node"].sum() > 15 and batch.replaced["code"].any()

    ids = full(tokens["ids"], lengths, 1)
    position = full(torch.where(tokens["node"], 0, tokens["position"] + 1), lengths, 1)
    allowed = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(lengths), 1, 1)  # else padding sees no one: NaN
    linked = torch.zeros_like(allowed)
    start = 0
    for b, n in enumerate(lengths):
        allowed[b, :n, :n] = batch.plan.dense(b)
        for node, piece in tokens["link"].tolist():
            if start <= node < start + n:
                linked[b, node - start, piece - start] = True
        start += n
    x_BLD = theirs.embeddings.word_embeddings(ids)
    share = linked / linked.sum(-1, keepdim=True).clamp(min=1)
    x_BLD = torch.where(position.eq(0)[..., None], share.float() @ x_BLD, x_BLD)
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    expected = theirs(inputs_embeds=x_BLD, attention_mask=bias, position_ids=position).last_hidden_state
    valid = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(net(batch), expected[valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["edge", "link"])
def test_nodes_see_along_edges_alone_and_nothing_joins_what_is_asked(name):
    recipe, asked = some_recipe(), 0
    task = task_of(recipe, name)
    for unit in range(12):
        made = task.view.row(some_samples()[unit % 4], recipe.network.readers, row(unit), None)
        tokens = made.seen["code"]
        allowed = pack([made], task.view.attend.plan).plan.dense(0)
        node, special = tokens["node"], (tokens.special_N >= 0) & ~tokens["node"]
        edges, links = ({tuple(pair) for pair in tokens[field].tolist()} for field in ("edge", "link"))
        seen = {tuple(pair) for pair in (allowed & node[:, None] & node).nonzero().tolist()}
        assert seen == edges | {(i, i) for i in node.nonzero().squeeze(1).tolist()}
        between = allowed & node[:, None] & ~node
        assert torch.equal(between, (allowed & ~node[:, None] & node).T)
        assert {tuple(pair) for pair in (between & ~special).nonzero().tolist()} == links
        assert between[node][:, special].all() and allowed[~node][:, ~node].all()
        questions = tokens[f"{name}_asked"].tolist()
        assert not any(allowed[i, j] or allowed[j, i] for i, j in questions)
        true = tokens[f"{name}_true"].sum()
        assert 2 * true == len(questions) or true > len(questions) / 2  # as many that are none, where there are
        asked += len(questions)
    assert asked > 20


@torch.no_grad()
def test_the_loss_of_words_is_the_same_without_nodes_and_with_nodes_whose_links_are_hidden():
    with_, without = some_recipe(), some_recipe(flow="none")
    for seed in range(5):
        vary(with_.module(), seed)
    without.network.load_state_dict(with_.network.state_dict())
    alone = [one.evaluations[0] for one in (with_, without)]
    heads = [one.objective.eval().readouts[0].head for one in alone]
    heads[1].load_state_dict(heads[0].state_dict())

    def unlinked(tokens, draw):
        nothing = torch.zeros(0, 2, dtype=torch.int64)
        fields = {name: replace(tokens.fields[name], values=nothing, lengths_B=torch.tensor([0])) for name in ("link",)}
        return replace(tokens, fields={**tokens.fields, **fields})

    losses, states = {}, {}
    for name, one, cut in (("no nodes", alone[1], None), ("hidden", alone[0], unlinked), ("shown", alone[0], None)):
        # [CLS] and [SEP] see all nodes, and are seen by all words: a way around the links
        attend = replace(one.view.attend, special=False)
        view = replace(one.view, attend=attend, **({"cuts": {"code": cut}} if cut else {}))
        batch = batch_of(view, with_ if one is alone[0] else without, some_samples())
        losses[name] = one.objective(batch, DRAW).total(batch.counts).item()
        states[name] = one.objective.states(one.objective.readouts[0], batch)
    assert losses["hidden"] == pytest.approx(losses["no nodes"], abs=1e-5)
    torch.testing.assert_close(states["hidden"], states["no nodes"], atol=1e-5, rtol=0)
    assert (states["shown"] - states["no nodes"]).abs().max() > 1e-3


@dataclass(frozen=True)
class Named:
    """Picks all pieces that are one letter."""

    letter: str
    role: str = "code"

    def __call__(self, tokens, draw):
        return ((tokens["ids"] == ord(self.letter)) & tokens["code"]).nonzero().squeeze(1)


@torch.no_grad()
def test_a_name_hidden_everywhere_is_told_by_no_node():
    recipe = some_recipe()
    net, batches = recipe.network.eval(), []
    vary(net)
    for letter in ("q", "z"):
        text = f"def f(y):\n    {letter} = y\n    {letter} = {letter} + y\n    return {letter}\n"
        one = Sample("a", "", "", {"py": text.encode()})
        for corruption in (HideAll(), recipe.network.readers["code"].replacement(mask=1.0, random=0.0)):
            view = replace(task_of(recipe, "edge").view, picks={"word": Named(letter)}, corruption={"word": corruption})
            batches.append(batch_of(view, recipe, [one]))
    states = [net(batch) for batch in batches]
    assert not torch.equal(batches[0].clean["code"]["ids"], batches[2].clean["code"]["ids"])
    assert all(torch.equal(states[0], one) for one in states[1:])
    shown = batch_of(View(attend=net.attend), recipe, [one])
    assert (net(shown) - states[0]).abs().max() > 1e-3


def test_the_base_model_has_the_parameters_of_roberta_base(tmp_path):
    word_tokenizer(50_265).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        recipe = graphcodebert(tokenizer=str(tmp_path), **scales["base"])
        theirs = transformers.RobertaModel(
            transformers.RobertaConfig(vocab_size=50_265, type_vocab_size=1, max_position_embeddings=514),
            add_pooling_layer=False,
        )
    count = sum(p.numel() for p in recipe.network.parameters())
    assert count / 1e6 == pytest.approx(125, rel=0.02)
    # without a padding's place and a vector of the one kind of segment
    assert count == sum(p.numel() for p in theirs.parameters()) - 2 * 768


@pytest.mark.parametrize("numbers", [{}, {"flow": "shuffled"}, {"flow": "none"}, {"ask": "link"}], ids=str)
def test_it_and_its_ablations_learn(numbers):
    recipe = some_recipe(lr=5e-3, steps=30, warmup=5, **numbers)
    stage = recipe.stages[0]
    optimizer = stage.optimizer.build(recipe.module().named_parameters())
    losses = {task.name: [] for task in stage.tasks}
    for step in range(30):
        task = stage.task_at(step, 0)
        set_learning_rate(optimizer, stage.optimizer.schedule, step)
        batch = batch_of(task.view, recipe, some_samples(), epoch=step)
        loss = task.objective(batch, Draw.micro_batch(0, 0, step, 0)).total(batch.counts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(recipe.module().parameters(), 1.0)
        optimizer.step()
        losses[task.name].append(loss.item())
    wanted = {"flow": {"none": {"mlm"}}.get(numbers.get("flow"), {"edge", "link"}), "ask": {"link"}}
    assert set(losses) == wanted["ask" if "ask" in numbers else "flow"]
    for some in losses.values():
        assert sum(some[-3:]) < 0.75 * sum(some[:3])


def test_tasks_take_turns_and_the_questions_are_not_the_words():
    recipe = some_recipe()
    stage = recipe.stages[0]
    names = [stage.task_at(step, 0).name for step in range(40)]
    assert all(set(names[i : i + 2]) == {"edge", "link"} for i in range(0, 40, 2))
    for task in stage.tasks:
        batch = batch_of(task.view, recipe, some_samples())
        loss = task.objective(batch, DRAW)
        assert [term.name for term in loss.terms] == ["mlm", task.name]
        assert [term.per for term in loss.terms] == ["picked:word", f"picked:{task.name}"]
        assert (batch.clean["code"].special_N[batch.picked["word"].clean_M] < 0).all()


def test_shuffled_edges_keep_their_ends_and_leave_the_questions_true():
    reader = CodeReader(max_length=160)
    tokens = reader.tokenize(some_samples()[0], row(0))
    ask, cut = AskPairs(share=0.3), InTurn([AskPairs(share=0.3), ShufflePairs()])
    moved = 0
    for unit in range(10):
        asked, both = ask(tokens, row(unit)), cut(tokens, row(unit))
        for end in (0, 1):
            assert sorted(asked["edge"][:, end].tolist()) == sorted(both["edge"][:, end].tolist())
        assert torch.equal(asked["edge_asked"], both["edge_asked"])
        moved += int((asked["edge"] != both["edge"]).any())
    assert moved > 5


def test_auc_is_that_of_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, score = rng.integers(0, 2, 50), rng.integers(0, 9, 50)
        assert auc(truth, score) == pytest.approx(roc_auc_score(truth, score))
    assert np.isnan(auc(np.ones(3), np.ones(3)))


def test_pairs_are_ranked_beside_what_equal_names_tell():
    samples = [*some_samples(40), Sample("bad", "", "", {"txt": b"no code, no nodes"})]
    recipe = some_recipe()
    recipe.module().eval()
    task = task_of(recipe, "edge")
    ranking = recipe.evaluations[1]
    own, rule = ranking.run(AsUnits(samples), Processes())
    assert own.name == "edge: AUC" and rule.name == "edge, by equal names alone: AUC"
    assert own.chance == 0.5 and own.protocol["pairs"] >= own.protocol["true"] > 20 and own.n <= 40
    assert 0.6 < rule.value < 0.95 and rule.low < rule.value < rule.high
    assert ranking.run(AsUnits(samples), Processes())[0] == own, "nothing is drawn anew"

    for sign, wanted in ((1, 1.0), (-1, 0.0)):
        told = ("by the answers", lambda tokens, pair_P2, sign=sign: sign * tokens["edge_true"].float())
        _, known = PairRanking(task.objective, ranking.readout, ranking.view, told).run(AsUnits(samples), Processes())
        assert known.value == wanted


def test_words_that_are_written_alike():
    made = View().row(some_samples()[1], {"code": CodeReader(max_length=160)}, row(0), None)
    other = View().row(some_samples()[0], {"code": CodeReader(max_length=160)}, row(1), None)
    tokens = pack([made, other], View().attend.plan).clean["code"]
    written = {}
    for node, piece in tokens["link"].tolist():
        written.setdefault(node, []).append(tokens["ids"][piece].item())
    nodes = sorted(written)
    pairs = torch.tensor([(i, j) for i in nodes for j in nodes])
    alike = same_words(tokens, pairs)
    assert alike.tolist() == [float(written[i] == written[j]) for i, j in pairs.tolist()]
    assert len(nodes) < alike.sum() < len(alike)


def test_its_step_can_be_planned_without_data_or_a_device():
    small = {name: value for name, value in SMALL.items() if name not in ("steps", "warmup")}
    flops = {flow: plan("graphcodebert", flow=flow, steps=10, warmup=1, **small)["stages"][0]["flops"]
             for flow in ("true", "none")}  # fmt: skip
    assert flops["none"] < flops["true"] < 2 * flops["none"]
