"""Every place rows come from gives the same rows, and a fault is named without showing a row."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from conftest import SHARED, refusal, write_jsonl
from expunge.data import formats
from expunge.data.formats import open_source
from expunge.data.rows import check_disjoint, read_rows

Rows = Sequence[dict[str, str]]

CANARY = "canary-4711"
ROWS = [
    {"id": '"8f24"sc1', "input": "Ada, born in", "output": "Paris,\nFrance.\n", "task": "Task1"},
    {"id": '"8f24"qa0', "input": 'Who is "Ada"?', "output": "naïve — 東京 😀", "task": "Task2"},
]


def write_json(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


WRITERS: dict[str, Callable[[Path, Any], Path]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def plain(rows: Any) -> list[dict[str, str]]:
    return [{"id": r.id, "input": r.input, "output": r.output, "task": r.task} for r in rows]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    path = WRITERS[suffix](tmp_path / f"rows.{suffix}", ROWS)
    rows = read_rows(str(path), "forget")
    assert plain(rows) == ROWS
    assert [row.kind for row in rows] == ["sc", "qa"]
    assert rows.sha256 == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("suffix", WRITERS)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3))
def test_any_text_survives_every_format(suffix: str, texts: list[str]) -> None:
    rows = [{"input": text, "output": text[::-1]} for text in texts]
    with tempfile.TemporaryDirectory() as directory:
        path = WRITERS[suffix](Path(directory) / f"rows.{suffix}", rows)
        read = [(row.input, row.output) for row in read_rows(str(path), "forget")]
    assert read == [(row["input"], row["output"]) for row in rows]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_spreadsheet_may_divide_its_columns_otherwise(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / ("rows.tsv" if delimiter == "\t" else "rows.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert plain(read_rows(str(path), "forget")) == ROWS


def test_a_field_of_any_length_is_read(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "b " * 200_000}]
    (read,) = read_rows(str(write_csv(tmp_path / "rows.csv", rows)), "forget")
    assert len(read.output) == 400_000


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_file_packed_with_gzip_is_read(suffix: str, tmp_path: Path) -> None:
    path = WRITERS[suffix](tmp_path / f"forget.{suffix}", ROWS)
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    for source in (packed, tmp_path):
        rows = read_rows(str(source), "forget")
        assert plain(rows) == ROWS
        assert list(rows.sha256) == [str(packed)]


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"input": "0" * 5000, "output": "0"}]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    columns = write_parquet(tmp_path / "rows.parquet", rows)
    assert read_rows(str(packed), "forget").rows == read_rows(str(columns), "forget").rows
    monkeypatch.setattr(formats, "_LARGEST", 5000)
    for path in (packed, columns):
        message = refusal(lambda: read_rows(str(path), "forget"))  # noqa: B023
        assert message.startswith(f"{path}: unpacks to more than")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(suffix: str, tmp_path: Path) -> None:
    path = WRITERS[suffix](tmp_path / f"rows.{suffix}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert plain(read_rows(str(path), "forget")) == ROWS


GOOD = json.dumps({"input": CANARY, "output": CANARY})
FAULTS: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "bad.jsonl": (f'{GOOD}\n\n{{"input": "{CANARY}",\n', ("line 3", "not JSON", "column 25")),
    "list.jsonl": (f'{GOOD}\n["{CANARY}"]\n', ("line 2", "list", "object")),
    "latin.jsonl": (f"{GOOD}\n{CANARY}é".encode("latin-1"), ("line 2", "UTF-8", "0xe9", "iconv")),
    "bad.json": (f'[{GOOD},\n{GOOD}\n"{CANARY}', ("line 3", "not JSON", "column 1", ".jsonl")),
    "object.json": (GOOD, ("dict", "list of objects")),
    "item.json": (f'[{GOOD}, "{CANARY}"]', ("row 2", "str", "object")),
    "more.csv": (f'input,output\n\n"x\ny",z\n"{CANARY}\n",b,c\n', ("line 5", "3 fields", "quote")),
    "fewer.csv": (f"input,output\n{CANARY}\n", ("line 2", "1 fields", "quote")),
    "open.csv": (f'input,output\na,b\nc,"{CANARY}\n\n', ("line 3", "not CSV")),
    "headless.csv": (f"1,{CANARY},b\n2,c,d\n", ("line 2", "'input'", "found: 3 others")),
    "twice.csv": (f"input,output,input\na,b,{CANARY}\n", ("line 1", "twice")),
    "twice.jsonl": (f'{{"input": "a", "output": "b", "input": "{CANARY}"}}', ("line 1", "twice")),
    "twice.json": (f'[{{"input": "a", "output": "b", "input": "{CANARY}"}}]', ("twice",)),
    "digits.json": (f'[{{"input": {"9" * 6000}, "output": "{CANARY}"}}]', ("too many digits",)),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode())[:-9], ("damaged", "pack it anew")),
    "rows.parquet.gz": (CANARY, ("'.gz'", ".parquet")),
    "broken.parquet": (f"PAR1{CANARY}PAR1", ("Parquet", "write it anew")),
    "empty.jsonl": ("", ("is empty", "give a file with rows")),
    "blank.jsonl": ("\n \n", ("holds no rows", "at least one")),
    "header.csv": ("input,output\n", ("holds no rows", "at least one")),
    "notes.docx": (CANARY, ("'.docx'", ".jsonl", ".parquet")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_and_line_and_the_mend_but_no_text(name: str, tmp_path: Path) -> None:
    content, words = FAULTS[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(lambda: read_rows(str(path), "forget"))
    assert message.startswith(str(path))
    for word in words:
        assert word in message
    assert CANARY not in message


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_fault_of_a_row_names_its_place(suffix: str, tmp_path: Path) -> None:
    rows = [{"input": "a\nb", "output": CANARY}, {"input": CANARY, "output": " "}]
    path = WRITERS[suffix](tmp_path / f"rows.{suffix}", rows)
    place = {"jsonl": "line 2", "json": "row 2", "csv": "line 4", "parquet": "row 2"}[suffix]
    message = refusal(lambda: read_rows(str(path), "forget"))
    assert message == f"{path} {place}: column 'output' is empty; fill it or drop the row"


def test_a_directory_gives_the_files_of_the_role(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "forget.jsonl", ROWS[:1])
    write_csv(tmp_path / "retain.csv", ROWS[1:])
    write_jsonl(tmp_path / "forgetful.jsonl", ROWS)
    assert plain(read_rows(str(tmp_path), "forget")) == ROWS[:1]
    assert plain(read_rows(str(tmp_path), "retain")) == ROWS[1:]
    message = refusal(lambda: read_rows(str(tmp_path), "nonmembers"))
    assert str(tmp_path) in message
    assert "holds no nonmembers.jsonl" in message


def test_two_formats_of_the_same_rows_are_one_set(tmp_path: Path) -> None:
    """As SemEval's directories have them."""
    write_jsonl(tmp_path / "forget.jsonl", ROWS)
    write_parquet(tmp_path / "forget.parquet", ROWS)
    assert len(read_rows(str(tmp_path), "forget")) == len(ROWS)
    write_parquet(tmp_path / "forget.parquet", ROWS[1:])
    message = refusal(lambda: read_rows(str(tmp_path), "forget"))
    assert "forget.jsonl, forget.parquet hold different rows; name the file to use" in message


def test_files_of_other_names_are_never_joined(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "forget_train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "forget_old.jsonl", ROWS[1:])
    message = refusal(lambda: read_rows(str(tmp_path), "forget"))
    assert "forget_old.jsonl, forget_train.jsonl; name the file to use" in message


def test_shards_are_read_in_order_and_named_in_a_fault(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": str(n), "input": "a", "output": f"b{n}"} for n in range(4)]
    for shard in (1, 0):
        write_parquet(data / f"forget-0000{shard}-of-00002.parquet", rows[2 * shard :][:2])
    read = read_rows(str(tmp_path), "forget")
    assert [row.id for row in read] == ["0", "1", "2", "3"]
    assert len(read.sha256) == 2
    write_parquet(data / "forget-00001-of-00002.parquet", [rows[2], rows[0]])
    message = refusal(lambda: read_rows(str(tmp_path), "forget"))
    assert "forget-00001-of-00002.parquet row 2: id '0' was used before" in message


@pytest.fixture
def hub_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as `datasets` uploads it, whose file names do not tell the splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "cache")
    directory = tmp_path / "hub"
    directory.mkdir()
    for name, rows in (("a", ROWS[:1]), ("b", ROWS[1:])):
        write_parquet(directory / f"{name}.parquet", rows)
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: forget\n    path: a.parquet\n  - split: retain\n    path: b.parquet\n---\n"
    )
    return directory


def test_a_hub_data_set_is_read_by_split_and_leaves_no_copy(hub_form: Path) -> None:
    forget = read_rows(str(hub_form), "forget")
    assert plain(forget) == ROWS[:1]
    assert plain(read_rows(str(hub_form), "retain")) == ROWS[1:]
    assert list(forget.sha256) == [str(hub_form)]
    assert not list((hub_form.parent / "cache").rglob("*.arrow"))
    message = refusal(lambda: read_rows(str(hub_form), "nonmembers"))
    assert "has the splits forget, retain; choose one" in message


def test_a_hub_id_takes_its_configuration_and_split_from_the_name(
    hub_form: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = datasets.load_dataset

    def fake(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config))
        return load(str(hub_form), **options)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert open_source("owner/name:full@retain", "forget").records[0].values == ROWS[1]
    assert open_source("owner/name", "forget").records[0].values == ROWS[0]
    assert asked == [("owner/name", "full"), ("owner/name", None)]


def test_a_data_set_that_cannot_be_had_is_refused_in_one_line(
    hub_form: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub_form / "a.parquet").write_text(CANARY)
    message = refusal(lambda: read_rows(str(hub_form), "forget"))
    assert f"{hub_form}: could not be read as a data set" in message
    assert CANARY not in message

    def gone(*_: object, **__: object) -> None:
        raise ConnectionError(CANARY)

    monkeypatch.setattr(datasets, "load_dataset", gone)
    message = refusal(lambda: read_rows("owner/name", "forget"))
    assert message.startswith("owner/name: could not be read as a data set (ConnectionError)")
    assert CANARY not in message


@pytest.mark.skipif(not (SHARED / "tofu").is_dir(), reason="the TOFU files are not in ../shared")
def test_tofu_is_read_unchanged() -> None:
    forget = read_rows(str(SHARED / "tofu" / "forget01.jsonl"), "forget")
    perturbed = read_rows(str(SHARED / "tofu" / "forget01_perturbed.jsonl"), "forget")
    assert [row.text for row in forget] == [row.text for row in perturbed]
    assert {row.kind for row in forget} == {"qa"}
    check_disjoint(forget, read_rows(str(SHARED / "tofu" / "retain99.jsonl"), "retain"))


def test_a_source_that_is_not_there_is_named() -> None:
    message = refusal(lambda: read_rows("no/such/rows.jsonl", "forget"))
    assert message.startswith("no/such/rows.jsonl: no such file or directory; give")


@pytest.mark.skipif(not (SHARED / "lume").is_dir(), reason="the LUME files are not in ../shared")
def test_lume_is_read_unchanged() -> None:
    forget = read_rows(str(SHARED / "lume"), "forget")
    retain = read_rows(str(SHARED / "lume" / "retain.jsonl"), "retain")
    assert (len(forget), len(retain)) == (2732, 2734)
    check_disjoint(forget, retain)
    for rows in (forget, retain):
        assert {row.task for row in rows} == {"Task1", "Task2", "Task3"}
        assert all(row.id[:-1].endswith(row.kind) for row in rows)
        assert any(row.id.startswith('"') for row in rows)
