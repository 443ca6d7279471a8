"""Recipe arguments, records of runs and the command line: what is wrong is told, all together, before any work."""

import json
import logging
import random

import pytest
from faults.mutants import of_json
from test_cli import run as command
from test_run import TONES, melodies, shards  # noqa: F401  (a fixture)

import mmpre
from mmpre.plugins import PluginError, find_recipe
from mmpre.runs.options import RunOptions
from mmpre.runs.record import read_record
from mmpre.runs.record_check import RunError
from mmpre.values import problems


@pytest.fixture(scope="module")
def finished(melodies, tmp_path_factory):  # noqa: F811
    """A short run of a recipe file."""
    out = tmp_path_factory.mktemp("finished") / "run"
    options = RunOptions(workers=0, exact=True)
    return mmpre.train(TONES, out=out, data=shards(melodies, "train"), steps=6, options=options)


@pytest.mark.fault("C1", "C5")
def test_all_that_is_wrong_with_a_recipe_is_told_together_with_the_nearest_names():
    with pytest.raises(PluginError) as caught:
        find_recipe("bert").numbers("tiny", {"lerning_rate": 1, "widht": 5, "lr": float("nan"), "heads": 2.5})
    told = str(caught.value)
    assert told.startswith("recipe bert: there is no number 'lerning_rate'")
    for part in (
        "'widht'; did you mean 'width'?",
        "lr must be finite, got nan",
        "heads must be a whole number, got 2.5",
    ):
        assert part in told, told


@pytest.mark.fault("C2", "C5")
@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (float, "1e-4", "x must be a number, got the text '1e-4'; write it as a number, not as a text"),
        (int, "12", "x must be a whole number, got the text '12'; write it as a number, not as a text"),
        (float, float("-inf"), "x must be finite, got -inf"),
        (int, 1 << 80, f"x must be between -2^53 and 2^53, got {1 << 80}"),
        pytest.param(int, 10**5000, "x must be between -2^53 and 2^53, got a number of thousands of digits", id="huge"),
        (int, True, "x must be a whole number, got True"),
        (bool, 1, "x must be true or false, got 1"),
        (float | None, "a", "x must be a number or nothing (None), got the text 'a'"),
        (
            tuple[str, ...],
            "a.tar",
            "x must be a list, each a text, got the text 'a.tar'; for a single one give ('a.tar',)",
        ),
        (tuple[float, float], [0.9], "x must be a list, each a number, got the list [0.9]"),
        (str, {"a": 1}, "x must be a text, got an object {'a': 1}"),
    ],
)
def test_a_value_of_another_type_or_range_says_what_was_wanted(kind, value, told):
    assert problems({"x": value}, {"x": kind}) == [told]


def test_values_of_their_types_pass():
    good = {
        "a": (float, 1),
        "b": (int | None, None),
        "c": (tuple[str, ...], ["x"]),
        "d": (tuple[float, float], (0.9, 1)),
    }
    assert problems({k: v for k, (_, v) in good.items()}, {k: t for k, (t, _) in good.items()}) == []


@pytest.mark.fault("C5")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--lr", "nan", "--hang-seconds", "-1"],
            "lr must be finite, got nan; RunOptions: hang_seconds must not be neg",
        ),
        (["--steps", "99999999999999999999"], "steps must be between -2^53 and 2^53"),
        (["--steps", "4000000000000000"], "steps x batch must stay below 2^62 rows"),
        (
            ["--width", "-4"],
            "recipe bert cannot be built with these numbers: RuntimeError: Trying to create tensor with neg",
        ),
        (["--width", "99999999"], "can't allocate memory"),
        (["--heads", "0"], "width must be a multiple of heads, got width 128 and 0 heads"),
        (["--batch", "-5"], "batch must be at least 1, got -5"),
        (["--lr", "-1"], "lr must be above 0 and below 100, got -1.0"),
        (["--lr", "abc"], "could not convert string to float: 'abc'"),
        (["--steps", "1e3"], "invalid literal for int()"),
        (["--data", "x" * 5000], "File name too long"),
        (["--data", ""], "is no path; give a file, a folder or a pattern"),
        (["--data", "{0..99999999}.tar"], "must rise and name at most 1000000 shards"),
    ],
)
def test_numbers_that_cannot_work_end_with_a_message(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    batch = ["--batch", "2048"] if "4000000000000000" in words else []
    code, out, err = command(
        capsys, "train", "bert", "--scale", "tiny", "--data", "d.tar", "--out", "run", *batch, *words
    )
    assert code == 2 and "Traceback" not in out + err
    assert message in err.replace("\n", " ") + out, err
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.fault("C9")
def test_what_differs_from_the_run_is_told_field_by_field_with_a_verdict(finished, melodies):  # noqa: F811
    with pytest.raises(RunError) as caught:
        mmpre.train(TONES, out=finished, data=shards(melodies, "train"), steps=6, width=64,
                    options=RunOptions(workers=2, exact=True, seed=3))  # fmt: skip
    told = str(caught.value)
    assert "already holds a run; continue it with `mmpre resume" in told
    assert "width: 32 there, 64 here (changes what is trained)" in told
    assert "seed: 0 there, 3 here (the data's order, masks and weights)" in told
    assert "workers: 0 there, 2 here (harmless: resume takes it)" in told
    with pytest.raises(RunError) as caught:
        mmpre.resume(finished, width=64, seed=3, wokers=1, workers=0)
    told = str(caught.value)
    assert "width is a number of the recipe and changes what is trained" in told
    assert "seed would change the results" in told
    assert "there is no option 'wokers'; did you mean 'workers'?" in told
    with pytest.raises(RunError, match=r"data must be a list, each a text, got the text 'a.tar'; for a single one"):
        mmpre.resume(finished, data="a.tar")


@pytest.mark.fault("A14")
def test_a_changed_list_of_shards_is_refused_with_what_differs(finished, melodies, tmp_path):  # noqa: F811
    paths = shards(melodies, "train")
    with pytest.raises(RunError, match=rf"; missing: {paths[0].rpartition('/')[2]}\. Shards may move"):
        mmpre.resume(finished, data=paths[1:])
    with pytest.raises(RunError, match="the same shards in another order"):
        mmpre.resume(finished, data=paths[::-1])
    valid = shards(melodies, "valid")
    with pytest.raises(RunError, match=rf"; new: {valid[0].rpartition('/')[2]}\."):
        mmpre.resume(finished, data=[*paths, *valid])


@pytest.mark.fault("C12")
def test_an_output_folder_that_cannot_be_used_is_refused_before_any_work(melodies, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written \(Not a directory\); give another folder by --out"):
        mmpre.train(TONES, out=tmp_path / "file" / "run", data=shards(melodies, "train"))
    with pytest.raises(RunError, match=r"is the folder of the shards .*; give the run a folder of its own"):
        mmpre.train(TONES, out=melodies, data=shards(melodies, "train"))
    named = [f"some@1={url}" for url in shards(melodies, "train")]
    with pytest.raises(RunError, match=r"is the folder of the shards .*; give the run a folder of its own"):
        mmpre.train(TONES, out=melodies, data=named)
    assert not (melodies / "run.json").exists()


@pytest.fixture
def edited(finished, tmp_path):
    """A copy of the run's record with some change; returns its folder."""

    def edit(change):
        record = json.loads((finished / "run.json").read_text())
        change(record)
        (tmp_path / "run.json").write_text(json.dumps(record))
        (tmp_path / "recipe.py").write_bytes((finished / "recipe.py").read_bytes())
        return tmp_path

    return edit


@pytest.mark.fault("C2", "C5")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=7), "has format 7, this version of mmpre reads format 1; use the version that"),
        (lambda r: r.update(numbers=[]), "numbers must be an object, got list"),
        (lambda r: r["options"].update(sed=1), "options.sed is none; did you mean 'seed'?"),
        (
            lambda r: r["options"].update(seed="1", keep=0.5),
            "seed must be a whole number, got the text '1'; write it as a",
        ),
        (lambda r: r["numbers"].update(lr="1e-4"), "lr must be a number, got the text '1e-4'"),
        (lambda r: r["numbers"].update(widht=4), "there is no number 'widht'; did you mean 'width'?"),
        (lambda r: r["data"][0].pop("fingerprint"), "data must say fingerprint, samples and units"),
        (
            lambda r: r["data"].append(r["data"][0]),
            "has 1 stages now, it had 2; go on with the recipe as it was, or",
        ),
        (lambda r: r.update(files={"lr": "files/lr/../../x"}), "files must name copies in the run's folder"),
        (lambda r: r["recipe"].update(name=5), "recipe.name must be a plain name, got 5"),
    ],
)
def test_a_record_that_was_edited_is_refused_with_what_is_wrong(edited, change, message):
    with pytest.raises(ValueError) as caught:
        mmpre.resume(edited(change))
    assert message in str(caught.value), caught.value


@pytest.mark.fault("C3", "C6")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "run.json: line 1, column 1"),
        (b"[]", "must hold an object, got list"),
        (b'{"format": 1, "format": 1}', "key 'format' stands twice in one object"),
        (b"[" * 100_000, "is nested more than 100 deep"),
        (b'{"a": "' + b"x" * (9 << 20) + b'"}', "is longer than 8,388,608 bytes"),
        (b'{"format": NaN}', "NaN is no JSON number"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_record_that_is_no_json_of_ours_names_its_file_and_the_way_out(tmp_path, text, message):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(RunError) as caught:
        read_record(tmp_path)
    assert str(tmp_path) in str(caught.value) and message in str(caught.value)
    assert "put back a copy of it" in str(caught.value)


@pytest.mark.fault("G9")
def test_log_lines_cannot_speak_to_the_terminal(caplog):
    from mmpre.command_line.cli import _Printable

    record = logging.LogRecord("mmpre", logging.WARNING, "", 0, "%s is odd", ("a\x1b[2J\x07\u202e.tar",), None)
    assert _Printable().format(record) == r"a\x1b[2J\x07\u202e.tar is odd"


@pytest.mark.fault("C7")
def test_random_changes_of_a_record_give_named_errors_alone(finished, tmp_path):
    record = json.loads((finished / "run.json").read_text())
    (tmp_path / "recipe.py").write_bytes((finished / "recipe.py").read_bytes())
    dice, refused = random.Random(0), 0
    for _ in range(400):
        (tmp_path / "run.json").write_bytes(of_json(record, dice))
        try:
            mmpre.load(tmp_path)
        except ValueError as e:
            refused += 1
            assert type(e).__module__.startswith("mmpre."), repr(e)
            assert str(tmp_path) in str(e) or str(e).startswith("recipe tones: "), e
    assert refused > 250
