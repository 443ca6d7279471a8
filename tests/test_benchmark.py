"""Benchmarks: contenders do the same work, ratios are what they say, and what is missing is told."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import run as command_line

import mmpre.benchmark
from mmpre.benchmark import BenchmarkError, Comparison, Settings, Turn, run
from mmpre.data.shards import shard_writer
from mmpre.recipes.benchmarks import bert, texts
from mmpre.recipes.benchmarks.harness import quantiles, take_turns, timed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A data set of 200 texts of 3 to 60 words."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    with shard_writer(folder / "train") as sink:
        for i in range(200):
            words = rng.integers(0, 90, size=rng.integers(3, 60))
            sink.write({"__key__": f"t{i:03d}", "txt": " ".join(f"w{word}" for word in words)})
    return folder


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    tokenizer = texts.tokenizer_of(corpus, 150, tmp_path_factory.mktemp("tokenizer"))
    return dict(
        data=str(corpus / "train"), tokenizer=str(tokenizer), width=32, depth=1, length=40, batch=4, steps=3, warmup=1
    )


def comparison(ours, theirs, **more):
    turns = {name: [Turn(amount, s, 1_000_000) for amount, s in some] for name, some in (("a", ours), ("b", theirs))}
    return Comparison(title="a and b", unit="rows", turns=turns, **more)


def test_ratios_are_taken_round_by_round_and_their_median_and_spread_told():
    made = comparison(ours=[(100, 1), (100, 2), (300, 1)], theirs=[(50, 1), (100, 8), (100, 1)])
    assert made.ratios("b") == [2, 4, 3]
    told = made.summary()["contenders"]
    assert told["b"]["ours_is_faster_by"] == {"median": 3, "low": 2, "high": 4}
    assert told["a"]["per_second"] == {"median": 100, "low": 50, "high": 300}
    assert told["a"]["ours_is_faster_by"]["high"] == 1
    assert told["b"]["peak_mb"]["median"] == 1


def test_a_round_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        comparison(ours=[(1, 1), (1, 1)], theirs=[(1, 1)]).ratios("b")


def test_warm_up_steps_are_not_counted():
    steps = iter([1000, 1000, 3, 4, 5])
    turn = timed(steps, warmup=2, count=2)
    assert turn.amount == 7 and next(steps) == 5
    assert turn.peak_bytes > 10_000_000


def test_padded_rows_are_the_packed_ones_and_real_tokens_are_counted_alike(tiny):
    case = bert.Case(**tiny)
    lengths = [len(row) for row in bert.rows_of(case, 16)]
    assert min(lengths) < max(lengths) <= 40
    packed, padded = bert.packed(**tiny), bert.padded(**tiny)
    assert packed.amount == padded.amount == sum(lengths[4:16])
    places = sum(4 * max(lengths[i : i + 4]) for i in (4, 8, 12))
    assert padded.more["padding %"] == pytest.approx(100 * (1 - packed.amount / places))


def test_full_length_rows_have_no_padding_and_about_as_many_tokens_in_a_step(tiny):
    full, packed = bert.full(**tiny), bert.packed(**tiny)
    assert full.more["padding %"] == 0
    assert full.amount % 40 == 0
    assert full.amount == pytest.approx(packed.amount, rel=0.5)


def test_rows_of_like_length_are_grouped_and_short_turns_see_every_length(tiny):
    lengths = [len(row) for row in bert.rows_of(bert.Case(**tiny), 200)]
    batches = bert.by_length(lengths, 4)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    chosen = quantiles(2, 12, 3)
    assert len(chosen) == 15 and sorted(chosen[2:12]) == pytest.approx([0.05 + i / 10 for i in range(10)])
    seen = [lengths[row] for quantile in chosen[2:12] for row in batches[int(quantile * 50)]]
    assert np.mean(seen) == pytest.approx(np.mean(lengths), rel=0.1)
    assert bert.grouped(**tiny).more["padding %"] < 5 < bert.padded(**tiny).more["padding %"]


def test_every_contender_has_as_many_parameters(tiny):
    import transformers

    recipe = bert.recipe_of(bert.Case(**tiny))
    config = transformers.BertConfig(
        vocab_size=150, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=128,
        max_position_embeddings=40,
    )  # fmt: skip
    theirs = transformers.BertForMaskedLM(config)
    assert sum(p.numel() for p in recipe.module().parameters()) == sum(p.numel() for p in theirs.parameters())


def test_a_tokenizer_has_just_the_size_asked_for(corpus, tmp_path):
    from mmpre.modalities.text import TextReader

    vocabulary = TextReader(str(texts.tokenizer_of(corpus, 5000, tmp_path))).vocabulary
    assert vocabulary.size == 5000
    assert vocabulary.free[1] < 1000, "random replacements are pieces that the texts have"


def test_missing_texts_are_told_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(BenchmarkError, match=r"mmpre data build sotu --fetch --out .*nothing"):
        texts.find_texts(Settings(data=(tmp_path / "nothing",)))


def test_a_contender_that_fails_is_named_with_its_error():
    with pytest.raises(BenchmarkError, match=r"some case: contender padded failed:(.|\n)*unexpected keyword.*'colour'"):
        take_turns("mmpre.recipes.benchmarks.bert", ["padded"], {"colour": "red"}, Settings(repeats=1), "some case")


@pytest.fixture
def two_benchmarks(monkeypatch):
    """One that works and one that lacks something."""

    def fails(settings):
        raise BenchmarkError("bench bad: wanted a disk, there is none")

    good = SimpleNamespace(run=lambda settings: [comparison(ours=[(2, 1)], theirs=[(1, 1)])])
    modules = {"good": good, "bad": SimpleNamespace(run=fails)}
    monkeypatch.setattr(mmpre.benchmark, "find_benchmark", modules.__getitem__)


def test_one_benchmark_that_cannot_run_does_not_stop_the_others(two_benchmarks, capsys, tmp_path):
    out = tmp_path / "results" / "speed.json"
    with pytest.raises(BenchmarkError, match="wanted a disk"):
        run(["bad", "good"], Settings(threads=1), as_json=True, out=out)
    printed, kept = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed == kept
    assert printed["benchmarks"]["bad"] == []
    assert printed["benchmarks"]["good"][0]["contenders"]["b"]["ours_is_faster_by"]["median"] == 2
    assert {"cpu", "cores", "threads", "load", "torch", "commit", "date"} <= printed["machine"].keys()


def test_a_case_of_one_benchmark_among_several_is_enough(monkeypatch, capsys):
    good = SimpleNamespace(run=lambda settings: [comparison(ours=[(2, 1)], theirs=[(1, 1)])])
    modules = {"good": good, "other": SimpleNamespace(run=lambda settings: [])}
    monkeypatch.setattr(mmpre.benchmark, "find_benchmark", modules.__getitem__)
    run(["good", "other"], Settings(cases="12 x 768"))
    assert "faster by" in capsys.readouterr().out
    with pytest.raises(BenchmarkError, match="bench other: no case has '12 x 768' in its title"):
        run(["other"], Settings(cases="12 x 768"))


def test_a_page_says_what_was_run_where_and_when_and_shows_each_table(two_benchmarks, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["/bin/mmpre", "bench", "good", "--cases", "12 x 768"])
    run(["good"], Settings(threads=1), out=tmp_path / "speed.md")
    page = (tmp_path / "speed.md").read_text()
    where = mmpre.benchmark.machine(1)
    assert "mmpre bench good --cases '12 x 768'" in page
    assert all(f"{key} {where[key]}" in page for key in ("cpu", "threads", "torch", "commit", "date"))
    assert "| b | 1 | 2.00 (2.00 to 2.00) | 1 |" in page
    with pytest.raises(BenchmarkError, match=r"out must be a file that ends in .json or .md, got speed.txt"):
        run(["good"], Settings(), out=Path("speed.txt"))


def test_a_table_shows_rates_or_seconds_and_the_ratio(two_benchmarks, capsys):
    run(["good"], Settings())
    shown = capsys.readouterr().out
    assert "rows/s" in shown and "2.00 (2.00 to 2.00)" in shown
    mmpre.benchmark.show("start", comparison(ours=[(1, 0.25)], theirs=[(1, 0.5)], per_second=False))
    shown = capsys.readouterr().out
    assert "seconds/rows" in shown and "0.250" in shown and "0.500" in shown and "2.00" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["brt"], "there is no benchmark 'brt'; did you mean 'bert'?"),
        (["bert", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["bert", "--data", "no/texts"], "mmpre data build sotu --fetch --out no/texts"),
    ],
)
def test_the_command_line_refuses_with_a_way_out(words, message, capsys):
    code, _, told = command_line(capsys, "bench", *words)
    assert code == 2
    assert message in told


def test_a_case_that_no_title_holds_is_told(corpus, capsys):
    code, _, told = command_line(capsys, "bench", "bert", "--data", corpus, "--cases", "float8")
    assert code == 2
    assert "bench bert: no case has 'float8' in its title" in told
