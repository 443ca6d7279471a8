"""Pictures as regions from boxes, or from the cells of a grid, by a frozen network."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from pictures import encoded, noise
from pictures import sample as picture
from PIL import Image
from torch import nn

from mmpre.command_line.cli import main
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import ShardReader, Sidecar, shard_writer
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.modalities.regions import RegionReader, Regions
from mmpre.region_features import RegionFeatures, cells, describe

NAME = "test_resnet.r160_in1k"  # timm's smallest, with batch normalisation
BOXES = [[2, 3, 20, 30], [10, 0, 40, 12], [0, 0, 40, 32], [7.4, 8.2, 9.1, 9.9]]


def boxed(boxes, seed=0, **more):
    told = {"regions": [{"box": box} for box in boxes]}
    return picture(noise(32, 40, seed), f"p{seed}", json=json.dumps(told).encode(), **more)


@pytest.fixture(scope="module")
def made():
    return RegionFeatures(NAME, grid=3, side_px=32)


def test_features_are_those_of_the_network_run_on_each_box_alone(made):
    many = made([boxed(BOXES), picture(noise(50, 30, 1)), boxed(BOXES[:1], 2)])
    assert [len(one["features"]) for one in many] == [4, 9, 1]
    mean = std = 0.5  # what timm names for it
    whole = Image.fromarray(noise(32, 40, 0).astype(np.uint8))
    for box, feature_E in zip([*BOXES[:3], [7, 8, 9, 10]], many[0]["features"], strict=True):
        crop = np.asarray(whole.crop(box).resize((32, 32), Image.Resampling.BILINEAR)) / 255
        value_13ss = torch.tensor((crop - mean) / std).permute(2, 0, 1)[None].float()
        torch.testing.assert_close(made.network(value_13ss)[0], feature_E.float(), atol=2e-2, rtol=2e-3)
    alone = made([boxed(BOXES[:1], 2)])[0]["features"]
    torch.testing.assert_close(alone, many[2]["features"], atol=2e-2, rtol=2e-3)


def test_boxes_become_shares_of_the_picture(made):
    (told,) = made([boxed([[10, 8, 30, 24]])])
    torch.testing.assert_close(told["boxes"], torch.tensor([[0.25, 0.25, 0.75, 0.75, 0.5, 0.5, 0.25]]))
    (told,) = made([boxed([[-0.6, 0, 40.9, 32]])])  # a detector's rounding
    assert told["boxes"][0].tolist() == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("width", "height", "grid"), [(40, 32, 4), (7, 5, 3), (2, 9, 4), (1, 1, 5)])
def test_a_grids_cells_cover_the_picture_once(width, height, grid):
    covered = np.zeros((height, width), int)
    for x1, y1, x2, y2 in cells(width, height, grid):
        assert x1 < x2 and y1 < y2
        covered[y1:y2, x1:x2] += 1
    assert (covered == 1).all() and len(cells(width, height, grid)) == min(grid, width) * min(grid, height)


def test_the_same_seed_draws_the_same_network_and_about_tells_another():
    one, same, other = RegionFeatures(NAME), RegionFeatures(NAME), RegionFeatures(NAME, seed=1)
    assert one.about == same.about and len({one.about, other.about, RegionFeatures(NAME, grid=2).about}) == 3


def test_pixels_are_scaled_as_the_network_names_it_and_about_tells_what_is_not_imagenets():
    crops = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    network = nn.Flatten()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    plain = ((crops / 255 - mean[:, None, None]) / std[:, None, None]).flatten(1).half()
    assert torch.equal(describe(network, crops), plain) and RegionFeatures(network).about.endswith("side 80")
    network.pretrained_cfg = {"mean": (0.5, 0.25, 0.5), "std": (1.0, 1.0, 0.5)}
    own = (crops / 255 - torch.tensor([0.5, 0.25, 0.5])[:, None, None]) * torch.tensor([1, 1, 2])[:, None, None]
    assert torch.equal(describe(network, crops), own.flatten(1).half())
    assert RegionFeatures(network).about.endswith("side 80, mean (0.5, 0.25, 0.5), std (1.0, 1.0, 0.5)")


def test_weights_of_a_file_are_taken_and_must_fit(tmp_path):
    torch.manual_seed(5)
    source = RegionFeatures(NAME, seed=3)
    safetensors.torch.save_file(source.network.state_dict(), tmp_path / "weights.safetensors")
    again = RegionFeatures(NAME, weights=tmp_path / "weights.safetensors")
    assert again.about == source.about
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors does not fit test_resnet.*are missing.*1 are unknown"):
        RegionFeatures(NAME, weights=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (b'{"regions": [{"box": [0, 0, 80, 32]}]}', "boxes out of range"),
        (b'{"regions": [{"box": [20, 0, 10, 32]}]}', "boxes out of range"),
        (b'{"regions": [{"box": [NaN, 0, 10, 32]}]}', "bad JSON"),
        (b'{"regions": [{"box": [1, 2, 3]}]}', "boxes of another form"),
        (b'{"regions": [7]}', "boxes of another form"),
        (b'{"regions": {"a": 1}}', "boxes of another form"),
        (b"[", "bad JSON"),
    ],
)
def test_boxes_that_cannot_be_used_are_a_hole(made, told, cause):
    with pytest.raises(BadMember) as caught:
        made([picture(noise(32, 40), json=told)])
    assert caught.value.cause == cause and caught.value.member == "json"


def test_without_boxes_a_grid_stands_in_or_the_sample_is_a_hole(made):
    for members in ({}, {"json": b'{"caption": "x"}'}, {"json": b'{"regions": []}'}):
        assert len(made([picture(noise(32, 40), **members)])[0]["features"]) == 9
        with pytest.raises(BadMember, match="give a grid, or leave the sample out"):
            RegionFeatures(nn.Flatten(), grid=0)([picture(noise(32, 40), **members)])
    with pytest.raises(BadMember) as caught:
        made([Sample("a", "shard", "digest", {"png": encoded(noise(8, 8))[:40]})])
    assert caught.value.cause == "broken picture"
    with pytest.raises(ValueError, match="side_px at least 1, got 4 and 0"):
        RegionFeatures(NAME, side_px=0)


def test_a_file_of_two_lines_derives_regions_that_the_modality_reads(tmp_path, capsys):
    with shard_writer(tmp_path / "shards") as sink:
        for i in range(4):
            one = boxed(BOXES, i) if i % 2 else picture(noise(32, 40, i))
            sink.write({"__key__": f"p{i}", **one.members})
        sink.write({"__key__": "broken", "png": b"no picture"})
    file = tmp_path / "regions.py"
    file.write_text(
        f'from mmpre.region_features import RegionFeatures\nderive = RegionFeatures("{NAME}", grid=2, side_px=32)\n'
    )
    main(["data", "derive", str(tmp_path / "shards"), "--out", str(tmp_path / "beside"), "--by", str(file),
          "--suffix", "regions.safetensors", "--max-holes", "0.5"])  # fmt: skip
    assert "4 of 5 samples" in capsys.readouterr().out
    shards = open_shards(tmp_path / "shards")
    units = Units(ShardReader(shards), [Sidecar(tmp_path / "beside", shards)])
    modality = Regions(RegionReader(96), width=8, types=nn.Embedding(2, 8))
    sizes = []
    for i in range(4):
        tokens = modality.reader.tokenize(units.sample(i), Draw.row(0, 0, 0, epoch=0, unit=i))
        nothing_N = torch.zeros(len(tokens), dtype=torch.bool)
        assert modality.embed(modality.features(tokens), tokens, nothing_N).isfinite().all()
        sizes.append(len(tokens))
    assert sizes == [4, 4, 4, 4]
    note = json.loads((tmp_path / "beside" / ".made").glob("*.json").__next__().read_text())
    assert "grid 2, side 32" in note["by"]
