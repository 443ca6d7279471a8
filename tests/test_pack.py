"""Shards from a user's own files."""

import errno
import json
import os
import tarfile

import pytest

from mmpre.command_line.cli import main
from mmpre.data.audio import Audio
from mmpre.data.codes import WithCodes
from mmpre.data.index import open_shards
from mmpre.data.naming import READ, cut_name
from mmpre.data.pack import PackError, pack_files
from mmpre.data.shard_writer import ShardSink
from mmpre.data.shards import ShardReader
from mmpre.data.video import Video
from mmpre.labels import Numbered
from mmpre.modalities.code_graph import CodeReader
from mmpre.modalities.dna import Bases, DnaReader
from mmpre.modalities.image_patches import ImageReader
from mmpre.modalities.regions import RegionReader
from mmpre.modalities.text import Questions, TextReader


def content(folder):
    shards = open_shards(folder)
    reader = ShardReader(shards)
    return {shards.key(i): reader.read(i) for i in range(len(shards))}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for i in range(4):
        (folder / "sub" / f"p{i}.PNG").write_bytes(b"png%d" % i)
    return folder


def rows(folder):
    return [{"path": f"sub/p{i}.PNG", "words": f"picture {i}", "who": f"w{i % 2}"} for i in range(4)]


def files(folder, *names):
    """Small files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def csv(folder):
    text = "path,words,who\n" + "".join(f"{r['path']},{r['words']},{r['who']}\n" for r in rows(folder))
    (folder / "t.csv").write_text(text)
    return folder / "t.csv"


def jsonl(folder):
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(folder)))
    return folder / "t.jsonl"


def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows(folder)), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("make", [csv, jsonl, parquet])
def test_tables_with_paths_and_texts_become_pairs(pictures, tmp_path, make):
    out = pack_files(make(pictures), tmp_path / "out", pair=("image=path", "text=words"))
    found = content(out)
    assert found["000000002"] == {"png": b"png2", "txt": b"picture 2"}
    assert len(found) == 4


def test_files_of_one_name_in_a_folder_are_one_sample(pictures, tmp_path):
    (pictures / "sub" / "p1.txt").write_text("one")
    (pictures / ".hidden").write_text("x")
    found = content(pack_files(pictures, tmp_path / "out"))
    assert found["sub/p1"] == {"png": b"png1", "txt": b"one"}
    assert len(found) == 4


def test_the_same_source_gives_the_same_bytes_and_plain_tars(pictures, tmp_path):
    one, two = (pack_files(csv(pictures), tmp_path / name, pair=("text=words",)) for name in "ab")
    assert [p.read_bytes() for p in sorted(one.glob("*.tar"))] == [p.read_bytes() for p in sorted(two.glob("*.tar"))]
    with tarfile.open(next(one.glob("*.tar"))) as tar:
        assert tar.getnames()[0] == "000000000.txt"


def test_a_split_keeps_what_belongs_together_together(tmp_path):
    table = tmp_path / "source" / "t.jsonl"
    table.parent.mkdir()
    table.write_text("".join(json.dumps({"words": f"text {i}", "who": f"w{i % 60}"}) + "\n" for i in range(300)))
    out = pack_files(table, tmp_path / "out", pair=("text=words",), split="who")
    groups = {}
    for split in ("train", "valid", "test"):
        for sample in content(out / split).values():
            groups.setdefault(int(sample["txt"].split()[1]) % 60, set()).add(split)
    assert all(len(splits) == 1 for splits in groups.values())
    assert len(content(out / "train")) > 180


def test_problems_are_told_together_and_can_be_left_out(pictures, tmp_path):
    text = "path,words\nsub/p0.PNG,a\nsub/gone.png,b\n../../etc/passwd,c\nsub/p1.PNG,\n"
    (pictures / "bad.csv").write_text(text)
    pairs = ("image=path", "text=words")
    with pytest.raises(PackError) as told:
        pack_files(pictures / "bad.csv", tmp_path / "out", pair=pairs)
    assert "3 problems" in str(told.value)
    assert "row 2: there is no file sub/gone.png" in str(told.value)
    assert "row 3: ../../etc/passwd lies outside of the table's folder, at /" in str(told.value)
    assert "; put the table into a folder above them, with paths from there" in str(told.value)
    assert "row 4: column words is empty" in str(told.value)
    assert not (tmp_path / "out").exists()
    assert len(content(pack_files(pictures / "bad.csv", tmp_path / "out", pair=pairs, skip=True))) == 1


@pytest.mark.parametrize(
    ("source", "pair", "message"),
    [
        ("t.csv", ("image=pth",), "no column pth; it has path, words, who"),
        ("t.csv", (), "say which columns to take, such as --pair image=path text=caption"),
        ("t.csv", ("image",), "wanted member=column, such as image=path"),
        (
            "t.csv",
            ("text=who", "caption=words"),
            "two columns would become the member txt; give each a name of its own",
        ),
        ("gone.csv", ("text=words",), "there is no such folder or file"),
        ("sub/p0.PNG", ("text=words",), "wanted a folder, .csv, .tsv, .jsonl or .parquet, got .png"),
    ],
)
def test_a_wrong_request_says_what_was_wanted(pictures, tmp_path, source, pair, message):
    csv(pictures)
    with pytest.raises(PackError, match=message):
        pack_files(pictures / source, tmp_path / "out", pair=pair)


def test_two_columns_do_not_become_one_member_in_silence(pictures, tmp_path):
    (pictures / "two.csv").write_text("a,b\nsub/p0.PNG,sub/p1.PNG\n")
    with pytest.raises(PackError, match=r"row 1: sub/p1\.PNG cannot be taken: another column gives .png too"):
        pack_files(pictures / "two.csv", tmp_path / "out", pair=("image=a", "file=b"))
    (pictures / "note.txt").write_text("said")
    (pictures / "texts.csv").write_text("a,b\nnote.txt,words\n")
    with pytest.raises(PackError, match=r"row 1: column b cannot be taken: another gives \.txt too"):
        pack_files(pictures / "texts.csv", tmp_path / "out", pair=("file=a", "text=b"))
    (pictures / "bare").write_bytes(b"x")
    (pictures / "bare.csv").write_text("a\nbare\n")
    with pytest.raises(PackError, match="row 1: bare cannot be taken: its name has no suffix"):
        pack_files(pictures / "bare.csv", tmp_path / "out", pair=("file=a",))


def test_an_out_folder_with_something_in_it_or_inside_the_source_is_refused(pictures, tmp_path, capsys):
    with pytest.raises(PackError, match="is there already and not empty; name a new folder"):
        pack_files(pictures, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", str(pictures), "--out", str(pictures / "out")])
    assert ended.value.code == 2
    assert "lies inside of the source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "stem", "suffix"),
    [
        ("GCF_0000.40_x_genomic.fna", "GCF_0000.40_x_genomic", "fna"),
        ("GCF_0000.40_x.FA.gz", "GCF_0000.40_x", "fa.gz"),
        ("photo.final.JPG", "photo.final", "jpg"),
        ("a.1.regions.safetensors", "a.1", "regions.safetensors"),
        ("a.question.txt", "a", "question.txt"),
        ("question.txt", "question", "txt"),
        ("a.b.m4a", "a.b", "m4a"),
        ("a..wav", "a.", "wav"),
        ("a.", "a", ""),
        ("a", "a", ""),
    ],
)
def test_a_name_ends_before_the_longest_suffix_that_is_read(name, stem, suffix):
    assert cut_name(name) == (stem, suffix)


def test_the_suffixes_that_are_kept_whole_are_those_of_the_readers():
    regions, text = RegionReader(4), TextReader()
    asked = Questions(text, Numbered(count=2, suffixes=("answer.json",)), share=0.5)
    readers = (Audio(), Video(), DnaReader(Bases()), ImageReader(8), CodeReader(), regions, text, asked, asked.label)
    assert set().union(*(reader.suffixes for reader in readers), [WithCodes(regions, codes=2).suffix]) <= READ


def test_dots_in_a_files_name_stay_in_its_key_as_something_safe(tmp_path, capsys):
    names = ("GCF_0000.40_x_genomic.fna", "a.2024-01.wav", "a.2024-02.wav", "p.final.JPG", "p.final.question.txt")
    found = content(pack_files(files(tmp_path / "source", *names), tmp_path / "out"))
    assert {key: set(members) for key, members in found.items()} == {
        "GCF_0000_40_x_genomic": {"fna"}, "a_2024-01": {"wav"}, "a_2024-02": {"wav"},
        "p_final": {"jpg", "question.txt"},
    }  # fmt: skip
    assert "no reader" not in capsys.readouterr().err


def test_paths_in_a_table_are_cut_alike(tmp_path):
    source = files(tmp_path / "source", "p.final.JPG", "p.x.regions.safetensors", "p.seg.png")
    (source / "t.csv").write_text("image,boxes,seg\np.final.JPG,p.x.regions.safetensors,p.seg.png\n")
    out = pack_files(source / "t.csv", tmp_path / "out", pair=("image=image", "regions=boxes", "seg=seg"))
    assert set(content(out)["000000000"]) == {"jpg", "regions.safetensors", "seg.png"}


def test_names_that_would_share_a_key_are_told_and_never_joined(tmp_path):
    source = files(tmp_path / "source", "a.b.png", "a_b.txt", "a_b.png", "c.png")
    with pytest.raises(
        PackError, match=r"2 problems .*\n.*a_b\.png: its key would be 'a_b', which a\.b has too; rename"
    ):
        pack_files(source, tmp_path / "out")
    assert content(pack_files(source, tmp_path / "out", skip=True)) == {
        "a_b": {"png": b"a.b.png"},
        "c": {"png": b"c.png"},
    }
    (source / "t.jsonl").write_text('{"k": "a.b", "t": "one"}\n{"k": "a b", "t": "two"}\n')
    with pytest.raises(PackError, match=r"key 'a_b' is given more than once \(dots and blanks count as _\)"):
        pack_files(source / "t.jsonl", tmp_path / "table", pair=("text=t",), key="k")


def test_members_that_no_reader_looks_for_are_told_once_with_the_way_out(tmp_path, capsys):
    source = files(tmp_path / "source", "a.m4a", "b.m4a", "c.faa", "d.fna")
    pack_files(source, tmp_path / "out")
    told = capsys.readouterr().err
    assert (
        "3 members have a suffix that no reader of mmpre looks for (.m4a 2, .faa 1); convert them (.png, .flac" in told
    )
    assert "--pair" not in told
    (source / "t.csv").write_text("path\nd.fna\n")
    pack_files(source / "t.csv", tmp_path / "table", pair=("genome=path",))
    told = capsys.readouterr().err
    assert "(.genome.fna 1); convert" in told and "; --pair file=COLUMN keeps a file's own suffix" in told
    pack_files(source / "t.csv", tmp_path / "own", pair=("file=path",))
    assert "no reader" not in capsys.readouterr().err


def test_keys_that_begin_as_webdatasets_own_are_made_safe(tmp_path):
    names = ("__init__.py", "__pycache__/a.cpython-311.txt", "a._b.wav", "c..wav", "sub/__init__.py")
    found = content(pack_files(files(tmp_path / "source", *names), tmp_path / "out"))
    assert set(found) == {"_init__", "_pycache__/a_cpython-311", "a__b", "c_", "sub/__init__"}
    table = tmp_path / "source" / "t.jsonl"
    table.write_text('{"k": "../x", "t": "one"}\n')
    assert set(content(pack_files(table, tmp_path / "table", pair=("text=t",), key="k"))) == {"_/x"}


def test_suffixes_that_no_shard_can_hold_are_problems_that_skip_leaves_out(tmp_path):
    source = files(tmp_path / "source", "a._b", "b.t\x01t", "c.txt")
    with pytest.raises(PackError) as told:
        pack_files(source, tmp_path / "out")
    assert "2 problems (mend them, or leave them out with --skip)" in str(told.value)
    assert "a._b: its suffix '_b' would not be read back from a shard; rename it" in str(told.value)
    assert "its suffix 't\\x01t' would" in str(told.value)
    assert set(content(pack_files(source, tmp_path / "out", skip=True))) == {"c"}
    (source / "t.csv").write_text("path\na._b\n")
    with pytest.raises(PackError, match=r"row 1: a\._b cannot be taken: its suffix '_b' would not be read back"):
        pack_files(source / "t.csv", tmp_path / "table", pair=("file=path",))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pair": ("image=path",)}, r"a folder has no columns, got --pair; leave that out \(files of one name are one"),
        ({"pair": ("image=path",), "key": "id"}, "a folder has no columns, got --pair and --key; leave that out"),
        (
            {"split": "album"},
            r"wanted --split key for a folder \(the name of a file decides\), got --split album; give",
        ),
    ],
)
def test_what_only_a_table_has_is_refused_for_a_folder(pictures, tmp_path, asked, message):
    with pytest.raises(PackError, match=message):
        pack_files(pictures, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_samples_of_different_members_are_told_with_the_way_out(tmp_path, capsys):
    halves = [f"{folder}/{i}.{kind}" for folder, kind in (("images", "jpg"), ("captions", "txt")) for i in range(3)]
    pack_files(files(tmp_path / "halves", *halves), tmp_path / "out")
    told = capsys.readouterr().err
    assert (
        "samples have different members (3 have .txt, 3 have .jpg); one without what a reader wants is a hole" in told
    )
    assert "side by side in one folder under one name, or name them in a row of a table" in told
    pack_files(files(tmp_path / "alike", "a.jpg", "a.txt", "b.PNG", "b.txt"), tmp_path / "whole")
    assert "different members" not in capsys.readouterr().err


def test_a_split_that_leaves_a_part_empty_is_told(tmp_path, capsys):
    out = pack_files(files(tmp_path / "one", "genome.fna"), tmp_path / "out", split="key")
    told = capsys.readouterr().err
    assert "--split key left nothing for valid and test (different values: 1); pack more files (a long one" in told
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["train"]
    pack_files(files(tmp_path / "many", *(f"{i}.fna" for i in range(60))), tmp_path / "all", split="key")
    pack_files(tmp_path / "one", tmp_path / "unsplit")
    assert "left nothing" not in capsys.readouterr().err


def test_a_link_out_of_the_tables_folder_is_told_with_where_it_leads(tmp_path):
    files(tmp_path, "elsewhere/a.png")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "source" / "t.csv").write_text("path\na.png\n")
    message = rf"a\.png lies outside of the table's folder, at {tmp_path}/elsewhere/a\.png; put the table into a folder"
    with pytest.raises(PackError, match=message):
        pack_files(tmp_path / "source" / "t.csv", tmp_path / "out", pair=("image=path",))
    (tmp_path / "t.csv").write_text(f"path\nsource/a.png\n{tmp_path}/elsewhere/a.png\n")
    assert len(content(pack_files(tmp_path / "t.csv", tmp_path / "out", pair=("image=path",)))) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")])
def test_a_broken_pack_leaves_nothing_and_does_not_stop_the_next(pictures, tmp_path, monkeypatch, error):
    def fails(self, sample):
        files(self.folder, "half.tar")
        raise error

    with monkeypatch.context() as broken, pytest.raises(type(error)):
        broken.setattr(ShardSink, "write", fails)
        pack_files(pictures, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [pictures]
    (tmp_path / "out").mkdir()
    assert len(content(pack_files(pictures, tmp_path / "out"))) == 4
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", pictures]


def test_an_out_that_cannot_be_replaced_is_refused_before_any_work(pictures, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (pictures / "bare").write_bytes(b"a problem that reading the source would find")
    with pytest.raises(PackError, match=r"--out .*link is a link, which no folder can replace; name the place that it"):
        pack_files(pictures, tmp_path / "link")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    with pytest.raises(
        PackError, match=r"--out .*disk is a mount, which no folder can replace; name a new folder in it"
    ):
        pack_files(pictures, tmp_path / "disk")
    assert not list((tmp_path / "disk").iterdir())
