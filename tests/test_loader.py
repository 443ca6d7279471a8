"""The stream of rows: one and the same for every number of processes and workers, and from every step on."""

import numpy as np
import pytest
import torch
import webdataset
from tones import ToneReader

from mmpre.data.index import open_shards
from mmpre.data.loader import LoadingError, MicroBatches, check_world, load, slots
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.masking.schedule import Line
from mmpre.recipe import Stage, Task
from mmpre.schedules import Constant
from mmpre.training.optim import AdamW
from mmpre.view import OtherSample, View


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(tmp_path / "tones-%03d.tar"), maxcount=37, verbose=0) as sink:
        for i in range(100):
            notes = " ".join(f"{p:.2f}" for p in rng.normal(size=rng.integers(3, 12)))
            sink.write({"__key__": f"s{i:03d}", "notes": notes.encode()})
    return sorted(str(path) for path in tmp_path.glob("*.tar"))


def data(shards, stage, **changes):
    units = Units(ShardReader(open_shards(shards)))
    work = {task.name: (task.view, {"tones": ToneReader()}) for task in stage.tasks}
    return MicroBatches(
        units,
        work,
        seed=3,
        stage=0,
        micro_batches=stage.micro_batches,
        block=stage.block,
        window=stage.window,
        **changes,
    )


def stage(**changes):
    view = View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll())
    tasks = [Task("a", view, None, ratio=2), Task("b", view, None)]
    numbers = dict(
        tasks=tasks, data=(), steps=20, batch=12, micro_batches=4, optimizer=AdamW(lr=1e-3, schedule=Constant())
    )
    return Stage(**(numbers | changes))


def stream(shards, *, world, workers, first=0, last=20):
    """What all ranks together receive: for each step and micro-batch its keys, masks and values."""
    one, seen = stage(), {}
    for rank in range(world):
        for made in load(data(shards, one), slots(one, 3, first, last, rank, world), workers):
            (part,) = made.parts
            seen[made.slot.step, made.slot.m] = (
                made.slot.task, made.units, part.keys, part.picked["note"].clean_M.tolist(),
                part.seen["tones"]["pitch"].tolist(),
            )  # fmt: skip
    return seen


@pytest.mark.fault("E4", "E13", "I9")
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 0), (2, 1), (4, 0), (4, 3)])
def test_the_stream_is_the_same_for_every_number_of_processes_and_workers(shards, world, workers):
    assert stream(shards, world=world, workers=workers) == stream(shards, world=1, workers=0)


def test_a_resumed_stream_is_the_rest_of_the_unbroken_one(shards):
    whole = stream(shards, world=1, workers=0)
    rest = stream(shards, world=2, workers=1, first=13)
    assert rest == {place: made for place, made in whole.items() if place[0] >= 13}


def test_every_unit_comes_once_an_epoch_and_epochs_differ(shards):
    whole = stream(shards, world=1, workers=0, last=25)
    units = [unit for place in sorted(whole) for unit in sorted(whole[place][1])]
    by_step = [sorted(u for place, made in whole.items() if place[0] == s for u in made[1]) for s in range(25)]
    assert sorted(units) == sorted(list(range(100)) * 3)
    assert by_step[0] != by_step[25 // 3]


def test_tasks_have_exact_shares_and_depend_on_the_step_alone():
    one = stage()
    names = [one.task_at(step, seed=5).name for step in range(30)]
    assert all(sorted(names[i : i + 3]) == ["a", "a", "b"] for i in range(0, 30, 3))
    assert names == [one.task_at(step, seed=5).name for step in range(30)]
    assert names != [one.task_at(step, seed=6).name for step in range(30)]


def test_masks_are_drawn_anew_each_epoch_and_alike_in_the_same_one(shards):
    units = data(shards, stage())
    slot = next(iter(slots(stage(), 3, 0, 1, 0, 1)))
    picks = [made.parts[0].picked["note"].clean_M.tolist() for made in (units[slot], units[slot])]
    assert picks[0] == picks[1]


def test_a_rate_follows_the_step_wherever_a_stream_is_taken_up(shards):
    view = View(picks={"note": RandomTokens(role="tones", rate=Line(0.6, 0.2, 19))}, corruption=HideAll())
    one = stage(tasks=[Task("a", view, None)], micro_batches=1)

    def shares(first):
        made = load(data(shards, one), slots(one, 3, first, 20, 0, 1), 0)
        return [m.parts[0].counts["picked:note"] / m.parts[0].counts["ordinary:note"] for m in made]

    whole = shares(0)
    assert abs(sum(whole[:5]) / 5 - 0.56) < 0.1 and abs(sum(whole[15:]) / 5 - 0.25) < 0.1
    assert shares(13) == whole[13:]


@pytest.mark.fault("C8")
def test_a_world_that_does_not_divide_the_micro_batches_is_told_which_do():
    with pytest.raises(ValueError, match=r"3 processes cannot share 4 micro-batches.*use one of 1, 2, 4"):
        check_world(4, 3)


def test_a_broken_sample_keeps_its_slot_as_a_hole_and_moves_no_other_row(shards, tmp_path):
    good = stream(shards, world=1, workers=0)
    path = open(shards[1], "r+b")
    with path:
        content = path.read()
        at = content.index(b"s040.notes") + 512
        path.seek(at)
        path.write(bytes([content[at] ^ 4]))
    one = stage()
    for made in load(data(shards, one), slots(one, 3, 0, 20, 0, 1), 0):
        was = good[made.slot.step, made.slot.m]
        assert made.units == was[1]
        keys = [key for part in made.parts for key in part.keys]
        assert keys == [key for key in was[2] if key != "s040"]
        assert [hole.key for hole in made.holes] == ["s040"] * ("s040" in was[2])


def test_an_error_in_a_worker_reaches_the_trainer_with_its_cause(shards):
    one = stage(tasks=[Task("a", View(picks={"x": RandomTokens(role="nowhere", rate=0.5)}), None)])
    with pytest.raises(LoadingError, match="task a: KeyError: 'nowhere'"):
        list(load(data(shards, one), slots(one, 3, 0, 2, 0, 1), 1))


def test_a_micro_batch_over_the_token_limit_is_split_by_lengths_alone(shards):
    one = stage(micro_batches=1)
    made = next(iter(load(data(shards, one, max_tokens=30), slots(one, 3, 0, 1, 0, 1), 0)))
    assert len(made.parts) > 1
    assert all(part.layout.size <= 30 for part in made.parts)
    assert sum(len(part.keys) for part in made.parts) == 12


def test_two_donors_may_not_write_one_label():
    with pytest.raises(ValueError, match="two of its donors and labels write matched; give each a label of its own"):
        View(donors={"text": OtherSample(share=0.5), "image": OtherSample(share=0.5)})


def test_donors_come_from_another_sample_by_the_order_alone(shards):
    view = View(donors={"tones": OtherSample(share=0.5)})
    one = stage(tasks=[Task("pairs", view, None)], batch=48)
    made = [made for made in load(data(shards, one), slots(one, 3, 0, 20, 0, 1), 0)]
    matched = torch.cat([part.labels["matched"] for m in made for part in m.parts])
    assert abs(matched.float().mean() - 0.5) < 0.06
    again = [made for made in load(data(shards, one), slots(one, 3, 0, 20, 0, 1), 2)]
    assert all(
        torch.equal(a.parts[0].seen["tones"]["pitch"], b.parts[0].seen["tones"]["pitch"])
        for a, b in zip(made, again, strict=True)
    )


def test_what_another_sample_lent_is_blamed_on_it(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "tones-%06d.tar"), maxcount=40, verbose=0) as sink:
        for i in range(40):
            sink.write({"__key__": f"s{i:03d}", "notes": b"1.0 high 2.0" if i == 7 else b"1.0 2.0 %d" % i})
    one = stage(tasks=[Task("pairs", View(donors={"tones": OtherSample(share=1.0)}), None)], batch=40, steps=3)
    shards, lent = [str(tmp_path / "tones-000000.tar")], 0
    for made in load(data(shards, one), slots(one, 3, 0, 3, 0, 1), 0):
        assert all(
            (hole.shard, hole.key, hole.cause) == ("tones-000000.tar", "s007", "not notes") for hole in made.holes
        )
        lent += len(made.holes)
        # the row that had no part in it is missing, the broken sample's own row took another's notes and is there
        assert len(made.units) == len(made.holes) + sum(len(part.keys) for part in made.parts)
    assert lent > 0
