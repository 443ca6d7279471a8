"""Pictures of what a mask hides: every modality that stands draws its rows, and `data inspect` writes them."""

import json

import numpy as np
import pytest
import torch
from pictures import noise
from pictures import sample as picture_of
from PIL import Image
from test_modalities import CASES, films, genomes, programs, recordings, regions

from mmpre.command_line.cli import main
from mmpre.data.hidden import parse_mask
from mmpre.data.shards import shard_writer
from mmpre.draw import Draw
from mmpre.masking.grid import Tube
from mmpre.masking.random import RandomTokens
from mmpre.show import Shows, cells, show_row


@pytest.mark.parametrize("case", CASES)
def test_what_is_hidden_looks_otherwise_and_what_is_not_looks_the_same(case):
    module, samples, _ = CASES[case]()
    reader = module.reader
    tokens = reader.tokenize(samples[0], Draw.row(0, 0, 0, epoch=0, unit=0))
    nothing_N = torch.zeros(len(tokens), dtype=torch.bool)
    first_N, last_N = nothing_N.clone(), nothing_N.clone()
    ordinary = (tokens.special_N < 0).nonzero().squeeze(1)
    first_N[ordinary[0]], last_N[ordinary[-1]] = True, True
    plain, first, last = (np.array(show_row(reader, tokens, one, samples[0])) for one in (nothing_N, first_N, last_N))
    assert plain.shape == first.shape == last.shape
    assert (plain != first).any() and (plain != last).any() and (first != last).any()
    assert (plain == first).mean() > 0.5 or len(ordinary) < 4
    assert isinstance(reader, Shows) or case == "tones"  # of the tests


def test_a_picture_shows_what_is_left_of_it():
    module, samples, _ = CASES["image patches"]()
    tokens = module.reader.tokenize(samples[0], Draw.row(0, 0, 0, epoch=0, unit=0))
    shown = np.array(module.reader.show(tokens, torch.ones(len(tokens), dtype=torch.bool)))
    assert (shown == 128).all()


def test_a_reader_without_a_method_gets_numbered_cells_and_wrong_lengths_are_refused():
    class Bare:
        suffixes = ("txt",)

        def tokenize(self, sample, draw):
            raise AssertionError

    module, samples, _ = CASES["text"]()
    tokens = module.reader.tokenize(samples[0], Draw.row(0, 0, 0, epoch=0, unit=0))
    hidden_N = torch.arange(len(tokens)) == 2
    expected = cells([str(i) for i in range(len(tokens))], hidden_N, special=tokens.special_N >= 0)[0]
    assert (np.array(show_row(Bare(), tokens, hidden_N)) == np.array(expected)).all()
    with pytest.raises(ValueError, match=r"each of the row's 15 tokens whether it is hidden, got shape \[3\]"):
        show_row(Bare(), tokens, hidden_N[:3])


def test_cells_go_on_in_the_next_line_and_keep_the_order():
    picture, boxes = cells(["word"] * 100, torch.zeros(100, dtype=torch.bool))
    assert len({box[1] for box in boxes}) > 1
    assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))
    assert max(box[2] for box in boxes) <= picture.width and max(box[3] for box in boxes) <= picture.height


def test_masks_are_read_as_recipes_write_them():
    assert parse_mask("RandomTokens(rate=0.3)", "it") == RandomTokens(role="it", rate=0.3)
    tube = Tube(role="it", inside=RandomTokens(role="it", rate=0.5))
    assert parse_mask(" Tube(inside=RandomTokens(rate=0.5))", "it") == tube


@pytest.mark.parametrize(
    "text, told",
    [
        ("RandomToken(rate=0.3)", r"no mask RandomToken; did you mean RandomTokens\?"),
        ("RandomTokens(0.3)", r"Name\(number=value, ...\)"),
        ("RandomTokens(rate=__import__('os').getpid())", "Name"),
        ("RandomTokens(rate=2)", "rate must lie"),
        ("RandomTokens(rte=0.2)", "unexpected keyword argument 'rte'"),
        ("(" * 5000, "wanted one of RandomTokens"),
        ("", "such as RandomTokens"),
    ],
)
def test_what_is_no_mask_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        parse_mask(text, "it")


def test_inspect_writes_the_picture_and_says_how_much_is_hidden(tmp_path, capsys):
    with shard_writer(tmp_path / "shards", prefix="texts") as sink:
        sink.write({"__key__": "broken", "txt": b"\xff\xfe"})
        for i in range(4):
            sink.write({"__key__": f"text{i}", "txt": "seven words stand in this text " * (i + 1)})
    asked = ["data", "inspect", str(tmp_path / "shards"), "--modality", "text", "--samples", "2", "--json",
             "--mask", "WholeUnits(share=0.5)", "--picture", str(tmp_path / "new" / "hidden.png")]  # fmt: skip
    main(asked)
    told = json.loads(capsys.readouterr().out)
    assert [one["key"] for one in told["shown"]] == ["text0", "text1"]
    assert all(0.3 < one["hidden"] / one["ordinary"] < 0.6 for one in told["shown"])
    with Image.open(told["picture"]) as picture:
        assert picture.format == "PNG" and picture.width >= 960
    main([*asked[:-2], "--picture", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "new" / "hidden.png").read_bytes()


PICTURED = {
    "speech": recordings, "video": films, "dna": genomes, "code_graph": programs, "regions": regions,
    "image_patches": lambda: [picture_of(noise(40, 60, i), str(i)) for i in range(2)],
    "timm_images": lambda: [picture_of(noise(40, 60, i), str(i)) for i in range(2)],
}  # fmt: skip


@pytest.mark.parametrize("modality", PICTURED)
def test_inspect_draws_every_modality_with_its_ordinary_reader(modality, tmp_path, capsys):
    samples = PICTURED[modality]()
    with shard_writer(tmp_path / "shards") as sink:
        for sample in samples:
            sink.write({"__key__": sample.key, **sample.members})
    main(["data", "inspect", str(tmp_path / "shards"), "--modality", modality, "--samples", "2", "--json",
          "--picture", str(tmp_path / "hidden.png")])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert [one["key"] for one in told["shown"]] == [sample.key for sample in samples[:2]]
    assert all(0 < one["hidden"] < one["ordinary"] for one in told["shown"])
    with Image.open(tmp_path / "hidden.png") as picture:
        assert len(set(picture.convert("L").resize((64, 64)).getdata())) > 2


def test_inspect_names_the_last_sample_where_none_can_be_read(tmp_path, capsys):
    with shard_writer(tmp_path, prefix="texts") as sink:
        sink.write({"__key__": "a", "txt": "text"})
    with pytest.raises(SystemExit):
        main(["data", "inspect", str(tmp_path), "--modality", "dna", "--picture", str(tmp_path / "hidden.png")])
    assert "no sample of" in (said := capsys.readouterr().err) and "can be read as dna; the last: a:" in said
    assert not (tmp_path / "hidden.png").exists()
    (tmp_path / "knock.py").touch()
    with pytest.raises(SystemExit):
        main(["data", "inspect", str(tmp_path), "--modality", str(tmp_path / "knock.py")])
    assert "inspect: knock does not say how it is read; its file needs plain_reader(sample)" in capsys.readouterr().err
