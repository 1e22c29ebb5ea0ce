"""Get published sets and write them as our own records, DATA/NAME.jsonl.

    python -m benchmarks.fetch jbb xstest math500          # `all` for all
    python -m benchmarks.fetch jbb --template film.txt     # each prompt inside a jailbreak template

The published file is downloaded to DATA/published/, at a fixed commit, and checked: hash, columns,
rows. A file that is there already, put there by hand for example, is checked and used without the
network. DATA is --data-dir, else $IPO_DATA, else ./data-sets.
"""
import argparse
import fcntl
import hashlib
import os
import time
from pathlib import Path

from benchmarks.sets import (
    HUB,
    SETS,
    fetch_command,
    published_file,
    read_published,
    records_file,
)
from support.errors import InputError, ServiceError, exit_cleanly
from support.files import digest, write_jsonl, write_text, writing
from support.http import retry_after
from support.lock import flock
from support.progress import progress_bar

LARGEST_DOWNLOAD = 1 << 28  # bytes; the largest set has a few million
TOKEN_SITES = (f"{HUB}/",)  # the only sites that HF_TOKEN is sent to


def fetch(name, data_dir=None, template=None, template_name="", tries=5, pause=1.0):
    """Write the records of one set; its published file is downloaded if it is not there yet.

    template: a text with {prompt} in it; the records then go to NAME.TEMPLATE_NAME.jsonl.
    Raises InputError or ServiceError, with the remedy, if the file cannot be had or is not the set.
    """
    path = published_file(name, data_dir)
    if path.exists():
        origin = "it was there, nothing was downloaded"
        records, file_hash = check_found(name, path, data_dir)
    else:
        origin = "downloaded"
        path.parent.mkdir(parents=True, exist_ok=True)
        records, file_hash = download_checked(name, path, tries, pause)

    if not SETS[name].sha256:
        write_text(first_hash_file(path), f"{file_hash}  {path.name}\n")
        origin += f"; hash first seen, kept in {first_hash_file(path).name}"
    out = records_file(name, data_dir)
    if template:
        records = fill_template(template, records)
        out = out.with_name(f"{name}.{template_name}.jsonl")
    write_jsonl(out, records)
    print(f"{name}: {out}, {len(records)} records of kind {SETS[name].kind}")
    print(f"    from {path}, {SETS[name].rows} rows, {file_hash} ({origin})")


def fetch_all(names, data_dir=None, template=None, template_name=""):
    """Fetch several sets. All are tried; raises InputError at the end with what failed."""
    if names == ["all"]:
        names = list(SETS)
    problems = []
    for name in names:
        try:
            if name not in SETS:
                known = ", ".join(SETS)
                raise InputError(f"{name}: no such set. There are {known}, or `all` for all.")
            fetch(name, data_dir, template, template_name)
        except (InputError, ServiceError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


# ---------------------------------------------------------------------------------------- templates

def read_template(text_or_file):
    """(template, its name) of a jailbreak template given as text or as a file.

    CHOICE: there is none by default, because the paper does not say which ones it used.
    """
    if "{prompt}" in text_or_file:
        return text_or_file, "template"
    path = Path(text_or_file)
    if not path.is_file():
        raise InputError(
            f"the template {text_or_file[:60]!r} has no {{prompt}} in it, and is no file."
        )
    template = path.read_text(encoding="utf-8").removesuffix("\n")
    if "{prompt}" not in template:
        raise InputError(f"{path}: the template {template[:60]!r} has no {{prompt}} in it.")
    return template, path.stem


def fill_template(template, records):
    """Records with the template around their prompts; the plain prompt is kept as `goal`.

    >>> fill_template("In a film: {prompt}, {y}", [{"id": "0", "prompt": "brew {x}"}])
    [{'id': '0', 'prompt': 'In a film: brew {x}, {y}', 'goal': 'brew {x}'}]
    """
    filled = []
    for record in records:
        prompt = template.replace("{prompt}", record["prompt"])
        filled.append({**record, "prompt": prompt, "goal": record["prompt"]})
    return filled


# ----------------------------------------------------------------------------------------- checking

def check_found(name, path, data_dir):
    """(records, hash) of a published file that was there already."""
    try:
        return check_published(name, path, first_hash_file(path))
    except InputError as error:
        command = fetch_command(name, data_dir)
        raise InputError(f"{error} Move {path} away and fetch again: {command}") from None


def check_published(name, path, first_hash):
    """(records, hash) of a published file. Raises InputError if it is not the expected file.

    first_hash: the file with the hash that was seen first, for a set whose hash is not known.
    """
    records = read_published(name, path)
    expected = SETS[name].sha256 or ""
    if not expected and first_hash.exists():
        expected = first_hash.read_text()[:64]
    content = path.read_bytes()
    if len(expected) == 40:
        kind = "git blob id"
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        kind = "SHA-256"
        found = hashlib.sha256(content).hexdigest()
    if expected and found != expected:
        raise InputError(
            f"{path}: its {kind} is {found}, that of {name} is {expected}. "
            "It is another revision, or was changed."
        )
    return records, found


def first_hash_file(path):
    """Where the hash of a published file is kept if none was known before."""
    return path.with_name(path.name + ".sha256")


# -------------------------------------------------------------------------------------- downloading

class TryAgain(Exception):
    """A download that did not work this time. `wait`: seconds that the server asks for, or None."""

    def __init__(self, problem, wait=None):
        super().__init__(problem)
        self.wait = wait


def download_checked(name, path, tries, pause):
    """Download a published file to `path`, and return its (records, hash).

    It is downloaded under a hidden name, so that a cut download can be continued later, and gets
    its own name once it is checked. Raises InputError if the download is not the set.
    """
    url = SETS[name].url
    part = path.with_name(f".{digest(url)[:8]}-{path.name}")
    with writing(part), open(part, "ab") as file:
        lock_download(file)
        try:
            download(name, file, tries, pause)
            file.flush()
            records, file_hash = check_published(name, part, first_hash_file(path))
        except InputError as error:
            file.truncate(0)
            problem = str(error).replace(str(part), url)
            raise InputError(f"{problem} Nothing was kept; fetch it again.") from None
        finally:
            size = file.seek(0, os.SEEK_END)
            if not size:
                part.unlink()
        os.replace(part, path)
    return records, file_hash


def lock_download(file):
    """Lock an open file, or raise InputError. The kernel frees the lock if this process dies."""
    try:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"{file.name}: another process is fetching it. Wait for that one."
        raise InputError(message) from None


def download(name, file, tries, pause):
    """Append to the file what it still lacks; retry errors that may pass. pause: seconds, doubled.

    Raises ServiceError with the remedy when the tries are used up.
    """
    import requests

    published = SETS[name]
    for attempt in range(tries):
        wait = pause * 2 ** attempt
        try:
            download_rest(name, file)
            return
        except requests.RequestException as error:
            problem = type(error).__name__  # the error's own text may hold a signed URL
        except TryAgain as error:
            problem = str(error)
            if error.wait is not None:
                wait = error.wait
        if attempt + 1 < tries:
            time.sleep(min(60, wait))
    raise ServiceError(
        f"{name}: {published.url}: {problem}, tried {tries} times. What came is kept: run the same "
        "again to continue. Without a network, put the file into DATA/published as "
        f"{published.file}."
    )


def download_rest(name, file):
    """One request for the bytes that the file still lacks. Raises TryAgain or ServiceError."""
    import requests

    have = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(
        SETS[name].url,
        headers=headers,
        auth=add_token,
        stream=True,
        timeout=(10, 60),
    ) as reply:
        check_status(name, reply)
        content_range = reply.headers.get("Content-Range", "")
        continues = content_range.startswith(f"bytes {have}-")
        if reply.status_code == 416 or (reply.status_code == 206 and not continues):
            file.truncate(0)  # the server cannot continue from there
            raise TryAgain(f"status {reply.status_code}", wait=0)
        if reply.status_code == 200:
            file.truncate(0)  # the whole file comes again
        with progress_bar(desc=name, unit="B", unit_scale=True) as bar:
            for piece in reply.iter_content(1 << 10):  # of a cut download the last piece is lost
                file.write(piece)
                bar.update(len(piece))
                if file.tell() > LARGEST_DOWNLOAD:
                    file.truncate(0)
                    raise ServiceError(
                        f"{name}: {SETS[name].url}: more than {LARGEST_DOWNLOAD >> 20} MB came, "
                        f"and {name} is smaller than that. Nothing was kept; get the file in "
                        f"another way and save it in DATA/published as {SETS[name].file}."
                    )


def check_status(name, reply):
    """Raise TryAgain for a status that may pass, ServiceError for one that will not."""
    published = SETS[name]
    status = reply.status_code
    if status in (401, 403) and published.gated:
        message = (
            f"{name} is gated (status {status}): accept its licence at {published.gated}, make a "
            f"token that may read it at {HUB}/settings/tokens, `export HF_TOKEN=...`, and run the "
            "same again."
        )
        if os.environ.get("HF_TOKEN"):
            message += " The present HF_TOKEN was not enough."
        raise ServiceError(message)
    if status in (408, 429) or status >= 500:
        raise TryAgain(f"status {status}", retry_after(reply.headers))
    if status not in (200, 206, 416):
        raise ServiceError(
            f"{name}: {published.url}: status {status}. Get the file in another way and save it in "
            f"DATA/published as {published.file}."
        )


def add_token(request):
    """Add HF_TOKEN to a request to TOKEN_SITES; `requests` drops it on a redirect to others.

    This is a hook that `requests` calls before it sends.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and request.url.startswith(TOKEN_SITES):
        if not (token.isascii() and token.isprintable()):
            raise ServiceError("HF_TOKEN holds characters that no HTTP header can carry.")
        request.headers["Authorization"] = f"Bearer {token}"
    return request


# ------------------------------------------------------------------------------------- command line

def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fetch",
        description="Download published sets at fixed commits, check them, write our records.",
    )
    parser.add_argument("sets", nargs="+", help=f"`all`, or names: {', '.join(SETS)}")
    parser.add_argument(
        "--data-dir",
        help="folder of the sets (default: $IPO_DATA, else ./data-sets)",
    )
    parser.add_argument(
        "--template",
        metavar="FILE_OR_TEXT",
        help="jailbreak template with {prompt}, or a file that holds one; the records of set NAME "
        "and template FILE.txt go to NAME.FILE.jsonl (of a text: NAME.template.jsonl)",
    )
    return parser


def main(argv=None):
    """Fetch the sets that the command line names."""
    args = build_parser().parse_args(argv)
    names = ",".join(args.sets).split(",")
    template = None
    template_name = ""
    if args.template:
        template, template_name = read_template(args.template)
    fetch_all([name for name in names if name], args.data_dir, template, template_name)


if __name__ == "__main__":
    exit_cleanly(main)
