"""The files that `mmpre embed` writes, put together from parts one after the other, and how to read them.

safetensors   states.ROLE [rows, D], or with all tokens [tokens, D] and lengths.ROLE [rows]; keys as UTF-8 bytes with
              the end of each (`keys(path)` reads them); shard [rows], a number among the names in the metadata; window
parquet       a row for each: key, shard, window, states.ROLE
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
from safetensors.numpy import load_file

Writer = Callable[[Path, Sequence[Path], Mapping[str, Any]], None]
TYPES = {"float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8"}


def keys(path: Path | str) -> list[str]:
    """The keys of a safetensors file's rows, in their order."""
    with safetensors.safe_open(path, "np") as file:
        text, ends = file.get_tensor("keys").tobytes(), file.get_tensor("key_ends").tolist()
    return [text[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]


def about_of(path: Path) -> dict[str, Any]:
    """What a file says of how it was made."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return json.loads(parquet.read_schema(path).metadata[b"mmpre"])
    with safetensors.safe_open(path, "np") as file:
        return json.loads((file.metadata() or {})["mmpre"])


def writer_of(path: Path) -> Writer:
    """What writes files of this suffix. Raises ImportError where its package is missing."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ImportError(
                "a .parquet file needs pyarrow: pip install mmpre[parquet], or write .safetensors"
            ) from None
    return WRITERS[path.suffix]


def write_safetensors(out: Path, parts: Sequence[Path], about: Mapping[str, Any]) -> None:
    """Parts are read once for each tensor, so that only one is held at a time; the library would want all at once."""
    shapes: dict[str, list[int]] = {}
    types: dict[str, str] = {}
    shards: dict[str, int] = {}
    for part in parts:
        for name, array in _arrays(part, shards).items():
            if name not in shapes:
                shapes[name], types[name] = [0, *array.shape[1:]], TYPES[array.dtype.name]
            shapes[name][0] += len(array)
    header: dict[str, Any] = {"__metadata__": {"mmpre": json.dumps(about), "shards": json.dumps(list(shards))}}
    end = 0
    for name in sorted(shapes, key=lambda name: (-_size(types[name]), name)):  # wide numbers first: all stay aligned
        start, end = end, end + _size(types[name]) * int(np.prod(shapes[name]))
        header[name] = {"dtype": types[name], "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            if name != "__metadata__":
                _append(file, name, parts, shards)
    with safetensors.safe_open(out, "np"):  # the library checks places and sizes
        pass


def write_parquet(out: Path, parts: Sequence[Path], about: Mapping[str, Any]) -> None:
    """A row group for each part."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = None
    for table in _tables(parts):
        if schema is None:
            schema = table.schema.with_metadata({"mmpre": json.dumps(about)})
            writer = parquet.ParquetWriter(out, schema)
        writer.write_table(pa.Table.from_arrays(table.columns, schema=schema))
    writer.close()


WRITERS: Mapping[str, Writer] = {".safetensors": write_safetensors, ".parquet": write_parquet}


def _tables(parts: Sequence[Path]) -> Iterator[Any]:
    import pyarrow as pa

    for part in parts:
        names, arrays = _read(part)
        if not names:
            continue
        key, shard, window = zip(*names, strict=True)
        columns = {"key": pa.array(key), "shard": pa.array(shard), "window": pa.array(window, pa.int32())}
        for name, array in arrays.items():
            if name.startswith("states."):
                flat = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
                lengths = arrays.get(name.replace("states.", "lengths."))
                if lengths is not None:
                    ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
                    flat = pa.ListArray.from_arrays(pa.array(ends), flat)
                columns[name] = flat
        yield pa.table(columns)


def _append(file: BinaryIO, name: str, parts: Sequence[Path], shards: dict[str, int]) -> None:
    before = 0  # bytes of keys in the parts before this one
    for part in parts:
        arrays = _arrays(part, shards)
        if name in arrays:
            array = arrays[name]
            file.write((array + before if name == "key_ends" else array).tobytes())
            before += len(arrays["keys"])


def _arrays(part: Path, shards: dict[str, int]) -> dict[str, np.ndarray]:
    """A part's arrays, its names as numbers too; new shards are numbered."""
    names, arrays = _read(part)
    if not names:
        return {}
    text = [key.encode() for key, _, _ in names]
    return arrays | {
        "keys": np.frombuffer(b"".join(text), dtype=np.uint8),
        "key_ends": np.cumsum([len(one) for one in text], dtype=np.int64),
        "shard": np.array([shards.setdefault(shard, len(shards)) for _, shard, _ in names], dtype=np.int32),
        "window": np.array([window for _, _, window in names], dtype=np.int32),
    }


def _read(part: Path) -> tuple[list[tuple[str, str, int]], dict[str, np.ndarray]]:
    with safetensors.safe_open(part, "np") as file:
        names = json.loads(file.metadata()["names"])
    return names, load_file(part)


def _size(kind: str) -> int:
    return {"F32": 4, "I64": 8, "I32": 4, "U8": 1}[kind]
