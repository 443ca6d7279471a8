"""Codes: a codebook learned with its network, k-means centres, sidecars of both, and predicting them where hidden."""

import json

import clips
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from pictures import encoded, sample, waves

import mmpre
from mmpre.batch import pack
from mmpre.codes import Centres, Codebook, use
from mmpre.command_line.cli import main
from mmpre.data.codes import WithCodes
from mmpre.data.derive import DeriveError, derive
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import ShardReader, Sidecar, shard_writer
from mmpre.data.units import Units
from mmpre.data.video import Evenly, Video
from mmpre.derivers import fit_centres, from_run
from mmpre.draw import Draw
from mmpre.encoder import vit_encoder
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import HideAll
from mmpre.masking.everything import Everything
from mmpre.masking.exact import ExactShare
from mmpre.masking.grid import Tube
from mmpre.modalities.video import VideoReader, VideoTubelets
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipes.visual_tokens import visual_tokens
from mmpre.runs.options import RunOptions
from mmpre.tokens import Tokens
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(width=32, depth=1, decoder_depth=1, heads=2, codes=32, values=8, side_px=32, batch=8, micro_batches=1,
             steps=200, warmup=5, lr=5e-3, valid_every=100)  # fmt: skip


def row(unit=0):
    return Draw.row(0, 0, 0, epoch=0, unit=unit)


def some_task(**numbers):
    torch.manual_seed(0)
    return visual_tokens(**SMALL | numbers).stages[0].tasks[0]


def some_batch(task, count=6):
    pictures = [sample(waves(32, 32, seed), str(seed)) for seed in range(count)]
    rows = [task.held_out.row(one, task.objective.readers, row(i), None) for i, one in enumerate(pictures)]
    return pack(rows, task.held_out.attend.plan)


# ---- codebook ----


def test_the_nearest_code_is_that_of_the_smallest_angle():
    torch.manual_seed(0)
    book, z_NC = Codebook(20, 6), F.normalize(torch.randn(50, 6), dim=1)
    with torch.no_grad():
        book.vector_KC *= torch.rand(20, 1) + 0.1  # lengths do not count
    cosine_NK = F.cosine_similarity(z_NC[:, None], book.vector_KC[None], dim=2)
    assert torch.equal(book.nearest(z_NC), cosine_NK.argmax(1))
    with pytest.raises(ValueError, match="at least 2 codes of at least 2 values, got 1 of 8"):
        Codebook(1, 8)


def test_codes_that_nothing_uses_are_put_beside_used_ones():
    torch.manual_seed(0)
    book = Codebook(8, 4, patience=3)
    before = book.vectors().clone()
    for step in range(3):
        book.vector_KC.grad = torch.zeros_like(book.vector_KC)
        book.vector_KC.grad[[1, 5]] = 0.1
        book.after_step(step)
        assert torch.equal(book.vectors(), before) == (step < 2)
    moved = [i for i in range(8) if i not in (1, 5)]
    near = (book.vectors()[moved] @ before[[1, 5]].mT).amax(1)
    assert (near > 0.99).all() and torch.equal(book.vectors()[[1, 5]], before[[1, 5]])
    assert book.idle_K.tolist() == [0] * 8
    assert "idle_K" in book.state_dict()


def test_perplexity_is_the_number_of_codes_that_are_taken_alike():
    assert use(torch.tensor([5, 5, 5, 5])) == pytest.approx((4, 1))
    assert use(torch.tensor([9, 0, 0, 0])) == pytest.approx((1, 0.25))
    assert use(torch.tensor([1, 1, 0, 0])) == pytest.approx((2, 0.5))


# ---- learned with a network ----


def test_the_gradient_of_what_was_rounded_is_that_of_its_code():
    task = some_task()
    objective, batch, seen = task.objective, some_batch(task), {}
    latent, decoded = objective.coder.latent, objective._decoded

    def keep_latent(batch):
        seen["z"] = latent(batch)
        seen["z"].retain_grad()
        return seen["z"]

    def keep_decoded(vector_NC, *more):
        seen["read"] = vector_NC
        vector_NC.retain_grad()
        return decoded(vector_NC, *more)

    objective.coder.latent, objective._decoded = keep_latent, keep_decoded
    loss = objective(batch, DRAW)
    pixels = next(term for term in loss.terms if term.name == "pixels")
    pixels.sum.backward()
    assert torch.equal(seen["z"].grad, seen["read"].grad) and seen["z"].grad.abs().sum() > 0
    code_N = objective.coder.book.nearest(seen["z"].detach())
    torch.testing.assert_close(seen["read"].detach(), objective.coder.book.vectors()[code_N].detach())
    assert objective.coder.book.vector_KC.grad is None  # pixels do not move codes: what they stand for does
    sizes = {term.name: term.sum.item() for term in loss.terms}
    assert sizes["codebook"] == pytest.approx(sizes["commitment"]) and loss.terms[2].weight == 0.25


def test_codes_of_a_picture_among_others_are_its_own():
    task = some_task()
    coder = task.objective.coder.eval()
    together = some_batch(task)
    codes = coder.codes(together).split(together.layout.lengths_B.tolist())
    for key, code_n in zip(together.keys, codes, strict=True):
        one = task.held_out.row(sample(waves(32, 32, int(key)), key), task.objective.readers, row(3), None)
        assert torch.equal(coder.codes(pack([one], task.held_out.attend.plan)), code_n)


def test_everything_is_every_ordinary_token():
    tokens = Tokens.of_row(torch.tensor([0, -1, -1, 3, -1]))
    assert Everything(role="image")(tokens, row()).tolist() == [1, 2, 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, first in (("train", 0), ("valid", 100)):
        with shard_writer(folder / split) as sink:
            for i in range(first, first + 24):
                sink.write({"__key__": f"w{i}", "png": encoded(waves(32, 40, i))})
    with shard_writer(folder / "clips") as sink:
        for i in range(8):
            sink.write({"__key__": f"c{i}", "webp": clips.animation(clips.frames(6, 32, 32, i))})
        sink.write({"__key__": "broken", "webp": clips.animation(clips.frames(6, 32, 32))[:200]})
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "codes"
    numbers = {name: value for name, value in SMALL.items()}
    mmpre.train("visual_tokens", data=(str(data / "train"),), valid=(str(data / "valid"),), **numbers,
                out=out, options=RunOptions(workers=0))  # fmt: skip
    return out


def test_the_recipe_learns_to_restore_held_out_pictures_better_than_each_patchs_mean(run, data, capsys):
    main(["eval", str(run), "--data", str(data / "valid"), "--json"])
    told = json.loads(capsys.readouterr().out)
    errors, untrained = (told[name]["tasks"]["codes"] for name in ("trained", "untrained"))
    assert errors["pixels"] < 0.7 * errors["pixels_flat"] < untrained["pixels"]
    found = {one["name"]: one["value"] for one in told["trained"]["results"]}
    assert found["codebook perplexity (of 32)"] > 8  # a quarter of the codes
    assert found["the same without the commonest code (of 32)"] > 8
    assert 0.25 < found["share of codes in use (of 32)"] <= 1


def test_a_coders_run_makes_codes_of_samples(run, data, tmp_path):
    derive([data / "valid"], tmp_path / "codes", from_run(run))
    shards = open_shards(data / "valid")
    units = Units(ShardReader(shards), [Sidecar(tmp_path / "codes", shards)])
    opened = mmpre.load(run).recipe
    task = opened.stages[0].tasks[0]
    reader = WithCodes(task.objective.readers["image"], 32)
    for i in (0, 7):
        tokens = reader.tokenize(units.sample(i), row())
        batch = pack([task.held_out.row(units.sample(i), task.objective.readers, row(), None)], lambda *_: None)
        expected = opened.network.eval().codes(pack([task.held_out.row(units.sample(i), task.objective.readers, row(),
                                                                       None)], task.held_out.attend.plan))  # fmt: skip
        assert tokens["code"][0] == -1 and torch.equal(tokens["code"][1:], expected[1:])
        assert torch.equal(tokens["patch"], batch.clean["image"]["patch"])


# ---- k-means ----


def test_centres_are_found_again_and_the_nearest_is_taken(tmp_path):
    torch.manual_seed(0)
    true_KE = torch.randn(5, 7) * 10
    of_N = torch.randint(5, (2_000,))
    value_NE = true_KE[of_N] + torch.randn(2_000, 7)
    centres = Centres.fit(lambda: value_NE.split(300), 5)
    off_KK = torch.cdist(true_KE, centres.centre_KE)
    assert (off_KK.amin(1) < 0.5).all() and off_KK.argmin(1).unique().numel() == 5
    assert torch.equal(off_KK.argmin(1)[of_N], centres.nearest(value_NE))
    centres.save(tmp_path / "centres")
    assert torch.equal(Centres.load(tmp_path / "centres").centre_KE, centres.centre_KE)
    with pytest.raises(ValueError, match="fitted to vectors of 7 values, got 3"):
        centres.nearest(value_NE[:, :3])
    with pytest.raises(ValueError, match="9 codes need at least as many vectors, got 8; ask for fewer"):
        Centres.fit(lambda: value_NE[:8].split(4), 9)
    safetensors.torch.save_file({"x": true_KE}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"must hold a matrix `centres`, it holds \['x'\]"):
        Centres.load(tmp_path / "other")


@pytest.mark.parametrize("features", [True, False])
def test_k_means_of_patches_or_of_states_makes_codes_on_the_command_line(run, data, tmp_path, features):
    words = ["data", "derive", str(data / "valid"), "--out", str(tmp_path / "codes"), "--by", str(run), "--centres",
             str(tmp_path / "centres"), "--fit", "12", *(["--features"] if features else [])]  # fmt: skip
    main(words)
    shards = open_shards(data / "valid")
    told = safetensors.torch.load(Sidecar(tmp_path / "codes", shards).read(3)["derived.safetensors"])
    assert told["lengths"].tolist() == [17] and told["codes"][0] == -1
    assert told["codes"][1:].min() >= 0 and told["codes"].max() < 12
    if features:
        opened = mmpre.load(run).recipe.network.net.modalities["image"]
        tokens = opened.reader.tokenize(Units(ShardReader(shards)).sample(3), row())
        value_NE = opened.features(tokens)[1:]
        away_NK = torch.cdist(value_NE, Centres.load(tmp_path / "centres").centre_KE)
        assert torch.equal(away_NK.argmin(1).int(), told["codes"][1:])
    assert len(Centres.load(tmp_path / "centres")) == 12


def test_fitting_needs_a_file_and_centres_fit_what_they_are_used_for(run, data, tmp_path):
    with pytest.raises(SystemExit):
        main(["data", "derive", str(data / "valid"), "--out", str(tmp_path / "a"), "--by", str(run), "--fit", "3"])
    fit_centres(run, [data / "train"], 4, tmp_path / "centres", features=True)
    with pytest.raises((ValueError, DeriveError), match="fitted to vectors of 192 values, got 32"):
        derive([data / "valid"], tmp_path / "b", from_run(run, centres=tmp_path / "centres"))


# ---- codes with tokens, predicted where hidden ----

PLAIN = VideoReader(Video(sampling=Evenly(4)), patch_px=8, frames=1)


def coded(codes, lengths=None, key="a", clip=None):
    clip = clips.animation(clips.frames(6, 32, 32)) if clip is None else clip
    told = {"codes": torch.tensor(codes, dtype=torch.int32), "lengths": torch.tensor(lengths or [len(codes)])}
    return Sample(key, "shard", "digest", {"webp": clip, "derived.safetensors": safetensors.torch.save(told)})


def test_codes_stand_beside_their_tokens():
    codes = [-1, *(i % 7 for i in range(64))]
    tokens = WithCodes(PLAIN, 7).tokenize(coded(codes), row())
    assert tokens["code"].tolist() == codes and tokens["code"].dtype == torch.int64
    assert torch.equal(tokens["tubelet"], PLAIN.tokenize(coded(codes), row())["tubelet"])


@pytest.mark.parametrize(
    ("codes", "lengths", "cause"),
    [
        ([-1] + [3] * 63, None, "codes of other tokens"),
        ([-1] + [3] * 64, [60], "codes of other tokens"),
        ([-1] + [3] * 63 + [7], None, "codes out of range"),
        ([-1] * 65, None, "codes out of range"),
    ],
)
def test_codes_that_do_not_fit_are_a_hole(codes, lengths, cause):
    with pytest.raises(BadMember) as caught:
        WithCodes(PLAIN, 7).tokenize(coded(codes, lengths), row())
    assert caught.value.cause == cause and caught.value.member == "derived.safetensors"


def test_codes_that_are_missing_or_no_whole_numbers_are_a_hole():
    one, codes = coded([-1] + [0] * 64), torch.zeros(65, dtype=torch.int32)
    told = {
        "codes incomplete": [{"states": torch.ones(3)}],
        "codes of another type": [
            {"codes": codes, "lengths": torch.tensor([70, -5])}, {"codes": codes, "lengths": torch.tensor([65.0])},
            {"codes": codes.float(), "lengths": torch.tensor([65])},
            {"codes": codes.bool(), "lengths": torch.tensor([65])},
        ],
        "codes of other tokens": [{"codes": codes, "lengths": torch.zeros(0, dtype=torch.int64)}],
    }  # fmt: skip
    for members, cause in (
        ({"webp": one.members["webp"]}, "missing member"),
        *(({**one.members, "derived.safetensors": safetensors.torch.save(some)}, cause)
          for cause, every in told.items() for some in every),
    ):  # fmt: skip
        with pytest.raises(BadMember) as caught:
            WithCodes(PLAIN, 7).tokenize(Sample("a", "shard", "digest", members), row())
        assert caught.value.cause == cause


def test_codes_of_hidden_tubes_are_learned(tmp_path):
    """A clip's code is that of its ground, so hidden ones can be told from those that are seen."""
    torch.manual_seed(0)
    net = Network({"video": VideoTubelets(PLAIN, width=32)}, vit_encoder(32, 1, 2))
    objective = OnePass(net, [Predict("tube", Vocabulary.untied(32, 4, field="code"))])
    tube = Tube(role="video", inside=ExactShare(role="video", share=0.5))
    view = View(readers={"video": WithCodes(PLAIN, 4)}, picks={"tube": tube}, corruption=HideAll())
    made = []
    for i in range(8):
        clip = clips.frames(6, 32, 32)
        clip[..., 1] = 60 * (i % 4) + 20
        made.append(coded([-1] + [i % 4] * 64, key=str(i), clip=clips.animation(clip)))
    optimizer, losses = torch.optim.AdamW(objective.parameters(), lr=3e-3), []
    for step in range(25):
        rows = [view.row(one, objective.readers, row(step), None) for one in made]
        batch = pack(rows, view.attend.plan)
        loss = objective(batch, DRAW)
        losses.append(loss.total(batch.counts))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0].item() == pytest.approx(np.log(4), abs=0.2)
    accuracy, per = loss.metrics["tube_accuracy"]
    assert accuracy / batch.counts[per] > 0.95


def test_clips_get_codes_too_and_broken_ones_none(data, tmp_path):
    numbers = SMALL | dict(clip=3, tubelet=1, steps=2, warmup=0, batch=4)
    mmpre.train("visual_tokens", data=(str(data / "clips"),), **numbers,
                out=tmp_path / "run", options=RunOptions(workers=0, max_holes=0.9))  # fmt: skip
    derive([data / "clips"], tmp_path / "codes", from_run(tmp_path / "run"), max_holes=0.5)
    shards = open_shards(data / "clips")
    beside = Sidecar(tmp_path / "codes", shards)
    told = safetensors.torch.load(beside.read(0)["derived.safetensors"])
    assert told["lengths"].tolist() == [1 + 3 * 16]
    with pytest.raises(Exception, match="has nothing for it"):
        beside.read(8)


def test_codes_are_the_same_in_half_precision():
    torch.manual_seed(0)
    book, z_NC = Codebook(4_096, 8), F.normalize(torch.randn(500, 8), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        half_N = book.nearest(z_NC)
    assert torch.equal(half_N, book.nearest(z_NC))
