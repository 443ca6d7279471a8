"""Labels of rows and of regions, and questions in place of captions: what is read, and what is refused."""

import pytest
import torch
from asked_pictures import changed, some_pictures, tensors_of

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.labels import Numbered
from mmpre.modalities.regions import RegionReader
from mmpre.modalities.text import Questions, TextReader

DRAW = Draw.micro_batch(0, 0, 0, 0)


def test_an_answer_is_drawn_by_its_weight_and_what_is_none_is_told():
    label = Numbered(count=4, suffixes=("answer.json",))

    def drawn(data, unit=0):
        sample = Sample("a", "shard", "digest", {"answer.json": data})
        return label(sample, Draw.row(0, 0, 0, epoch=0, unit=unit))

    assert drawn(b"3") == 3
    many = [drawn(b'{"1": 3, "2": 1.0, "0": 0}', unit) for unit in range(400)]
    assert set(many) == {1, 2} and 0.68 < many.count(1) / 400 < 0.82
    for data in (b"4", b"-1", b"true", b'"1"', b"[1]", b"{}", b'{"1": -1}', b'{"9": 1}', b'{"1": 0}', b"1.0"):
        with pytest.raises(BadMember, match="wanted a whole number from 0 to 3, or weights"):
            drawn(data)
    assert label(Sample("a", "shard", "digest", {}), DRAW) == -1
    with pytest.raises(ValueError, match="count must be at least 2, got 1; yes and no are 2"):
        Numbered(count=1, suffixes=("answer.json",))


def test_labels_of_regions_that_cannot_be_are_told():
    reader, (sample,) = RegionReader(16, labels={"object": 7}), some_pictures(1, regions=3)
    row = Draw.row(0, 0, 0, epoch=0, unit=0)
    tokens = reader.tokenize(sample, row)
    assert tokens["object"].tolist() == tensors_of(sample)["object"].tolist() and "attribute" not in tokens.fields
    wrong = {
        "whole numbers from 0 to 6, got torch.int64, 1 to 7": dict(object=torch.tensor([1, 7, 2])),
        "whole numbers from 0 to 6, got torch.float32": dict(object=torch.tensor([1.0, 2.0, 3.0])),
        r"object must be \[regions\], as many as features, got \[2\]": dict(object=torch.tensor([1, 2])),
        "object_confidence must be 0 to 1, got 0.5 to 2": dict(object_confidence=torch.tensor([0.5, 1.0, 2.0])),
        "object_confidence must be 0 to 1": dict(object_confidence=torch.tensor([0.5, 1.0, float("nan")])),
    }
    for message, tensors in wrong.items():
        with pytest.raises(BadMember, match=message):
            reader.tokenize(changed(sample, **tensors), row)
    with pytest.raises(BadMember, match="no tensor 'colour' in it, only"):
        RegionReader(16, labels={"colour": 3}).tokenize(sample, row)


def test_questions_of_a_share_that_cannot_be_are_refused():
    reader = TextReader("bytes", max_length=16)
    with pytest.raises(ValueError, match=r"got windowed=False and a share of 33; a third is 0\.33"):
        Questions(reader, Numbered(count=2, suffixes=("answer.json",)), share=33)
