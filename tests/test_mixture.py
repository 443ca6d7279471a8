"""Several sources in one stream: exact proportions, every source in its own order, seek in closed form."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tones import ToneReader

import mmpre
from mmpre.data.index import open_shards
from mmpre.data.ledger import Hole, Ledger, TooManyHolesError
from mmpre.data.loader import MicroBatches, Slot
from mmpre.data.mixture import Mixture, Source, Stream, cycle, sources
from mmpre.data.order import Order
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.data.units import TooFewSamplesError, Units
from mmpre.draw import hashed
from mmpre.runs.options import RunOptions
from mmpre.runs.replay import replay
from mmpre.view import View

TONES = Path(__file__).parent / "tones.py"
CYCLE_532 = [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]  # frozen: another cycle gives every stored mixed run another stream


class Numbers:
    """Units that hold nothing but their count."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.fixture
def two(tmp_path):
    """Two sources whose shards have the same file names and keys."""
    for name, count in (("high", 30), ("low", 12)):
        with shard_writer(tmp_path / name, maxcount=20) as sink:
            for i in range(count):
                sink.write({"__key__": f"s{i:02d}", "notes": f"{10 if name == 'high' else -10} {i}"})
    return {name: str(tmp_path / name) for name in ("high", "low")}


def mixed(two, weights=(3, 1)):
    return Mixture({name: Units(ShardReader(open_shards(path))) for name, path in two.items()}, weights)


@pytest.mark.parametrize("weights", [[1], [1, 1], [5, 3, 2], [1, 7], [97, 1, 2], [3, 3, 3, 1, 12], [1000, 1]])
def test_every_window_of_a_cycle_is_exact_and_every_prefix_within_one(weights):
    total = sum(weights)
    places = np.tile(cycle(weights), 3)
    counts = np.cumsum(places[:, None] == np.arange(len(weights)), 0)
    counts = np.concatenate([np.zeros((1, len(weights)), int), counts])
    for start in range(2 * total):
        assert (counts[start + total] - counts[start] == weights).all()
    due = np.arange(len(counts))[:, None] * np.array(weights) / total
    assert np.abs(counts - due).max() < 1


def test_the_cycle_is_frozen():
    assert cycle([5, 3, 2]).tolist() == CYCLE_532


def test_one_source_streams_as_it_did_alone_whatever_it_is_called():
    plain = Order(1009, hashed(3, 1, "order"), block=4, window=16)
    positions = np.arange(3000)
    for name in ("", "only"):
        stream = Stream(Mixture({name: Numbers(1009)}, [7]), 3, 1, block=4, window=16)
        assert (stream.units(positions) == plain.units(positions)).all()
        assert stream.epochs(np.array([0, 1008, 1009, 2999])) == [0, 0, 1, 2]


def test_each_source_has_its_own_order_and_epochs_and_a_position_needs_no_other():
    mixture = Mixture({"a": Numbers(50), "b": Numbers(7)}, [10, 6])
    stream = Stream(mixture, 3, 0, block=2, window=8)
    units = stream.units(np.arange(8 * 50))
    a, b = units[units < 50], units[units >= 50] - 50
    assert len(a) == 250 and len(b) == 150
    assert (np.sort(a.reshape(5, 50), 1) == np.arange(50)).all()
    assert (np.sort(b[:147].reshape(21, 7), 1) == np.arange(7)).all()
    assert (a[:50] != a[50:100]).any()
    for start in (0, 1, 7, 399):
        assert stream.units(np.array([start]))[0] == units[start]
    far = 10**15 + 5  # as quick as the first: no place before it is looked at
    round_, place = divmod(far, 8)
    source, own = mixture.at(np.array([far]))
    weight = [5, 3][source[0]]
    assert own[0] == round_ * weight + (cycle([5, 3])[:place] == source[0]).sum()
    assert stream.epochs(np.array([far])) == [own[0] // [50, 7][source[0]]]


def test_donors_come_from_the_rows_own_source():
    stream = Stream(Mixture({"a": Numbers(5), "b": Numbers(4)}, [1, 1]), 3, 0, block=1, window=1)
    for position in range(200):
        unit = int(stream.units(np.array([position]))[0])
        other = stream.donor(position, unit, "image0")
        assert other != unit and (other < 5) == (unit < 5)


def test_rows_of_both_sources_are_read_and_told_apart(two):
    mixture = mixed(two)
    data = MicroBatches(mixture, {"t": (View(), {"tones": ToneReader()})}, seed=0, stage=0, micro_batches=1,
                        block=2, window=4)  # fmt: skip
    made = data[Slot(0, 0, "t", 0, 16)]
    high = [unit for unit in made.units if unit < 30]
    assert len(high) == 12 and len(made.units) == 16
    pitches = made.parts[0].clean["tones"]["pitch"][::2].tolist()
    assert sorted(pitches) == [-10.0] * 4 + [10.0] * 12
    assert mixture.identity(0) == ("high/shard-000000.tar", "s00")
    assert mixture.identity(31) == ("low/shard-000000.tar", "s01")
    assert mixture.shares() == pytest.approx({"high/shard-000000.tar": 0.5, "high/shard-000001.tar": 0.25,
                                              "low/shard-000000.tar": 0.25})  # fmt: skip


def test_a_source_that_is_mostly_broken_stops_the_run(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", limit=0.3, minimum=10)
    ledger.begin(0, {"a/x.tar": 0.8, "b/x.tar": 0.1, "b/y.tar": 0.1})
    holes = [Hole("checksum", f"b/{'xy'[i % 2]}.tar", str(i), "", "", "") for i in range(10)]
    ledger.add(holes, seen=90, step=0)
    with pytest.raises(TooManyHolesError, match="10 of 18 rows of source b cannot be used"):
        ledger.check()


def test_a_run_over_sources_from_the_command_lines_words_records_them_and_refuses_other_weights(two, tmp_path):
    options = RunOptions(workers=0, log_every=1, save_every=2)
    words = (f"high@6={two['high']}", f"low@2={two['low']}")
    run = mmpre.train(TONES, out=tmp_path / "run", options=options, data=words, steps=6, batch=8)
    told = json.loads((run / "run.json").read_text())["data"][0]
    assert told["units"] == 42
    assert replay(run, 5)["logged"]
    assert {name: (one["weight"], one["samples"]) for name, one in told["sources"].items()} == {
        "high": (3, 30), "low": (1, 12),
    }  # fmt: skip
    with pytest.raises(ValueError, match="the data of stage 0 is not what"):
        mmpre.resume(run, data=(f"high@1={two['high']}", f"low@1={two['low']}"))


def test_words_name_sources_and_plain_paths_are_one_without_a_name():
    assert sources(("a.tar", "b.tar"), "beside") == {"": Source(("a.tar", "b.tar"), 1, "beside")}
    assert sources(("a@3=x/*.tar", "b@1=y.tar", "a@3=z=1.tar")) == {
        "a": Source(("x/*.tar", "z=1.tar"), 3), "b": Source(("y.tar",), 1),
    }  # fmt: skip
    assert sources(("https://x.org/a@b/c=d.tar",)) == {"": Source(("https://x.org/a@b/c=d.tar",))}


@pytest.mark.parametrize("weight", [0, -1, 0.5, math.nan, True, "x"])
def test_weights_are_whole_parts_above_none(weight):
    with pytest.raises(ValueError, match=rf"source 'b': the weight must be a whole number .* got {weight!r}; 0.7 to"):
        sources({"a": Source(("a.tar",), 1), "b": Source(("b.tar",), weight)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a@3=x", "y.tar"), "y.tar belongs to no source; write all as NAME@WEIGHT=SHARDS, as in a@3=y.tar"),
        (("a@3=x", "a@2=y"), "source 'a' has weights 3 and 2"),
        (("a@0=x", "b@nan=y"), "source 'a': the weight .* got 0.*source 'b': the weight .* got 'nan'"),
        ({"a": Source(())}, "source 'a' has no shards"),
        ({"a/b": Source(("x",))}, "source 'a/b': a name is a letter"),
        ({}, "no source is given"),
        ({"a": Source(("x",), 99991), "b": Source(("y",), 2)}, "99,993 parts in lowest terms, at most 65,536"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_meant_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        sources(data)


def test_one_sidecar_for_several_sources_is_refused():
    with pytest.raises(ValueError, match="several sources share no sidecar"):
        sources({"a": Source(("x",)), "b": Source(("y",))}, "folder")


def test_a_source_smaller_than_its_share_of_a_step_is_refused(two):
    mixed(two, (1, 1)).check(24)
    with pytest.raises(TooFewSamplesError, match="a step takes 13 rows of it, source 'low' has 12 units"):
        mixed(two, (1, 1)).check(25)
