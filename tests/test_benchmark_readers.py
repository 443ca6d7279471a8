"""The benchmark of readers: all contenders make the same tokens, and a comparison comes out."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpre.benchmark import Settings
from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.modalities.dna import DnaReader, Kmers
from mmpre.recipes.benchmarks import readers

KINDS = ("recordings", "genomes", "programs", "films", "animations", "regions")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in KINDS}
    for name, folder in folders.items():
        getattr(readers, f"write_{name}")(folder)
    return folders


def test_all_contenders_count_rows(data):
    for name, contender in readers.CONTENDERS.items():
        turn = contender(data=str(data[name.split()[0]]), steps=3)
        assert turn.amount == 3 and turn.seconds > 0


def test_the_plain_loop_reads_the_sounds_that_ours_does(data):
    units = Units(ShardReader(open_shards(data["recordings"])))
    for i, wave_T in enumerate(itertools.islice(readers.recordings(str(data["recordings"])), 3)):
        ours_T = readers.Audio().wave(units.sample(i))
        torch.testing.assert_close(wave_T[: len(ours_T)], ours_T)


def test_the_words_of_transformers_are_ours(data):
    from transformers import EsmTokenizer

    readers.transformers_words(str(data["genomes"]), 1)
    tokenizer = EsmTokenizer(str(Path(data["genomes"]) / "vocabulary.txt"), eos_token=None)
    reader, unit = DnaReader(Kmers(6), length=1019), Units(ShardReader(open_shards(data["genomes"]))).sample(0)
    tokens = reader.tokenize(unit, Draw.row(0, 0, 0, epoch=0, unit=0))
    theirs = tokenizer.convert_ids_to_tokens(tokenizer(reader.letters(tokens))["input_ids"])
    assert theirs[1:] == [reader.cutter.letters([i]) for i in tokens["ids"][1:-1].tolist()]


@pytest.mark.parametrize("kind", ["films", "animations"])
def test_all_take_the_same_frames_of_a_clip(data, kind):
    units = Units(ShardReader(open_shards(data[kind])))
    sample = units.sample(2)
    (member,) = sample.members.values()
    video = readers.Video(sampling=readers.Segments(readers.FRAMES, random=False))
    ours = video.frames(sample, Draw.row(0, 0, 0, epoch=0, unit=0)).numpy()
    bare = (readers.decord_frames, readers.av_frames) if kind == "films" else (readers.pillow_frames,)
    for frames in bare:
        assert np.array_equal(frames(member), ours)


def test_a_comparison_is_made_of_the_case_that_is_asked_for():
    (comparison,) = readers.run(Settings(repeats=1, threads=1, steps=2, cases="genomes"))
    assert comparison.ours == "mmpre" and list(comparison.turns) == ["mmpre", "transformers"]
