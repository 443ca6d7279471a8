"""A shard's index: what it finds in whole tars, what damage costs, and what is refused."""

import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from tars import SUFFIXES, content, entries, entry, flip, headers, samples, tar

from mmpre.data.index import ShardError, Shards, expand_shards, index_shard, open_index, open_shards
from mmpre.data.shards import CorruptSample, ShardReader

FORMATS = {
    "ustar": (tarfile.USTAR_FORMAT, "s{:04d}"),
    "gnu long names": (tarfile.GNU_FORMAT, "d" * 95 + "/" + "q" * 10 + "{:04d}"),
    "pax long names": (tarfile.PAX_FORMAT, "d" * 95 + "/" + "q" * 10 + "{:04d}"),
    "pax other letters": (tarfile.PAX_FORMAT, "ключ{:04d}"),
}


@pytest.fixture
def put(tmp_path):
    """Write a tar's bytes to a fresh shard, and return its path."""

    def put(data, name="shard.tar"):
        path = tmp_path / name
        path.write_bytes(data)
        path.with_name(f"{name}.idx").unlink(missing_ok=True)
        return path

    return put


def readable(path):
    """What training would see of a shard: the members of every sample that can be read."""
    shards = Shards([index_shard(path)])
    reader, found = ShardReader(shards), {}
    for i in range(len(shards)):
        try:
            found[shards.key(i)] = reader.read(i)
        except CorruptSample:
            continue
    reader.close()
    return found


def refused(path):
    with pytest.raises(ShardError) as caught:
        index_shard(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_member_is_found_in_tars_of_every_kind(put, kind):
    tar_format, name = FORMATS[kind]
    made = samples(name=name)
    path = put(tar(entries(made), tar_format))
    assert readable(path) == made
    assert index_shard(path).problems == []


@pytest.mark.fault("A12")
def test_webdataset_and_the_index_see_the_same_samples(tmp_path):
    names = ("a/b.jpg", "a/b.seg.PNG", "c.TXT", "x.y/d.json", "__meta__", "__info__.json", "e/__f.txt")
    path = tmp_path / "odd.tar"
    path.write_bytes(tar([entry("folder", type=tarfile.DIRTYPE), *(entry(name, name.encode()) for name in names)]))
    theirs = {
        sample["__key__"]: {k: v for k, v in sample.items() if k[0] != "_"}
        for sample in webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    }
    assert readable(path) == theirs
    assert theirs["a/b"] == {"jpg": b"a/b.jpg", "seg.png": b"a/b.seg.PNG"}


@pytest.mark.fault("A9")
def test_members_of_one_key_are_one_sample_wherever_they_stand(put):
    made = samples()
    assert readable(put(tar(sorted(entries(made), key=lambda one: one[0].name[-3:])))) == made


@pytest.mark.fault("A22")
def test_what_is_no_plain_file_of_a_sample_is_left_out_and_told(put, tmp_path):
    good = samples(1)
    odd = [
        entry("a.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("b.txt", type=tarfile.LNKTYPE, linkname="s0000.txt"),
        entry("c.txt", type=tarfile.CHRTYPE),
        entry("d.txt", type=tarfile.FIFOTYPE),
        entry("../../e.txt", b"out"),
        entry("/f.txt", b"absolute"),
        entry("README", b"no suffix"),
        entry("g/.hidden", b"hidden"),
    ]
    path = put(tar(odd + entries(good)))
    assert readable(path) == good
    assert open_index(path).causes == {"not a regular file": 4, "unsafe name": 2, "no suffix": 1, "hidden file": 1}
    assert sorted(os.listdir(tmp_path)) == ["shard.tar", "shard.tar.idx"]


def test_a_sparse_file_is_left_out_and_what_follows_it_is_read(put):
    good = samples(2)
    data = tar(entries(good))
    sparse = bytearray(tar([entry("hole.txt", b"x" * 512)])[:1024])
    sparse[156:157] = b"S"
    sparse[482] = 1  # another block of the map follows the header
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse[:512])
    path = put(bytes(sparse[:512]) + bytes(512) + bytes(sparse[512:]) + data)
    assert readable(path) == good


@pytest.mark.fault("A12")
def test_names_that_are_not_utf8_are_kept_with_escapes(put):
    path = put(tar([entry("caf\udce9.txt", b"latin"), entry("new\nline.txt", b"line")], errors="surrogateescape"))
    assert readable(path) == {"caf\\xe9": {"txt": b"latin"}, "new\nline": {"txt": b"line"}}


# ---- damage inside a shard ----


@pytest.mark.fault("A4")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_bit_in_any_header_costs_that_sample_alone(put, kind):
    tar_format, name = FORMATS[kind]
    made = samples(4, name=name, size=300)
    whole = tar(entries(made), tar_format)
    rng = np.random.default_rng(0)
    for number, (place, _, _) in enumerate(headers(whole)):
        for at in (0, 134, 150, 156, 258, int(rng.integers(512))):
            found = readable(put(flip(whole, place + at, int(rng.integers(8)))))
            lost = made.keys() - found.keys()
            of = list(made)[number * len(made) // len(headers(whole))]
            assert lost == {of}, (place, at)
            assert all(found[key] == made[key] for key in found)


def test_a_damaged_header_is_told(put, caplog):
    whole = tar(entries(samples()))
    path = put(flip(whole, headers(whole)[4][0] + 3))
    with caplog.at_level(logging.WARNING):
        index = index_shard(path)
    assert index.causes == {"damaged header": 1, "incomplete sample": 1}
    assert [problem.where for problem in index.problems] == [f"byte {headers(whole)[4][0]}", "s0001"]
    assert "1 of 8 samples are incomplete" in caplog.text
    assert "damaged header" in caplog.text


@pytest.mark.fault("A1", "A2", "A3")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_anywhere_costs_what_is_cut_off(put, kind):
    tar_format, name = FORMATS[kind]
    made = samples(5, name=name, size=300)
    whole = tar(entries(made), tar_format)
    end = {}
    for place, header_kind, size in headers(whole):
        if header_kind == b"0":
            end[len(end)] = place + 512 + size
    cuts = {place + at for place, _, size in headers(whole) for at in (0, 3, 100, 511, 512, 515, 512 + size)}
    for cut in sorted(cuts - {0}):
        path = put(whole[:cut])
        if cut < 512:
            assert "wanted a tar" in refused(path)
            continue
        members = sum(place <= cut for place in end.values())
        expected = dict(list(made.items())[: members // len(SUFFIXES)])
        try:
            found = readable(path)
        except ShardError:
            found = {}
        if members <= len(SUFFIXES):  # one sample alone does not tell how many members it should have
            assert found.keys() <= expected.keys()
        else:
            assert found == expected, cut
        if found:
            assert open_index(path).causes["cut"] == 1


@pytest.mark.parametrize("damage", ["zeroed", "garbage"])
def test_lost_sectors_never_join_members_of_two_samples(put, damage):
    made = samples(10)
    whole = tar(entries(made))
    places = [place for place, _, _ in headers(whole)]
    rng = np.random.default_rng(1)
    for first in places:
        for size in (512, 1024, 4096):
            start = first - int(rng.integers(0, 3)) * 512
            start, stop = max(start, 0), min(start + size, places[-1])
            if stop <= first:
                continue
            hit = bytes(stop - start) if damage == "zeroed" else rng.bytes(stop - start)
            found = readable(put(whole[:start] + hit + whole[stop:]))
            for key, members in found.items():
                assert members.keys() <= made[key].keys()
                assert all(data.startswith(f"{key}.{suffix}|".encode()) for suffix, data in members.items())
            touched = {whole[p : p + 5].decode() for p in places if start - 1400 <= p < stop}
            assert made.keys() - found.keys() <= touched | _beside(touched)
            assert len(made) - len(found) <= 6


def _beside(keys):
    return {f"s{int(key[1:]) + by:04d}" for key in keys for by in (-1, 1)}


def test_an_archive_inside_a_lost_member_gives_no_samples(put):
    inner = tar([entry(f"s{i:04d}.{s}", b"inner") for i in range(4) for s in ("jpg", "cls")])
    made = samples(6) | {"s0002": {"jpg": content("s0002", "jpg"), "tar": inner, "txt": content("s0002", "txt")}}
    whole = tar(entries(made))
    place = whole.index(b"s0002.tar")
    for at in (0, 126, 130, 135, 258):
        for bit in range(8):
            found = readable(put(flip(whole, place + at, bit)))
            assert found == {key: members for key, members in made.items() if key != "s0002"}
    found = readable(put(whole[:place] + bytes(range(256)) * 2 + whole[place + 512 :]))  # no size can be read
    assert b"inner" not in {data for members in found.values() for data in members.values()}
    assert {"s0000", "s0001", "s0003", "s0004", "s0005"} <= found.keys() | {"s0001", "s0003"}


def test_a_lost_name_header_costs_the_member_it_named(put):
    made = samples(4) | samples(1, name="d" * 99 + "/long{}")  # one long name among short ones
    whole = tar(entries(made), tarfile.GNU_FORMAT)
    place = next(place for place, kind, _ in headers(whole) if kind == b"L")
    for damaged in (flip(whole, place + 40), whole[:place] + b"\xff" * 512 + whole[place + 512 :]):
        found = readable(put(damaged))
        assert all(found[key] == made[key] for key in found)
        assert samples(3).keys() <= found.keys()


def test_a_damaged_long_name_never_becomes_another_samples(put):
    made = samples(4, name="{:04d}" + "x" * 110, suffixes=("a", "b"))
    made["0001" + "x" * 110].pop("b")
    whole = tar(entries(made), tarfile.GNU_FORMAT)
    at = whole.index(b"0000" + b"x" * 110 + b".b") + 3  # 0000 becomes 0001, which has no b
    found = readable(put(flip(whole, at)))
    assert all(found[key] == made[key] for key in found if key != "0000" + "x" * 110)
    assert "b" not in found.get("0001" + "x" * 110, {})


@pytest.mark.fault("A23")
@pytest.mark.parametrize("size", [b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7, b"\xff" * 12, b"77777777777\0", b"xyz\0"])
def test_an_absurd_size_is_told_and_bounded(put, size):
    made = samples(6)
    whole = bytearray(tar(entries(made)))
    place = headers(bytes(whole))[4][0]  # s0001.json
    whole[place + 124 : place + 136] = size.ljust(12, b"\0")
    whole[place + 148 : place + 156] = b" " * 8
    whole[place + 148 : place + 156] = b"%06o\0 " % sum(whole[place : place + 512])
    path = put(bytes(whole))
    found = readable(path)
    assert found.keys() == (made.keys() - {"s0001"} if size != b"77777777777\0" else {"s0000"})  # 8 GB: as if cut
    assert {"absurd size", "cut"} & open_index(path).causes.keys()


def test_joined_tars_never_share_a_sample(put):
    one, two = samples(3), samples(3, suffixes=("cls",))
    found = readable(put(tar(entries(one)) + tar(entries(two | samples(2, name="t{}")))))
    assert found == samples(2, name="t{}")


# ---- whole shards ----


@pytest.mark.fault("A6", "A7")
def test_what_is_no_tar_is_refused_with_what_came(put):
    assert "is empty (0 bytes); download" in refused(put(b""))
    page = refused(put(b"<!DOCTYPE html><html>Not found</html>" * 90))
    assert "wanted a tar" in page and "<!DOCTYPE html>" in page and "web page" in page
    assert "unpack it to a plain .tar" in refused(put(b"\x1f\x8b\x08" + bytes(2000)))
    assert "only zero bytes" in refused(put(bytes(10240)))
    assert "holds no sample (no suffix: 1)" in refused(put(tar([entry("README", b"x")])))


@pytest.mark.fault("A10")
def test_a_name_that_occurs_twice_is_refused(put):
    made = entries(samples(2))
    assert "1 file names occur twice (s0000.jpg)" in refused(put(tar([*made, made[0]])))
    assert "(a.JPG)" in refused(put(tar([entry("a.jpg", b"1"), entry("a.JPG", b"2")])))


@pytest.mark.fault("A15")
def test_all_bad_shards_are_told_at_once(put, tmp_path):
    put(tar(entries(samples(2))), "good.tar")
    put(b"", "empty.tar")
    put(b"<html>", "page.tar")
    names = [tmp_path / name for name in ("good.tar", "empty.tar", "page.tar", "missing.tar")]
    with pytest.raises(ShardError, match="3 shards cannot be used") as caught:
        open_shards(names)
    assert [os.path.basename(shard) for shard, _ in caught.value.problems] == ["empty.tar", "page.tar", "missing.tar"]
    assert "No such file" in str(caught.value)


# ---- the index file ----


def test_an_index_is_written_once_and_read_back(put):
    made = samples()
    path = put(tar(entries(made)))
    index = open_index(path)
    written = index.where.stat().st_mtime_ns
    again = open_index(path)
    assert again.where.stat().st_mtime_ns == written and again.digest == index.digest
    assert [again.key(i) for i in range(len(again))] == list(made)
    assert [m.suffix for m in again.members(3)] == list(SUFFIXES)
    with pytest.raises(ShardError, match=r"no index; make one with `mmpre data index`"):
        path.with_name("shard.tar.idx").unlink()
        open_index(path, build=False)


@pytest.mark.fault("A21")
def test_a_damaged_half_written_foreign_or_old_index_is_built_again(put, caplog):
    path = put(tar(entries(samples())))
    whole = open_index(path).where.read_bytes()
    older = whole[:8] + b"\x63" + whole[9:]
    bad = [whole[:40], whole[:-7], flip(whole, 300), flip(whole, len(whole) - 3), b"something else" * 30, older, b""]
    for content_of_index in bad:
        path.with_name("shard.tar.idx").write_bytes(content_of_index)
        caplog.clear()
        assert readable_keys(path) == list(samples())
        assert "it is built again" in caplog.text
        assert path.with_name("shard.tar.idx").read_bytes() == whole


def readable_keys(path):
    index = open_index(path)
    return [index.key(i) for i in range(len(index))]


@pytest.mark.fault("A21")
def test_every_flipped_byte_of_an_index_is_noticed(put, caplog):
    path = put(tar(entries(samples(1))))
    where = open_index(path).where
    whole = where.read_bytes()
    for place in range(len(whole)):
        where.write_bytes(flip(whole, place, place % 8))
        caplog.clear()
        open_index(path)
        assert "it is built again" in caplog.text, place


def test_an_index_that_points_outside_its_shard_is_not_believed(put):
    from mmpre.data import shard_index

    index = open_index(put(tar(entries(samples()))))
    data = index.data.copy()
    data[208:216] = np.frombuffer((1 << 40).to_bytes(8, "little"), np.uint8)  # the first member's place
    data[shard_index._OWN] = np.frombuffer(shard_index._own_digest(data), np.uint8)
    with pytest.raises(shard_index.StaleIndexError, match="points outside its shard"):
        shard_index.ShardIndex(index.path, data, None)


def test_a_grown_or_replaced_shard_is_indexed_anew_and_a_damaged_one_is_not(put, caplog):
    path = put(tar(entries(samples(8))))
    digest = open_index(path).digest
    time = path.stat().st_mtime_ns
    path.write_bytes(tar(entries(samples(9))))
    assert len(open_index(path)) == 9 and "was made of" in caplog.text
    path.write_bytes(tar(entries(samples(9, name="t{:04d}"))))
    os.utime(path, ns=(time, time))
    assert readable_keys(path)[0] == "t0000" and "was replaced since" in caplog.text
    path.write_bytes(whole := tar(entries(samples(8))))
    assert open_index(path).digest == digest
    path.write_bytes(flip(whole, 520))  # a flipped bit of a member must be met as damage, not as new data
    assert open_index(path).digest == digest and "is damaged: 1 of" in caplog.text


@pytest.mark.fault("H2")
def test_an_index_goes_to_a_folder_where_it_cannot_stand_beside_the_shard(put, tmp_path, monkeypatch):
    path = put(tar(entries(samples())))
    path.with_name("shard.tar.idx").mkdir()  # for root no folder is read-only; this cannot be replaced by anyone
    index = open_index(path, folder=tmp_path / "kept")
    assert index.where.parent == tmp_path / "kept" and open_index(path, folder=tmp_path / "kept").where == index.where
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_index(path).where.parent == tmp_path / "cache" / "mmpre"
    (tmp_path / "file").write_bytes(b"")
    in_memory = open_index(path, folder=tmp_path / "file")
    assert in_memory.where is None and readable_keys(path) == list(samples())
    assert pickle.loads(pickle.dumps(in_memory)).key(2) == "s0002"


@pytest.mark.fault("A20")
def test_shards_of_one_name_share_no_index(tmp_path):
    for folder, name in (("a", "s{}"), ("b", "t{}")):
        (tmp_path / folder / "x.tar.idx").mkdir(parents=True)
        (tmp_path / folder / "x.tar").write_bytes(tar(entries(samples(name=name))))
    shards = open_shards([tmp_path / "a", tmp_path / "b" / "x.tar"], folder=tmp_path / "kept")
    assert (shards.key(0), shards.key(8)) == ("s0", "t0")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_an_open_index_holds_no_file_and_is_small(put):
    path = put(tar(entries(samples(300))))
    where = open_index(path).where
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    held = [open_index(path) for _ in range(50)]
    assert before == 0 or len(os.listdir("/proc/self/fd")) == before
    keys = sum(len(held[0].key(i)) for i in range(300))
    assert where.stat().st_size - keys < 64 * 900


# ---- lists of shards ----


def test_samples_are_numbered_through_the_shards_in_order(tmp_path):
    sizes = [1, 7, 50, 3]
    for i, count in enumerate(sizes):
        (tmp_path / f"p-{i}.tar").write_bytes(tar(entries(samples(count, name=f"k{i}-{{:03d}}", suffixes=("t",)))))
    shards = open_shards(tmp_path)
    expected = [f"k{i}-{j:03d}" for i, count in enumerate(sizes) for j in range(count)]
    assert [shards.key(i) for i in range(len(shards))] == expected
    for i in range(len(shards)):
        index, local = shards.locate(i)
        assert shards.number(shards.place(i), local) == i and shards.identity(i) == (index.digest, expected[i])
    for outside in (-1, len(shards)):
        with pytest.raises(IndexError, match=f"hold 61 samples, asked for number {outside}"):
            shards.key(outside)
    assert shards.shares()["p-2.tar"] == pytest.approx(50 / 61)
    assert pickle.loads(pickle.dumps(shards)).key(8) == expected[8]


def test_the_fingerprint_follows_content_and_order_and_no_path(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"{folder}{i}.tar").write_bytes(tar(entries(samples(2, name=f"k{i}{{}}"))))
    one, moved = open_shards(tmp_path / "a"), open_shards(tmp_path / "b")
    assert one.fingerprint == moved.fingerprint
    turned = open_shards([index.path for index in reversed(one.indexes)])
    assert one.fingerprint != turned.fingerprint != open_shards([one.indexes[0].path]).fingerprint


def test_paths_folders_globs_and_braces_name_shards(tmp_path):
    names = [f"a-{i:03d}.tar" for i in range(12)] + ["b.tar"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a-000.tar.idx").write_bytes(b"")
    (tmp_path / ".hidden.tar").write_bytes(b"")

    def found(*urls):
        return [path.name for path in expand_shards([str(tmp_path / url) for url in urls])]

    assert found("") == names
    assert found("a-*") == names[:12]
    assert found("a-{008..011}.tar", "b.tar") == names[8:]
    assert found("{b,a-000}.tar") == ["b.tar", "a-000.tar"]
    assert [path.name for path in expand_shards([(tmp_path / "b.tar").as_uri()])] == ["b.tar"]
    with pytest.raises(ShardError, match=r"c-\*: matches no file"):
        found("c-*")
    with pytest.raises(ShardError, match="is given 2 times"):
        found("", "b.tar")
    with pytest.raises(ShardError, match=r"holds no \*.tar file"):
        (tmp_path / "none").mkdir()
        found("none")


@pytest.mark.fault("G1")
def test_urls_that_run_code_are_refused(tmp_path):
    with pytest.raises(ShardError, match="would run its text as a shell command"):
        open_shards([f"pipe:touch {tmp_path / 'marker'}"])
    assert not (tmp_path / "marker").exists()


def test_no_shards_are_refused():
    with pytest.raises(ShardError, match="none were given"):
        open_shards([])


def test_a_folder_without_shards_is_told_where_they_are_or_how_they_are_made(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(ShardError, match=r"holds no \*\.tar file; `mmpre data pack` makes shards of files"):
        open_shards([tmp_path])
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.tar").touch()
    with pytest.raises(ShardError, match=r"holds no \*\.tar file; give one of its folders train, valid"):
        open_shards([tmp_path])
