"""Mirror-BERT: what its two views and dropped heads do, where it starts from, and that it spreads texts out."""

import pytest
import torch
from parity_text import some_batch, some_samples, word_tokenizer
from small_runs import bert, pairs, train

import mmpre
from mmpre.batch import Views
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.dropout import DropHeads
from mmpre.modalities.text import ERASED, ErasedText, TextReader
from mmpre.objectives.contrast import NTXent
from mmpre.recipes.mirror_bert import mirror_bert, scales

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    width=32, depth=2, heads=4, length=16, positions=16, batch=8, micro_batches=1, steps=4, dropout=0.0, erase=0
)  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def some_task(tokenizer, **numbers):
    torch.manual_seed(0)
    return mirror_bert(tokenizer=tokenizer, **SMALL | numbers).stages[0].tasks[0]


def views_of(task, samples, epoch=0):
    return Views(
        {name: some_batch(view, task.objective.readers, samples, epoch=epoch) for name, view in task.view.items()}
    )


def features(task, samples, epoch=0):
    return list(task.objective.features(views_of(task, samples, epoch), DRAW).values())


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_without_dropout_and_erased_characters_both_vectors_of_a_text_are_one(pool, tokenizer):
    task = some_task(tokenizer, pool=pool)
    a_BD, b_BD = features(task, some_samples(9))
    assert torch.equal(a_BD, b_BD)
    torch.testing.assert_close((a_BD * b_BD).sum(1), torch.ones(9), atol=1e-6, rtol=0)


@pytest.mark.parametrize("noise", [dict(dropout=0.1), dict(head_dropout=0.2), dict(erase=5)])
def test_each_noise_makes_the_two_vectors_differ(noise, tokenizer):
    a_BD, b_BD = features(some_task(tokenizer, **noise), some_samples(9))
    assert not torch.allclose(a_BD, b_BD, atol=1e-3)


def test_characters_are_erased_in_the_second_view_alone_and_not_in_short_texts(tokenizer):
    task, samples = some_task(tokenizer, erase=5, length=40, positions=40), some_samples(60)
    plain = some_task(tokenizer, length=40, positions=40)
    made, whole = views_of(task, samples), views_of(plain, samples)["whole"]
    assert torch.equal(made["whole"].seen["text"]["ids"], whole.seen["text"]["ids"])
    batch, texts = made["erased"], {sample.key: sample.text() for sample in samples}
    erased = 0
    for row, key in enumerate(batch.keys):
        start, length = int(batch.layout.starts_B[row]), int(batch.layout.lengths_B[row])
        marks = int((batch.seen["text"].special_N[start : start + length] == ERASED).sum())
        assert marks == (len(texts[key]) >= 30)
        erased += marks
    assert 10 < erased < 60


def test_dropped_heads_keep_what_is_said_on_average_and_are_never_all_dropped():
    drop, y_NHK = DropHeads(0.5), torch.rand(6, 4, 8) + 0.5
    row_N = torch.tensor([0, 0, 0, 1, 1, 1])
    torch.manual_seed(0)
    made = torch.stack([drop(y_NHK, row_N, 2) for _ in range(4_000)])
    assert made.isfinite().all()
    assert (made.mean(0) / y_NHK - 1).abs().max() < 0.1
    assert (made.mean(0).norm() / y_NHK.norm()).item() == pytest.approx(1, abs=0.02)
    share = made / y_NHK
    assert torch.allclose(share[:, 0], share[:, 2]) and not torch.allclose(share[:, 0], share[:, 3])
    assert (share.flatten(2).amax(2) >= 1).all()
    assert torch.equal(drop.eval()(y_NHK, row_N, 2), y_NHK)
    with pytest.raises(ValueError, match=r"DropHeads: p must be at least 0 and below 1, got 1\.0"):
        DropHeads(1.0)


def test_the_loss_is_the_same_with_the_views_exchanged_and_the_rows_in_another_order(tokenizer):
    a_BD, b_BD = features(some_task(tokenizer, dropout=0.2), some_samples(9))
    loss, order = NTXent(0.04), torch.randperm(9)
    torch.testing.assert_close(loss(a_BD, b_BD), loss(b_BD, a_BD))
    torch.testing.assert_close(loss(a_BD, b_BD), loss(a_BD[order], b_BD[order]))


def test_it_starts_from_a_trained_run_and_its_steps_spread_texts_out(tmp_path):
    shards = pairs(tmp_path)
    before = bert(tmp_path, tmp_path / "bert", **shards)
    small = dict(width=16, depth=2, heads=2, length=16, positions=16, batch=12, micro_batches=1, valid_every=20)
    after = train(
        "mirror_bert", tmp_path / "mirror", start=str(before), steps=20, lr=1e-3, dropout=0.1, erase=0, **shards,
        tokenizer=str(tmp_path / "tokenizer.json"), **small,
    )  # fmt: skip
    samples, spread, apart, positive = some_samples(40, seed=9), [], [], []
    for run in (before, after):
        net = mmpre.load(run).recipe.network.eval()
        task = some_task(str(tmp_path), **small | dict(steps=4, dropout=0.1))
        for tower in task.objective.towers.values():
            tower.net = net
        with torch.no_grad():
            x_BD, _ = features(task, samples)
            a_BD, b_BD = features_of_noise(task, net, samples)
        spread.append(torch.pdist(x_BD).square().mul(-2).exp().mean().log().item())
        apart.append(1 - torch.pdist(x_BD).square().mean().item() / 2)
        positive.append((a_BD * b_BD).sum(1).mean().item())
    assert spread[1] < spread[0] - 0.1
    assert apart[1] < apart[0] - 0.1, "the mean cosine of two texts falls"
    assert positive[1] > 0.8 and positive[1] > apart[1] + 0.2, "that of a text with itself, under dropout, stays high"


def features_of_noise(task, net, samples):
    net.train()
    made = features(task, samples)
    net.eval()
    return made


def test_what_it_is_held_against_goes_on_with_the_starts_own_words_and_head(tmp_path):
    shards = pairs(tmp_path)
    before = bert(tmp_path, tmp_path / "bert", **shards)
    small = dict(width=16, depth=2, heads=2, length=16, positions=16, batch=12, micro_batches=1, valid_every=20)
    small |= dict(tokenizer=str(tmp_path / "tokenizer.json"), start=str(before), learn="words", steps=1, **shards)
    still = train("mirror_bert", tmp_path / "still", lr=1e-12, **small)
    was, now = (mmpre.load(run).recipe.module().state_dict() for run in (before, still))
    assert was.keys() == now.keys() and any("head" in name for name in was)
    assert all(torch.allclose(was[name], now[name], rtol=0, atol=1e-9) for name in was)
    more = train("mirror_bert", tmp_path / "more", lr=1e-3, **small)
    went = mmpre.load(more).recipe.module().state_dict()
    assert any(not torch.equal(went[name], was[name]) for name in was if "encoder" in name)


def test_the_papers_scales_are_berts_and_words_have_their_own_numbers(tmp_path):
    word_tokenizer(30_522).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        made = {name: mirror_bert(tokenizer=str(tmp_path), **numbers) for name, numbers in scales.items()}
    count = sum(p.numel() for p in made["base"].module().parameters())
    assert count / 1e6 == pytest.approx(110, rel=0.02)
    assert len(made["words"].stages[0].tasks[0].view["erased"].readers) == 0
    assert made["words"].stages[0].tasks[0].objective.pairing.temperature == 0.2
    heads = {
        scale: {one.p for one in made[scale].network.modules() if isinstance(one, DropHeads)}
        for scale in ("drophead", "roberta")
    }
    assert heads == {"drophead": {0.2}, "roberta": {0.05}}


def test_a_text_of_which_erasing_would_leave_nothing_is_read_whole(tokenizer):
    reader = ErasedText(TextReader(tokenizer, max_length=16), length=5, least=6)
    text = Sample("a", "s", "d", {"txt": b"  w1  "})
    ids = {tuple(reader.tokenize(text, Draw.row(0, 0, 0, epoch=0, unit=i))["ids"].tolist()) for i in range(40)}
    assert ids == {tuple(reader.reader.tokenize(text, Draw.row(0, 0, 0, epoch=0, unit=0))["ids"].tolist())}
