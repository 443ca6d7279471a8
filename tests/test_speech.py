import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sounds import encoded, sample, sound
from torch import nn
from torchaudio.compliance import kaldi
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2 import modeling_wav2vec2 as theirs
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertFeatureProjection

from mmpre.data.audio import Audio
from mmpre.data.sample import BadMember
from mmpre.draw import Draw
from mmpre.modalities.speech import (
    WAV2VEC2,
    ConvolutionalPositions,
    Convolutions,
    FbankReader,
    FrameConvolutions,
    Speech,
    WaveReader,
)
from mmpre.modality import Modality, Reader
from mmpre.tokens import Tokens

DRAW = Draw.row(0, 0, 0, epoch=0, unit=0)
SHORT = ((10, 5), (3, 2), (2, 2))  # 20 samples a token


def waves(*seconds):
    return [sound(one, seed=i) for i, one in enumerate(seconds)]


def test_frames_are_kaldis_normalised_and_stacked():
    wave = sound(0.6)
    frame_FE = kaldi.fbank(torch.from_numpy(wave)[None] * 2**15, num_mel_bins=80, sample_frequency=16_000, dither=0.0)
    assert len(frame_FE) == 58
    wanted = (frame_FE - frame_FE.mean(0)) / (frame_FE.var(0) + 1e-7).sqrt()
    for stack in (1, 2, 3):
        tokens = FbankReader(stack=stack).tokenize(sample(wave), DRAW)
        assert tokens["frame"].shape == (58 // stack, 80 * stack)
        torch.testing.assert_close(tokens["frame"].flatten(), wanted[: 58 // stack * stack].flatten())


@pytest.mark.parametrize("seconds", [0.6, 1.013, 2.5])
def test_frames_are_those_of_transformers(seconds):
    wave = sound(seconds)
    made = SeamlessM4TFeatureExtractor()(wave, sampling_rate=16_000, return_tensors="pt")
    wanted = made["input_features"][0][made["attention_mask"][0].bool()]
    ours = FbankReader().tokenize(sample(wave), DRAW)["frame"]
    assert ours.shape == wanted.shape
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)


def test_frames_do_not_depend_on_loudness_and_silence_is_no_danger():
    wave = sound(0.5)
    loud, soft = (FbankReader().tokenize(sample(wave * gain), DRAW)["frame"] for gain in (1.0, 0.03))
    torch.testing.assert_close(loud, soft, atol=1e-4, rtol=1e-4)
    silent = FbankReader().tokenize(sample(np.zeros(4_000, np.float32)), DRAW)["frame"]
    assert torch.equal(silent, torch.zeros_like(silent))
    assert not WaveReader().tokenize(sample(np.zeros(4_000, np.float32)), DRAW)["wave"].any()


def test_the_waveform_is_normalised_as_transformers_does():
    wave = sound(0.4) + 0.1
    wanted = Wav2Vec2FeatureExtractor()(wave, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    torch.testing.assert_close(WaveReader().tokenize(sample(wave), DRAW)["wave"], wanted, atol=1e-5, rtol=1e-4)
    plain = WaveReader(normalise=False).tokenize(sample(wave), DRAW)["wave"]
    assert torch.equal(plain, torch.from_numpy(wave))


@pytest.mark.parametrize("reader", [FbankReader, WaveReader])
@pytest.mark.parametrize("rate_hz", [16_000, 22_050])
def test_windows_are_known_before_they_are_read(reader, rate_hz):
    reader = reader(Audio(seconds=0.7, windowed=True))
    assert isinstance(reader, Reader) and reader.windowed
    made = encoded(sound(3.0, rate_hz), rate_hz)
    again = pickle.loads(pickle.dumps(reader))
    lengths = reader.windows(sample(made))
    assert [len(again.tokenize(sample(made, window=w), DRAW)) for w in range(5)] == lengths
    assert again.digest == reader.digest


def test_the_digest_tells_what_changes_lengths():
    kinds = [FbankReader, WaveReader, lambda audio: FbankReader(audio, stack=3), lambda audio: WaveReader(audio, SHORT)]
    audios = [Audio(), Audio(seconds=3), Audio(windowed=True), Audio(rate_hz=8_000), Audio(suffixes=("flac",))]
    assert len({kind(audio).digest for kind in kinds for audio in audios}) == 20


@pytest.mark.parametrize(
    ("reader", "samples"), [(FbankReader(), 559), (FbankReader(stack=1), 559), (WaveReader(), 399)]
)
def test_a_sound_shorter_than_a_token_costs_its_sample(reader, samples):
    assert len(reader.tokenize(sample(sound(1.0)[: samples + 1]), DRAW))
    with pytest.raises(BadMember, match="ms do not fill a token") as caught:
        reader.tokenize(sample(sound(1.0)[:samples]), DRAW)
    assert caught.value.cause == "audio too short"


def config(layer_norm, **more):
    return Wav2Vec2Config(
        hidden_size=32, num_attention_heads=2, conv_dim=[16] * 7, conv_bias=layer_norm, layer_norm_eps=1e-5,
        feat_extract_norm="layer" if layer_norm else "group", num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16, **more,
    )  # fmt: skip


def same_front(layer_norm):
    """Ours and theirs with the same weights, none of which is as it was made."""
    torch.manual_seed(0)
    front = theirs.Wav2Vec2FeatureEncoder(config(layer_norm)).eval()
    ours = Convolutions(WAV2VEC2, channels=16, bias=layer_norm, layer_norm=layer_norm)
    for i, layer in enumerate(front.conv_layers):
        nn.init.normal_(layer.conv.weight, std=0.3)
        ours.convolutions[i].load_state_dict(layer.conv.state_dict())
        if hasattr(layer, "layer_norm"):
            nn.init.normal_(layer.layer_norm.weight)
            nn.init.normal_(layer.layer_norm.bias)
            ours.norms[i].load_state_dict(layer.layer_norm.state_dict())
    return ours, front


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_convolutions_of_a_ragged_batch_are_those_of_transformers_row_by_row(layer_norm):
    ours, front = (one.double() for one in same_front(layer_norm))
    rows = [torch.from_numpy(wave).double() for wave in waves(0.9, 0.31, 0.025, 0.5, 0.4199)]
    made = ours(torch.cat(rows), [len(row) for row in rows])
    alone = [front(row[None])[0].T for row in rows]
    assert [len(one) for one in alone] == [WaveReader().tokens_of(len(row)) for row in rows]
    torch.testing.assert_close(made, torch.cat(alone), atol=1e-5, rtol=1e-5)
    (made.square().mean() * 100).backward()
    (torch.cat(alone).square().mean() * 100).backward()
    for ours_one, theirs_one in zip(ours.convolutions, front.conv_layers, strict=True):
        torch.testing.assert_close(ours_one.weight.grad, theirs_one.conv.weight.grad, atol=1e-5, rtol=1e-4)


def test_the_waveforms_embedding_is_that_of_transformers():
    torch.manual_seed(0)
    model = theirs.Wav2Vec2Model(config(True, num_hidden_layers=1)).eval()
    convolutions, _ = same_front(True)
    speech = Speech(WaveReader(), width=32, convolutions=convolutions, positions=ConvolutionalPositions(32)).eval()
    for i, layer in enumerate(model.feature_extractor.conv_layers):
        speech.convolutions.convolutions[i].load_state_dict(layer.conv.state_dict())
        speech.convolutions.norms[i].load_state_dict(layer.layer_norm.state_dict())
    speech.norm.load_state_dict(model.feature_projection.layer_norm.state_dict())
    speech.project.load_state_dict(model.feature_projection.projection.state_dict())
    speech.positions.convolution.load_state_dict(model.encoder.pos_conv_embed.conv.state_dict())
    speech.mask_D.data.copy_(model.masked_spec_embed)
    rows = waves(0.9, 0.31, 0.5)
    tokens = Tokens.pack([speech.reader.tokenize(sample(wave), DRAW) for wave in rows])
    replaced_N = torch.arange(len(tokens)) % 3 == 0
    made = speech.embed(speech.features(tokens), tokens, replaced_N).split(tokens.lengths_B.tolist())
    for row, hidden, wave in zip(made, replaced_N.split(tokens.lengths_B.tolist()), rows, strict=True):
        value = Wav2Vec2FeatureExtractor()(wave, sampling_rate=16_000, return_tensors="pt")["input_values"]
        x, heard = model.feature_projection(model.feature_extractor(value).transpose(1, 2))
        x = torch.where(hidden[None, :, None], model.masked_spec_embed, x)
        torch.testing.assert_close(row, (x + model.encoder.pos_conv_embed(x))[0], atol=1e-5, rtol=1e-4)
        assert heard.shape[2] == 16


def test_frames_are_projected_as_in_transformers():
    speech = Speech(FbankReader(), width=32).eval()
    projection = Wav2Vec2BertFeatureProjection(Wav2Vec2BertConfig(hidden_size=32)).eval()
    projection.layer_norm.load_state_dict(speech.norm.state_dict())
    projection.projection.load_state_dict(speech.project.state_dict())
    tokens = speech.reader.tokenize(sample(sound(0.5)), DRAW)
    x, heard = projection(tokens["frame"][None])
    nothing_N = torch.zeros(len(tokens), dtype=torch.bool)
    torch.testing.assert_close(speech.features(tokens), heard[0])
    torch.testing.assert_close(speech.embed(speech.features(tokens), tokens, nothing_N), x[0])
    shown = speech.embed(speech.features(tokens), tokens, ~nothing_N)
    assert torch.equal(shown, speech.mask_D.expand(len(tokens), 32))


def modules():
    torch.manual_seed(0)
    short = WaveReader(layers=SHORT)
    return {
        "frames": Speech(FbankReader(), width=32),
        "frames with positions": Speech(FbankReader(), width=32, positions=ConvolutionalPositions(32, kernel=9)),
        "random frames": Speech(FbankReader(), width=32, noise=0.1),
        "frames, convolutions": Speech(
            FbankReader(stack=4), width=32, noise=0.1, convolutions=FrameConvolutions((4, 2), stack=4, bins=80)
        ),
        "waves, base": Speech(short, width=32, convolutions=Convolutions(SHORT, channels=8)),
        "waves, large": Speech(
            short, width=32, convolutions=Convolutions(SHORT, channels=8, bias=True, layer_norm=True),
            positions=ConvolutionalPositions(32, kernel=8),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", modules())
def test_rows_do_not_reach_into_each_other(name):
    speech = modules()[name].eval()
    assert isinstance(speech, Modality)
    rows = [speech.reader.tokenize(sample(wave), DRAW) for wave in waves(0.06, 0.3, 0.1, 0.205)]

    def embed(rows):
        tokens = Tokens.pack(rows)
        replaced_N = torch.zeros(len(tokens), dtype=torch.bool)
        return speech.embed(speech.features(tokens), tokens, replaced_N)

    packed = embed(rows).split([len(row) for row in rows])
    for row, together in zip(rows, packed, strict=True):
        torch.testing.assert_close(together, embed([row]), atol=1e-5, rtol=1e-5)
    louder = [row.with_values(**{n: f.values * 3 + 1 for n, f in row.fields.items()}) for row in rows]
    moved = embed([louder[0], rows[1], louder[2], louder[3]]).split([len(row) for row in rows])
    torch.testing.assert_close(moved[1], packed[1], atol=1e-6, rtol=1e-6)


def test_gradients_reach_every_weight():
    for speech in modules().values():
        tokens = Tokens.pack([speech.reader.tokenize(sample(wave), DRAW) for wave in waves(0.1, 0.3)])
        x_ND = speech.embed(speech.features(tokens), tokens, torch.arange(len(tokens)) % 4 == 0)
        F.mse_loss(x_ND, torch.randn_like(x_ND)).backward()
        assert [name for name, w in speech.named_parameters() if w.grad is None or not w.grad.any()] == []


def test_frame_convolutions_are_torchs_over_each_row_alone():
    torch.manual_seed(0)
    front = FrameConvolutions((6, 4), stack=4, bins=16)
    lengths_B = torch.tensor([3, 1, 5])
    frame_NE = torch.randn(9, 64)
    made = front(frame_NE, lengths_B)
    assert made.shape == (9, front.size) and front.size == 4 * 4
    wanted = []
    for row_nE in frame_NE.split(lengths_B.tolist()):
        x_1CFH = row_nE.reshape(1, 1, -1, 16)
        for one in front.convolutions:
            x_1CFH = F.relu(F.conv2d(x_1CFH, one.weight, one.bias, stride=2, padding=1))
        wanted.append(x_1CFH[0].movedim(0, 1).flatten(1))
    torch.testing.assert_close(made, torch.cat(wanted), atol=1e-6, rtol=1e-6)


def test_replaced_frames_are_random_and_say_nothing_of_what_they_replace():
    torch.manual_seed(0)
    speech = Speech(FbankReader(), width=32, noise=0.1)
    tokens = speech.reader.tokenize(sample(sound(2.0)), DRAW)
    f_NE, replaced_N = speech.features(tokens), torch.arange(len(tokens)) % 2 == 0
    made = []
    for f in (f_NE, torch.where(replaced_N[:, None], f_NE + 3, f_NE)):
        torch.manual_seed(1)
        made.append(speech.embed(f, tokens, replaced_N))
    assert torch.equal(*made)
    shown_MD = made[0][replaced_N] - speech.project.bias
    assert shown_MD.var(0).sum().item() == pytest.approx(0.1**2 * speech.project.weight.square().sum().item(), rel=0.2)
    assert not torch.equal(speech.embed(f_NE, tokens, replaced_N), made[0]) and speech.mask_D is None


def test_a_front_that_does_not_fit_its_reader_is_refused():
    with pytest.raises(ValueError, match="a WaveReader goes with Convolutions of its own layers, a FbankReader with"):
        Speech(WaveReader(), width=8)
    with pytest.raises(ValueError, match=r"got FbankReader of \(2, 80\), convolutions of \(\(10, 5\), "):
        Speech(FbankReader(), width=8, convolutions=Convolutions(SHORT))
    with pytest.raises(ValueError, match=r"got FbankReader of \(2, 80\), convolutions of \(4, 80\)"):
        Speech(FbankReader(), width=8, convolutions=FrameConvolutions((4, 2), stack=4, bins=80))
    with pytest.raises(ValueError, match="a stack of 2 to their number that divides the bands, got 1 convolutions, a "):
        FrameConvolutions((4,), stack=4, bins=80)
    with pytest.raises(ValueError, match="bins must be at least 4, stack at least 1, got 80, 0"):
        FbankReader(stack=0)
