"""Reading by number: damage costs one sample, storage that fails is tried again, sidecars fit or are refused."""

import hashlib
import json
import multiprocessing
import os
import pickle
import resource

import numpy as np
import pytest
import webdataset
from tars import entries, flip, samples, tar

from mmpre.data import shards as shards_module
from mmpre.data.index import ShardError, Shards, open_index, open_shards
from mmpre.data.shards import CorruptSample, ShardReader, Sidecar, StorageError, record_sidecar, shard_writer

NAMES = ("a-000.tar", "a-001.tar", "a-002.tar")


@pytest.fixture
def made():
    return [samples(5, name=f"{i}-{{:03d}}") for i in range(3)]


@pytest.fixture
def folder(tmp_path, made):
    (tmp_path / "main").mkdir()
    for name, some in zip(NAMES, made, strict=True):
        (tmp_path / "main" / name).write_bytes(tar(entries(some)))
    return tmp_path / "main"


def everything(reader):
    return {reader.shards.key(i): reader.read(i) for i in range(len(reader.shards))}


def test_every_sample_is_read_by_its_number(folder, made):
    reader = ShardReader(open_shards(folder))
    assert everything(reader) == made[0] | made[1] | made[2]
    assert list(reader.read(3)) == ["jpg", "json", "txt"]
    with pytest.raises(IndexError, match="hold 15 samples, asked for number 15"):
        reader.read(15)


def test_members_far_apart_and_empty_ones_are_read(tmp_path):
    some = samples(40, size=9000)
    some["s0003"]["txt"] = b""
    (tmp_path / "x.tar").write_bytes(tar(sorted(entries(some), key=lambda one: one[0].name[-3:])))
    assert everything(ShardReader(open_shards(tmp_path))) == some


@pytest.mark.fault("A5", "B2")
def test_a_flipped_payload_bit_costs_that_sample_alone_and_is_named(folder, made):
    shards = open_shards(folder)
    path = folder / NAMES[1]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for local in range(5):
        member = shards.indexes[1].members(local)[local % 3]
        path.write_bytes(flip(whole, member.offset + int(rng.integers(member.size)), int(rng.integers(8))))
        reader = ShardReader(shards)
        for number in range(15):
            key = shards.key(number)
            if number != 5 + local:
                assert reader.read(number) == (made[0] | made[1] | made[2])[key]
                continue
            with pytest.raises(CorruptSample) as caught:
                reader.read(number)
            e = caught.value
            assert (e.cause, e.shard, e.key, e.member) == ("checksum", NAMES[1], key, member.suffix)
            assert f"{NAMES[1]}: {key}.{member.suffix}: checksum" in str(e)
            assert pickle.loads(pickle.dumps(e)).args == e.args


def test_a_shard_that_was_cut_costs_its_last_sample(folder, made):
    whole = (folder / NAMES[0]).read_bytes()
    (folder / NAMES[0]).write_bytes(whole[: whole.rindex(b"0-004.txt|") + 3])
    reader = ShardReader(open_shards(folder))
    assert [reader.read(i) for i in range(4)] == list(made[0].values())[:4]
    with pytest.raises(CorruptSample, match=r"a-000.tar: 0-004: incomplete sample"):
        reader.read(4)
    assert reader.read(5) == made[1]["1-000"]


@pytest.mark.fault("A8")
def test_the_same_keys_in_two_shards_are_never_joined(tmp_path):
    one, two = samples(2), samples(2, suffixes=("cls",))
    whole = tar(entries(one))
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"s0001.jpg|") + 3])
    (tmp_path / "b.tar").write_bytes(tar(entries(two)))
    shards = open_shards(tmp_path)
    reader = ShardReader(shards)
    assert [reader.read(i) for i in (0, 2, 3)] == [one["s0000"], *two.values()]
    assert shards.identity(0)[1] == shards.identity(2)[1] and shards.identity(0) != shards.identity(2)
    with pytest.raises(CorruptSample):
        reader.read(1)


def test_control_characters_of_a_key_do_not_reach_a_message(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar(entries({"a\x1b[31m\nb": {"txt": b"content"}})))
    shards = open_shards(tmp_path)
    (tmp_path / "x.tar").write_bytes(flip((tmp_path / "x.tar").read_bytes(), 513))
    with pytest.raises(CorruptSample) as caught:
        ShardReader(shards).read(0)
    assert str(caught.value).isprintable() and r"a\x1b[31m\x0ab" in str(caught.value)


# ---- storage that fails ----


class Flaky:
    """os.pread that fails now and then."""

    def __init__(self, faults):
        self.faults, self.calls, self.real = list(faults), 0, os.pread

    def __call__(self, handle, size, offset):
        self.calls += 1
        fault = self.faults.pop(0) if self.faults else None
        if fault == "short":
            return self.real(handle, max(1, size // 3), offset)
        if fault == "nothing":
            return b""
        if fault == "wrong":
            return bytes(size)
        if fault:
            raise OSError(fault, os.strerror(fault))
        return self.real(handle, size, offset)


@pytest.mark.fault("H4")
@pytest.mark.parametrize("faults", [[5, 5], ["short"] * 5, ["nothing", 116], ["wrong"], [5, "short", "wrong", 5]])
def test_passing_faults_of_storage_change_nothing(folder, made, monkeypatch, faults):
    reader = ShardReader(open_shards(folder), wait_s=0.001)
    flaky = Flaky(faults)
    monkeypatch.setattr(shards_module.os, "pread", flaky)
    assert reader.read(0) == made[0]["0-000"]
    assert flaky.calls > 1 and not flaky.faults


@pytest.mark.fault("H4")
def test_lasting_faults_of_storage_stop_the_run_and_are_no_damage(folder, monkeypatch):
    reader = ShardReader(open_shards(folder), wait_s=0.001, tries=3)
    flaky = Flaky([5] * 100)
    monkeypatch.setattr(shards_module.os, "pread", flaky)
    with pytest.raises(
        StorageError, match=r"a-000.tar: reading .* failed 3 times: .*Input/output error.*check the storage"
    ):
        reader.read(0)
    assert flaky.calls == 3


@pytest.mark.fault("A16")
def test_a_shard_that_vanishes_changes_size_or_shrinks_while_open_stops_the_run(folder, made):
    reader = ShardReader(open_shards(folder), wait_s=0.001)
    assert reader.read(0) == made[0]["0-000"]
    whole = (folder / NAMES[0]).read_bytes()
    with (folder / NAMES[0]).open("r+b") as file:
        file.truncate(2048)
    with pytest.raises(StorageError, match=f"changed since it was indexed: has 2048 bytes, {len(whole)} when"):
        reader.read(3)
    (folder / NAMES[1]).unlink()
    with pytest.raises(StorageError, match=r"a-001.tar.*No such file"):
        reader.read(5)
    (folder / NAMES[0]).write_bytes(whole)
    assert reader.read(3) == made[0]["0-003"]


@pytest.mark.fault("A13")
def test_verify_lists_every_shard_whose_content_changed(folder):
    shards = open_shards(folder)
    reader = ShardReader(shards)
    reader.verify()
    for name in NAMES[1:]:
        path, time = folder / name, (folder / name).stat().st_mtime_ns
        path.write_bytes(flip(path.read_bytes(), len(path.read_bytes()) - 1))
        os.utime(path, ns=(time, time))
    with pytest.raises(ShardError, match="2 shards cannot be used") as caught:
        reader.verify()
    assert [os.path.basename(shard) for shard, _ in caught.value.problems] == list(NAMES[1:])


# ---- handles and processes ----


@pytest.mark.fault("H5")
def test_few_files_are_held_open_and_a_limit_is_named(folder, made, monkeypatch):
    reader = ShardReader(open_shards(folder), files=2, wait_s=0.001)
    for number in (0, 5, 10, 1, 14):
        reader.read(number)
        assert len(reader._open) <= 2
    reader.close()
    held, limit = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
        while True:
            held.append(open(os.devnull))
    except OSError:
        with pytest.raises(StorageError, match=r"raise the limit of open files \(ulimit -n\)"):
            reader.read(0)
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert reader.read(0) == made[0]["0-000"]


def _read_all(reader, numbers, answers):
    answers.put(hashlib.sha256(repr([reader.read(i) for i in numbers]).encode()).hexdigest())


def test_a_used_reader_works_in_forked_processes(folder):
    reader = ShardReader(open_shards(folder))
    numbers = [0, 14, 7, 3] * 20
    expected = hashlib.sha256(repr([reader.read(i) for i in numbers]).encode()).hexdigest()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=_read_all, args=(reader, numbers, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [answers.get(timeout=60) for _ in workers] == [expected] * 2
    for worker in workers:
        worker.join()
    assert hashlib.sha256(repr([reader.read(i) for i in numbers]).encode()).hexdigest() == expected


def test_pickling_takes_no_open_file_and_keeps_the_index_on_disk(folder, made):
    reader = ShardReader(open_shards(folder))
    reader.read(0)
    again = pickle.loads(pickle.dumps(reader))
    assert not again._open and again.read(7) == made[1]["1-002"] and reader._open


# ---- writing ----


def write(folder, some, **options):
    with shard_writer(folder, **options) as sink:
        for key, members in some.items():
            sink.write({"__key__": key, **members})
    return sink.paths


def test_the_same_samples_give_the_same_bytes(tmp_path):
    some = samples(10)
    one, two = write(tmp_path / "a", some, maxcount=4), write(tmp_path / "b", some, maxcount=4)
    assert [path.name for path in one] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    shards = open_shards(tmp_path / "a", build=False)
    assert everything(ShardReader(shards)) == some and shards.fingerprint == open_shards(two).fingerprint
    theirs = webdataset.WebDataset([str(path) for path in one], shardshuffle=False)
    assert {sample["__key__"]: sample["jpg"] for sample in theirs} == {key: some[key]["jpg"] for key in some}
    assert sorted(os.listdir(tmp_path / "a")) == sorted(f"{path.name}{end}" for path in one for end in ("", ".idx"))


def test_shards_end_at_a_count_or_a_size_and_numbers_begin_where_asked(tmp_path):
    some = {f"k{i}": {"bin": bytes(1000)} for i in range(10)}
    by_size = write(tmp_path / "100%s", some, prefix="p", maxsize=3000, start=7)
    assert [path.name for path in by_size] == [f"p-{i:06d}.tar" for i in range(7, 11)]
    assert [len(open_index(path)) for path in by_size] == [3, 3, 3, 1]
    with pytest.raises(FileExistsError, match="exists already; give an empty folder"):
        write(tmp_path / "100%s", some, prefix="p", start=7)


def test_long_and_foreign_keys_are_written_and_read(tmp_path):
    some = {"ключ": {"txt": b"1"}, "d" * 90 + "/" + "k" * 90: {"seg.png": b"2"}}
    write(tmp_path, some)
    assert everything(ShardReader(open_shards(tmp_path))) == some


def test_nothing_half_written_is_left_under_a_shards_name(tmp_path):
    with pytest.raises(RuntimeError, match="builder failed"), shard_writer(tmp_path, maxcount=2) as sink:
        for i in range(3):
            sink.write({"__key__": f"k{i}", "txt": "text"})
        raise RuntimeError("builder failed")
    assert sorted(os.listdir(tmp_path)) == ["shard-000000.tar", "shard-000000.tar.idx"]
    assert everything(ShardReader(open_shards(tmp_path))) == {f"k{i}": {"txt": b"text"} for i in range(2)}
    assert write(tmp_path / "none", {}) == []


@pytest.mark.parametrize(
    ("sample", "wrong"),
    [
        ({"txt": b"x"}, "needs a __key__"),
        ({"__key__": "a.b", "txt": b"x"}, "key 'a.b' would not be read back"),
        ({"__key__": "../a", "txt": b"x"}, "would not be read back"),
        ({"__key__": "/a", "txt": b"x"}, "would not be read back"),
        ({"__key__": "a\nb", "txt": b"x"}, r"key 'a\\\\x0ab' would not"),
        ({"__key__": "a", "TXT": b"x"}, "suffix 'TXT' would not"),
        ({"__key__": "a", "x/y": b"x"}, "suffix 'x/y' would not"),
        ({"__key__": "a", "txt": 3}, "a.txt must be bytes or text, got int; encode it first"),
        ({"__key__": "a"}, "sample a has no members"),
        ({"__key__": "first", "txt": b"x"}, "key first was written before"),
    ],
)
def test_what_would_not_be_read_back_is_not_written(tmp_path, sample, wrong):
    with pytest.raises((ValueError, TypeError), match=wrong), shard_writer(tmp_path) as sink:
        sink.write({"__key__": "first", "txt": b"x"})
        sink.write(sample)


# ---- sidecars ----


@pytest.fixture
def sidecar(tmp_path, folder, made):
    """A sidecar folder with one member, `feat`, for every sample."""
    beside = tmp_path / "beside"
    beside.mkdir()
    for name, some in zip(NAMES, made, strict=True):
        (beside / name).write_bytes(tar(entries({key: {"feat": f"of {key}".encode()} for key in some})))
    record_sidecar(beside, open_shards(folder))
    return beside


def test_a_sidecar_gives_the_extra_members_by_number(folder, sidecar):
    shards = open_shards(folder)
    beside = Sidecar(sidecar, shards)
    assert [beside.read(i) for i in range(15)] == [{"feat": f"of {shards.key(i)}".encode()} for i in range(15)]
    part = Shards([shards.indexes[2], shards.indexes[0]])  # another choice of the same shards
    assert Sidecar(sidecar, part).read(0) == {"feat": b"of 2-000"}
    assert pickle.loads(pickle.dumps(beside)).read(7) == {"feat": b"of 1-002"}


def test_a_sidecar_of_other_shards_is_refused(folder, sidecar, made):
    (folder / NAMES[1]).write_bytes(tar(entries(samples(5, name="9-{:03d}"))))
    (folder / "b.tar").write_bytes(tar(entries(samples(5))))
    with pytest.raises(ShardError) as caught:
        Sidecar(sidecar, open_shards(folder))
    assert "a-001.tar: it was made of another shard of that name; make it again" in str(caught.value)
    assert "b.tar: it names no such shard" in str(caught.value)


def test_a_sidecar_with_other_keys_or_another_order_is_refused(folder, sidecar, made):
    keys = list(made[2])
    for wrong in (keys[:-1], [*keys, "more"], keys[::-1]):
        (sidecar / NAMES[2]).write_bytes(tar(entries({key: {"feat": b"x"} for key in wrong})))
        with pytest.raises(ShardError, match=r"beside/a-002.tar: .* keys of .*a-002.tar are missing"):
            Sidecar(sidecar, open_shards(folder))


def test_a_sidecar_says_which_samples_it_has_nothing_for(folder, sidecar, made):
    keys = list(made[2])
    (sidecar / NAMES[2]).write_bytes(tar(entries({key: {"feat": key.encode()} for key in keys if key != keys[1]})))
    record_sidecar(sidecar, open_shards(folder), holes={NAMES[2]: [keys[1]]})
    beside = Sidecar(sidecar, open_shards(folder))
    assert beside.read(12) == {"feat": keys[2].encode()} and beside.read(10) == {"feat": keys[0].encode()}
    with pytest.raises(CorruptSample, match=rf"a-002.tar: {keys[1]}: hole in sidecar"):
        beside.read(11)


@pytest.mark.parametrize("record", [None, b"{", b"[1]", b'{"format": 9, "shards": {}, "holes": {}}', b'{"format": 1}'])
def test_a_sidecar_without_a_record_of_its_shards_is_refused(folder, sidecar, record):
    (sidecar / "sidecar.json").unlink()
    if record is not None:
        (sidecar / "sidecar.json").write_bytes(record)
    with pytest.raises(ShardError, match=r"sidecar.json: (cannot be read|is not what|has format 9)"):
        Sidecar(sidecar, open_shards(folder))


def test_a_sidecar_of_shards_with_one_name_is_refused(tmp_path, folder):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / NAMES[0]).write_bytes(tar(entries(samples(2))))
    with pytest.raises(ShardError, match="different file names"):
        record_sidecar(tmp_path, open_shards([folder / NAMES[0], tmp_path / "other" / NAMES[0]]))
    record_sidecar(tmp_path, open_shards(folder))
    assert json.loads((tmp_path / "sidecar.json").read_text())["shards"].keys() == set(NAMES)
