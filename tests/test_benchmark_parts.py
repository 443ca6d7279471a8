"""The benchmarks of single promises: contenders run, do the same work, and count what they say."""

import pytest
import torch

from mmpre.attention import Plan
from mmpre.benchmark import Settings
from mmpre.draw import Draw
from mmpre.recipes.benchmarks import bert, exact, loader, mae, matmul, processes, scale, start
from mmpre.recipes.benchmarks.pictures import write_pictures
from mmpre.recipes.benchmarks.texts import tokenizer_of

SHORT = dict(width=32, depth=2, length=40, batch=4, steps=2, warmup=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    data = loader.write_texts(folder / "texts", 120)
    return dict(data=str(data / "train"), tokenizer=str(tokenizer_of(data, 300, folder)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(write_pictures(tmp_path_factory.mktemp("pictures"), 60, side_px=(40, 60)))


@pytest.fixture
def tiny_mae(pictures):
    return dict(
        data=pictures, width=32, depth=1, decoder_width=16, decoder_depth=1, decoder_heads=1, patch_px=8, side_px=32,
        batch=4, steps=2, warmup=1,
    )  # fmt: skip


def test_both_maes_have_as_many_parameters_and_see_as_many_pictures_in_the_same_order(tiny_mae):
    case = mae.Case(**tiny_mae)
    ours, theirs = mae.recipe_of(case).module(), mae.their_model(case)
    fixed = sum(p.numel() for name, p in theirs.named_parameters() if "position" in name or "pos_embed" in name)
    masks = case.width  # our patches could be shown as replaced ones; theirs cannot
    assert sum(p.numel() for p in ours.parameters()) - masks == sum(p.numel() for p in theirs.parameters()) - fixed
    source = mae.source_of(case, mae.recipe_of(case))
    units = source.order.units(torch.arange(12).numpy()).tolist()
    shown = mae.Pictures(case, 12)
    assert [sample.key for sample in shown.samples] == [source.units.sample(unit).key for unit in units]
    assert shown[0].shape == (3, 32, 32)
    turns = [contender(**tiny_mae) for contender in mae.CONTENDERS.values()]
    assert [turn.amount for turn in turns] == [8, 8]


def test_products_are_those_that_a_training_step_multiplies(texts, monkeypatch):
    """torch's own counter of floating-point operations sees the same, forward and backward.

    But for what nobody is in, where rows of like length share a product: that is no work done.
    """
    monkeypatch.setattr(Plan, "_like_runs", lambda self, heads: None)
    from torch.utils.flop_counter import FlopCounterMode

    case = bert.Case(**texts, **SHORT, dropout=0.1)  # with dropout, attention is written out as products
    recipe = bert.recipe_of(case)
    (task,) = recipe.stages[0].tasks
    slot = next(iter(matmul.slots(recipe.stages[0], 0, 0, 1, 0, 1)))
    (batch,) = bert.source_of(case, recipe)[slot].parts
    task.objective.train()
    with FlopCounterMode(display=False) as counted:
        task.objective(batch, Draw.micro_batch(0, 0, 0, 0)).total(batch.counts).backward()
    told = sum(product.flops for product in matmul.products(batch, case, 300))
    assert told == pytest.approx(counted.get_total_flops(), rel=1e-6)


def test_a_step_and_its_products_count_the_same_operations(texts):
    turns = [contender(**texts, **SHORT) for contender in matmul.CONTENDERS.values()]
    assert turns[0].amount == pytest.approx(turns[1].amount) and turns[0].amount > 0


@pytest.mark.parametrize("kind", ["texts", "pictures"])
def test_both_loaders_give_as_many_rows_and_decode_alike(kind, texts, pictures):
    numbers = (texts if kind == "texts" else {"data": pictures}) | dict(batch=4, steps=3, warmup=1)
    assert [contender(**numbers).amount for contender in loader.CONTENDERS.values()] == [12, 12]
    case = loader.Case(**numbers)
    (task,) = loader.stage_of(case).tasks
    (reader,) = task.objective.readers.values()
    source = bert.Units(bert.ShardReader(bert.open_shards(case.data)))
    sample = source.sample(0)
    theirs = loader.decoder_of(case)(dict(sample.members))
    ours = reader.tokenize(sample, Draw.row(0, 0, 0, epoch=0, unit=0))
    if kind == "texts":
        assert ours["ids"][1:-1].tolist() == theirs.tolist()
    else:
        assert ours["patch"][1:].shape == theirs.shape == (196, 768)


def test_exact_and_fast_mode_see_the_same_tokens(texts):
    turns = [contender(**texts, **SHORT, micro_batches=2) for contender in exact.CONTENDERS.values()]
    assert turns[0].amount == turns[1].amount > 0


def test_two_processes_together_see_the_tokens_of_one(texts):
    numbers = texts | SHORT | dict(micro_batches=2)
    assert processes.two(**numbers).amount == processes.one(**numbers).amount > 0


def test_runs_over_many_and_few_samples_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "FILES", 2)
    monkeypatch.setattr(scale, "SHARD", 50)
    scale.write(tmp_path / "many", 200, 1)
    assert len({path.stat().st_ino for path in (tmp_path / "many").glob("*.tar")}) == 2
    assert len(scale.open_shards(tmp_path / "many")) == 200
    monkeypatch.undo()
    scale.write(tmp_path / "few", 70, 1)
    numbers = dict(many=str(tmp_path / "many"), few=str(tmp_path / "few"), position=180, steps=2, batch=8, warmup=1)
    many, few, far, begin = (contender(**numbers) for contender in scale.CONTENDERS.values())
    assert many.amount == few.amount == 2 * 8 * 5  # [CLS] and a quarter of 16 patches
    assert "grown MB" in many.more
    assert far.amount == begin.amount == 1


def test_a_start_ends_with_the_first_step_that_is_written_down(texts):
    turn = start.train(texts["data"])
    assert turn.seconds > 0 and turn.peak_bytes > 100e6
    assert 1e6 < start.CONTENDERS["python"](texts["data"]).peak_bytes < 60e6  # not this process's
    with pytest.raises(RuntimeError, match="no/shards"):
        start.train("no/shards")


@pytest.mark.parametrize("module", [exact, loader, mae, processes, scale, start])
def test_cases_that_no_title_holds_are_left_out(module):
    assert list(module.run(Settings(repeats=1, cases="float8"))) == []


def test_without_a_wish_the_usual_cases_are_run_and_with_one_all_that_fit(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(bert, "tokenizer_of", lambda data, vocab, folder: tmp_path / "tokenizer.json")
    data = (loader.Path(texts["data"]).parent,)
    usual = [title for title, _ in bert.cases(Settings(data=data), tmp_path)]
    wished = [title for title, _ in bert.cases(Settings(data=data, cases="12 x 768"), tmp_path)]
    assert len(usual) == len(bert.USUAL) and len(wished) == 4
    assert all("12 x 768" in title for title in wished)


def test_a_gradient_of_one_micro_batch_is_not_rounded_in_exact_mode():
    """And several are added in float64: in float32 the small ones would be lost."""
    from mmpre.processes.processes import Processes
    from mmpre.training.gradients import Summed

    weight = torch.nn.Parameter(torch.zeros(3))
    for parts, expected in (([0.1], 0.1), ([1.0] + [2.0**-25] * 4, 1 + 2.0**-23)):
        gradients = Summed([weight], Processes(), exact=True)
        for value in parts:
            weight.grad = torch.full((3,), value)
            gradients.add()
        gradients.finish()
        assert torch.equal(weight.grad, torch.full((3,), expected))
