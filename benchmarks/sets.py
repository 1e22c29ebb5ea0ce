"""The published data sets: where their files come from, what they hold, our records of them.

A record has an `id` (str, unique in its set), a `prompt`, which is what the model is asked, and the
columns that its reader below adds. A new set is one reader of a few lines, from the rows of the
published file to records, and one entry in SETS.
"""
import hashlib
import os
from pathlib import Path
from typing import Callable, NamedTuple

from support.errors import InputError
from support.files import read_rows

# ---------------------------------------------------------------------------------- rows to records

MATH_REQUEST = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE_REQUEST = (
    "One of the four is right. Think it through step by step. Then give your choice on a last line "
    "of its own, with its letter for X:\nAnswer: X"
)
CODE_REQUEST = (
    "Write the Python function `{}` that is begun below. Reply with one ```python block that holds "
    "the complete function, together with the imports and helper functions that stand above it "
    "here.\n\n```python\n{}\n```"
)


def from_columns(prompt, id_column=None, **kept):
    """A reader that takes the prompt and other columns of a row as they are.

    prompt, id_column: names of columns; without an id_column a row's number is its id.
    kept: further fields of the record, as name=column.
    """
    def reader(rows):
        records = []
        for number, row in enumerate(rows):
            record_id = row[id_column] if id_column else number
            record = {"id": str(record_id), "prompt": row[prompt]}
            for name, column in kept.items():
                record[name] = row[column]
            records.append(record)
        return records
    return reader


def read_wildjailbreak(rows):
    """The 250 adversarial harmful prompts that STAR-1 draws with `Dataset.shuffle(seed=42)`.

    That shuffle is a permutation by numpy. CHOICE: the paper does not say which of the 2,000 it
    used; its baselines come from STAR-1.
    """
    import numpy as np

    harmful = [row for row in rows if row["data_type"] == "adversarial_harmful"]
    order = np.random.default_rng(42).permutation(len(harmful)).tolist()
    records = []
    for number in order[:250]:
        row = harmful[number]
        record = {
            "id": str(number),
            "prompt": row["adversarial"],
            "category": row["data_type"],
        }
        records.append(record)
    return records


def read_math(rows):
    """Mathematics: `problem` as it is in the file, and `answer` (AIME's may begin with zeros)."""
    records = []
    for row in rows:
        record_id = row.get("unique_id", row.get("id"))
        record = {
            "id": str(record_id),
            "prompt": row["problem"] + MATH_REQUEST,
            "problem": row["problem"],
            "answer": str(row["answer"]),
        }
        records.append(record)
    return records


def option_order(question):
    """The order of a question's four options, the same on every machine and in every Python.

    The options are sorted by hashes of their numbers and the question.

    >>> option_order("2 + 2?")
    [0, 2, 1, 3]
    """
    def option_hash(number):
        return hashlib.sha256(f"{number} {question}".encode()).digest()
    return sorted(range(4), key=option_hash)


def read_gpqa(rows):
    """Multiple choice: `question`, and `answer`, the letter of the right option in the prompt."""
    records = []
    for number, row in enumerate(rows):
        question = row["Question"].strip()
        options = [row[column].strip() for column in GPQA_COLUMNS[1:]]
        order = option_order(question)
        lines = []
        for letter, option in zip("ABCD", order):
            lines.append(f"{letter}) {options[option]}")
        listed = "\n".join(lines)
        record = {
            "id": row.get("Record ID") or str(number),
            "question": question,
            "answer": "ABCD"[order.index(0)],  # the right option is the file's first
            "prompt": f"{question}\n\n{listed}\n\n{CHOICE_REQUEST}",
        }
        records.append(record)
    return records


def read_humaneval(rows):
    """Code: `code_prompt`, a function's head as published, `entry_point`, its name, and `test`."""
    records = []
    for row in rows:
        head = row["prompt"].rstrip()
        record = {
            "id": row["task_id"],
            "prompt": CODE_REQUEST.format(row["entry_point"], head),
            "code_prompt": row["prompt"],
            "entry_point": row["entry_point"],
            "test": row["test"],
            "canonical_solution": row["canonical_solution"],
        }
        records.append(record)
    return records


# ---------------------------------------------------------------------------------------- the table

class PublishedSet(NamedTuple):
    """One set. `rows` and `columns` are those of its file, of which `reader` makes records."""
    kind: str                  # harmful, benign, xstest, math, choice, code or train
    file: str                  # name of the published file in DATA/published
    url: str                   # at a fixed commit
    sha256: str | None         # 40 digits are a git blob id; None: see the comment on SETS
    rows: int
    columns: tuple
    reader: Callable
    gated: str | None = None   # page on which its licence is to be accepted
    plain: str = "prompt"      # field of a record with the question alone, without our words


GITHUB = "https://raw.githubusercontent.com"
HUB = "https://huggingface.co"
STAR = f"{GITHUB}/UCSC-VLAA/STAR-1/b49333598887845f148ed1b4d2576dc2bff7581a"
STRONGREJECT = f"{GITHUB}/alexandrasouly/strongreject/f7cad6c17e624e21d8df2278e918ae1dddb4cb56"
XSTEST = f"{GITHUB}/paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
QWEN_MATH = f"{GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465"
HUMANEVAL = f"{GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d"
JBB = f"{HUB}/datasets/JailbreakBench/JBB-Behaviors"
JBB_FILES = f"{JBB}/resolve/886acc352a31533ffbcf4ef22c744658688086fc/data"
WILDJAILBREAK = f"{HUB}/datasets/allenai/wildjailbreak"
WILDJAILBREAK_FILES = f"{WILDJAILBREAK}/resolve/5ddc12a7894f842b0619b8e1c7ee496b198af009"
GPQA = f"{HUB}/datasets/Idavidrein/gpqa"
GPQA_FILES = f"{GPQA}/resolve/633f5ee89ab8ad4522a9f850766b73f62147ffdd"

# JBB's rows are numbered in a column Index, whose header is empty in older files.
JBB_COLUMNS = ("Goal", "Behavior", "Category", "Source")
GPQA_COLUMNS = (
    "Question",
    "Correct Answer",
    "Incorrect Answer 1",
    "Incorrect Answer 2",
    "Incorrect Answer 3",
)
read_jbb = from_columns("Goal", behavior="Behavior", category="Category", source="Source")

# The hashes were computed from the files, except two: STAR-benign-915's is from the tree of its
# commit, and WildJailbreak's is what its users state. The files of the two sets without a hash were
# not at hand: `fetch` keeps the hash of the first download beside the file.
SETS = {
    "star1": PublishedSet(
        kind="train",
        file="STAR-1.json",
        url=f"{STAR}/data/STAR-1.json",
        sha256="cfff9b23307914ecf8a94a1d5526f71f7144fcfc5f651741bea1ac41b3184db4",
        rows=1000,
        columns=("id", "question", "response", "category", "source"),
        reader=from_columns(
            "question", "id", response="response", category="category", source="source"
        ),
    ),
    "star-benign-915": PublishedSet(
        kind="train",
        file="STAR-benign-915.json",
        url=f"{STAR}/data/STAR-benign-915.json",
        sha256="aa2c7aba6f99b32917ad007d2ff7d61fec0a0128",
        rows=915,
        columns=("id", "question", "response", "source"),
        reader=from_columns("question", "id", response="response", source="source"),
    ),
    "jbb": PublishedSet(
        kind="harmful",
        file="jbb_harmful-behaviors.csv",
        url=f"{JBB_FILES}/harmful-behaviors.csv",
        sha256="4a8ec6832056b631eb092dccc60d37a61c3d441268268888b3d006288afeffa1",
        rows=100,
        columns=JBB_COLUMNS,
        reader=read_jbb,
    ),
    "jbb-benign": PublishedSet(
        kind="benign",
        file="jbb_benign-behaviors.csv",
        url=f"{JBB_FILES}/benign-behaviors.csv",
        sha256=None,
        rows=100,
        columns=JBB_COLUMNS,
        reader=read_jbb,
    ),
    "strongreject": PublishedSet(
        kind="harmful",
        file="strongreject_dataset.csv",
        url=f"{STRONGREJECT}/strongreject_dataset/strongreject_dataset.csv",
        sha256="4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
        rows=313,
        columns=("category", "source", "forbidden_prompt"),
        reader=from_columns("forbidden_prompt", category="category", source="source"),
    ),
    "wildjailbreak": PublishedSet(
        kind="harmful",
        file="wildjailbreak_eval.tsv",
        url=f"{WILDJAILBREAK_FILES}/eval/eval.tsv",
        sha256="eeb7e43aafa0151588f5cb8994b99adc0ee34a57819d92f43a6084f0b7fe4fa4",
        rows=2210,
        columns=("adversarial", "label", "data_type"),
        reader=read_wildjailbreak,
        gated=WILDJAILBREAK,
    ),
    "xstest": PublishedSet(
        kind="xstest",
        file="xstest_prompts.csv",
        url=f"{XSTEST}/xstest_prompts.csv",
        sha256="11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
        rows=450,
        columns=("id", "prompt", "type", "label"),
        reader=from_columns("prompt", "id", label="label", type="type"),
    ),
    "math500": PublishedSet(
        kind="math",
        file="math500.jsonl",
        url=f"{STAR}/benchmark/reasoning_benchmark/datasets/MATH/test.jsonl",
        sha256="a239272930e5202bf1d5275f7fa475a56687c775a61f1354a6d3371bf9dd7a94",
        rows=500,
        columns=("problem", "answer", "unique_id"),
        reader=read_math,
        plain="problem",
    ),
    "aime24": PublishedSet(
        kind="math",
        file="aime24.jsonl",
        url=f"{QWEN_MATH}/evaluation/data/aime24/test.jsonl",
        sha256="af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
        rows=30,
        columns=("id", "problem", "answer"),
        reader=read_math,
        plain="problem",
    ),
    "gpqa-diamond": PublishedSet(
        kind="choice",
        file="gpqa_diamond.csv",
        url=f"{GPQA_FILES}/gpqa_diamond.csv",
        sha256=None,
        rows=198,
        columns=GPQA_COLUMNS,
        reader=read_gpqa,
        gated=GPQA,
        plain="question",
    ),
    "humaneval": PublishedSet(
        kind="code",
        file="HumanEval.jsonl.gz",
        url=f"{HUMANEVAL}/data/HumanEval.jsonl.gz",
        sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        rows=164,
        columns=("task_id", "prompt", "entry_point", "canonical_solution", "test"),
        reader=read_humaneval,
        plain="code_prompt",
    ),
}


# -------------------------------------------------------------------------------------------- files

def data_folder(data_dir=None):
    """The folder of all sets: `data_dir`, else $IPO_DATA, else ./data-sets."""
    # Not ./datasets: a folder of that name makes transformers believe that the package `datasets`
    # is installed.
    return Path(data_dir or os.environ.get("IPO_DATA") or "data-sets")


def published_file(name, data_dir=None):
    """Where a set's published file is."""
    return data_folder(data_dir) / "published" / SETS[name].file


def records_file(name, data_dir=None):
    """Where our records of a set are, which is all that other commands read."""
    return data_folder(data_dir) / f"{name}.jsonl"


def find_prompts(name_or_path, data_dir=None):
    """The file of prompts that a set's name or a path stands for.

    Raises InputError with the command that gets the set if its records are not there.
    """
    if name_or_path not in SETS:
        return Path(name_or_path)
    path = records_file(name_or_path, data_dir)
    if not path.exists():
        command = fetch_command(name_or_path, data_dir)
        raise InputError(f"{path}: no such file. Get it with: {command}")
    return path


def fetch_command(name, data_dir=None):
    """The command that gets a set."""
    return f"python -m benchmarks.fetch {name} --data-dir {data_folder(data_dir)}"


def checked_rows(name, path):
    """The rows of a published file.

    Raises InputError if it is damaged, lacks a column or a text, or has another number of rows.
    """
    published = SETS[name]
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        missing = [column for column in published.columns if row.get(column) is None]
        if missing:
            raise InputError(
                f"{path}, row {number}: no {', '.join(missing)}; its columns are "
                f"{', '.join(map(str, row))}. This is not the file of {name}."
            )
    if len(rows) != published.rows:
        raise InputError(
            f"{path}: {len(rows)} rows where {name} has {published.rows}. "
            "It was cut short, or is another revision."
        )
    return rows


def read_published(name, path):
    """Our records of a set, from its published file. Raises InputError as `checked_rows` does."""
    rows = checked_rows(name, path)
    records = SETS[name].reader(rows)
    distinct = {record["id"] for record in records}
    if len(distinct) < len(records):  # published ids need not be unique
        for number, record in enumerate(records):
            record["id"] = str(number)
    return records
