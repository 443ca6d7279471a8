"""What attention reads most is hidden."""

import pytest
import torch
from parity_text import some_batch, vary, word_tokenizer
from violets import DRAW, batch_of, made, member, some, task_of

from mmpre.attention import Causal, Full
from mmpre.attention.backends import attention_probabilities, attention_received, received
from mmpre.attention.bias import ALiBi
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.layout import Layout
from mmpre.view import View


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    word_tokenizer().save(str(path))
    return str(path)


def test_what_is_received_is_the_sum_of_what_is_given():
    torch.manual_seed(0)
    layout = Layout({"text": torch.tensor([3, 5, 5, 9])})
    q_NHK, k_NHK = torch.randn(2, layout.size, 4, 8)
    for attend, bias in ((Full(), None), (Causal(), None), (Full(), ALiBi(4)), (Causal(), ALiBi(4))):
        plan_of = attend.plan(layout)
        rows = attention_probabilities(q_NHK, k_NHK, plan_of, bias)
        expected = torch.cat([weight_Hnn.mean(0).sum(0) for weight_Hnn in rows])
        torch.testing.assert_close(attention_received(q_NHK, k_NHK, plan_of, bias), expected)


def hidden_tokens(batch):
    """For each row, the numbers of its hidden tokens among all of its tokens."""
    place = torch.cat([batch.layout.at(one.role, one.clean_M) for one in batch.picked.values()]).sort().values
    row = batch.layout.row_N[place]
    return [(place[row == i] - batch.layout.starts_B[i]).tolist() for i in range(len(batch.layout))]


def test_attended_rows_hide_exact_counts_of_both_sides_and_no_special_token(tokenizer):
    recipe = made(tokenizer, attended=1.0)
    objective, batch = task_of(recipe).objective, batch_of(recipe, some(8))
    special_N = torch.cat([batch.clean[role].special_N for role in batch.layout.roles])[batch.layout.source_N]
    sides = set()
    for step in range(30):
        hidden = objective.hidden(batch, Draw.micro_batch(0, 0, step, 0))
        for row, some_n in enumerate(hidden_tokens(hidden)):
            assert len(some_n) == int(0.15 * int(batch.layout.lengths_B[row]))
        for one in hidden.picked.values():
            place = batch.layout.at(one.role, one.clean_M)
            assert (special_N[place] < 0).all()
            assert torch.equal(hidden.replaced[one.role].nonzero().squeeze(1), one.clean_M)
            sides |= {one.role} if len(one) else set()
    assert sides == {"video", "text"}
    one, other = (objective.hidden(batch, Draw.micro_batch(0, 0, 3, 0)).replaced for _ in range(2))
    assert all(torch.equal(one[role], other[role]) for role in one)


def test_tokens_are_hidden_in_proportion_to_the_attention_they_receive(tokenizer):
    recipe = made(tokenizer, attended=1.0)
    vary(recipe.module())
    objective, net = task_of(recipe).objective, recipe.network
    with torch.no_grad():
        for block in net.encoder.blocks:
            block.sublayers[0].sublayer.qkv.weight.mul_(4)  # so that some are read far more than others
    one = member(0, 1, "w1 w2 w3")  # 5 + 5 tokens: int(0.15 * 10) is one
    batch = batch_of(recipe, [Sample(f"{i}", "", "", one.members) for i in range(400)])
    with torch.no_grad(), received() as read:
        net(some_batch(View(), net.readers, [one]))
    assert len(read) == 2
    special = torch.cat([part.special_N for part in some_batch(View(), net.readers, [one]).clean.values()]) >= 0
    share = sum(read).masked_fill(special, 0.0)
    share = share / share.sum()
    times = torch.zeros(10)
    for step in range(8):
        hidden = hidden_tokens(objective.hidden(batch, Draw.micro_batch(0, 0, step, 0)))
        times += torch.bincount(torch.tensor(hidden).flatten(), minlength=10)
    assert share.max() > 1.3 * share[share > 0].min()
    assert (times / 3200 - share).abs().max() < 0.03


def test_half_of_the_rows_keep_their_blocks_and_losses_are_means_of_what_is_hidden(tokenizer):
    recipe = made(tokenizer)
    objective, batch = task_of(recipe).objective, batch_of(recipe, some(8))
    own, kept = hidden_tokens(batch), 0
    for step in range(40):
        hidden = hidden_tokens(objective.hidden(batch, Draw.micro_batch(0, 0, step, 0)))
        kept += sum(one == other for one, other in zip(own, hidden, strict=True))
    assert kept / 320 == pytest.approx(0.5, abs=0.1)
    hidden = objective.hidden(batch, DRAW)
    plain, loss = objective.then(hidden, DRAW), objective(batch, DRAW)
    for one, other in zip(plain.terms, loss.terms, strict=True):
        count = len(hidden.picked[{"mlm": "word", "mvm": "patch"}[one.name]]) if one.name != "vtm" else 8
        assert other.per == "rows"
        assert other.sum.item() / 8 == pytest.approx(one.sum.item() / max(count, 1), rel=1e-5)


def test_wrong_shares_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"share must lie between 0 and 1, rows in 0 to 1, got share 0\.15 and rows 2"):
        made(tokenizer, attended=2)
