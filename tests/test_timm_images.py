"""Models of timm as fronts and as towers."""

from pathlib import Path

import pytest
import timm
import torch
from pictures import noise, sample

import mmpre
from mmpre.batch import pack
from mmpre.blocks import Encoder
from mmpre.data.shard_writer import shard_writer
from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.heads.pool import Mean, Tower
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.modalities.timm_images import SquareReader, TimmImages
from mmpre.modality import Modality, Reader
from mmpre.network import Network
from mmpre.plan import plan
from mmpre.runs.checkpoint import latest
from mmpre.runs.options import RunOptions
from mmpre.runs.replay import replay
from mmpre.view import View

MODELS = {  # each with the side it takes and what its map is smaller by
    "vit_tiny_patch16_224": (32, 16, dict(img_size=32, embed_dim=32, depth=2, num_heads=2)),
    "convnext_atto": (64, 32, dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    "swin_tiny_patch4_window7_224": (64, 32, dict(img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1))),
}


def made(name, width=24, **more):
    side, stride, sizes = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **sizes)
    return TimmImages(SquareReader(side, stride), model, width=width, **more)


def batch_of(net, pictures, view=None):
    view = view or View()
    rows = [
        view.row(sample(p, str(i)), net.readers, Draw.row(0, 0, 0, epoch=0, unit=i), None)
        for i, p in enumerate(pictures)
    ]
    return pack(rows, view.attend.plan)


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_equals_the_model_of_timm(name):
    image = made(name)
    net = Network({"image": image}, Encoder([])).eval()
    assert isinstance(image.reader, Reader) and isinstance(image, Modality)
    side = image.reader.side_px
    batch = batch_of(net, [noise(side, side, i) for i in range(3)])
    pixels = batch.seen["image"]["pixels"].float() / 255
    config = image.model.pretrained_cfg
    pixels = (pixels - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    theirs = image.model.forward_features(pixels)
    if theirs.ndim == 3:
        theirs_BE = theirs[:, image.model.num_prefix_tokens :].mean(1)
    else:
        theirs_BE = theirs.mean((2, 3)) if theirs.shape[1] == image.model.num_features else theirs.mean((1, 2))
    expected = image.project(theirs_BE) + image.places.weight.mean(0)
    torch.testing.assert_close(Tower(net, Mean("image"))(batch), expected, atol=1e-5, rtol=1e-4)


def test_as_a_front_it_feeds_blocks_and_a_replaced_place_hides_its_features():
    image = made("vit_tiny_patch16_224")
    net = Network({"image": image}, bert_encoder(24, 1, 2, dropout=0.0, attention_dropout=0.0)).eval()
    hide = View(picks={"place": RandomTokens(role="image", rate=0.3)}, corruption=HideAll())
    batch = batch_of(net, [noise(32, 32)], hide)
    f_NE, tokens = image.features(batch.seen["image"]), batch.seen["image"]
    other_NE = torch.where(batch.replaced["image"][:, None], torch.randn_like(f_NE), f_NE)
    assert torch.equal(
        image.embed(f_NE, tokens, batch.replaced["image"]), image.embed(other_NE, tokens, batch.replaced["image"])
    )
    net(batch).sum().backward()
    assert image.model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_a_frozen_model_keeps_weights_and_statistics_in_training():
    model = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match="has batch normalisation, which lets the rows of a batch see each other"):
        TimmImages(SquareReader(32, 32), model, width=8)
    image = TimmImages(SquareReader(32, 32), model, width=8, frozen=True)
    net = Network({"image": image}, Encoder([])).train()
    assert not any(p.requires_grad for p in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net(batch_of(net, [noise(32, 32)])).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert image.project.weight.grad is not None


def test_no_stage_of_a_run_trains_a_frozen_front(tmp_path):
    with shard_writer(tmp_path / "shards") as sink:
        for i in range(12):
            sink.write({"__key__": f"{i}", **sample(noise(32, 32, i)).members})
    recipe, data = Path(__file__).parent / "frozen_front.py", (str(tmp_path / "shards"),)
    options = RunOptions(exact=True, workers=0, log_every=1, save_every=1, keep=8)
    run = mmpre.train(recipe, out=tmp_path / "run", options=options, data=data)
    both = (mmpre.load(run).untrained(), mmpre.load(run).recipe)
    before, after = (dict(one.module().named_parameters()) for one in both)
    front = {name for name in before if ".image.model." in name}
    assert front and {name for name, value in before.items() if torch.equal(value, after[name])} == front
    moved = {label.rpartition("/")[0] for label in latest(run / "checkpoints").tensors["optimizer"]}
    assert moved == before.keys() - front
    assert replay(run, 1)["same"] is True and replay(run, 3)["same"] is True
    every, places = (4 * sum(before[name].numel() for name in moved if part in name) for part in ("", "places"))
    held = [stage["memory"]["alone"]["gradients"] for stage in plan(recipe)["stages"]]
    assert held == [every - places, every] and places > 0


def test_a_row_is_the_same_among_others_and_random_crops_come_from_the_row():
    image = made("convnext_atto")
    net = Network({"image": image}, Encoder([])).eval()
    pictures = [noise(50, 80, i) for i in range(3)]
    together = net(batch_of(net, pictures)).view(3, 4, -1)
    alone = net(batch_of(net, pictures[:1]))
    torch.testing.assert_close(together[0], alone, atol=1e-6, rtol=1e-5)

    def flip(picture):
        return picture.rotate(90 * int(torch.randint(4, ())))

    reader = SquareReader(32, 16, flip)
    rows = [Draw.row(0, 0, 0, epoch=e, unit=0) for e in range(8)]
    shown = [reader.tokenize(sample(pictures[0]), row)["pixels"] for row in rows]
    assert torch.equal(shown[0], reader.tokenize(sample(pictures[0]), rows[0])["pixels"])
    assert any(not torch.equal(shown[0], other) for other in shown[1:])


def test_a_stride_that_does_not_fit_is_told():
    with pytest.raises(ValueError, match="side_px must be a multiple of stride_px"):
        SquareReader(30, 16)
    model = timm.create_model("convnext_atto", num_classes=0, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    net = Network({"image": TimmImages(SquareReader(64, 16), model, width=8)}, Encoder([]))
    with pytest.raises(ValueError, match="counts 16 tokens a picture, ConvNeXt gives 4 for 64 px"):
        net(batch_of(net, [noise(64, 64)]))
