"""Speech networks of conformer layers as transformers' Wav2Vec2BertModel, with a feature extractor."""
# N tokens of the packed batch, B rows, n tokens of the longest, E values of a token

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpre.attention.bias import RelativeKey
from mmpre.blocks import Encoder
from mmpre.encoder import conformer_encoder
from mmpre.exchange.export import Check
from mmpre.exchange.key_table import to_theirs
from mmpre.modalities.speech import FbankReader, Speech
from mmpre.network import Network
from mmpre.recipe import Recipe
from mmpre.recipes.exports.encoders import LIMIT, batch_of, loaded, looks_elsewhere, quietly
from mmpre.recipes.imports.wav2vec2_bert import FRONT, HIDDEN, POINTWISE, layers
from mmpre.sublayers.convolution import Convolution
from mmpre.tokens import Tokens

STACK = 2  # frames of a token, of which the extractor's mask is right
SECONDS = (0.7, 1.3)  # of the made utterances that are compared
FRAMES = 1e-3  # largest difference between frames: theirs are computed in float64


class Wav2Vec2Bert:
    target = "Wav2Vec2BertModel of transformers"

    def differs(self, recipe: Recipe) -> list[str] | None:
        net = recipe.network
        if not isinstance(net, Network) or not any(isinstance(one, Speech) for one in net.modalities.values()):
            return None
        if len(net.modalities) > 1:
            return [f"its rows hold {' and '.join(net.modalities)}, the class hears speech alone"]
        (speech,), told = net.modalities.values(), []
        if not isinstance(speech.reader, FbankReader) or speech.convolutions is not None:
            return ["it hears through convolutions, the class mel frames as they are"]
        if speech.reader.stack != STACK:
            told.append(f"its tokens are {speech.reader.stack} frames, those of the class's extractor {STACK}")
        if speech.positions is not None:
            told.append("positions are added to its input, the class has distances in attention alone")
        return told + _layers_differ(net.encoder) + looks_elsewhere(recipe)

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        net = recipe.network
        (speech,), encoder = net.modalities.values(), net.encoder
        sizes, own = _sizes(encoder), speech.mask_D is not None
        transformers.Wav2Vec2BertConfig(
            hidden_size=sizes["width"], num_hidden_layers=sizes["depth"], num_attention_heads=sizes["heads"],
            intermediate_size=sizes["hidden"], feature_projection_input_dim=speech.project.in_features,
            position_embeddings_type="relative_key", left_max_position_embeddings=sizes["left"],
            right_max_position_embeddings=sizes["right"], conv_depthwise_kernel_size=sizes["kernel"],
            hidden_act="swish", hidden_dropout=sizes["dropout"], activation_dropout=sizes["dropout"],
            attention_dropout=sizes["dropout"], conformer_conv_dropout=sizes["dropout"],
            feat_proj_dropout=speech.dropout.p, layerdrop=0.0, layer_norm_eps=sizes["eps"],
            apply_spec_augment=False, mask_time_prob=0.05 if own else 0.0,
            architectures=["Wav2Vec2BertModel"], dtype="float32",
        ).save_pretrained(folder)  # fmt: skip
        found = to_theirs(FRONT, speech.state_dict())
        found |= to_theirs(layers("encoder.layers.", sizes["depth"]), encoder.state_dict())
        found = {name: one[:, :, None] if POINTWISE.search(name) else one for name, one in found.items()}
        if own:
            found[HIDDEN] = speech.mask_D.detach()
        found = {name: tensor.float().contiguous().clone() for name, tensor in found.items()}
        save_file(found, folder / "model.safetensors", {"format": "pt"})
        bins, rate_hz = speech.reader.bins, speech.reader.audio.rate_hz
        with quietly():
            transformers.SeamlessM4TFeatureExtractor(
                feature_size=bins, num_mel_bins=bins, sampling_rate=rate_hz, stride=STACK
            ).save_pretrained(folder)
        seconds = f"cut recordings into {speech.reader.audio.seconds:g} s, as mmpre did in training"
        return [seconds] if own else [seconds, "hidden frames were random vectors: there is no learned one to write"]

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        ((role, speech),) = recipe.network.modalities.items()
        with quietly():
            extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        model = loaded(transformers.Wav2Vec2BertModel, folder)
        waves, rate_hz = made_waves(speech.reader), speech.reader.audio.rate_hz
        made = extractor([one.numpy() for one in waves], sampling_rate=rate_hz, return_tensors="pt")
        valid_Bn = made["attention_mask"].bool()
        rows = [speech.reader.frames(one) for one in waves]  # the shortest first, as rows are packed
        heard_NE = torch.cat(rows) - made["input_features"][valid_Bn]
        longest = max(map(len, rows))
        ours_BnE = torch.stack([nn.functional.pad(one, (0, 0, 0, longest - len(one))) for one in rows])
        mask_Bn = torch.arange(longest) < torch.tensor([len(one) for one in rows])[:, None]
        states_ND = model(input_features=ours_BnE, attention_mask=mask_Bn.long()).last_hidden_state[mask_Bn]
        ours_ND = recipe.network(batch_of(role, [_tokens(one) for one in rows]))
        what = f"{len(rows)} made utterances of {min(map(len, rows))} to {longest} tokens"
        return [Check(f"frames of {what}", float(heard_NE.abs().max()), FRAMES),
                Check(f"states of {what}", float((ours_ND - states_ND).abs().max()),
                      LIMIT * max(1.0, float(ours_ND.abs().max())))]  # fmt: skip


exporter = Wav2Vec2Bert()


def made_waves(reader: FbankReader) -> list[Tensor]:
    """Rising tones with noise, the shortest first."""
    rng, made = torch.Generator().manual_seed(0), []
    for seconds in SECONDS:
        t_T = torch.arange(int(seconds * reader.audio.rate_hz)) / reader.audio.rate_hz
        noise_T = torch.rand(len(t_T), generator=rng) * 0.4 - 0.2
        made.append(0.4 * torch.sin(2 * torch.pi * (200 + 300 * t_T) * t_T) + noise_T)
    return made


def _tokens(frame_nE: Tensor) -> Tokens:
    return Tokens.of_row(torch.full((len(frame_nE),), -1), frame=frame_nE)


def _sizes(encoder: Encoder) -> dict[str, float]:
    """The numbers of a conformer's first layer, and how many layers there are."""
    half, attention, convolution, _, closing = encoder.blocks[0].sublayers
    distances: RelativeKey = attention.sublayer.bias
    return {
        "width": closing.norm.normalized_shape[0], "depth": len(encoder.blocks), "heads": attention.sublayer.heads,
        "hidden": half.sublayer.sublayer.up.out_features, "kernel": convolution.sublayer.kernel,
        "left": distances.left, "right": distances.right, "dropout": half.dropout.p, "eps": half.norm.eps,
    }  # fmt: skip


def _layers_differ(encoder: Encoder) -> list[str]:
    """What keeps an encoder from being the class's: it is compared with one that is made of its own sizes."""
    other = "its layers are not a conformer's with relative keys, in the class's order"
    try:
        sizes = _sizes(encoder)
    except (AttributeError, ValueError, TypeError):
        return [other]
    with torch.device("meta"):
        like = conformer_encoder(causal=True, **sizes)
    ours, theirs = (dict(one.named_modules()) for one in (encoder, like))
    if {name: type(one) for name, one in ours.items()} != {name: type(one) for name, one in theirs.items()}:
        return [other]
    told = []
    if any(isinstance(one, Convolution) and one.before != one.kernel - 1 for one in ours.values()):
        told.append("its convolutions look ahead, the class's back alone")
    elif any(_settings(one) != _settings(theirs[name]) for name, one in ours.items()):
        told.append("its layers differ in their sizes, dropout or eps")
    return told


def _settings(module: nn.Module) -> tuple:
    """What a module has beside its tensors' values."""
    names = ("eps", "p", "factor", "activation", "kernel", "heads", "kv_heads", "dropout", "within", "rotary", "left",
             "right", "normalized_shape", "bias")  # fmt: skip
    found = [getattr(module, name, None) for name in names]
    shapes = [(name, one.shape) for name, one in module.named_parameters(recurse=False)]
    return (*(one for one in found if not isinstance(one, nn.Module | Tensor)), *shapes)
