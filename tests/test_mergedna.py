"""MergeDNA: its passes, what they mask and teach, and that nothing leaks."""

import numpy as np
import pytest
import torch
from parity_text import AsUnits, some_batch
from scipy.stats import chisquare
from torch import nn

from mmpre.attention import Full, Plan
from mmpre.attention.rules import CAUSAL
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.encoder import llama_encoder, merging_encoder
from mmpre.evaluation.hidden import HiddenTokens
from mmpre.evaluation.markov import markov
from mmpre.heads.vocabulary import Vocabulary
from mmpre.layout import Layout
from mmpre.merging import Merge
from mmpre.merging_encoder import Merged
from mmpre.objectives.merged import DrawnShare, MergedReconstruction
from mmpre.plan import plan
from mmpre.processes.processes import Processes
from mmpre.recipes.mergedna import mergedna, scales
from mmpre.training.optim import set_learning_rate

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    length=80, width=32, local=3, latent=2, latent_decoder=1, local_decoder=1, heads=2, hidden=64, group=8, batch=8,
    micro_batches=1, steps=10, warmup=1,
)  # fmt: skip
LENGTHS = (80, 80, 17, 33, 5, 1, 64, 48)


def sequences(lengths=LENGTHS, seed=0, letters="ACGT"):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list(letters), length)) for length in lengths]
    return [Sample(f"{i}", "", "", {"fa": f">a\n{text}\n".encode()}) for i, text in enumerate(texts)]


def some_task(**numbers):
    torch.manual_seed(0)
    return mergedna(**SMALL | numbers).stages[0].tasks[0]


def batch_of(task, samples=None):
    return some_batch(task.view, task.objective.readers, sequences() if samples is None else samples)


def test_without_merges_it_is_a_plain_transformer():
    torch.manual_seed(0)
    encoder = merging_encoder(32, (3, 2, 1, 1), 2, hidden=64, window=16, share=1.0).double()
    layout = Layout({"dna": torch.tensor([40, 16, 7])})
    x_ND = torch.randn(63, 32, dtype=torch.float64)
    windows = Layout({"dna": torch.tensor([16, 16, 8, 16, 7])})
    plain, rows = Full().plan(windows), Full().plan(layout)
    state_ND = x_ND
    for i, block in enumerate(encoder.blocks):
        state_ND = block(state_ND, layout, plain if i < 3 or i == 6 else rows)
    got = encoder(x_ND, layout, rows, read=range(8))
    torch.testing.assert_close(got.last, encoder.norm(state_ND), atol=1e-10, rtol=0)
    assert torch.equal(got.layer[0], x_ND) and torch.allclose(got.layer[7], state_ND, atol=1e-10)
    at_M = torch.tensor([3, 50])
    assert torch.equal(encoder(x_ND, layout, rows, at=at_M), got.last[at_M])


def test_rows_packed_together_are_as_each_alone():
    objective = some_task().objective
    together = batch_of(some_task())
    states = objective.net(together, read=range(7))
    for i, sample in enumerate(sequences()):
        alone = objective.net(batch_of(some_task(), [sample]), read=range(7))
        row = int((together.order_B == i).nonzero())
        start, length = int(together.layout.starts_B[row]), int(together.layout.lengths_B[row])
        assert length == LENGTHS[i]
        torch.testing.assert_close(states.last[start : start + length], alone.last, atol=2e-5, rtol=0)
        for layer in range(7):
            torch.testing.assert_close(
                states.layer[layer][start : start + length], alone.layer[layer], atol=2e-5, rtol=0
            )


def test_rows_merge_on_in_the_latent_encoder_as_each_alone():
    objective = some_task().objective.double()
    net, together = objective.net, batch_of(some_task())

    def fewer(batch):
        merged, groups = net.encoder.latent(net.encoder.local(net.embed(batch), batch.layout, share=0.5), share=0.5)
        return merged.layout, merged.state_LD, groups.source_N, net.encoder.decode(merged, batch.layout)

    layout, state_LD, source_L, last_ND = fewer(together)
    assert (source_L.bincount() > 1).any()
    for i, sample in enumerate(sequences()):
        _, alone_LD, group_L, decoded_ND = fewer(batch_of(some_task(), [sample]))
        row = int((together.order_B == i).nonzero())
        mine, own = layout.row_N == row, together.layout.row_N == row
        torch.testing.assert_close(state_LD[mine], alone_LD, atol=1e-9, rtol=0)
        assert torch.equal(source_L[mine] - source_L[mine].min(), group_L)
        torch.testing.assert_close(last_ND[own], decoded_ND, atol=1e-9, rtol=0)


def test_each_pass_leaves_as_many_tokens_as_its_share_and_windows_keep_order():
    task = some_task()
    batch, encoder = batch_of(task), task.objective.net.encoder
    x_ND = task.objective.net.embed(batch)
    for share in (0.4, 0.5, 0.6):
        merged = encoder.local(x_ND, batch.layout, share=share)
        wanted = (batch.layout.lengths_B * share).round().clamp(min=1)
        assert ((merged.layout.lengths_B - wanted).abs() <= 1).all()
        assert (merged.merge.source_N.diff() >= 0).all()
        assert torch.equal(merged.size_L, merged.merge.sum(torch.ones(batch.layout.size)))
        first_L = merged.merge.first(torch.arange(batch.layout.size))
        start_L = batch.layout.starts_B[merged.layout.row_N]
        assert torch.equal(first_L - start_L, merged.position_L)
        window_N = (torch.arange(batch.layout.size) - batch.layout.starts_B[batch.layout.row_N]) // 16
        assert torch.equal(window_N[first_L][merged.merge.source_N], window_N), "no token crosses windows"
        fewer, groups = encoder.latent(merged, share=0.5)
        assert torch.equal(groups.layout.lengths_B, (merged.layout.lengths_B * 0.5).round().long().clamp(min=1))
        assert torch.equal(groups.back(groups.sum(torch.ones(merged.layout.size))).long(),
                           groups.source_N.bincount()[groups.source_N])  # fmt: skip
        assert torch.equal(fewer.merge.source_N, merged.merge.source_N) and fewer.layout is merged.layout


def made_up(rows):
    """Rows of seven merged tokens, of which one stays alone, two go together, and four."""
    lengths_B = torch.full((rows,), 7)
    group_7 = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    source = (torch.arange(rows)[:, None] * 3 + group_7).flatten()
    layout = Layout({"merged": lengths_B})
    merged = Merged(torch.zeros(7 * rows, 1), Merge.none(layout), torch.arange(7).repeat(rows), torch.ones(7 * rows))
    return merged, Merge(source, Layout({"merged": torch.full((rows,), 3)}))


def test_one_token_is_drawn_by_the_inverse_square_of_its_groups_size():
    merged, groups = made_up(20_000)
    shares = np.array([1, 1 / 4, 1 / 4, *[1 / 16] * 4])
    for adaptive, wanted in ((True, shares / shares.sum()), (False, np.full(7, 1 / 7))):
        net = some_task().objective.net
        objective = MergedReconstruction(net, "dna", None, latent=1 / 7, adaptive=adaptive)
        seen = np.zeros(7)
        for step in range(5):
            picked = objective.picked(merged, groups, Draw.micro_batch(0, 0, step, 0)).view(-1, 7)
            assert (picked.sum(1) == 1).all()
            seen += picked.sum(0).numpy()
        assert seen.sum() == 100_000
        assert chisquare(seen, 100_000 * wanted).pvalue > 1e-3


def watched(task, batch, monkeypatch):
    """The loss, and the batches that were embedded for it."""
    net, shown = task.objective.net, []
    embed = type(net).embed
    monkeypatch.setattr(type(net), "embed", lambda self, one, **more: shown.append(one) or embed(self, one, **more))
    loss = task.objective(batch, DRAW)
    monkeypatch.undo()
    return loss, shown


def test_exactly_so_many_whole_tokens_are_masked_and_what_they_were_does_not_leak(monkeypatch):
    task = some_task()
    batch, encoder = batch_of(task), task.objective.net.encoder
    loss, (clean, hidden) = watched(task, batch, monkeypatch)
    masked_N = hidden.replaced["dna"]
    assert not clean.replaced["dna"].any() and 0.2 < masked_N.float().mean() < 0.8
    share = task.objective.shares.at(DRAW)
    merged = encoder.local(task.objective.net.embed(batch), batch.layout, share=share)
    in_token_L = merged.merge.sum(masked_N.float())
    assert ((in_token_L == 0) | (in_token_L == merged.size_L)).all(), "tokens are masked whole"
    drawn_B = torch.zeros(len(LENGTHS)).index_add(0, merged.layout.row_N, (in_token_L > 0).float())
    half_B = (merged.layout.lengths_B.double() * 0.5).round().clamp(min=1)
    assert torch.equal(drawn_B, half_B.float())

    # other bases under the masks: states, and costs of the places that show their own, stay what they are
    tokens = hidden.seen["dna"]
    other = tokens.with_values(ids=torch.where(masked_N, (tokens["ids"] + 1) % 4, tokens["ids"]))
    changed = task.objective.net.embed(type(hidden)(**hidden.__dict__ | {"seen": {"dna": other}}))
    assert torch.equal(changed, task.objective.net.embed(hidden))
    again, state_ND = task.objective._read(hidden, share)
    cost_N, _ = task.objective._cost(state_ND, batch)
    want = float((cost_N * masked_N).sum().detach() / (share * 0.5))
    assert loss.terms[2].sum.item() == pytest.approx(want, rel=1e-5)

    # how long what masks went into is: of the third pass's own merges, not of the first one's
    spans = [again.size_L[again.merge.source_N], merged.size_L[merged.merge.source_N]]
    by_hand, of_first = ([float((one[masked_N].clamp(max=4) == n).float().mean()) for n in range(1, 5)]
                         for one in spans)  # fmt: skip
    told = [float(loss.metrics[f"masked_of_{n}"][0]) / batch.counts["tokens"] for n in range(1, 5)]
    assert told == pytest.approx(by_hand) and sum(told) == pytest.approx(1.0) and told != pytest.approx(of_first)


def grads(task, number, **numbers):
    objective = task.objective
    objective.zero_grad()
    objective(batch_of(task), DRAW).terms[number].sum.backward()
    return {name: 0.0 if p.grad is None else float(p.grad.abs().sum()) for name, p in objective.named_parameters()}


def local_part(name):
    return name.startswith(("net.encoder.groups", "net.modalities")) or any(
        name.startswith(f"net.encoder.blocks.{i}.") for i in range(3)
    )


def test_the_pass_of_fewer_tokens_teaches_the_local_encoder_nothing_and_the_first_one_its_grouping():
    task = some_task()
    first, second, third = (grads(task, number) for number in range(3))
    assert all(value == 0 for name, value in second.items() if local_part(name))
    assert all(value > 0 for name, value in second.items() if not local_part(name))
    for one in (first, third):
        assert all(value > 0 for value in one.values()), [name for name, value in one.items() if value == 0]
    assert sum(name.startswith("net.encoder.groups") for name in first) == 3


def test_the_share_left_is_drawn_for_a_step_and_is_alike_in_its_parts():
    shares = [DrawnShare().at(Draw.micro_batch(3, 0, step, 0)) for step in range(2_000)]
    assert min(shares) >= 0.4 and max(shares) <= 0.6
    assert np.mean(shares) == pytest.approx(0.5, abs=0.005) and np.std(shares) == pytest.approx(0.048, abs=0.004)
    assert DrawnShare().at(Draw.micro_batch(3, 0, 7, 1)) == shares[7]
    with pytest.raises(ValueError, match=r"wanted 0 < low <= mean <= high <= 1 .*, got 0\.4, 0\.3, 0\.6 and 0\.05"):
        DrawnShare(mean=0.3)


@pytest.mark.parametrize("learn", ["all", "uniform", "bytes"])
def test_it_and_its_ablations_learn(learn):
    torch.manual_seed(0)
    recipe = mergedna(**SMALL | dict(learn=learn, steps=30, warmup=5, lr=3e-3))
    stage, task = recipe.stages[0], recipe.stages[0].tasks[0]
    optimizer = stage.optimizer.build(recipe.module().named_parameters())
    losses = []
    for step in range(30):
        set_learning_rate(optimizer, stage.optimizer.schedule, step)
        batch = batch_of(task, sequences([80] * 8, seed=step, letters="AC"))  # two of the eight ids
        loss = task.objective(batch, Draw.micro_batch(0, 0, step, 0))
        total = loss.total(batch.counts)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(recipe.module().parameters(), 1.0)
        optimizer.step()
        losses.append(total.item())
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    if learn != "bytes":
        metrics = {name: float(value) / batch.counts[per] for name, (value, per) in loss.metrics.items()}
        assert sum(metrics[f"of_{n}"] for n in range(1, 5)) == pytest.approx(1.0)
        assert 0.2 < metrics["masked_share"] < 0.8 and 1 <= metrics["masked_size"] < 6


def test_the_papers_scale_has_the_papers_parameters():
    with torch.device("meta"):
        recipe = mergedna(**scales["base"])
    encoder = recipe.network.encoder

    def millions(blocks):
        return sum(p.numel() for block in blocks for p in block.parameters()) / 1e6

    parts = [millions(encoder._part(number)) for number in range(4)]
    assert parts == pytest.approx([51, 253, 51, 25], rel=0.02)
    assert sum(p.numel() for p in recipe.module().parameters()) / 1e6 == pytest.approx(380, rel=0.02)
    assert encoder.parts == [4, 20, 4, 2]


def test_its_step_can_be_planned_without_a_device():
    small = {name: value for name, value in SMALL.items() if name not in ("steps", "warmup")}
    flops = {learn: plan("mergedna", learn=learn, steps=10, warmup=1, **small)["stages"][0]["flops"]
             for learn in ("all", "uniform", "bytes")}  # fmt: skip
    assert flops["all"] == flops["uniform"] and 1.5 * flops["bytes"] < flops["all"] < 4 * flops["bytes"]


def test_hidden_bases_are_asked_for_alike_and_counted_by_row():
    recipe = mergedna(**SMALL)
    (evaluation,) = recipe.evaluations
    assert evaluation.network is recipe.network
    head = Vocabulary(nn.Embedding(8, 32), transform=nn.Identity())
    with torch.no_grad():
        head.table.weight.zero_()
        head.bias[:] = torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0])
    samples = sequences([80] * 40, letters="AC") + sequences([80] * 10, seed=1, letters="C")
    got = HiddenTokens(recipe.network, head, evaluation.view, rows=50).run(AsUnits(samples), Processes.start())[0]
    assert got.n == 50 and 0.5 < got.value < 0.7 and got.rows.max() == 1.0
    assert got.chance == pytest.approx(got.value, abs=1e-6)  # the commonest is C


def test_an_encoder_that_does_not_merge_and_a_causal_view_are_refused():
    net = some_task().objective.net
    with pytest.raises(ValueError, match="wanted a network with a MergingEncoder, got Encoder"):
        MergedReconstruction(type(net)(dict(net.modalities), llama_encoder(32, 1, 2)), "dna", None)
    with pytest.raises(ValueError, match=r"latent is a share, above 0 and below 1; got 1\.0"):
        MergedReconstruction(net, "dna", None, latent=1.0)
    layout = Layout({"dna": torch.tensor([4])})
    with pytest.raises(ValueError, match=r"wants the view's attend to be Full\(\), got Band"):
        net.encoder(torch.randn(4, 32), layout, Plan(layout, CAUSAL))
    with pytest.raises(ValueError, match=r"wanted a share above 0 and at most 1 .*, got 0 and 16"):
        merging_encoder(32, (1, 1, 1, 1), 2, share=0)


def test_a_markov_model_knows_what_repeats_in_other_rows_and_nothing_of_its_own():
    rng = np.random.default_rng(0)
    cycle = np.array([0, 1, 2, 3, 1])  # after any two it is clear what comes
    turned = [np.roll(np.tile(cycle, 10), i) for i in range(6)]
    places = [rng.choice(np.arange(48), 12, replace=False) for _ in turned]
    early = [np.mean(one < 2) for one in places]
    share_R = markov(turned, places, 2)
    assert all(1 - first <= share <= 1 for first, share in zip(early, share_R, strict=True)) and share_R.mean() > 0.9
    noise = [rng.integers(0, 4, 200) for _ in range(40)]
    asked = [np.arange(5, 200)] * 40
    assert markov(noise, asked, 5).mean() == pytest.approx(0.25, abs=0.03)
    assert markov([noise[0], noise[0].copy()], [np.arange(10, 200)] * 2, 9).mean() > 0.99
    assert markov([np.array([1, 1]), np.array([1, 2])], [np.array([0]), np.array([], dtype=int)], 5).tolist() == [
        1.0,
        0.0,
    ]


def test_hidden_bases_are_told_beside_a_markov_model():
    (asked,) = mergedna(**SMALL).evaluations
    network, beside = asked.run(AsUnits(sequences([80] * 12)), Processes.start())
    assert (network.name, beside.name, beside.n) == ("masked bases", "Markov model of order 5", network.n)
    assert beside.protocol == {"counted in": f"the other {network.n - 1} rows"} and beside.chance == network.chance


def test_layers_that_cannot_merge_so_far_are_refused_before_a_step_draws_it():
    with pytest.raises(ValueError, match=r"1 layers? cannot bring"):
        mergedna(**SMALL | dict(local=1))
