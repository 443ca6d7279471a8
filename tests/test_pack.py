"""Shards from a user's own files."""

import json
import tarfile

import pytest

from mmpre.command_line.cli import main
from mmpre.data.index import open_shards
from mmpre.data.pack import PackError, pack_files
from mmpre.data.shards import ShardReader


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
    assert "row 3: ../../etc/passwd lies outside of the table's folder" in str(told.value)
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
    with pytest.raises(PackError, match="exists and is not empty"):
        pack_files(pictures, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", str(pictures), "--out", str(pictures / "out")])
    assert ended.value.code == 2
    assert "lies inside of the source" in capsys.readouterr().err
