import gzip
import hashlib
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
import webdataset

from mmpre.command_line.cli import main
from mmpre.data import fasta
from mmpre.data.bases import codes_of, letters_of, reverse_complement
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units, measure
from mmpre.draw import Draw
from mmpre.masking.corrupt import HideAll
from mmpre.modalities import dna
from mmpre.modalities.dna import CLS, SEP, Bases, Dna, DnaReader, Kmers, Pieces
from mmpre.modality import Modality, Reader
from mmpre.tokens import Tokens

DRAW = Draw.row(0, 0, 0, epoch=0, unit=0)


def bases(count, letters="ACGT", seed=0):
    return "".join(np.random.default_rng(seed).choice(list(letters), count))


def written(*records, width=60):
    """A FASTA file of records."""
    lines = []
    for number, record in enumerate(records):
        lines += [f">record{number} made up", *(record[i : i + width] for i in range(0, len(record), width))]
    return "\n".join(lines).encode() + b"\n"


def sample(*records, window=0, kind="fa", data=None):
    data = written(*records) if data is None else data
    return Sample(hashlib.sha1(data).hexdigest(), "shard", "digest", {kind: data}, window)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A tokenizer trained by the command line on shards of DNA with a word that comes again and again."""
    folder = tmp_path_factory.mktemp("dna")
    with webdataset.ShardWriter(str(folder / "a-%03d.tar"), verbose=0) as sink:
        for i in range(4):
            text = written("".join(bases(7, seed=9 * i + j) + "GATTACA" for j in range(200)).replace("CCC", "cNc"))
            sink.write({"__key__": f"k{i}", "fa.gz": text})  # which compresses it
    main(["data", "tokenizer", str(folder), "--kind", "letters", "--modality", dna.__file__, "--vocab", "60",
          "--out", str(folder / "tokenizer.json")])  # fmt: skip
    return folder / "tokenizer.json"


@pytest.fixture(params=["bases", "3-mers", "6-mers", "3-mers, overlapping", "pieces"])
def cutter(request, learned):
    return {"bases": Bases, "3-mers": lambda: Kmers(3), "6-mers": Kmers, "pieces": lambda: Pieces(learned),
            "3-mers, overlapping": lambda: Kmers(3, overlap=True)}[request.param]()  # fmt: skip


def test_a_sequence_stands_between_cls_and_sep_and_can_be_written_again(cutter):
    reader = DnaReader(cutter, length=200)
    assert isinstance(reader, Reader)
    for text in (bases(200), bases(101), bases(90) + "N" + bases(30, seed=1), "N" + bases(50) + "NNNN" + bases(20)):
        tokens = reader.tokenize(sample(text), DRAW)
        assert reader.letters(tokens) == text
        assert tokens.special_N.tolist() == [CLS, *[-1] * (len(tokens) - 2), SEP]
        assert tokens["ids"][0] == cutter.cls and tokens["ids"][-1] == cutter.sep and tokens["ids"].max() < cutter.size
        assert tokens["position"].tolist() == list(range(len(tokens)))
        for i, first in zip(tokens["ids"][1:-1].tolist(), tokens["base"][1:-1].tolist(), strict=True):
            piece = cutter.letters([i])
            assert text[first : first + len(piece)] == piece or "N" in text[first : first + 3]
    without = DnaReader(cutter, length=200, ends=False).tokenize(sample(bases(77)), DRAW)
    assert (without.special_N == -1).all() and reader.letters(without) == bases(77)


def test_overlapping_words_come_from_every_base_and_hide_behind_an_n():
    made = Kmers(3, overlap=True)
    ids_W, first_W, last_W = made.cut(codes_of(b"ACGTNAC", "fa"))
    assert [made.letters([i]) for i in ids_W[:2]] == ["ACG", "CGT"] and ids_W[2:].tolist() == [4**3 + 4] * 3
    assert (first_W.tolist(), last_W.tolist()) == ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7])
    assert made.letters(ids_W) == "ACGTNNN", "no word of the last two bases is left"


def test_words_side_by_side_leave_single_bases_before_an_n_and_at_the_end():
    made = Kmers(3)
    ids_W, first_W, last_W = made.cut(codes_of(b"ACGTTNNACGTACC", "fa"))
    assert [made.letters([i]) for i in ids_W] == ["ACG", "T", "T", "N", "N", "ACG", "TAC", "C"]
    assert (last_W - first_W).tolist() == [3, 1, 1, 1, 1, 3, 3, 1]


def test_learned_pieces_hold_what_comes_again(learned):
    pieces = [Pieces(learned).letters([i]) for i in range(5, Pieces(learned).size)]
    assert set("ACGTN") <= set(pieces) and any("GATTACA" in piece for piece in pieces)
    tokens = DnaReader(Pieces(learned)).tokenize(sample("GATTACA" * 20), DRAW)
    assert len(tokens) < 40


def test_a_tokenizer_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Pieces: no tokenizer\.json can be read from"):
        Pieces(tmp_path / "tokenizer.json")
    with pytest.raises(SystemExit):
        main(["data", "tokenizer", "x.tar", "--modality", "text", "--out", "y.json"])
    assert "modality text does not say what its texts are (corpus); name --suffix instead" in capsys.readouterr().err


def test_repeats_are_kept_as_a_field_and_other_letters_are_told_apart():
    tokens = DnaReader(ends=False).tokenize(sample("ACgtUuRyn"), DRAW)
    assert DnaReader().letters(tokens) == "ACGTTTNNN"
    assert tokens["lower"].tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 1]
    words = DnaReader(Kmers(3), ends=False).tokenize(sample("ACgttACC"), DRAW)
    assert words["lower"].tolist() == [1, 2, 0, 0]
    over = DnaReader(Kmers(3, overlap=True), ends=False).tokenize(sample("ACgttACC"), DRAW)
    assert over["lower"].tolist() == [1, 2, 3, 2, 1, 0]


def test_the_other_strand():
    assert letters_of(reverse_complement(codes_of(b"AACGtn", "fa"))) == "naCGTT"
    code_L = codes_of(bases(999, "ACGTNacgtn").encode(), "fa")
    assert (reverse_complement(reverse_complement(code_L)) == code_L).all()
    text = bases(60)
    other = DnaReader(reverse=1.0, length=60).tokenize(sample(text), DRAW)
    wanted = text[::-1].translate(str.maketrans("ACGT", "TGCA"))
    assert DnaReader().letters(other) == wanted
    draws = [Draw.row(0, 0, 0, epoch=0, unit=i) for i in range(400)]
    half = [DnaReader().letters(DnaReader(reverse=0.5).tokenize(sample(text), draw)) for draw in draws]
    assert set(half) == {text, wanted} and 150 < half.count(wanted) < 250
    assert DnaReader(reverse=0.5).digest == DnaReader().digest, "both strands have the same windows"


@pytest.mark.parametrize("sizes", [(1000,), (64, 65, 1, 200), (63,), (0, 130, 0)])
def test_windows_hold_every_base_once_and_end_where_records_end(cutter, sizes):
    records = [bases(size, seed=i) for i, size in enumerate(sizes)]
    reader = DnaReader(cutter, length=64)
    lengths = reader.windows(sample(*records))
    tokens = [reader.tokenize(sample(*records, window=w), DRAW) for w in range(len(lengths))]
    assert [len(one) for one in tokens] == lengths and max(lengths) <= reader.longest
    assert len(lengths) == sum(-(-size // 64) for size in sizes)
    assert "".join(map(reader.letters, tokens)) == "".join(records)
    for w, one in enumerate(tokens):
        name, start, end = reader.place(sample(*records, window=w))
        number = int(name.removeprefix("record").removesuffix(" made up"))
        assert records[number][start:end] == reader.letters(one) and start % 64 == 0


def test_windows_may_overlap():
    text = bases(1000)
    reader = DnaReader(length=100, stride=30)
    places = [reader.place(sample(text, window=w))[1:] for w in range(len(reader.windows(sample(text))))]
    assert places == [(start, min(start + 100, 1000)) for start in range(0, 901, 30)]
    assert len(DnaReader(length=100, stride=30).windows(sample(bases(99)))) == 1


def test_windows_of_ns_are_left_out():
    text = bases(100) + "N" * 250 + bases(100) + "n" * 30 + bases(20)
    reader = DnaReader(length=50)
    kept = [reader.place(sample(text, window=w))[1] for w in range(len(reader.windows(sample(text))))]
    few = [i for i in range(0, 500, 50) if text[i : i + 50].upper().count("N") <= 25]
    assert kept == few and 0 < len(few) < 10
    assert len(DnaReader(length=50, most_n=1.0).windows(sample(text))) == 10
    strict = DnaReader(length=50, most_n=0.0)
    assert len(strict.windows(sample(text))) == 4
    with pytest.raises(BadMember, match="more than 50% of each of its 2 windows is N") as caught:
        reader.windows(sample("N" * 80))
    assert caught.value.cause == "only N"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "not FASTA"),
        (b"ACGT\n", "not FASTA"),
        (b">name only", "empty sequence"),
        (b">a\n\n>b\n \n", "empty sequence"),
        (b">protein\nMEFLIP*\n", "not DNA"),
        (b">a\nAC-GT\n", "not DNA"),
        (b">a\nAC\xffGT\n", "not DNA"),
        (b"\x1f\x8bnonsense", "broken gzip"),
        (gzip.compress(written(bases(500)), mtime=0)[:90], "broken gzip"),
    ],
)
def test_a_member_that_is_no_dna_costs_its_sample(data, cause):
    for call in (lambda: DnaReader().windows(sample(data=data)), lambda: DnaReader().tokenize(sample(data=data), DRAW)):
        with pytest.raises(BadMember) as caught:
            call()
        assert (caught.value.cause, caught.value.member) == (cause, "fa")


def test_gzip_is_read_in_parts_and_never_beyond_the_limit(monkeypatch):
    text = bases(300)
    parts = b"".join(gzip.compress(part) for part in (written(text)[:100], written(text)[100:]))
    assert DnaReader().letters(DnaReader().tokenize(sample(data=parts, kind="fasta.gz"), DRAW)) == text
    monkeypatch.setattr(fasta, "MAX_BYTES", 100_000)
    bomb = gzip.compress(b">a\n" + b"A" * 50_000_000)
    tracemalloc.start()
    with pytest.raises(BadMember, match="more than 100,000 bytes; cut it into several samples"):
        DnaReader().windows(sample(data=bomb, kind="fa.gz"))
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.parametrize("data", [b"ACGT\nAC\n", gzip.compress(b"ACGTAC", mtime=0)])
def test_a_member_of_letters_alone_is_one_record(data):
    made = sample(data=data, kind="dna")
    assert DnaReader().place(made) == (made.key, 0, 6)
    assert DnaReader().letters(DnaReader().tokenize(made, DRAW)) == "ACGTAC"
    with pytest.raises(BadMember, match="there is no letter in it"):
        DnaReader().windows(sample(data=b" \n", kind="dna"))


def test_windows_line_ends_and_names_of_records():
    made = sample(data=b"\r\n>one two\r\nAC\r\nGT\r\n>three\r\nGG\r\n", window=1)
    assert DnaReader().place(made) == ("three", 0, 2)
    assert DnaReader().letters(DnaReader().tokenize(made.at_window(0), DRAW)) == "ACGT"


def test_a_pickled_reader_reads_the_same_and_takes_nothing_along(cutter):
    reader = DnaReader(cutter, length=100)
    before = len(pickle.dumps(reader))
    one = reader.tokenize(sample(bases(5000), window=7), DRAW)
    again = pickle.loads(pickle.dumps(reader))
    assert torch.equal(one["ids"], again.tokenize(sample(bases(5000), window=7), DRAW)["ids"])
    assert again.digest == reader.digest and len(pickle.dumps(reader)) == before


def test_the_digest_tells_what_changes_lengths(learned):
    cutters = [Bases(), Kmers(3), Kmers(4), Kmers(3, overlap=True), Pieces(learned)]
    more = [{}, {"length": 9}, {"stride": 5}, {"most_n": 0.1}, {"ends": False}, {"suffixes": ("fa",)}]
    assert len({DnaReader(one, **some).digest for one in cutters for some in more}) == 30


def test_members_are_read_once_for_their_windows(tmp_path, monkeypatch):
    with webdataset.ShardWriter(str(tmp_path / "a-%03d.tar"), verbose=0) as sink:
        for i in range(3):
            sink.write({"__key__": f"k{i}", "fa": written(bases(1000, seed=i))})
    reader = DnaReader(length=100)
    units = measure(Units(ShardReader(open_shards(tmp_path))), [reader], tmp_path / "cache")
    assert len(units) == 30 and units.lengths(np.arange(30)).tolist() == [102] * 30
    assert pickle.loads(pickle.dumps(units))._kept == {}, "what was read is not sent along"
    reads, read = [], units.reader.read
    monkeypatch.setattr(units.reader, "read", lambda number: reads.append(number) or read(number))
    made = {reader.letters(reader.tokenize(units.sample(unit), DRAW)) for unit in (17, 3, 28, 12, 0, 9, 17)}
    assert len(made) == 6 and sorted(reads) == [0, 1, 2]


def test_random_ids_are_pieces_without_n_and_masks_are_marked(cutter):
    reader = DnaReader(cutter)
    first, last = reader.cutter.free
    assert all(set(cutter.letters([i])) <= set("ACGTN") for i in (first, last - 1))
    assert not {cutter.cls, cutter.sep, cutter.mask} & set(range(first, last))
    assert reader.replacement().mask_id == cutter.mask


@pytest.mark.parametrize("positions", [False, True])
def test_the_embedding_is_the_piece_and_its_position_and_hides_what_is_replaced(cutter, positions):
    torch.manual_seed(0)
    module = Dna(DnaReader(cutter, length=64), width=8, positions=positions)
    assert isinstance(module, Modality)
    tokens = Tokens.pack([module.reader.tokenize(sample(bases(64, seed=i)), DRAW) for i in range(3)])
    nothing_N = torch.zeros(len(tokens), dtype=torch.bool)
    plain = module.embed(module.features(tokens), tokens, nothing_N)
    wanted = module.table.weight[tokens["ids"]] + (module.positions.weight[tokens["position"]] if positions else 0)
    torch.testing.assert_close(plain, wanted)
    index = torch.tensor([2, 4])
    hidden = HideAll()(tokens, index, DRAW)
    by_id = module.reader.replacement(mask=1.0, random=0.0)(tokens, index, DRAW)
    shown = module.embed(module.features(hidden.tokens), hidden.tokens, hidden.replaced_N)
    torch.testing.assert_close(shown, module.embed(module.features(by_id.tokens), by_id.tokens, nothing_N))
    assert not torch.equal(shown[index], plain[index])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"stride must lie between 1 and length, or bases.* got stride 9 and length 8"):
        DnaReader(length=8, stride=9)
    with pytest.raises(ValueError, match=r"most_n and reverse are shares, 0 to 1; got 0\.5 and 50"):
        DnaReader(reverse=50)
    with pytest.raises(ValueError, match="k must lie between 2 and 10, got 1; use Bases"):
        Kmers(1)
