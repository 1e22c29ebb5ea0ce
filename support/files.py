"""Reading and writing files: JSON lines, whole files renamed into place, rows of data sets."""
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

from support.errors import InputError

BLOCK = 1 << 16  # bytes
LARGEST_UNPACKED = 1 << 28  # bytes of a compressed file
ROW_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def digest(text):
    """The first 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refuse_half_characters(text, place):
    """Raise InputError for half of a surrogate pair, which JSON lets through and UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20):error.end + 20])
        raise InputError(
            f"{place}: half of a surrogate pair, which no tokenizer takes, in {around}. "
            "Mend or delete that row."
        ) from None


# ----------------------------------------------------------------------------------------- JSON

def read_text(path, remedy="Save the file as UTF-8."):
    """A whole text file. Raises InputError naming file, line and remedy where it is not UTF-8."""
    return decode_text(Path(path).read_bytes(), path, remedy)


def decode_text(content, path, remedy="Save the file as UTF-8."):
    """The text of the bytes of a file, without a byte-order mark; see `read_text`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = f"not UTF-8 ({error.reason})"
        raise InputError(f"{path}, line {line}: {problem}. {remedy}") from None


def read_json(path, *keys):
    """The contents of a JSON file; with `keys`, an object that has them.

    Raises InputError naming file and remedy for anything else.
    """
    remedy = "Was it cut short? Restore it, or delete it and what was made with it."
    content = parse_json(read_text(path, remedy), path, remedy)
    if not keys:
        return content
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"{path}: expected a JSON object with {', '.join(keys)}. {remedy}")
    return content


def parse_json(text, path, remedy, line=1):
    """The JSON in a text that begins in this line of a file; InputError for anything else."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"{error.msg} at column {error.colno}"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        problem = str(error)
    raise InputError(f"{path}, line {line}: not valid JSON ({problem}). {remedy}")


# ----------------------------------------------------------------------------------- JSON lines

def json_line(record):
    """One record as one JSON line, without the newline.

    >>> json_line({"cure": "π \\ud83d"})  # half of a surrogate pair, which UTF-8 cannot hold
    '{"cure": "π \\\\ud83d"}'
    """
    line = json.dumps(record, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode()


def read_jsonl(path):
    """Read a JSON-lines file of objects into a list of dicts; see `stream_jsonl`."""
    return list(stream_jsonl(path))


def stream_jsonl(path, needs_id=False):
    """Yield the objects of a JSON-lines file one by one, so that only one is held at a time.

    Raises InputError naming file, line and remedy when a line is not a JSON object, when it has the
    `id` of an earlier one, and with `needs_id` when it has none.
    """
    seen = set()
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for number, record in parse_jsonl(file, path):
                place = f"{path}, line {number}"
                if "id" in record:
                    refuse_repeated_id(record["id"], seen, place)
                elif needs_id:
                    raise InputError(f"{place}: a record without an id. Mend or delete that line.")
                yield record
        except UnicodeDecodeError:
            read_text(path)  # raises an InputError that says in which line
            raise


def refuse_repeated_id(record_id, seen, place):
    """Add an id to those `seen`; raises InputError where it is one of them."""
    if record_id in seen:
        raise InputError(
            f"{place}: the id {record_id!r} comes twice. Ids name results; delete one of the two."
        )
    seen.add(record_id)


def parse_jsonl(lines, path):
    """Yield (line number, object) of JSON lines that came from the file `path`.

    Raises InputError as `stream_jsonl` does, but for repeated ids.
    """
    remedy = "Each line must hold one JSON object; mend or delete that line."
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_json(line.rstrip(), path, remedy, number)
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: expected a JSON object, found {type(record).__name__}. "
                'Write each record as {"id": ..., ...} on a line of its own.'
            )
        yield number, record


def cut_torn_line(path):
    """Cut off a last line without its newline, which a kill has torn; make the file if need be."""
    with open(path, "ab+") as file:
        start = file.seek(0, os.SEEK_END)
        end_of_last_line = 0
        while start and not end_of_last_line:
            # Backwards and in blocks, because the file may be larger than the memory.
            block_end = start
            start = max(0, start - BLOCK)
            file.seek(start)
            newline = file.read(block_end - start).rfind(b"\n")
            if newline >= 0:
                end_of_last_line = start + newline + 1
        file.truncate(end_of_last_line)


# -------------------------------------------------------------------------- whole files, written

@contextmanager
def writing(path, temporary=None):
    """Let an error of the operating system name the file `path`: that of a full disk names none.

    temporary: the name that the file has until it is finished, which is not to be shown. Libraries
    written in Rust report such an error as text, as in "(os error 28)".
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if getattr(error, "filename", None) not in (None, str(temporary)):
            raise  # it names another file
        in_text = re.search(r"\(os error (\d+)\)", str(error))
        if in_text:
            number = int(in_text[1])
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def whole_file(path):
    """A text file that takes the name `path` once all of it is written, and never before.

    Half of a surrogate pair, which UTF-8 cannot hold, is written as JSON does: \\ud83d.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    options = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    try:
        with writing(path, temporary):
            with open(temporary, "w", **options) as file:
                yield file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error


def write_text(path, text):
    """Write a whole file atomically: to a temporary name beside it, then renamed."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path, value):
    """Write one JSON document atomically, indented for people."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, records):
    """Write a whole JSON-lines file atomically, one record at a time."""
    with whole_file(path) as file:
        for record in records:
            file.write(json_line(record) + "\n")


# --------------------------------------------------------------------------- rows of any format

def read_rows(path):
    """The rows of a .jsonl, .json, .csv, .tsv or .txt file (also with .gz) as dicts.

    A line of a .txt file is a row with the one column `prompt`. Raises InputError (file, line,
    remedy) for a file that is missing, damaged or of another kind.
    """
    path = Path(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {problem}. Give a .jsonl, .json, .csv, .tsv or .txt file.")
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
        lines = io.StringIO(text, newline="\n")
        return [record for _, record in parse_jsonl(lines, path)]
    if suffix == ".json":
        return _parse_json_list(text, path)
    delimiter = "\t" if suffix == ".tsv" else ","
    return _parse_table(text, delimiter, path)


def _read_text(path):
    if path.suffix.lower() == ".gz":
        return decode_text(_unpack(path), path)
    return read_text(path)


def _unpack(path):
    """The bytes packed in a .gz file, in bounded memory: a small file may hold many gigabytes."""
    pieces = []
    size = 0
    try:
        with gzip.open(path) as file:
            while size <= LARGEST_UNPACKED:
                piece = file.read(BLOCK)
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)
                size += len(piece)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file ({error}). Was it cut short?") from None
    raise InputError(
        f"{path}: it unpacks to more than {LARGEST_UNPACKED >> 20} MB. If that is what it should "
        f"hold, unpack it with `gunzip -k {path}` and give the unpacked file."
    )


def _parse_json_list(text, path):
    rows = parse_json(text, path, "Was it cut short?")
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
