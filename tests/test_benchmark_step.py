"""The benchmark of one step: it is the recipe's own step, and its counts of parameters are right."""

import pytest

from mmpre.benchmark import Settings
from mmpre.plugins import find_recipe, names
from mmpre.recipes.benchmarks.step import CASES, Case, Made, measure, run

SMALL = {
    "bert": dict(width=32, depth=1, heads=2, length=12),
    "two_stage": dict(width=32, depth=1, heads=2, short=6, long=12),
    "uniter": dict(width=32, depth=1, heads=2, length=12, positions=12, regions=4, features=8, classes=5),
    "w2v_bert": dict(seconds=1.0, channels=(4, 2), width=32, depth=1, more_depth=0, heads=2, codes=8, values=32),
    "violet": dict(
        channels=8, depths=(1, 1, 1), swin_heads=(1, 2, 2), window=(4, 4, 4), depth=1, heads=2, side_px=32, length=12
    ),
    "graphcodebert": dict(width=32, depth=1, heads=2, length=40, comment=10, nodes=8),
    "mae": dict(
        width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, patch_px=16, side_px=32
    ),
}


@pytest.mark.parametrize(("name", "stage"), [*((name, 0) for name in SMALL), ("two_stage", 1)])
def test_a_step_is_made_and_its_parameters_are_told_by_part(name, stage):
    vocabulary = 0 if name in ("mae", "w2v_bert") else 90
    case = Case(name, "base", vocabulary, rows=3, stated=2.0, counts="encoder", stage=stage, numbers=SMALL[name])
    turn = measure(case, 2)
    assert turn.amount == 2 and turn.seconds > 0 and turn.peak_bytes > 50_000_000
    more = dict(turn.more)
    # of MAE's patches a quarter is left, with [CLS]
    longest = {
        "bert": 36, "two_stage": 18 * (stage + 1), "uniter": 48, "w2v_bert": 72, "violet": 96, "graphcodebert": 144,
        "mae": 6,
    }[name]  # fmt: skip
    assert more["tokens"] == longest
    assert more["encoder M"] == pytest.approx((23 if name == "w2v_bert" else 12) * 32**2 / 1e6, rel=0.1)
    assert more["all M"] == pytest.approx(more["modalities M"] + more["encoder M"] + more["rest M"])
    assert more["paper M"] == 2.0


def test_cases_name_recipes_and_scales_that_exist_and_base_is_the_default(monkeypatch):
    for case in CASES:
        assert case.scale in find_recipe(case.recipe).scales
    monkeypatch.setattr("mmpre.recipes.benchmarks.step.take_turns", lambda *arguments: {"mmpre": []})
    titles = [
        "bert base, 4 rows", "two_stage base, 16 rows", "two_stage base, stage 2, 4 rows", "uniter base, 4 rows",
        "lxmert base, 4 rows", "mosaicbert base, 4 rows", "modernbert base, 4 rows", "electra base, 4 rows",
        "mirror_bert base, 16 rows", "babylm2 base, 16 rows", "violet base, 4 rows", "graphcodebert base, 4 rows",
        "mae base, 16 rows",
        "w2v_bert base, 2 rows",
        "mergedna base, 1 rows",
    ]  # fmt: skip
    assert [made.title for made in run(Settings())] == titles
    assert [made.title for made in run(Settings(cases="electra large"))] == ["electra large, 2 rows"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.scale == "base"], ids=lambda case: case.title)
def test_a_step_of_the_papers_size_is_made_here(case):
    made = {one.title: one for one in run(Settings(repeats=1, threads=1, cases=case.title))}
    (turn,) = made[case.title].turns["mmpre"]
    assert turn.amount == 1 and turn.more["tokens"] > 500
    assert turn.more["counted M"] == pytest.approx(turn.more["paper M"], rel=case.within)


def test_every_recipe_that_mmpre_brings_has_a_case():
    plain = {"masked", "two_towers", "visual_tokens"}  # networks of the project's own: no paper's sizes
    assert {case.recipe for case in CASES} | plain == set(names("recipe"))


def test_a_reader_that_nothing_makes_samples_for_is_named():
    class Smell:
        suffixes = ("smell",)

    with pytest.raises(ValueError, match="nothing makes up samples for a Smell"):
        Made({"nose": Smell()}, 2).sample(0)
