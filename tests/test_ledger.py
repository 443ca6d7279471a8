"""Holes are counted alike on every process, named once, and stop a run that loses too much."""

import json

import pytest

from mmpre.data.ledger import Hole, Ledger, TooManyHolesError


def hole(number=0, cause="checksum", shard="a.tar", modality="image"):
    return Hole(cause, shard, f"k{number}", "jpg", modality, "its bytes do not fit")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_holes_are_counted_by_cause_shard_and_modality_and_named_in_lines(tmp_path):
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    ledger.add([hole(0), hole(1), hole(2, cause="empty text", modality="text")], seen=64, step=3)
    ledger.add([], seen=64, step=4)
    assert ledger.seen == 128
    assert ledger.table == {("checksum", "a.tar", "image"): 2, ("empty text", "a.tar", "text"): 1}
    assert [(line["step"], line["key"], line["cause"]) for line in lines(ledger.path)] == [
        (3, "k0", "checksum"), (3, "k1", "checksum"), (3, "k2", "empty text"),
    ]  # fmt: skip
    assert (
        ledger.summary() == "3 holes in 128 rows (checksum: 2, such as a.tar: k0.jpg, its bytes do not fit; "
        "empty text: 1, such as a.tar: k2.jpg, its bytes do not fit)"
    )


def test_tables_of_processes_add_up(tmp_path):
    parts = [[hole(0)], [hole(1), hole(2, shard="b.tar")]]
    ledgers = [Ledger(tmp_path / "x") for _ in parts]
    for ledger, some in zip(ledgers, parts, strict=True):
        ledger.add(some, seen=8, step=0, write=False)
    whole = Ledger(tmp_path / "x")
    whole.add(parts[0] + parts[1], seen=16, step=0, write=False)
    assert ledgers[0].table + ledgers[1].table == whole.table
    assert not (tmp_path / "x").exists()


@pytest.mark.fault("G9")
def test_a_key_cannot_speak_to_the_terminal_or_add_a_line(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add([Hole("checksum", "a\x1b[2J.tar", 'k\n{"step": 0}', "jpg", "image", "\x07")], seen=1, step=0)
    assert len(lines(ledger.path)) == 1 and "\x1b" not in ledger.path.read_text()
    assert ledger.summary().isprintable() and r"a\x1b[2J.tar" in ledger.summary()


def test_a_run_that_loses_too_much_stops_and_says_how_to_go_on(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", limit=0.05, minimum=100)
    ledger.add([hole(i) for i in range(9)], seen=99, step=0)
    ledger.check()  # too few rows to tell
    ledger.add([], seen=81, step=1)
    ledger.check()  # 9 of 180 is 5 percent
    ledger.add([hole()], seen=1, step=2)
    with pytest.raises(TooManyHolesError, match=r"10 of 181 all rows cannot be used, the run allows 5.0%.*max_holes"):
        ledger.check()


def test_one_bad_shard_or_modality_stops_a_run_that_is_well_as_a_whole(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", limit=0.05, minimum=100)
    ledger.begin(0, {"a.tar": 0.99, "b.tar": 0.01})
    ledger.add([hole(i, shard="b.tar") for i in range(50)], seen=9_000, step=0)
    ledger.check()  # 90 rows of b.tar are too few to tell
    ledger.add([], seen=1_000, step=1)
    with pytest.raises(TooManyHolesError, match=r"50 of 100 rows of b.tar cannot be used"):
        ledger.check()
    ledger = Ledger(tmp_path / "ledger.jsonl", limit=0.05)
    ledger.add([], seen=9_000, step=0, modalities=("text",))
    ledger.add([hole(i, modality="speech") for i in range(60)], seen=1_000, step=1, modalities=("text", "speech"))
    with pytest.raises(TooManyHolesError, match=r"60 of 1000 rows with speech"):
        ledger.check()


def test_another_leg_counts_its_own_shards_and_the_same_leg_goes_on(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", limit=0.05, minimum=100)
    ledger.begin(0, {"a.tar": 0.5, "b.tar": 0.5})
    ledger.add([hole(i) for i in range(40)], seen=1_000, step=0)
    ledger.begin(1, {"a.tar": 1.0})
    ledger.add([], seen=200, step=1)
    ledger.check()
    resumed = Ledger(tmp_path / "ledger.jsonl", limit=0.05, minimum=100)
    resumed.load_state(json.loads(json.dumps(ledger.state())))
    resumed.begin(1, {"a.tar": 1.0})
    resumed.add([hole(i) for i in range(11)], seen=10, step=2)
    with pytest.raises(TooManyHolesError, match=r"11 of 210 rows of a.tar"):
        resumed.check()


def test_a_resumed_run_counts_on_and_writes_no_line_twice(tmp_path):
    def run(ledger, first, last):
        for step in range(first, last):
            ledger.add([hole(step)] if step % 3 == 0 else [], seen=8, step=step)
        return ledger

    unbroken = run(Ledger(tmp_path / "a.jsonl"), 0, 30)
    broken = run(Ledger(tmp_path / "b.jsonl"), 0, 12)
    state = json.dumps(broken.state())
    run(broken, 12, 20)  # lost with the process
    with broken.path.open("a") as file:
        file.write('{"step": 3, "cut')
    resumed = Ledger(tmp_path / "b.jsonl")
    resumed.load_state(json.loads(state))
    resumed.truncate_after(11)
    run(resumed, 12, 30)
    assert resumed.path.read_bytes() == unbroken.path.read_bytes()
    assert resumed.state() == unbroken.state()
    Ledger(tmp_path / "none.jsonl").truncate_after(5)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.fault("H1")
def test_a_full_disk_does_not_end_the_run_here(tmp_path, caplog):
    ledger = Ledger(tmp_path)  # a folder cannot be written to
    for step in range(3):
        ledger.add([hole()], seen=8, step=step)
    assert ledger.table.total() == 3
    assert caplog.text.count("cannot be written") == 1


def test_a_limit_that_is_no_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got 5.0; 5 percent is 0.05"):
        Ledger(tmp_path / "x", limit=5.0)
