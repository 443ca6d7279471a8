"""What every modality must keep to, as plain functions that its own tests call: `check_modality(modality, samples)`.

    def test_it_keeps_the_contract():
        check_modality(WristMotion(width=32), [sample(0), sample(1), sample(2)])

A check that fails raises AssertionError and says what was wanted.
"""
# N tokens of the packed batch, M replaced ones, D model width

import copy
import pickle
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.modality import Modality, Reader
from mmpre.tokens import Tokens

DAMAGES = 60  # of each member of a sample


def check_modality(
    modality: Modality, samples: Sequence[Sample], *, visible: Sequence[str] = ("position",), tolerance: float = 1e-5
) -> None:
    """All checks below. Give at least two samples, of different lengths where the modality has such.

    `visible` names the fields, one entry a token, that a replaced token may show, such as where it stands.
    """
    _require(isinstance(modality, nn.Module) and isinstance(modality, Modality),
             "a modality must be an nn.Module with a reader, features and embed", type(modality).__name__)  # fmt: skip
    _require(len(samples) >= 2, "at least two samples are needed to try how rows lie together", f"{len(samples)}")
    check_reader(modality.reader, samples)
    check_bad_input(modality.reader, samples[0])
    rows = [modality.reader.tokenize(sample, _draw(i)) for i, sample in enumerate(samples)]
    training = modality.training
    try:
        modality.eval()
        check_packing(modality, rows, tolerance)
        check_hiding(modality, rows, visible, tolerance)
        check_gradients(modality, rows)
        check_devices(modality, rows)
    finally:
        modality.train(training)
        modality.zero_grad()


def check_reader(reader: Reader, samples: Sequence[Sample]) -> None:
    """The reader can be sent to workers, and what it makes depends on the sample and the draw alone."""
    _require(isinstance(reader, Reader) and not isinstance(reader.suffixes, str) and len(reader.suffixes) > 0,
             "a reader must have suffixes (a tuple of names) and tokenize", repr(reader))  # fmt: skip
    try:
        again = pickle.loads(pickle.dumps(reader))
    except Exception as e:
        raise AssertionError(f"check_reader: a reader must be picklable, for loading workers; got {e!r}") from e
    first = None
    for i, sample in enumerate(samples):
        tokens = reader.tokenize(sample, _draw(i))
        _require(isinstance(tokens, Tokens), "tokenize must return Tokens", type(tokens).__name__)
        _require(len(tokens) > 0, "a sample that gives no token must raise BadMember", f"sample {sample.key}")
        _check_fields(tokens)
        kinds = {name: (one.values.dtype, one.values.shape[1:], one.refers_to) for name, one in tokens.fields.items()}
        first = first or kinds
        _require(kinds == first, "all samples must give the same fields, types and widths", f"{first} and {kinds}")
        for other in (reader, again):
            _same(tokens, other.tokenize(sample, _draw(i)), "the same sample and draw must give the same tokens")
        _same(tokens, reader.tokenize(sample, _draw(i, step=7)), "a row's tokens must not depend on the step")
        _check_ordinary(tokens)
        if getattr(reader, "windowed", False):
            _check_windows(reader, sample)


def check_bad_input(reader: Reader, sample: Sample) -> None:
    """Damaged, empty and missing members raise BadMember, with a cause, and nothing else; some damage goes unseen."""
    generator = torch.Generator().manual_seed(0)

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    read = [suffix for suffix in reader.suffixes if suffix in sample.members]
    _try(reader, Sample("damaged-missing", sample.shard, sample.digest, {}), "a missing member", must_fail=True)
    for suffix in read:
        data = sample.members[suffix]
        damaged = [b"", b"\0", data[: len(data) // 2], bytes(range(256)), b"\xff" * len(data)]
        for _ in range(DAMAGES):
            one = bytearray(data)
            for _ in range(1 + number(4)):
                one[number(min(len(one), 256) if number(2) else len(one))] = number(256)
            damaged.append(bytes(one[: number(len(one)) + 1]) if number(3) == 0 else bytes(one))
        for i, one in enumerate(damaged):
            members = dict(sample.members) | {suffix: one}
            _try(reader, Sample(f"damaged-{suffix}-{i}", sample.shard, sample.digest, members), f"a damaged .{suffix}",
                 must_fail=not one and len(read) == 1)  # fmt: skip


def check_packing(modality: Modality, rows: Sequence[Tokens], tolerance: float = 1e-5) -> None:
    """A row among others is embedded as it is alone, and gives as many vectors as it has tokens."""
    packed, count = _embedded(modality, Tokens.pack(rows)), sum(map(len, rows))
    _require(packed.ndim == 2 and packed.is_floating_point() and len(packed) == count,
             "embed must return one vector for each token", f"{list(packed.shape)} for {count}")  # fmt: skip
    _require(bool(packed.isfinite().all()), "embed must return finite numbers", "NaN or infinity")
    for order in (list(range(len(rows))), list(range(len(rows)))[::-1]):
        mixed = _embedded(modality, Tokens.pack([rows[i] for i in order])).split([len(rows[i]) for i in order])
        for i, together in zip(order, mixed, strict=True):
            off = _apart(together, _embedded(modality, rows[i]))
            _require(off <= tolerance, "a row among others must be embedded as it is alone", f"{off:.2g} off")


def check_hiding(
    modality: Modality, rows: Sequence[Tokens], visible: Sequence[str] = ("position",), tolerance: float = 1e-5
) -> None:
    """What a replaced token was changes nothing in `embed`, with the same random numbers; that it is replaced does."""
    tokens = Tokens.pack(rows)
    ordinary = (tokens.special_N < 0).nonzero().squeeze(1)
    index_M = ordinary[::2]
    replaced_N = torch.zeros(len(tokens), dtype=torch.bool)
    replaced_N[index_M] = True
    values = {}
    for name, one in tokens.fields.items():
        if name not in visible and one.refers_to is None and torch.equal(one.lengths_B, tokens.lengths_B):
            values[name] = one.values.clone()
            values[name][index_M] = one.values[ordinary.roll(len(ordinary) // 3 + 1)[::2]]  # of other tokens
    other = tokens.with_values(**values)
    with torch.no_grad():
        f_NE = modality.features(tokens)
        other_NE = torch.where(replaced_N[:, None], modality.features(other) + torch.randn_like(f_NE), f_NE)
        shown_ND = _seeded(modality, f_NE, tokens, replaced_N)
        off = _apart(shown_ND, _seeded(modality, other_NE, other, replaced_N))
        _require(off <= tolerance, "embed must not show what a replaced token was (its features, or a field that is "
                 f"not named in visible={tuple(visible)})", f"{off:.2g} off")  # fmt: skip
        plain_ND = _seeded(modality, f_NE, tokens, torch.zeros_like(replaced_N))
    same = (shown_ND[index_M] == plain_ND[index_M]).all(1).all()
    _require(not same, "embed must show a replaced token otherwise than an ordinary one", "the same vectors")


def check_gradients(modality: Modality, rows: Sequence[Tokens]) -> None:
    """Every parameter that learns gets a gradient, from rows of which some tokens are replaced."""
    tokens = Tokens.pack(rows)
    modality.zero_grad()
    x_ND = modality.embed(modality.features(tokens), tokens, torch.arange(len(tokens)) % 2 == 0)
    (x_ND * torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    without = [name for name, one in modality.named_parameters()
               if one.requires_grad and (one.grad is None or not one.grad.any())]  # fmt: skip
    _require(not without, "gradients must reach every parameter", f"none in {', '.join(without)}")


def check_devices(modality: Modality, rows: Sequence[Tokens]) -> None:
    """Nothing stays behind on the CPU and nothing waits for the device: tried on torch's meta device, without data."""
    moved, tokens = copy.deepcopy(modality).to("meta"), Tokens.pack(rows).to("meta")
    try:
        x_ND = _embedded(moved, tokens)
    except (RuntimeError, NotImplementedError) as e:
        raise AssertionError(
            "check_devices: features and embed must run where the module is, without reading values back (register "
            f"tensors as buffers; lengths_B stay on the CPU); on the meta device: {e}"
        ) from e
    _require(x_ND.device.type == "meta", "embed must answer on the module's device", str(x_ND.device))


def _check_fields(tokens: Tokens) -> None:
    sizes = {"tokens": len(tokens)} | {name: len(one.values) for name, one in tokens.fields.items()}
    for name, one in tokens.fields.items():
        _require(one.lengths_B.tolist() == [len(one.values)], f"field {name!r} of one row must have its own length",
                 f"lengths {one.lengths_B.tolist()} for {len(one.values)} values")  # fmt: skip
        if one.refers_to is not None and len(one.values):
            low, high = one.values.aminmax()
            _require(0 <= low and high < sizes[one.refers_to], f"field {name!r} must refer to entries of "
                     f"{one.refers_to!r}, of which there are {sizes[one.refers_to]}", f"{low} to {high}")  # fmt: skip


def _check_ordinary(tokens: Tokens) -> None:
    ordinary = int((tokens.special_N < 0).sum())
    _require(ordinary > 0, "a row must have a token that is not special, or raise BadMember", "none")


def _check_windows(reader: Reader, sample: Sample) -> None:
    _require(isinstance(getattr(reader, "digest", None), str), "a reader that cuts windows needs a digest (a text)",
             repr(getattr(reader, "digest", None)))  # fmt: skip
    announced = [int(length) for length in reader.windows(sample)]
    made = [len(reader.tokenize(sample.at_window(window), _draw(0))) for window in range(len(announced))]
    _require(made == announced, "windows(sample) must announce the tokens of each window", f"{announced}, made {made}")


def _try(reader: Reader, sample: Sample, what: str, *, must_fail: bool) -> None:
    calls: list[Callable[[], object]] = [lambda: reader.tokenize(sample, _draw(0))]
    if getattr(reader, "windowed", False):
        calls.append(lambda: reader.windows(sample))
    for call in calls:
        try:
            call()
        except BadMember as e:
            _require(bool(e.cause and e.member), "BadMember needs a cause and a member", f"{e.cause!r}, {e.member!r}")
            continue
        except Exception as e:
            raise AssertionError(
                f"check_bad_input: {what} must raise BadMember(cause, member, detail), which costs its sample alone; "
                f"got {type(e).__name__}: {e} for {sample.key}"
            ) from e
        _require(not must_fail, f"{what} must raise BadMember", "no error")


def _embedded(modality: Modality, tokens: Tokens) -> Float[Tensor, "N D"]:
    with torch.no_grad():
        return modality.embed(modality.features(tokens), tokens, _nothing(tokens))


def _seeded(
    modality: Modality, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]
) -> Float[Tensor, "N D"]:
    """As embedded with the same random numbers each time: noise may stand for a replaced token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return modality.embed(f_NE, tokens, replaced_N)


def _nothing(tokens: Tokens) -> Bool[Tensor, "N"]:
    return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.special_N.device)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")


def _same(one: Tokens, other: Tokens, wanted: str) -> None:
    _require(torch.equal(one.special_N, other.special_N) and one.fields.keys() == other.fields.keys(), wanted, "others")
    for name, field in one.fields.items():
        equal = torch.equal(field.values.nan_to_num(), other.fields[name].values.nan_to_num())
        _require(equal, wanted, f"another {name}")


def _draw(unit: int, step: int = 0) -> Draw:
    return Draw.row(0, 0, step, epoch=0, unit=unit)


def _require(holds: bool, wanted: str, got: str) -> None:
    if not holds:
        raise AssertionError(f"check_modality: {wanted}; got {got}")
