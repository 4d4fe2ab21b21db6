"""Where rows come from: JSONL, JSON, CSV and Parquet files, directories and hub data sets."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expunge.errors import InputError

Role = Literal["forget", "retain", "nonmembers"]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_DELIMITERS = ",;\t|"
_LARGEST = 2**30
"""Bytes that a packed file may unpack to: a few megabytes can hold more than any memory."""
_TOO_LARGE = f"unpacks to more than {_LARGEST // 2**30} GiB; unpack it, or split it into several files"

_UNREADABLE = "holds a number of too many digits, or is nested too deeply; write plain rows"
_REPEATED = "names a column twice; give every column a name of its own"
_SHARD = re.compile(r"^(?P<stem>.+)-\d{5}-of-\d{5}$")
_HUB_ID = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?$")


@dataclass(frozen=True, repr=False)
class Record:
    """One raw row: its columns, and where in the source it stands ("line 12")."""

    place: str
    values: Mapping[str, object]


@dataclass(frozen=True, repr=False)
class Source:
    """An opened source; `sha256` is by file and empty for a hub data set."""

    name: str
    records: Sequence[Record]
    sha256: Mapping[str, str]


def open_source(source: str, role: Role) -> Source:
    """Reads the raw rows of a file, of the `<role>.*` files of a directory, or of a hub data set.

    A hub data set is `owner/name`, optionally `:config` and `@split`; the split defaults to `role`
    where the data set has one of that name, else to its only split. Raises InputError.
    """
    path = Path(source)
    if path.is_file():
        return _read_files(source, [path])
    if path.is_dir():
        return _open_directory(path, role)
    if match := _HUB_ID.match(source):
        return _open_hub(match["name"], match["config"], match["split"], role)
    raise InputError(f"{source}: no such file or directory; give a file, a directory or owner/name")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_directory(directory: Path, role: Role) -> Source:
    """Reads `<role>.*`, or the shards `<role>*-NNNNN-of-NNNNN.*` of one file, below `directory`."""
    found = sorted(directory.rglob(f"{role}*"))
    files = [path for path in found if _unpacked(path).suffix in SUFFIXES]
    exact = [path for path in files if _unpacked(path).stem == role and path.is_file()]
    if exact:
        sources = [_read_files(str(directory), [path]) for path in exact]
        first = [record.values for record in sources[0].records]
        if any([record.values for record in other.records] != first for other in sources[1:]):
            names = ", ".join(str(path.relative_to(directory)) for path in exact)
            raise InputError(f"{directory}: {names} hold different rows; name the file to use")
        return sources[0]
    shards: dict[str, list[Path]] = {}
    for path in files:
        if match := _SHARD.match(_unpacked(path).stem):
            shards.setdefault(f"{path.parent}/{match['stem']}{path.suffix}", []).append(path)
    if len(shards) == 1:
        return _read_files(str(directory), next(iter(shards.values())))
    if files:
        names = ", ".join(str(path.relative_to(directory)) for path in files)
        raise InputError(f"{directory}: holds no {role}.* but {names}; name the file to use")
    if (directory / "README.md").is_file():
        return _open_hub(str(directory), None, None, role)
    raise InputError(
        f"{directory}: holds no {role}.jsonl, {role}.json, {role}.parquet or {role}.csv;"
        " name the file itself"
    )


def _read_files(name: str, paths: Sequence[Path]) -> Source:
    records: list[Record] = []
    for path in paths:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: is empty; give a file with rows")
        part = _reader(path)(path)
        prefix = f"{path.name} " if len(paths) > 1 else ""
        records += [Record(prefix + record.place, record.values) for record in part]
    return Source(name, records, {str(path): sha256_of(path) for path in paths})


def _reader(path: Path) -> Callable[[Path], list[Record]]:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    suffix = _unpacked(path).suffix.lower()
    if suffix not in readers or (suffix == ".parquet" and path.suffix != _unpacked(path).suffix):
        raise InputError(
            f"{path}: unknown ending {path.suffix!r}; rows are read from {', '.join(SUFFIXES)}, and"
            " but for Parquet also packed with gzip"
        )
    return readers[suffix]


def _unpacked(path: Path) -> Path:
    """Its name without the ending of a file that is packed with gzip."""
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        if raw.startswith(b"\x1f\x8b"):
            with gzip.open(path) as file:
                raw = file.read(_LARGEST + 1)
            if len(raw) > _LARGEST:
                raise InputError(f"{path}: {_TOO_LARGE}")
    except (OSError, EOFError, zlib.error):
        raise InputError(f"{path}: is a damaged gzip file; pack it anew") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path} line {line}: is not UTF-8 (byte 0x{raw[error.start]:02x});"
            " convert the file, for example with iconv -t UTF-8"
        ) from None


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} line {number}: is not JSON ({error.msg} at column {error.colno});"
                " write one object a line"
            ) from None
        except _Repeated:
            raise InputError(f"{path} line {number}: {_REPEATED}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{path} line {number}: {_UNREADABLE}") from None
        records.append(_record(path, f"line {number}", values))
    return records


def _read_json(path: Path) -> list[Record]:
    try:
        values = json.loads(_decoded(path), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: is not JSON ({error.msg} at column {error.colno});"
            " for one object a line use the ending .jsonl"
        ) from None
    except _Repeated:
        raise InputError(f"{path}: {_REPEATED}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: {_UNREADABLE}") from None
    if not isinstance(values, list):
        raise InputError(f"{path}: holds a {type(values).__name__}; write a list of objects")
    return [_record(path, f"row {number}", value) for number, value in enumerate(values, 1)]


class _Repeated(ValueError):
    pass


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of a name that stands in it twice json.loads would keep the last in silence."""
    if len(dict(pairs)) < len(pairs):
        raise _Repeated
    return dict(pairs)


def _record(path: Path, place: str, values: object) -> Record:
    if not isinstance(values, dict):
        raise InputError(f"{path} {place}: is a {type(values).__name__}; write an object a row")
    return Record(place, values)


def _read_csv(path: Path) -> list[Record]:
    text = _decoded(path)
    # The names of columns hardly hold any, so the one that stands there most often divides them.
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    line = 1  # a record's first; its quoted fields may hold more
    usual = csv.field_size_limit(sys.maxsize)  # 131,072 characters, for every reader of the process
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path} line 1: {_REPEATED}")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) not in (0, len(header)):
                raise InputError(
                    f"{path} line {line}: has {len(fields)} fields, the header {len(header)};"
                    f" quote fields that hold {delimiter!r}"
                )
            if fields:
                records.append(Record(f"line {line}", dict(zip(header, fields, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path} line {line}: is not CSV ({error}); write the file anew") from None
    finally:
        csv.field_size_limit(usual)
    return records


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        described = parquet.read_metadata(path)
        groups = map(described.row_group, range(described.num_row_groups))
        if sum(group.total_byte_size for group in groups) > _LARGEST:
            raise InputError(f"{path}: {_TOO_LARGE}")
        table = parquet.read_table(path)
        rows = table.to_pylist()
    except (arrow.ArrowException, OSError):
        raise InputError(f"{path}: is not a readable Parquet file; write it anew") from None
    if len(set(table.column_names)) < table.num_columns:
        raise InputError(f"{path}: {_REPEATED}")
    return [Record(f"row {number}", values) for number, values in enumerate(rows, 1)]


def _open_hub(name: str, config: str | None, split: str | None, role: Role) -> Source:
    import datasets

    def unreadable(error: Exception) -> InputError:
        # The libraries raise many types here; the type is named, the message may quote rows.
        return InputError(
            f"{name}: could not be read as a data set ({type(error).__name__});"
            " check the name, the network and the login, or give a local file"
        )

    try:
        # Streamed, because a loaded data set leaves a copy of its rows in the user's cache.
        loaded = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:
        raise unreadable(error) from None
    splits = list(loaded)
    wanted = split or (role if role in splits else splits[0] if len(splits) == 1 else None)
    if wanted not in splits:
        raise InputError(
            f"{name}: has the splits {', '.join(splits)}; choose one, for example {name}@{splits[0]}"
        )
    try:
        records = [Record(f"row {n}", values) for n, values in enumerate(loaded[wanted], 1)]
    except Exception as error:
        raise unreadable(error) from None
    return Source(f"{name}@{wanted}", records, {})
