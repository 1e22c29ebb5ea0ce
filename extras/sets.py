"""The paper's data sets and benchmarks: where their files come from, how they are checked, what their records hold.

    python data.py fetch jbb xstest math500            # `all` for all

A new set is one function of a few lines, from the rows of its file to records, and one line in SETS. A record has an
`id` (str, unique in its set), a `prompt`, which is what the model is asked, and what its reader below adds.
"""
import fcntl
import hashlib
import os
import time
from pathlib import Path
from typing import Callable, NamedTuple

import data
from extras.files import read_rows

# ------------------------------------------------------------------------------------------------- rows to records


def columns(prompt, id=None, **keep):
    """A reader that takes the prompt's column, that of the id (None: the row's number), and name=column of others."""
    return lambda rows: [{"id": str(row[id] if id else number), "prompt": row[prompt],
                          **{name: row[column] for name, column in keep.items()}} for number, row in enumerate(rows)]


def wildjailbreak(rows):
    """The 250 adversarial harmful prompts that STAR-1 takes with `Dataset.shuffle(seed=42)`: numpy's permutation.

    CHOICE: the paper does not say which of the 2,000 it used; its baselines come from STAR-1.
    """
    import numpy as np
    rows = [row for row in rows if row["data_type"] == "adversarial_harmful"]
    picked = np.random.default_rng(42).permutation(len(rows))[:250].tolist()
    return [{"id": str(i), "prompt": rows[i]["adversarial"], "category": rows[i]["data_type"]} for i in picked]


def maths(rows):
    """`problem`, as it is in the file, and `answer` (str; AIME's may begin with zeros)."""
    ask = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    return [{"id": str(row.get("unique_id", row.get("id"))), "prompt": row["problem"] + ask,
             "problem": row["problem"], "answer": str(row["answer"])} for row in rows]


def option_order(question):
    """The order of four options, by hashes of their numbers and the question: the same on every machine and Python.

    >>> option_order("2 + 2?")
    [0, 2, 1, 3]
    """
    return sorted(range(4), key=lambda i: hashlib.sha256(f"{i} {question}".encode()).digest())


def gpqa(rows):
    """`question`, and `answer`: the letter that the right option has in the prompt."""
    records = []
    for number, row in enumerate(rows):
        question, options = row["Question"].strip(), [row[c].strip() for c in GPQA_COLUMNS[1:]]
        order = option_order(question)
        listed = "\n".join(f"{letter}) {options[i]}" for letter, i in zip("ABCD", order))
        records.append({
            "id": row.get("Record ID") or str(number), "question": question, "answer": "ABCD"[order.index(0)],
            "prompt": f"{question}\n\n{listed}\n\nOne of the four is right. Think it through step by step. Then give your "
                      "choice on a last line of its own, with its letter for X:\nAnswer: X"})
    return records


def humaneval(rows):
    """`code_prompt`, the head of the function as in the file, `entry_point`, its name, `test`, `canonical_solution`."""
    ask = ("Write the Python function `{}` that is begun below. Reply with one ```python block that holds the complete "
           "function, together with the imports and helper functions that stand above it here.\n\n```python\n{}\n```")
    return [{"id": row["task_id"], "prompt": ask.format(row["entry_point"], row["prompt"].rstrip()),
             "code_prompt": row["prompt"], **{k: row[k] for k in ("entry_point", "test", "canonical_solution")}}
            for row in rows]


# -------------------------------------------------------------------------------------------------------- the table

class Set(NamedTuple):
    """One set. `rows` and `columns` are those of its file; `read` makes records of them."""
    kind: str                 # harmful, benign, xstest, math, choice, code or train
    file: str                 # its name in the data directory
    url: str                  # at a fixed commit
    sha256: str | None        # 40 digits are a git blob id instead; None: see the comment on SETS
    rows: int
    columns: tuple
    read: Callable
    gated: str | None = None  # page on which its licence is to be accepted


GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co"
TOKEN_SITES = (f"{HUB}/",)  # who may see HF_TOKEN
STAR = f"{GITHUB}/UCSC-VLAA/STAR-1/b49333598887845f148ed1b4d2576dc2bff7581a"
STRONGREJECT = f"{GITHUB}/alexandrasouly/strongreject/f7cad6c17e624e21d8df2278e918ae1dddb4cb56/strongreject_dataset"
XSTEST = f"{GITHUB}/paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
AIME = f"{GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data/aime24"
HUMANEVAL = f"{GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data"
JBB = f"{HUB}/datasets/JailbreakBench/JBB-Behaviors/resolve/886acc352a31533ffbcf4ef22c744658688086fc/data"
WILDJAILBREAK, GPQA = f"{HUB}/datasets/allenai/wildjailbreak", f"{HUB}/datasets/Idavidrein/gpqa"
JBB_COLUMNS = ("Goal", "Behavior", "Category", "Source")  # and Index, the row's number, without a header in older files
GPQA_COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
jbb = columns("Goal", behavior="Behavior", category="Category", source="Source")

# The hashes were computed from the files, but STAR-benign-915's is from the tree of its commit and WildJailbreak's is what its
# users state. The files of the two sets without one were not at hand: `fetch` keeps the hash of what came first beside the file.
SETS = {
    "star1": Set("train", "STAR-1.json", f"{STAR}/data/STAR-1.json",
                 "cfff9b23307914ecf8a94a1d5526f71f7144fcfc5f651741bea1ac41b3184db4", 1000,
                 ("id", "question", "response", "category", "source"),
                 columns("question", "id", response="response", category="category", source="source")),
    "star-benign-915": Set("train", "STAR-benign-915.json", f"{STAR}/data/STAR-benign-915.json",
                           "aa2c7aba6f99b32917ad007d2ff7d61fec0a0128", 915, ("id", "question", "response", "source"),
                           columns("question", "id", response="response", source="source")),
    "jbb": Set("harmful", "jbb_harmful-behaviors.csv", f"{JBB}/harmful-behaviors.csv",
               "4a8ec6832056b631eb092dccc60d37a61c3d441268268888b3d006288afeffa1", 100, JBB_COLUMNS, jbb),
    "jbb-benign": Set("benign", "jbb_benign-behaviors.csv", f"{JBB}/benign-behaviors.csv", None, 100, JBB_COLUMNS, jbb),
    "strongreject": Set("harmful", "strongreject_dataset.csv", f"{STRONGREJECT}/strongreject_dataset.csv",
                        "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381", 313,
                        ("category", "source", "forbidden_prompt"),
                        columns("forbidden_prompt", category="category", source="source")),
    "wildjailbreak": Set("harmful", "wildjailbreak_eval.tsv",
                         f"{WILDJAILBREAK}/resolve/5ddc12a7894f842b0619b8e1c7ee496b198af009/eval/eval.tsv",
                         "eeb7e43aafa0151588f5cb8994b99adc0ee34a57819d92f43a6084f0b7fe4fa4", 2210,
                         ("adversarial", "label", "data_type"), wildjailbreak, WILDJAILBREAK),
    "xstest": Set("xstest", "xstest_prompts.csv", f"{XSTEST}/xstest_prompts.csv",
                  "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a", 450,
                  ("id", "prompt", "type", "label"), columns("prompt", "id", label="label", type="type")),
    "math500": Set("math", "math500.jsonl", f"{STAR}/benchmark/reasoning_benchmark/datasets/MATH/test.jsonl",
                   "a239272930e5202bf1d5275f7fa475a56687c775a61f1354a6d3371bf9dd7a94", 500,
                   ("problem", "answer", "unique_id"), maths),
    "aime24": Set("math", "aime24.jsonl", f"{AIME}/test.jsonl",
                  "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac", 30,
                  ("id", "problem", "answer"), maths),
    "gpqa-diamond": Set("choice", "gpqa_diamond.csv",
                        f"{GPQA}/resolve/633f5ee89ab8ad4522a9f850766b73f62147ffdd/gpqa_diamond.csv", None, 198,
                        GPQA_COLUMNS, gpqa, GPQA),
    "humaneval": Set("code", "HumanEval.jsonl.gz", f"{HUMANEVAL}/HumanEval.jsonl.gz",
                     "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef", 164,
                     ("task_id", "prompt", "entry_point", "canonical_solution", "test"), humaneval),
}


def read(name, path):
    """Records of a set from its file. Raises ValueError with the remedy if that is missing or not what it should be."""
    path = Path(path)
    get = f"python data.py fetch {name} --data-dir {path.parent}"
    if not path.exists():
        raise data.BadInput(f"{path}: no such file. Get it with: {get}")
    try:
        records = SETS[name].read(checked_rows(name, path))
    except ValueError as error:
        raise data.BadInput(f"{error} Move {path} away, then: {get}") from None
    if len({r["id"] for r in records}) < len(records):  # nobody promises that published ids are unique
        records = [{**r, "id": str(number)} for number, r in enumerate(records)]
    return records


def checked_rows(name, path):
    """The rows of a set's file. Raises ValueError if it lacks columns or texts, or has another number of rows."""
    s, rows = SETS[name], read_rows(path)
    for number, row in enumerate(rows, 1):
        missing = [c for c in s.columns if row.get(c) is None]
        if missing:
            raise data.BadInput(f"{path}, row {number}: no {', '.join(missing)}; its columns are "
                             f"{', '.join(map(str, row))}. This is not the file of {name}.")
    if len(rows) != s.rows:
        raise data.BadInput(f"{path}: {len(rows)} rows where {name} has {s.rows}. It was cut short, or is another revision.")
    return rows


# ------------------------------------------------------------------------------------------------------------ fetch

def verify(name, path, record):
    """The hash of a set's file. Raises ValueError if it is not the set. record: file with the hash seen first."""
    checked_rows(name, path)
    content, wanted = path.read_bytes(), SETS[name].sha256 or (record.read_text()[:64] if record.exists() else "")
    blob = len(wanted) == 40
    seen = (hashlib.sha1(b"blob %d\0" % len(content) + content) if blob else hashlib.sha256(content)).hexdigest()
    if wanted and seen != wanted:
        raise data.BadInput(f"{path}: its {'git blob id' if blob else 'SHA-256'} is {seen}, that of {name} is {wanted}. "
                         "It is another revision, or was changed.")
    return seen


def fetch(name, data_dir=None, tries=5, pause=1.0):
    """Get one set's file, unless it is there already; what is there and right needs no network.

    It is downloaded under a hidden name, where a cut download goes on, and gets its name once it is checked. Raises
    SystemExit or ValueError, with the remedy, if it cannot be had, or if what came or lay there is not the set.
    """
    s, path = SETS[name], data.prompts_path(name, data_dir)
    record, part = path.with_name(path.name + ".sha256"), path.with_name(f".{data.digest(s.url)[:8]}-{path.name}")
    if path.exists():
        try:
            seen = verify(name, path, record)
        except ValueError as error:
            raise data.BadInput(f"{error} Move {path} away and fetch again.") from None
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the kernel if this process dies
            except BlockingIOError:
                raise SystemExit(f"{part}: another process is fetching it. Wait for that one.") from None
            try:
                download(name, f, tries, pause)
                f.flush()
                seen = verify(name, part, record)
            except ValueError as error:
                f.truncate(0)
                raise data.BadInput(f"{str(error).replace(str(part), s.url)} Nothing was kept; fetch it again.") from None
            finally:
                if not f.seek(0, os.SEEK_END):
                    part.unlink()
            os.replace(part, path)
    if not s.sha256:
        data.write_text(record, f"{seen}  {path.name}\n")
    print(f"{name}: {path}, {s.rows} rows, {seen}" + ("" if s.sha256 else f" (first seen; kept in {record.name})"))


def with_token(request):
    """Add HF_TOKEN to a request (`requests`' hook) to huggingface.co; `requests` drops it on a redirect to others."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and request.url.startswith(TOKEN_SITES):
        if not (token.isascii() and token.isprintable()):
            raise SystemExit("HF_TOKEN holds characters that no HTTP header can carry.")
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def download(name, f, tries, pause):
    """Append to the file what it still lacks, and try again what may pass. Raises SystemExit with the remedy."""
    import requests
    for attempt in range(tries):
        try:
            problem, wait = _get(name, f)
            if not problem:
                return
        except requests.RequestException as error:  # its text may hold a signed URL
            problem, wait = type(error).__name__, None
        if attempt + 1 < tries:
            time.sleep(min(60, pause * 2 ** attempt if wait is None else wait))
    raise SystemExit(f"{name}: {SETS[name].url}: {problem}, tried {tries} times. What came is kept: run the same again to "
                     f"go on. Without a network, put the file into the data directory as {SETS[name].file}.")


def _get(name, f):
    import requests
    from tqdm import tqdm
    from extras.client import retry_after
    s, have = SETS[name], f.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(s.url, headers=headers, auth=with_token, stream=True, timeout=(10, 60)) as reply:
        status, starts = reply.status_code, reply.headers.get("Content-Range", "")
        if status in (401, 403) and s.gated:
            raise SystemExit(f"{name} is gated (status {status}): accept its licence at {s.gated}, make a token that may "
                             f"read it at {HUB}/settings/tokens, `export HF_TOKEN=...`, and run the same again."
                             + " The present HF_TOKEN was not enough." * bool(os.environ.get("HF_TOKEN")))
        if status == 416 or status == 206 and not starts.startswith(f"bytes {have}-"):  # it cannot go on from there
            f.truncate(0)
            return f"status {status}", 0
        if status not in (200, 206):
            if status in (408, 429) or status >= 500:
                return f"status {status}", retry_after(reply.headers)
            raise SystemExit(f"{name}: {s.url}: status {status}. Get the file in another way and save it as {s.file}.")
        if status == 200:
            f.truncate(0)
        with tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:
            for piece in reply.iter_content(1 << 10):  # of a cut download, the last piece is lost
                f.write(piece)
                bar.update(len(piece))
    return "", None


def fetch_all(sets, data_dir=None):
    """Command `fetch`. All sets are tried; raises SystemExit at the end with what went wrong."""
    names, problems = [n for part in sets for n in part.split(",") if n], []
    for name in SETS if names == ["all"] else names:
        try:
            if name not in SETS:
                raise data.BadInput(f"{name}: no such set. There are {', '.join(SETS)}, or `all` for all.")
            fetch(name, data_dir)
        except (ValueError, OSError, SystemExit) as error:
            problems.append(str(error))
    if problems:
        raise SystemExit("\n".join(problems))
