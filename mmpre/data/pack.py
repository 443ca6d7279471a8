"""`mmpre data pack`: shards from one's own files, a folder or a table, ready to train on."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track

from mmpre.aside import check_vacant, folder_aside
from mmpre.data.naming import READ, cut_name, fault_of, kind_of, safe_key
from mmpre.data.shards import shard_writer
from mmpre.strict_json import JSONError, parse

MAX_TOLD = 10  # problems told one by one
TEXT = {"text": "txt", "caption": "txt", "label": "cls"}  # what a member's name means where the table holds the value
FILE = ("image", "audio", "video", "file")  # names of members that are files and go by their own suffix alone
SPLITS = ("train", "valid", "test")


class PackError(ValueError):
    """A source that cannot be packed as asked."""


@dataclass
class Problems:
    """What could not be packed, told together."""

    found: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f"\n  and {len(self.found) - MAX_TOLD} more" if len(self.found) > MAX_TOLD else ""
        return "\n  ".join(["", *self.found[:MAX_TOLD]]) + more


def pack_files(
    source: tyro.conf.Positional[Path],
    out: Path,
    pair: tuple[str, ...] = (),
    key: str | None = None,
    split: str | None = None,
    maxcount: int = 10_000,
    skip: bool = False,
) -> Path:
    """Make shards of your own files.

    A folder: files of the same name in the same folder are one sample. A name ends before the suffix, such as .jpg or
    .fa.gz; other dots in it become _ in the sample's key. A .csv, .tsv, .jsonl or .parquet: a row is one sample, made
    of the columns that --pair names.

    Args:
        source: A folder or a table.
        out: A new folder for the shards.
        pair: member=column, such as `--pair image=path text=caption`. A member `text`, `caption` or `label` takes the
            column's value; any other name says that the column holds the path of a file (from the table's folder).
            The file's suffix becomes the member's; a name other than `image`, `audio`, `video` or `file` stands before
            it (`seg=path`: seg.png).
        key: Column with a key for each sample; by default rows are numbered.
        split: Column (or for a folder `key`) whose value decides the split, so that what belongs together stays
            together: about 80, 10 and 10 percent go to train, valid and test.
        maxcount: Samples in a shard at most.
        skip: Leave out rows and files with problems instead of refusing the whole source.
    """
    problems = Problems()
    if source.is_dir():
        _check_folder(source, pair, key, split)
        samples = _folder(source, problems)
    else:
        samples = _table(source, pair, key, split, problems)
    _check_places(source, out)
    rows = list(samples)
    _check_keys(rows, problems)
    if problems.found and not skip:
        raise PackError(
            f"{source}: {len(problems.found)} problems (mend them, or leave them out with --skip):{problems}"
        )
    if not rows:
        raise PackError(f"{source}: nothing to pack was found{problems if problems.found else ''}")
    with folder_aside(out) as aside:
        counts = _write(rows, aside, maxcount, by_split=split is not None)
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    left_out = f", left out:{problems}" if problems.found else ""
    say = partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)
    say(f"{out}: {sum(counts.values())} samples ({told}){left_out}")
    for doubt in _doubts(rows, counts, split):
        say(f"{out}: {doubt}", style="yellow")
    return out


@dataclass(frozen=True)
class Entry:
    """A sample to be: where its members' contents are, or what they are."""

    key: str
    group: str
    members: Mapping[str, Path | bytes]


def _check_folder(source: Path, pair: Iterable[str], key: str | None, split: str | None) -> None:
    if asked := [name for name, value in (("--pair", pair), ("--key", key)) if value]:
        raise PackError(
            f"{source}: a folder has no columns, got {' and '.join(asked)}; leave that out (files of one name are one "
            "sample), or give a table"
        )
    if split not in (None, "key"):
        raise PackError(
            f"{source}: wanted --split key for a folder (the name of a file decides), got --split {split}; give a "
            "table to split by a column"
        )


def _folder(source: Path, problems: Problems) -> Iterator[Entry]:
    groups: dict[str, dict[str, Path]] = {}
    names: dict[str, Path] = {}  # that the keys are made of
    for path in sorted(source.rglob("*")):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(source).parts):
            continue
        stem, suffix = cut_name(path.name)
        if fault := fault_of(suffix):
            problems.found.append(f"{path}: {fault}")
            continue
        name = path.relative_to(source).with_name(stem)
        key = safe_key(str(name))
        if names.setdefault(key, name) != name:
            problems.found.append(f"{path}: its key would be {key!r}, which {names[key]} has too; rename one of them")
            continue
        members = groups.setdefault(key, {})
        if suffix in members:
            problems.found.append(f"{path}: there is another {members[suffix]} of the same name and kind")
            continue
        members[suffix] = path
    for key, members in groups.items():
        yield Entry(key, key, members)


def _table(
    source: Path, pair: Iterable[str], key: str | None, split: str | None, problems: Problems
) -> Iterator[Entry]:
    told = [_pair(one) for one in pair]
    pairs, targets = dict(told), [TEXT.get(name, name) for name, _ in told]
    if twice := sorted({one for one in targets if targets.count(one) > 1}):
        raise PackError(
            f"{source}: two columns would become the member {', '.join(twice)}; give each a name of its own"
        )
    if not pairs:
        raise PackError(f"{source}: say which columns to take, such as --pair image=path text=caption")
    columns, rows = _rows(source)
    wanted = [*pairs.values(), *([key] if key else []), *([split] if split else [])]
    if missing := sorted(set(wanted) - set(columns)):
        raise PackError(f"{source}: no column {', '.join(missing)}; it has {', '.join(map(str, columns))}")
    for number, row in enumerate(rows, 1):
        members = _members(source, pairs, row, number, problems)
        if members:
            name = safe_key(str(row[key])) if key else f"{number - 1:09d}"
            yield Entry(name, str(row[split]) if split else name, members)


def _members(
    source: Path, pairs: Mapping[str, str], row: Mapping[str, object], number: int, problems: Problems
) -> dict[str, Path | bytes]:
    members: dict[str, Path | bytes] = {}
    for name, column in pairs.items():
        value = row.get(column)
        if value is None or value == "":
            problems.found.append(f"row {number}: column {column} is empty")
            return {}
        if name in TEXT:
            if TEXT[name] in members:
                problems.found.append(f"row {number}: column {column} cannot be taken: another gives .{TEXT[name]} too")
                return {}
            members[TEXT[name]] = str(value).encode()
            continue
        path = (source.parent / str(value)).resolve()
        if not path.is_relative_to(source.parent.resolve()):
            problems.found.append(
                f"row {number}: {value} lies outside of the table's folder, at {path}; put the table into a folder "
                "above them, with paths from there"
            )
            return {}
        if not path.is_file():
            problems.found.append(f"row {number}: there is no file {value}")
            return {}
        suffix = cut_name(path.name)[1]
        member = suffix if name in FILE or suffix.startswith(f"{name}.") else f"{name}.{suffix}"
        why = fault_of(suffix) or (f"another column gives .{member} too" if member in members else "")
        if why:
            problems.found.append(f"row {number}: {value} cannot be taken: {why}")
            return {}
        members[member] = path
    return members


def _rows(source: Path) -> tuple[list[str], Iterable[Mapping[str, object]]]:
    kind = source.suffix.lower()
    if not source.is_file():
        raise PackError(f"{source}: there is no such folder or file")
    if kind in (".csv", ".tsv"):
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
            try:
                rows = list(reader)
            except (UnicodeDecodeError, csv.Error) as e:
                raise PackError(f"{source}: line {reader.line_num}: {e}; write it as UTF-8") from None
        return list(reader.fieldnames or []), rows
    if kind == ".jsonl":
        rows = []
        for number, line in enumerate(source.read_bytes().splitlines(), 1):
            if line.strip():
                try:
                    rows.append(_object(parse(line)))
                except JSONError as e:
                    raise PackError(f"{source}: line {number}: {e}") from None
        return sorted({column for row in rows for column in row}), rows
    if kind == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise PackError(f"{source}: Parquet needs pyarrow; get it with `pip install mmpre[parquet]`") from None
        try:
            table = pyarrow.parquet.read_table(source)
        except (pyarrow.ArrowException, OSError) as e:
            raise PackError(f"{source}: is no Parquet file ({e})") from None
        return table.column_names, table.to_pylist()
    raise PackError(f"{source}: wanted a folder, .csv, .tsv, .jsonl or .parquet, got {kind or 'no suffix'}")


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise JSONError(f"wanted an object, got {type(value).__name__}")
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not equals or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not column:
        raise PackError(f"--pair {text!r}: wanted member=column, such as image=path")
    return name, column


def _check_places(source: Path, out: Path) -> None:
    if out.resolve() == source.resolve() or (source.is_dir() and out.resolve().is_relative_to(source.resolve())):
        raise PackError(f"--out {out} lies inside of the source {source}; name another folder")
    try:
        check_vacant(out)
    except FileExistsError as e:
        raise PackError(f"--out {e}") from None


def _check_keys(rows: list[Entry], problems: Problems) -> None:
    twice = [key for key, count in Counter(entry.key for entry in rows).items() if count > 1]
    problems.found += [f"key {key!r} is given more than once (dots and blanks count as _)" for key in twice]
    seen: set[str] = set()
    rows[:] = [entry for entry in rows if not (entry.key in seen or seen.add(entry.key))]


def _write(rows: list[Entry], out: Path, maxcount: int, *, by_split: bool) -> dict[str, int]:
    counts: Counter[str] = Counter()
    splits = {entry.key: _split(entry.group) if by_split else "train" for entry in rows}
    for split in sorted(set(splits.values()), key=SPLITS.index):
        mine = [entry for entry in rows if splits[entry.key] == split]
        folder = out / split if by_split else out
        with shard_writer(folder, prefix=split, maxcount=maxcount) as sink:
            for entry in track(mine, f"packing {split}", console=Console(stderr=True), transient=True):
                members = {s: m if isinstance(m, bytes) else m.read_bytes() for s, m in entry.members.items()}
                sink.write({"__key__": entry.key, **members})
                counts[split] += 1
    (out / "card.json").write_text(json.dumps({"counts": dict(counts)}, indent=2) + "\n")
    return dict(counts)


def _split(group: str) -> str:
    """The rule of every data set here: a hash of the group's name decides (see data_tools/split.py)."""
    value = int(hashlib.sha1(group.encode()).hexdigest()[:8], 16) % 100
    return "test" if value < 10 else "valid" if value < 20 else "train"


def _doubts(rows: list[Entry], counts: Mapping[str, int], split: str | None) -> Iterator[str]:
    """What was packed as asked and may yet be of no use in training, with the ways out."""
    if unread := Counter(suffix for entry in rows for suffix in entry.members if suffix not in READ):
        told = ", ".join(f".{suffix} {count}" for suffix, count in unread.most_common(MAX_TOLD))
        own = "; --pair file=COLUMN keeps a file's own suffix" if any("." in suffix for suffix in unread) else ""
        yield (
            f"{unread.total()} members have a suffix that no reader of mmpre looks for ({told}); convert them (.png, "
            f".flac, .mp4, .txt, .npy and .fa.gz are read), or name it to a reader (`--member` of masked){own}"
        )
    if len({frozenset(map(kind_of, entry.members)) for entry in rows}) > 1:
        sets = Counter(" and ".join(f".{suffix}" for suffix in sorted(entry.members)) for entry in rows)
        told = ", ".join(f"{count} have {suffixes}" for suffixes, count in sets.most_common(MAX_TOLD))
        yield (
            f"samples have different members ({told}); one without what a reader wants is a hole in training; put "
            "files of one sample side by side in one folder under one name, or name them in a row of a table"
        )
    if split is not None and (empty := [name for name in SPLITS if not counts.get(name)]):
        values = len({entry.group for entry in rows})
        yield (
            f"--split {split} left nothing for {' and '.join(empty)} (different values: {values}); pack more files (a "
            "long one can be cut), split by a column with more values, or pack held-out files by themselves"
        )
