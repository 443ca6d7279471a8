import pytest
import torch
from parity_text import losses_of, some_batch, some_samples, word_tokenizer

from mmpre.data.loader import MicroBatches
from mmpre.draw import Draw
from mmpre.recipes.mosaicbert import mosaicbert, scales
from mmpre.training.optim import set_learning_rate

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(width=32, depth=2, heads=4, length=16, batch=8, micro_batches=1, steps=10, warmup=1, dropout=0.0)


@pytest.fixture
def tokenizer(tmp_path):
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def test_the_base_scale_has_the_papers_137_million_parameters(tmp_path):
    word_tokenizer(30_522).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        base, large = (mosaicbert(tokenizer=str(tmp_path), **scales[scale]) for scale in ("base", "large"))
    assert base.network.modalities["text"].table.num_embeddings == 30_528
    assert sum(p.numel() for p in base.module().parameters()) == 137_400_384
    assert abs(sum(p.numel() for p in large.module().parameters()) / 435e6 - 1) < 0.01


def test_texts_longer_than_those_trained_on_are_read_without_positions_and_refused_with_them(tokenizer):
    torch.manual_seed(0)
    long = [s for s in some_samples(30, most=14) if len(s.text().split()) > 12][:3]
    alibi = mosaicbert(tokenizer=tokenizer, **SMALL)
    assert alibi.network.modalities["text"].positions is None
    learned = mosaicbert(tokenizer=tokenizer, alibi=False, **SMALL | dict(length=8))
    whole = some_batch(alibi.stages[0].tasks[0].view, alibi.network.readers, long)
    assert alibi.network(whole).isfinite().all()
    with pytest.raises(ValueError, match=r"a row of \d+ tokens was given, positions reach to 8"):
        learned.network(whole)


def test_held_out_rows_hide_half_as_much_as_rows_to_train_on(tokenizer):
    stage = mosaicbert(tokenizer=tokenizer, **SMALL).stages[0]
    readers, samples = stage.tasks[0].objective.readers, some_samples(400)
    shares = []
    for view in (stage.tasks[0].view, stage.tasks[0].held_out):
        batch = some_batch(view, readers, samples)
        shares.append(batch.counts["picked:word"] / int((batch.clean["text"].special_N < 0).sum()))
    assert shares[0] == pytest.approx(0.3, abs=0.03)
    assert shares[1] == pytest.approx(0.2, abs=0.03)  # 0.15, and at least one word of each short text

    class Some:
        def __len__(self):
            return 10

    made = [MicroBatches.of(stage, Some(), seed=0, number=0, held_out=held_out) for held_out in (False, True)]
    assert [one.work["mlm"][0] for one in made] == [stage.tasks[0].view, stage.tasks[0].held_out]


def test_every_parameter_shrinks_by_the_decay_times_the_schedule_alone(tokenizer):
    recipe = mosaicbert(tokenizer=tokenizer, **SMALL | dict(steps=100, warmup=10))
    stage, module = recipe.stages[0], recipe.module()
    optimizer = stage.optimizer.build(module.named_parameters())
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    set_learning_rate(optimizer, stage.optimizer.schedule, 54)
    factor = stage.optimizer.schedule.factor(54)
    assert 0.4 < factor < 0.6
    optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 1e-5 * factor), atol=0, rtol=2e-7, msg=lambda _, n=name: n)


@pytest.mark.parametrize("parts", [{}, {"alibi": False}, {"gated": False}, {"alibi": False, "gated": False}])
def test_every_ablation_learns(parts, tokenizer):
    torch.manual_seed(0)
    recipe = mosaicbert(tokenizer=tokenizer, **SMALL | parts)
    losses = losses_of(recipe, some_samples(8, most=8), 80)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
