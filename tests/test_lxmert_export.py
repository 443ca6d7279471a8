"""LXMERT goes to transformers' LxmertForPreTraining and comes back, bit for bit."""

import pytest
import torch
from parity_text import vary, word_tokenizer

import mmpre
from mmpre.exchange.export import Check, ExportError, export
from mmpre.exchange.imported_run import _write
from mmpre.exchange.imports import fill
from mmpre.plugins import find_recipe
from mmpre.recipes.exports import lxmert as exporter
from mmpre.recipes.imports import lxmert as family
from mmpre.runs.options import RunOptions
from mmpre.runs.run import build, new_record

SMALL = dict(width=32, language=2, relations=1, cross=2, heads=4, length=16, positions=16, regions=9, features=16,
             objects=7, attributes=5, answers=6)  # fmt: skip


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    """Those of this tree, whatever entry points are installed."""
    monkeypatch.setattr("mmpre.exchange.imports.survey", lambda kind: ({"lxmert": family}, {}))
    monkeypatch.setattr("mmpre.exchange.export.survey", lambda kind: ({"lxmert": exporter}, {}))


def a_run(tmp_path, **numbers):
    """A run at step 0 with weights that are not those at the start."""
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = find_recipe("lxmert")
    given = found.numbers(None, SMALL | {"tokenizer": str(tmp_path / "tokenizer.json")} | numbers)
    record = new_record(found, None, given, RunOptions())
    module = build(found, record["numbers"], 0).module()
    vary(module)
    _write(tmp_path / "run", module, record)
    return tmp_path / "run"


@pytest.mark.parametrize("numbers", [{}, {"vision": "feature", "ask": 0.0}, {"vision": "none"}])
def test_lxmert_goes_to_transformers_and_comes_back_bit_for_bit(numbers, tmp_path):
    run = a_run(tmp_path, **numbers)
    told = export(run, tmp_path / "out")
    assert told.target == "LxmertForPreTraining of transformers" and told.checks[0] == Check("tensors", 0.0, 0.0)
    assert all(one.good for one in told.checks)
    names = [one.what for one in told.checks]
    for what in ("states of 5 made rows' words", "states of their regions", "scores of words", "scores of matching"):
        assert what in names
    seen = {"both": 3, "feature": 1, "none": 0}[numbers.get("vision", "both")]
    assert sum("said of regions" in what for what in names) == seen
    assert ("scores of answers" in names) == (numbers.get("ask", 1) > 0)
    recipe = mmpre.load(run).untrained()
    report = fill(recipe.module(), tmp_path / "out")
    assert (report.missing, report.left) == ([], [])
    own = mmpre.load(run).recipe.module().state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in recipe.module().state_dict().items())


def test_what_is_not_the_same_there_is_not_written(tmp_path, monkeypatch):
    real = exporter.to_theirs

    def swapped(table, tensors):
        """Queries and keys of the attention across change places."""
        found = real(table, tensors)
        for name in [one for one in found if "visual_attention.att.query" in one]:
            other = name.replace("query", "key")
            found[name], found[other] = found[other], found[name]
        return found

    run = a_run(tmp_path)
    monkeypatch.setattr(exporter, "to_theirs", swapped)
    with pytest.raises(ExportError, match=r"tensors: largest difference .*; states of 5 made rows' words: largest"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_layers_across_there_is_no_class(tmp_path):
    with pytest.raises(ExportError, match="it pools other states than the first word's; its layers are not of each"):
        export(a_run(tmp_path, cross=0), tmp_path / "out")
