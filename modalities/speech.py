"""Speech as mel frames in Kaldi's manner, or as its waveform through wav2vec 2.0's convolutions.

Source: w2v-BERT 2.0's frames (Seamless, arXiv:2312.05187), as transformers' SeamlessM4TFeatureExtractor makes them;
wav2vec 2.0, Baevski et al. 2020, arXiv:2006.11477, sizes and initialisation as in the authors' code.
"""
# N tokens of the packed batch, n of one row, T samples, F frames of 10 ms, E values of a token, C channels, H bands,
# D width, S places with zeros between rows

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import soundfile
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchaudio.compliance import kaldi

from mmpre.data.audio import FORMATS, Audio
from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.dropout import Dropout
from mmpre.show import GREY, HIDDEN, INK, PAPER, WIDTH_PX, enlarged
from mmpre.tokens import Tokens

WAV2VEC2 = ((10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2)  # kernel and stride of each convolution: 25 ms, every 20 ms


class _Windows:
    """What the two readers share: a recording's windows, as numbers of tokens."""

    audio: Audio
    tokens_of: Callable[[int], int]
    token_ms: float

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.audio.suffixes

    @property
    def windowed(self) -> bool:
        return self.audio.windowed

    def tokens_in(self, ms: float) -> int:
        """How many tokens begin within so many milliseconds, at least one: a span's length, as masks count it."""
        if not ms > 0:
            raise ValueError(f"tokens_in: wanted more than 0 ms, got {ms}; a hidden span of 200 ms is usual")
        return max(1, round(ms / self.token_ms))

    def windows(self, sample: Sample) -> list[int]:
        """How many tokens each window of a recording has."""
        return [self.tokens_of(samples) for samples in self.audio.lengths(sample)]

    def made(self) -> dict[str, bytes]:
        """A tone that fills a window."""
        file, rate_hz = io.BytesIO(), self.audio.rate_hz
        wave_T = torch.sin(torch.arange(int(self.audio.seconds * rate_hz)) * (440 * 2 * math.pi / rate_hz))
        soundfile.write(file, (wave_T * 0.5).numpy(), rate_hz, format=FORMATS[self.suffixes[0]][0])
        return {self.suffixes[0]: file.getvalue()}


@dataclass(frozen=True)
class FbankReader(_Windows):
    """Reads logarithms of the energy in `bins` mel bands, 25 ms at a time every 10 ms, `stack` frames to a token.

    Each band is normalised over the window: its mean becomes 0 and its deviation 1, so loudness does not matter.
    Frames that do not fill a token are left out. Field: frame [n, stack x bins]; there are no special tokens.
    """

    audio: Audio = field(default_factory=Audio)
    bins: int = 80
    stack: int = 2

    def __post_init__(self) -> None:
        if self.bins < 4 or self.stack < 1:
            raise ValueError(f"FbankReader: bins must be at least 4, stack at least 1, got {self.bins}, {self.stack}")

    @property
    def digest(self) -> str:
        return f"fbank {self.stack} {self.audio.digest}"

    @property
    def token_ms(self) -> float:
        return 10.0 * self.stack

    def tokens_of(self, samples: int) -> int:
        rate_hz = self.audio.rate_hz
        return max(0, (samples - int(rate_hz * 0.025)) // int(rate_hz * 0.01) + 1) // self.stack

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        wave_T = self.audio.wave(sample)
        count = self.tokens_of(len(wave_T))
        if count * self.stack < 2:
            raise _too_short(sample, self.audio, wave_T)
        return Tokens.of_row(torch.full((count,), -1), frame=self.frames(wave_T))

    def frames(self, wave_T: Float[Tensor, "T"]) -> Float[Tensor, "n E"]:
        """Tokens' frames of samples in [-1, 1] at the audio's rate."""
        frame_FE = kaldi.fbank(
            wave_T[None] * 2**15, num_mel_bins=self.bins, sample_frequency=self.audio.rate_hz, dither=0.0
        )
        var_E, mean_E = torch.var_mean(frame_FE, dim=0)
        frame_FE = (frame_FE - mean_E) / (var_E + 1e-7).sqrt()
        count = self.tokens_of(len(wave_T))
        return frame_FE[: count * self.stack].reshape(count, -1)

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """The mel bands, low ones below, a column a frame; hidden spans grey."""
        band_EF = tokens["frame"].reshape(-1, self.bins).T.flip(0)
        light_EF = ((band_EF + 2.5) / 5).clamp(0, 1) * 255  # they were normalised: nearly all lie within 2.5
        light_EF[:, hidden_N.repeat_interleave(self.stack)] = GREY
        red_EF = light_EF.clone()
        red_EF[-3:, hidden_N.repeat_interleave(self.stack)] = 255  # grey is also a loudness
        return enlarged(Image.fromarray(torch.stack([red_EF, light_EF, light_EF], 2).byte().numpy()), side_px=WIDTH_PX)


@dataclass(frozen=True)
class WaveReader(_Windows):
    """Reads the waveform itself; `layers` are kernel and stride of the convolutions that make tokens of it.

    With `normalise` (as wav2vec 2.0's large models want it) a window's mean becomes 0 and its deviation 1.
    Field: wave [T], of a length of its own; there are no special tokens.
    """

    audio: Audio = field(default_factory=Audio)
    layers: tuple[tuple[int, int], ...] = WAV2VEC2
    normalise: bool = True

    @property
    def digest(self) -> str:
        return f"wave {self.layers} {self.audio.digest}"

    @property
    def stride(self) -> int:
        return math.prod(stride for _, stride in self.layers)

    @property
    def token_ms(self) -> float:
        return 1000 * self.stride / self.audio.rate_hz

    def tokens_of(self, samples: int) -> int:
        for kernel, stride in self.layers:
            samples = max(0, (samples - kernel) // stride + 1)
        return samples

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        wave_T = self.audio.wave(sample)
        count = self.tokens_of(len(wave_T))
        if count < 1:
            raise _too_short(sample, self.audio, wave_T)
        if self.normalise:
            var, mean = torch.var_mean(wave_T, correction=0)
            wave_T = (wave_T - mean) / (var + 1e-7).sqrt()
        return Tokens.of_row(torch.full((count,), -1), wave=wave_T)

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """The waveform's outline; the samples that hidden tokens begin at, each for a stride, on red."""
        wave_T = tokens["wave"]
        picture = Image.new("RGB", (WIDTH_PX, 160), PAPER)
        pen, most = ImageDraw.Draw(picture), float(wave_T.abs().max()) or 1.0
        for x, part in enumerate(wave_T.tensor_split(WIDTH_PX)):
            token = min(x * len(wave_T) // WIDTH_PX // self.stride, len(tokens) - 1)
            if hidden_N[token]:
                pen.line((x, 0, x, 160), fill=HIDDEN)
            if len(part):
                low, high = (80 - 78 * float(v) / most for v in part.aminmax())
                pen.line((x, high, x, low), fill=PAPER if hidden_N[token] else INK)
        return picture


def plain_reader(sample: Sample) -> FbankReader:
    """A reader of ordinary settings, for `mmpre data inspect`."""
    return FbankReader()


def _too_short(sample: Sample, audio: Audio, wave_T: Tensor) -> BadMember:
    ms = 1000 * len(wave_T) / audio.rate_hz
    return BadMember("audio too short", sample.bytes(audio.suffixes)[0], f"{ms:.0f} ms do not fill a token")


class Convolutions(nn.Module):
    """wav2vec 2.0's front: convolutions with GELU, over rows that lie end to end on a grid of the whole stride.

    Each row is filled up with zeros to a multiple of that stride, so a row's outputs stand where they would if it were
    alone; those that reach over a border are thrown away. With `layer_norm` every layer is normalised over its
    channels (the large models), otherwise the first one over its row's time, each channel by itself (the base model).
    """

    def __init__(
        self, layers: Sequence[tuple[int, int]], *, channels: int = 512, bias: bool = False, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.stride = tuple(layers), math.prod(stride for _, stride in layers)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels if i else 1, channels, kernel, stride, bias=bias)
            for i, (kernel, stride) in enumerate(layers)
        )
        norms = [nn.LayerNorm(channels) for _ in layers] if layer_norm else [nn.GroupNorm(channels, channels)]
        self.norms = nn.ModuleList(norms)
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight)

    def forward(self, wave_T: Float[Tensor, "T"], samples: Sequence[int]) -> Float[Tensor, "N C"]:
        """`samples` says how many each row has."""
        filled = [F.pad(row_T, (0, -len(row_T) % self.stride)) for row_T in wave_T.split(list(samples))]
        lengths, valid = [len(row_T) for row_T in filled], list(samples)
        x_1CT = torch.cat(filled)[None, None]
        for i, convolution in enumerate(self.convolutions):
            kernel, stride = self.layers[i]
            x_1CT = convolution(x_1CT)
            lengths = [length // stride for length in lengths]
            valid = [(length - kernel) // stride + 1 for length in valid]
            if i < len(self.norms):
                x_1CT = self._normed(self.norms[i], x_1CT, lengths, valid)
            x_1CT = F.gelu(x_1CT)
        rows = x_1CT[0].T.split([*lengths[:-1], x_1CT.shape[2] - sum(lengths[:-1])])
        return torch.cat([row[:n] for row, n in zip(rows, valid, strict=True)])

    def _normed(self, norm: nn.Module, x_1CT: Tensor, lengths: list[int], valid: list[int]) -> Tensor:
        if isinstance(norm, nn.LayerNorm):
            return norm(x_1CT.transpose(1, 2)).transpose(1, 2)
        rows = x_1CT.split([*lengths[:-1], x_1CT.shape[2] - sum(lengths[:-1])], dim=2)
        parts = [part for row, n in zip(rows, valid, strict=True) for part in (norm(row[..., :n]), row[..., n:])]
        return torch.cat(parts, dim=2)


class ConvolutionalPositions(nn.Module):
    """What wav2vec 2.0 adds for positions: a wide grouped convolution over a row's vectors, with weight norm and GELU.

    Rows lie with zeros between them, as many as half of the kernel, so that none sees another.
    """

    def __init__(self, width: int, *, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        self.kernel = kernel
        convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(convolution.weight, std=2 / math.sqrt(kernel * width))
        nn.init.zeros_(convolution.bias)
        self.convolution = nn.utils.parametrizations.weight_norm(convolution, dim=2)

    def forward(self, x_ND: Float[Tensor, "N D"], tokens: Tokens) -> Float[Tensor, "N D"]:
        gap, lengths_B = self.kernel // 2, tokens.lengths_B
        row_N = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B, output_size=len(x_ND))
        place_N = (torch.arange(len(x_ND)) + gap * row_N).to(x_ND.device, non_blocking=True)
        apart_SD = x_ND.new_zeros(len(x_ND) + gap * len(lengths_B), x_ND.shape[1]).index_copy(0, place_N, x_ND)
        y_DS = self.convolution(apart_SD.T[None])[0]
        return F.gelu(y_DS.T.index_select(0, place_N))


class FrameConvolutions(nn.Module):
    """Convolutions over frames and mel bands, of 3 by 3 places, a stride of 2 in both and ReLU: a token of `stack`
    frames becomes one vector.

    `stack` is 2 to the number of convolutions. Zeros stand around each row, so none reaches into another.
    """

    def __init__(self, channels: Sequence[int], *, stack: int, bins: int) -> None:
        super().__init__()
        if not channels or 2 ** len(channels) != stack or bins % stack:
            raise ValueError(
                "FrameConvolutions: each halves frames and bands, so wanted a stack of 2 to their number that divides "
                f"the bands, got {len(channels)} convolutions, a stack of {stack} and {bins} bands"
            )
        self.stack, self.bins, self.size = stack, bins, channels[-1] * bins // stack
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, 2, padding=(0, 1))
            for before, after in zip((1, *channels), channels, strict=False)
        )

    def forward(self, frame_NE: Float[Tensor, "N E"], lengths_B: Int[Tensor, "B"]) -> Float[Tensor, "N C"]:
        """`lengths_B` says how many tokens each row has."""
        x_FCH, frames_B = frame_NE.reshape(-1, 1, self.bins), lengths_B * self.stack
        for convolution in self.convolutions:
            row_F = torch.repeat_interleave(torch.arange(len(frames_B)), frames_B, output_size=len(x_FCH))
            place_F = (torch.arange(len(x_FCH)) + 2 * row_F + 1).to(x_FCH.device, non_blocking=True)
            apart_SCH = x_FCH.new_zeros(len(x_FCH) + 2 * len(frames_B), *x_FCH.shape[1:])
            apart_SCH = apart_SCH.index_copy(0, place_F, x_FCH)  # a zero before each row, one after it
            y_SCH = convolution(apart_SCH.movedim(0, 1)[None])[0].movedim(1, 0)
            kept_F = (torch.arange(len(x_FCH) // 2) + row_F[::2]).to(x_FCH.device, non_blocking=True)
            x_FCH, frames_B = F.relu(y_SCH.index_select(0, kept_F)), frames_B // 2
        return x_FCH.flatten(1)


class Speech(nn.Module):
    """Project(LayerNorm(what is heard)), where a replaced token is a learned vector, and positions if there are any.

    What is heard are the reader's mel frames, or what `convolutions` make of them or, where the reader gives that, of
    the waveform. With `noise`, what is projected of a replaced token are random numbers of that deviation, anew each
    time, in place of the learned vector.
    """

    def __init__(
        self,
        reader: FbankReader | WaveReader,
        *,
        width: int,
        convolutions: Convolutions | FrameConvolutions | None = None,
        positions: ConvolutionalPositions | None = None,
        noise: float = 0.0,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if (convolutions or isinstance(reader, WaveReader)) and _heard_by(reader) != _heard_by(convolutions):
            raise ValueError(
                "Speech: a WaveReader goes with Convolutions of its own layers, a FbankReader with none or with "
                f"FrameConvolutions of its stack and bins; got {type(reader).__name__} of {_heard_by(reader)}, "
                f"convolutions of {_heard_by(convolutions)}"
            )
        if isinstance(convolutions, FrameConvolutions):
            size = convolutions.size
        else:
            size = convolutions.convolutions[-1].out_channels if convolutions else reader.stack * reader.bins
        self.reader, self.convolutions, self.positions, self.noise = reader, convolutions, positions, noise
        self.norm = nn.LayerNorm(size, eps=eps)
        self.project = nn.Linear(size, width)
        self.dropout = Dropout(dropout)
        self.mask_D = None if noise else nn.Parameter(torch.empty(width).uniform_())

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        dtype = self.project.weight.dtype
        if self.convolutions is None:
            return self.norm(tokens["frame"].to(dtype))
        if isinstance(self.convolutions, FrameConvolutions):
            return self.norm(self.convolutions(tokens["frame"].to(dtype), tokens.lengths_B))
        wave = tokens.fields["wave"]
        return self.norm(self.convolutions(wave.values.to(dtype), wave.lengths_B.tolist()))

    def restored(self, tokens: Tokens, f_NE: Float[Tensor, "N E"]) -> Tokens:
        """The frames that have these features. What the norm takes from a frame, its own mean and deviation, is put
        back as it was. Raises ValueError for convolutions, which cannot be undone."""
        if self.convolutions is not None:
            raise ValueError("Speech: what convolutions give cannot be made a waveform again; predict mel frames")
        var_N1, mean_N1 = torch.var_mean(tokens["frame"].to(f_NE.dtype), 1, keepdim=True, correction=0)
        plain_NE = (f_NE - self.norm.bias) / self.norm.weight
        return tokens.with_values(frame=plain_NE * (var_N1 + self.norm.eps).sqrt() + mean_N1)

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        if self.mask_D is None:
            f_NE = torch.where(replaced_N[:, None], torch.randn_like(f_NE) * self.noise, f_NE)
        x_ND = self.dropout(self.project(f_NE).to(f_NE.dtype))  # under autocast the states keep their precision
        if self.mask_D is not None:
            x_ND = torch.where(replaced_N[:, None], self.mask_D, x_ND)
        return x_ND if self.positions is None else x_ND + self.positions(x_ND, tokens)


def _heard_by(one: object) -> tuple | None:
    """The layers of convolutions over the waveform, or the stack and bins of frames."""
    if isinstance(one, WaveReader | Convolutions):
        return tuple(one.layers)
    return None if one is None else (one.stack, one.bins)
