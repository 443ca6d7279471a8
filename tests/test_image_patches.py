import pickle

import numpy as np
import pytest
import torch
import torchvision
import webdataset
from pictures import encoded, noise, sample
from PIL import Image
from torchvision.transforms import v2 as transforms
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatches, Slot
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.modalities.image_patches import (
    DEVIATION,
    MEAN,
    ImagePatches,
    ImageReader,
    SinCos,
    grid,
    middle,
    picture,
    random_crops,
    resized,
)
from mmpre.modality import Modality, Reader
from mmpre.tokens import Tokens
from mmpre.view import View


def row(unit=0, epoch=0):
    return Draw.row(0, 0, 0, epoch=epoch, unit=unit)


def test_a_picture_becomes_its_patches_row_after_row_behind_cls():
    pixels = noise(6, 9)
    tokens = ImageReader(3).tokenize(sample(pixels), row())
    assert tokens.special_N.tolist() == [0] + [-1] * 6
    assert tokens["position"].tolist() == [[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert tokens["patch"].dtype == torch.uint8 and not tokens["patch"][0].any()
    for (r, c), patch in zip(tokens["position"][1:].tolist(), tokens["patch"][1:], strict=True):
        expected = pixels[3 * r : 3 * r + 3, 3 * c : 3 * c + 3]
        assert patch.tolist() == expected.flatten().tolist()
    assert picture(tokens["patch"][1:], 2, 3).tolist() == pixels.tolist()


@pytest.mark.parametrize(
    ("size_px", "most", "expected"),
    [
        ((224, 224), 1024, (14, 14)),
        ((100, 60), 1024, (4, 6)),  # 3.75 rows, 6.25 columns
        ((7, 3), 1024, (1, 1)),
        ((4000, 3000), 1024, (28, 36)),  # 28 x 37 would pass the limit
        ((10_000, 1), 200, (1, 200)),
        ((1, 10_000), 200, (200, 1)),
        ((16_000, 40), 100, (1, 100)),
        ((40, 40), 1, (1, 1)),
    ],
)
def test_the_grid_fits_the_picture_and_the_limit(size_px, most, expected):
    assert grid(*size_px, 16, most) == expected


def test_no_size_gives_an_empty_grid_or_too_large_a_one():
    g = np.random.default_rng(0)
    for _ in range(3_000):
        width_px, height_px = (int(2 ** g.uniform(0, 13)) for _ in range(2))
        patch_px, most = int(g.integers(1, 33)), int(g.integers(1, 300))
        rows, columns = grid(width_px, height_px, patch_px, most)
        assert rows >= 1 and columns >= 1 and rows * columns <= most


def test_a_picture_of_another_size_is_resized_to_the_grid():
    tokens = ImageReader(4).tokenize(sample(np.full((9, 15, 3), (10, 200, 30))), row())
    assert tokens["position"].max(0).values.tolist() == [1, 3]
    assert tokens["patch"][1:].unflatten(1, (-1, 3)).unique(dim=1).flatten(1).tolist() == [[10, 200, 30]] * 8


def test_pixels_are_normalised_as_torchvision_does():
    pixels = noise(8, 8)
    module = ImagePatches(ImageReader(4), width=8)
    tokens = module.reader.tokenize(sample(pixels), row())
    theirs = transforms.Compose(
        [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True), transforms.Normalize(MEAN, DEVIATION)]
    )(pixels.astype(np.uint8))
    ours = picture(module.features(tokens)[1:], 2, 2).permute(2, 0, 1)
    torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor), atol=1e-6, rtol=1e-5)


def test_a_crop_is_torchvisions_own_is_drawn_by_the_row_and_leaves_the_generator_alone():
    one = sample(noise(40, 30))
    reader = ImageReader(4, random_crops(16))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = reader.tokenize(one, row()), reader.tokenize(one, row())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["patch"], again["patch"])
    assert len(first) == 17
    others = [reader.tokenize(one, row(epoch=epoch))["patch"] for epoch in range(1, 9)]
    assert not any(torch.equal(first["patch"], other) for other in others)
    old = torchvision.transforms
    authors = old.Compose(
        [old.RandomResizedCrop(16, scale=(0.2, 1.0), interpolation=old.InterpolationMode.BICUBIC),
         old.RandomHorizontalFlip()]
    )  # fmt: skip
    torch.manual_seed(row().hash("transform"))
    expected = torch.from_numpy(np.array(authors(one.image())))  # resized by Pillow
    assert (picture(first["patch"][1:], 4, 4).int() - expected.int()).abs().max() <= 1


def test_resizing_is_bicubic_as_pillow_does_it_with_few_values_one_apart():
    values = np.cumsum(np.random.default_rng(0).normal(0, 9, (150, 190, 3)), 0) + 128
    for pixels in (values.clip(0, 255), noise(150, 190)):
        one = Image.fromarray(pixels.astype(np.uint8))
        for size_px in ((64, 48), (190, 150), (240, 300), (3, 200)):
            ours, theirs = resized(one, size_px), one.resize(size_px, Image.Resampling.BICUBIC)
            assert ours.size == size_px and ours.mode == "RGB"
            apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))
            assert apart.max() <= 2 and apart.mean() < 0.01


def test_half_of_the_crops_are_flipped():
    half = np.zeros((8, 8, 3))
    half[:, 4:] = 255
    reader, one = ImageReader(8, random_crops(8, least=0.95)), sample(half)
    left = [float(picture(reader.tokenize(one, row(i))["patch"][1:], 1, 1)[:, 0].float().mean()) for i in range(600)]
    assert abs(np.mean(np.array(left) > 127) - 0.5) < 4 * (0.25 / 600) ** 0.5


def test_the_middle_of_a_picture_is_not_random():
    reader = ImageReader(4, middle(8))
    pixels = noise(8, 20)
    patch = reader.tokenize(sample(pixels), row())["patch"]
    assert picture(patch[1:], 2, 2).tolist() == pixels[:, 6:14].tolist()
    assert torch.equal(patch, reader.tokenize(sample(pixels), row(1))["patch"])


def test_the_reader_is_a_reader_and_the_module_a_modality_and_the_reader_can_be_pickled():
    reader = ImageReader(4, random_crops(16))
    assert isinstance(reader, Reader) and isinstance(ImagePatches(reader, width=8), Modality)
    one = sample(noise(40, 30))
    copied = pickle.loads(pickle.dumps(reader))
    assert torch.equal(copied.tokenize(one, row())["patch"], reader.tokenize(one, row())["patch"])


def test_positions_are_those_of_mae_for_grids_of_any_shape():
    tokens = ImageReader(2).tokenize(sample(noise(6, 10)), row())
    theirs = build_2d_sinusoidal_position_embedding(3, 5, 16, cls_token=True)
    theirs = torch.cat([theirs[:, 8:], theirs[:, :8]], dim=1)  # MAE's order: column, row
    torch.testing.assert_close(SinCos(16, 5)(tokens), theirs, atol=1e-7, rtol=0)


def test_a_replaced_patch_hides_its_pixels_but_not_its_place():
    torch.manual_seed(0)
    module = ImagePatches(ImageReader(2), width=8)
    tokens = module.reader.tokenize(sample(noise(4, 4)), row())
    hidden_N = torch.tensor([False, True, False, True, False])
    other = tokens["patch"].clone()
    other[hidden_N] ^= 77
    before = module.embed(module.features(tokens), tokens, hidden_N)
    changed = tokens.with_values(patch=other)
    assert torch.equal(before, module.embed(module.features(changed), changed, hidden_N))
    assert not torch.equal(before[1], before[3])
    expected = module.project(module.features(tokens))[2] + module.places(tokens)[2]
    torch.testing.assert_close(before[2], expected)
    torch.testing.assert_close(before[0], module.cls_D)


def test_pictures_of_all_shapes_pack_end_to_end():
    reader = ImageReader(4)
    rows = [reader.tokenize(sample(noise(h, w)), row()) for h, w in ((4, 20), (13, 9), (8, 8))]
    packed = Tokens.pack(rows)
    assert packed.lengths_B.tolist() == [6, 7, 5]
    module = ImagePatches(reader, width=8)
    nothing_N = torch.zeros(len(packed), dtype=torch.bool)
    together = module.embed(module.features(packed), packed, nothing_N).split([6, 7, 5])
    for one, x_ND in zip(rows, together, strict=True):
        alone = module.embed(module.features(one), one, nothing_N[: len(one)])
        torch.testing.assert_close(alone, x_ND, atol=1e-6, rtol=0)


JPEG = encoded(noise(32, 32), "JPEG")


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"jpg": JPEG[: len(JPEG) // 2]}, "broken picture"),
        ({"jpg": b"this is no picture"}, "broken picture"),
        ({"jpg": b""}, "broken picture"),
        ({"png": JPEG}, "wrong type"),
        ({"txt": b"a cat"}, "missing member"),
    ],
)
def test_a_picture_that_cannot_be_read_costs_its_sample(members, cause):
    with pytest.raises(BadMember) as caught:
        ImageReader(4).tokenize(Sample("a", "shard", "digest", members), row())
    assert caught.value.cause == cause


def test_a_broken_picture_is_a_hole_and_its_neighbours_stay(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "p-%03d.tar"), maxcount=99, verbose=0) as sink:
        for i in range(8):
            sink.write({"__key__": f"s{i}", "jpg": JPEG[:-200] if i == 3 else JPEG})
    units = Units(ShardReader(open_shards(tmp_path)))
    work = {"look": (View(), {"image": ImageReader(8)})}
    source = MicroBatches(units, work, seed=0, stage=0, micro_batches=1, block=4, window=8)
    made = source[Slot(0, 0, "look", 0, 8)]
    (hole,) = made.holes
    assert (hole.cause, hole.key, hole.modality) == ("broken picture", "s3", "image")
    assert sorted(made.parts[0].keys) == [f"s{i}" for i in range(8) if i != 3]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least 1, got patch_px 0 and max_patches 1024"):
        ImageReader(0)
    with pytest.raises(ValueError, match=r"multiple of 4 .*got 30"):
        SinCos(30, 4)
    with pytest.raises(TypeError, match="must return a PIL picture, got Image; leave conversion"):
        ImageReader(4, transforms.ToImage()).tokenize(sample(noise(8, 8)), row())
