"""The real data sets, fetched and built whole: what they hold is what was counted when they were chosen."""

import json
import platform

import pytest

from mmpre.data_tools import (
    animal_shapes,
    asterisk,
    augustus,
    digits,
    fillets,
    fluent_emoji,
    openclipart,
    openmoji_pictures,
    ragout,
    sotu,
    stdlib,
    tuxpaint_stamps,
    wordnet,
)  # fmt: skip
from mmpre.data_tools.packages import PackageMissingError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def splits(train, valid, test, **more):
    return {"train": train, "valid": valid, "test": test, **more}


EXPECTED = {
    sotu: {"counts": splits(18_248, 2_356, 1_375), "speeches": splits(203, 26, 20)},
    wordnet: {
        "counts": splits(94_270, 11_751, 11_770), "triples": splits(188_261, 23_570, 23_876),
        # 147,982 with the marks of adjectives, as in "galore(ip)", taken for other words
        "lemmas": 147_478,
    },
    openmoji_pictures: {"counts": splits(1_319, 174, 160)},
    openclipart: {"counts": splits(3_039, 318, 263), "titles": splits(1_882, 231, 232), "not_drawn": 0},
    tuxpaint_stamps: {
        "counts": splits(742, 112, 96, **{"speech-train": 5_693, "speech-valid": 830, "speech-test": 772}),
        "names": splits(607, 86, 81),
    },
    animal_shapes: {"counts": splits(7_949, 1_026, 1_025)},
    digits: {"counts": splits(1_455, 157, 185)},
    asterisk: {
        "counts": splits(2_183, 249, 239), "prompts": splits(501, 62, 60),
        "utterances": {"en": 551, "fr": 509, "es": 477, "it": 580, "ru": 554},
    },
    fillets: {"counts": splits(3_029, 201, 210, unlabelled=58)},
    fluent_emoji: {"counts": splits(813, 107, 95, stills=903)},
    augustus: {
        "counts": splits(233, 16, 16, probe=62)
        | {f"coding-64-{split}": count for split, count in splits(10_078, 1_356, 2_198).items()}
        | {f"coding-128-{split}": count for split, count in splits(8_122, 1_072, 1_832).items()}
        | {f"donor-{split}": count for split, count in splits(1_686, 236, 400).items()},
        "bases": 21_146_708, "transcripts": 1_120,
        "without_inner_stop": 1_120, "beginning_with_ATG": 1_108,
    },
    ragout: {"counts": splits(484, 55, 205)},
}  # fmt: skip


@pytest.mark.parametrize("module", EXPECTED, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_real_set_holds_what_was_counted(module, tmp_path):
    try:
        out = module.build(tmp_path / "out", fetch=True)
    except PackageMissingError as e:
        pytest.skip(str(e))
    card = json.loads((out / "card.json").read_text())
    assert {name: card[name] for name in EXPECTED[module]} == EXPECTED[module]
    assert all(len(source["sha256"]) == 64 for source in card["sources"] if "archive" in source)


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="counted in Python 3.11.7")
def test_the_standard_library_of_3_11_7_holds_what_was_counted(tmp_path):
    card = json.loads((stdlib.build(tmp_path / "out") / "card.json").read_text())
    assert card["counts"] == splits(4_953, 761, 687) and card["modules"] == splits(322, 33, 41)
    assert card["split"].endswith("; 28 copies left out")  # of 782 and 694
