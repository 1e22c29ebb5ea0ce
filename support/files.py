"""Reading and writing files: JSON lines, whole files renamed into place, rows of data sets."""
import csv
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from pathlib import Path

from support.errors import InputError

ROW_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def digest(text):
    """The first 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------- JSON lines

def json_line(record):
    """One record as one JSON line, without the newline."""
    return json.dumps(record, ensure_ascii=False)


def read_jsonl(path):
    """Read a JSON-lines file of objects into a list of dicts.

    Raises InputError naming file, line and remedy when a line is not a JSON object.
    """
    with open(path, encoding="utf-8", newline="\n") as file:
        return parse_jsonl(file, path)


def parse_jsonl(lines, path):
    """The objects of JSON lines that came from the file `path`; see `read_jsonl`."""
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}). "
                "Each line must hold one JSON object; mend or delete that line."
            ) from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: expected a JSON object, found {type(record).__name__}. "
                'Write each record as {"id": ..., ...} on a line of its own.'
            )
        records.append(record)
    return records


# -------------------------------------------------------------------------- whole files, written

def write_text(path, text):
    """Write a whole file atomically: to a temporary name beside it, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def write_json(path, value):
    """Write one JSON document atomically, indented for people."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, records):
    """Write a whole JSON-lines file atomically."""
    lines = [json_line(record) + "\n" for record in records]
    write_text(path, "".join(lines))


# --------------------------------------------------------------------------- rows of any format

def read_rows(path):
    """The rows of a .jsonl, .json, .csv, .tsv or .txt file (also with .gz) as dicts.

    A line of a .txt file is a row with the one column `prompt`. Raises InputError (file, line,
    remedy) for a file that is missing, damaged or of another kind.
    """
    path = Path(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if not path.is_file():
        raise InputError(f"{path}: no such file. Give a .jsonl, .json, .csv, .tsv or .txt file.")
    if suffix not in ROW_FORMATS:
        raise InputError(
            f"{path}: unknown kind of file {suffix!r}. Use .jsonl, .json, .csv, .tsv or .txt."
        )
    text = _read_text(path)
    if suffix == ".txt":
        return [{"prompt": line} for line in text.splitlines() if line.strip()]
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise InputError(f"{path}, line 1: a web page, not data. Download the raw file.")
    if suffix == ".jsonl":
        return parse_jsonl(io.StringIO(text, newline="\n"), path)
    if suffix == ".json":
        return _parse_json_list(text, path)
    delimiter = "\t" if suffix == ".tsv" else ","
    return _parse_table(text, delimiter, path)


def _read_text(path):
    content = path.read_bytes()
    try:
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file ({error}). Was it cut short?") from None


def _parse_json_list(text, path):
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Was it cut short?"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a JSON list of objects.")
    return rows


def _parse_table(text, delimiter, path):
    csv.field_size_limit(sys.maxsize)  # WildJailbreak has cells beyond the 128 KB default
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    try:
        for row in reader:
            # DictReader files surplus cells under None, and fills missing ones with None.
            if None in row:
                raise _wrong_width("more", reader, path)
            if None in row.values():
                raise _wrong_width("fewer", reader, path)
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}. Is it a text file?") from None
    return rows


def _wrong_width(how, reader, path):
    return InputError(
        f"{path}, line {reader.line_num}: {how} cells than the header's "
        f"{len(reader.fieldnames)}. Is a quote missing, or the file cut short?"
    )
