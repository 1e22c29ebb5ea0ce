"""Rows of a file of prompts: JSON lines, JSON, CSV, TSV or text, also gzipped; with errors that name the line."""
import csv
import gzip
import io
import json
import sys
import zlib
from pathlib import Path

import data


def read_rows(path):
    """The rows of a file of prompts as dicts. Raises ValueError (file, line, remedy) for one that is damaged."""
    path = Path(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if not path.is_file():
        raise data.BadInput(f"{path}: no such file. Give a .jsonl, .json, .csv, .tsv or .txt file, or the name of a set.")
    if suffix not in (".jsonl", ".json", ".csv", ".tsv", ".txt"):
        raise data.BadInput(f"{path}: unknown kind of file {suffix!r}. Use .jsonl, .json, .csv, .tsv or .txt.")
    text = _read_text(path)
    if suffix == ".txt":
        return [{"prompt": line} for line in text.splitlines() if line.strip()]
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise data.BadInput(f"{path}, line 1: a web page, not data. Download the raw file.")
    if suffix == ".jsonl":
        return data.parse_jsonl(io.StringIO(text, newline="\n"), path)
    if suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise data.BadInput(f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Was it cut short?") from None
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise data.BadInput(f"{path}: expected a JSON list of objects.")
        return rows
    return _parse_table(text, "\t" if suffix == ".tsv" else ",", path)


def _read_text(path):
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise data.BadInput(f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise data.BadInput(f"{path}: not a whole gzip file ({error}). Was it cut short?") from None


def _parse_table(text, delimiter, path):
    csv.field_size_limit(sys.maxsize)  # WildJailbreak has cells beyond the 128 KB default
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter), []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise data.BadInput(f"{path}, line {reader.line_num}: {'more' if None in row else 'fewer'} cells than the "
                                 f"header's {len(reader.fieldnames)}. Is a quote missing, or the file cut short?")
            rows.append(row)
    except csv.Error as error:
        raise data.BadInput(f"{path}, line {reader.line_num}: {error}. Is it a text file?") from None
    return rows
