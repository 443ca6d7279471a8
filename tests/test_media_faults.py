"""Files that are damaged, lie about themselves or want too much: each costs its sample alone, with a cause."""

import io
import struct
import warnings
import zipfile
import zlib

import fake_decoders
import numpy as np
import pytest
import torch
from PIL import Image

from mmpre.data.contract import AdapterError, check_tokens
from mmpre.data.decoder import Decoder
from mmpre.data.index import open_shards
from mmpre.data.loader import LoadingError, MicroBatches, Slot
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.data.units import Units
from mmpre.tokens import Ragged, Tokens
from mmpre.view import View


def sample(**members):
    return Sample("k7", "a.tar", "digest", {name.replace("_", "."): data for name, data in members.items()})


def cause(read):
    with pytest.raises(BadMember) as caught:
        read()
    assert caught.value.member and caught.value.detail
    return caught.value.cause


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def png_header(width, height, bits=1, colour=0):
    """A PNG that announces any size, with a body of a few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


# ---- pictures ----


@pytest.mark.fault("B1")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_picture_cut_anywhere_is_told(kind):
    suffix = {"JPEG": "jpg"}.get(kind, kind.lower())
    whole = encoded(noise(48, 40), kind)
    ends = [len(whole) * i // 60 for i in range(60)]
    for end in ends:
        assert cause(lambda end=end: sample(**{suffix: whole[:end]}).image()) in ("broken picture", "picture too large")


@pytest.mark.fault("B3")
@pytest.mark.parametrize("size", [(13_000, 13_000), (2**31 - 1, 1), (1, 2**31 - 1), (40_000, 40_000), (0, 5)])
def test_a_picture_that_would_be_too_large_is_refused_from_its_header(size):
    read = sample(png=png_header(*size)).image
    assert cause(read) == ("broken picture" if 0 in size else "picture too large")


@pytest.mark.fault("B3")
def test_text_in_a_picture_cannot_unpack_to_any_size():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "x" * (80 << 20), zip=True)
    assert cause(sample(png=encoded(noise(4, 4), "PNG", pnginfo=info)).image) == "broken picture"


@pytest.mark.fault("B5")
@pytest.mark.parametrize(
    ("suffix", "data", "expected"),
    [
        ("jpg", encoded(noise(8, 8), "PNG"), "wrong type"),
        ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "broken picture"),
        ("png", encoded(noise(8, 8), "TIFF"), "broken picture"),
        ("jpg", encoded(noise(8, 8), "PPM"), "broken picture"),
        ("jpg", b"<!DOCTYPE html><html>moved</html>", "broken picture"),
        ("jpg", b"", "broken picture"),
    ],
)
def test_the_kind_must_be_allowed_and_fit_the_suffix(suffix, data, expected):
    assert cause(sample(**{suffix: data}).image) == expected


@pytest.mark.fault("B6")
def test_pictures_of_every_kind_become_rgb():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cmyk = sample(jpg=encoded(noise(9, 7, "CMYK"), "JPEG")).image()
        assert (cmyk.mode, cmyk.size) == ("RGB", (9, 7))
        deep = Image.fromarray((np.arange(12, dtype=np.uint16) * 5461).reshape(3, 4))
        assert (
            np.asarray(sample(png=encoded(deep, "PNG")).image())[..., 0].tolist()
            == ((np.arange(12) * 5461) >> 8).reshape(3, 4).tolist()
        )
        clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
        clear.putpixel((1, 0), (255, 0, 0, 255))
        for kind in (clear, clear.convert("P")):
            seen = np.asarray(
                sample(png=encoded(kind, "PNG", **({"transparency": 0} if kind.mode == "P" else {}))).image()
            )
            assert seen.shape == (1, 2, 3)
        assert np.asarray(sample(png=encoded(clear, "PNG")).image()).tolist() == [[[255, 255, 255], [255, 0, 0]]]
        frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
        first = sample(gif=encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).image()
        assert first.getpixel((0, 0)) == (255, 0, 0)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        assert sample(jpg=encoded(noise(20, 10), "JPEG", exif=exif)).image().size == (10, 20)
        for size in ((1, 1), (1, 20_000), (20_000, 1)):
            assert sample(png=encoded(noise(*size), "PNG")).image().size == size
        for mode in ("1", "L", "LA", "P"):
            assert sample(png=encoded(noise(5, 6).convert("RGBA").convert(mode), "PNG")).image().size == (5, 6)


# ---- text, JSON, arrays ----


@pytest.mark.fault("B12")
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"caf\xe9", "not UTF-8"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not UTF-8"),
        (b"", "empty text"),
        (b" \t\r\n\xc2\xa0", "empty text"),
        (b"\0\0\0", "empty text"),
        (b"a " * (25 << 20), "text too long"),
    ],
)
def test_a_text_that_is_none_is_told(data, expected):
    assert cause(sample(txt=data).text) == expected


@pytest.mark.fault("B12")
def test_nul_characters_leave_a_text():
    assert sample(txt=b"a\0b").text() == "ab"


@pytest.mark.fault("B13")
@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"[" * 100_000, "nested more than 100 deep"),
        (b'{"a":' * 100_000, "nested more than 100 deep"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b"[NaN]", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"[1e999]", "1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "a whole number of 5000 digits"),
        (rb'["\ud800"]', "half of a surrogate pair"),
        (b'["\xff"]', "is not UTF-8"),
        (b"", "Expecting value"),
        (b"{'a': 1}", "line 1, column 2"),
        (b"[1] [2]", "Extra data"),
        (b"[" + b"0," * (3 << 20) + b"0]", "is longer than"),
    ],
)
def test_json_that_is_not_accepted_says_why(data, detail):
    with pytest.raises(BadMember, match="json") as caught:
        sample(json=data).json()
    assert caught.value.cause == "bad JSON" and detail in caught.value.detail


def test_a_whole_pair_of_surrogates_is_a_character():
    assert sample(json=rb'["\ud83d\ude00"]').json() == ["\N{GRINNING FACE}"]


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.fault("B14", "G2")
def test_arrays_are_numbers_of_the_size_that_they_have():
    for array in (np.arange(6.0).reshape(2, 3), np.arange(4, dtype=">i2"), np.asfortranarray(np.ones((2, 2)))):
        read = sample(npy=npy(array)).array()
        assert (read == array).all() and read.shape == array.shape and read.dtype.isnative
    assert cause(sample(npy=npy(np.array([object()]), allow_pickle=True)).array) == "array of objects"
    assert cause(sample(npy=npy(np.array(["text"]))).array) == "array of objects"
    claims = npy(np.zeros(4)).replace(b"(4,)", b"(10**15,)".ljust(4)[:4])
    assert cause(sample(npy=claims).array) == "broken array"
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
    assert (
        cause(sample(npy=b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(80)).array)
        == "broken array"
    )
    for end in range(0, 160, 7):
        assert cause(lambda end=end: sample(npy=npy(np.zeros(4))[:end]).array()) == "broken array"


@pytest.mark.fault("B4")
def test_an_archive_cannot_unpack_to_more_than_the_limit_or_than_it_claims():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(3), b=np.ones((2, 2)))
    read = sample(npz=buffer.getvalue()).arrays()
    assert read.keys() == {"a", "b"} and read["b"].shape == (2, 2)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("a.npy", "w") as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
    assert len(bomb.getvalue()) < 400_000
    assert cause(sample(npz=bomb.getvalue()).arrays) == "array too large"
    lying = bomb.getvalue().replace(struct.pack("<I", 300 << 20), struct.pack("<I", 1 << 10))
    assert cause(sample(npz=lying).arrays) == "broken array"
    assert cause(sample(npz=b"PK\x03\x04").arrays) == "broken array"


# ---- readers that break the protocol, and decoders that break ----


class Reader:
    suffixes = ("bin",)

    def __init__(self, make):
        self.make = make

    def tokenize(self, sample, draw):
        return self.make(sample)


def unchecked(kind, **fields):
    """An object as a plugin may make it, without the checks that tests put on annotated shapes."""
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def tokens(special_N, lengths_B):
    return unchecked(Tokens, special_N=special_N, lengths_B=torch.tensor(lengths_B), fields={})


@pytest.mark.fault("B15")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "wanted Tokens (see Tokens.of_row), got NoneType"),
        (
            tokens(torch.zeros(2), [2]),
            "wanted special_N as whole numbers of shape [N], got torch.float32 of shape [2]",
        ),
        (
            tokens(torch.zeros(2, 2).long(), [2]),
            "got torch.int64 of shape [2, 2]",
        ),
        (
            tokens(torch.zeros(2).long(), [3]),
            "wanted lengths_B [2], as many as special_N has, got [3]",
        ),
        (
            Tokens.of_row(torch.full((2,), -1), x=Ragged(torch.ones(4), torch.tensor([2]))),
            "wanted lengths_B [4] of field 'x', as it has values, got [2]",
        ),
        (
            Tokens.of_row(torch.full((2,), -1), x=unchecked(Ragged, values=np.ones(2), lengths_B=torch.tensor([2]))),
            "got ndarray",
        ),
        (
            Tokens.of_row(torch.full((2,), -1), x=Ragged(torch.ones(2), torch.tensor([2]), "y")),
            "to refer to one of ['x'] or to tokens, got 'y'",
        ),
    ],
)
def test_a_reader_that_breaks_the_protocol_is_named_with_the_sample(made, message):
    with pytest.raises(AdapterError) as caught:
        check_tokens(made, "sound", Reader(None), sample(bin=b""))
    assert str(caught.value).startswith("Reader (role 'sound'), sample 'k7' of a.tar: wanted ")
    assert message in str(caught.value) and str(caught.value).endswith("mend the reader's tokenize")


@pytest.mark.fault("B15")
def test_numbers_that_are_not_finite_cost_the_sample():
    bad = Tokens.of_row(torch.full((2,), -1), x=torch.tensor([1.0, float("nan")]))
    with pytest.raises(BadMember, match="Reader made NaN or infinity of it") as caught:
        check_tokens(bad, "sound", Reader(None), sample(bin=b""))
    assert (caught.value.cause, caught.value.member) == ("not finite", "bin")


def stream(tmp_path, contents, make):
    """The rows and holes of one micro-batch over samples with these contents."""
    with shard_writer(tmp_path, prefix="d") as sink:
        for i, data in enumerate(contents):
            sink.write({"__key__": f"k{i:02d}", "bin": data})
    units = Units(ShardReader(open_shards([str(path) for path in sink.paths])))
    reader = Reader(make)
    made = MicroBatches(units, {"t": (View(), {"sound": reader})}, seed=0, stage=0, micro_batches=1, block=4, window=8)
    return made[Slot(0, 0, "t", 0, len(contents))]


@pytest.mark.fault("B15")
def test_rows_of_another_shape_are_told_with_both_samples(tmp_path):
    def make(sample):
        return Tokens.of_row(torch.full((2,), -1), x=torch.ones(2, 4 if sample.key == "k03" else 3))

    with pytest.raises(LoadingError, match=r"role 'sound': its reader made .*\[\*, [34]\].* of sample 'k\d\d' and"):
        stream(tmp_path, [b"x"] * 6, make)


@pytest.mark.fault("B9", "B10", "B11")
def test_a_run_goes_on_without_the_files_that_break_a_decoder_in_the_same_order(tmp_path):
    decoder = Decoder(fake_decoders.decode, seconds=0.5, max_bytes=256 << 20, recycle_bytes=128 << 20)

    def make(sample):
        value = decoder(sample.members["bin"], "bin")[""]
        return Tokens.of_row(torch.full((1,), -1), x=torch.tensor([[len(value)]]))

    good = [b"x " + bytes(i) for i in range(12)]
    bad = {2: b"hang", 5: b"segfault", 6: b"raise", 9: b"bomb"}
    whole = stream(tmp_path / "whole", good, make)
    broken = stream(tmp_path / "broken", [bad.get(i, data) for i, data in enumerate(good)], make)
    decoder.close()
    assert broken.units == whole.units
    assert sorted((hole.key, hole.cause, hole.modality) for hole in broken.holes) == [
        ("k02", "decoder hangs", "sound"), ("k05", "decoder crashed", "sound"), ("k06", "cannot be decoded", "sound"),
        ("k09", "decoder out of memory", "sound"),
    ]  # fmt: skip
    kept = [key for key in whole.parts[0].keys if int(key[1:]) not in bad]
    assert broken.parts[0].keys == kept
    values = dict(zip(whole.parts[0].keys, whole.parts[0].clean["sound"]["x"][:, 0].tolist(), strict=True))
    assert broken.parts[0].clean["sound"]["x"][:, 0].tolist() == [values[key] for key in kept]
