"""Files in, files out: prompts, JSONL records, the books of every stage, batches of pairs.

    python data.py fetch jbb xstest math500                                 # published sets, see extras/sets.py
    python data.py leakage --train star1 --drop-leaked clean.jsonl          # evaluation prompts among training prompts

This is the first of five files (data <- model <- intervene <- ipo <- evaluate). It reads prompt sets in the formats that
safety research uses, lays pairs out in batches, and gives each stage three habits:

* records are JSON lines with an `id`, appended as results arrive and skipped by id on restart;
* whole files are written to a temporary name and renamed, so a killed run leaves no half file behind;
* beside every output stand `NAME.config.json` (flags, input hashes, versions) and, once the stage is finished,
  `NAME.funnel.json` (what came in, what was dropped and why, what went out).
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

# The column that holds the prompt, by data set: STAR-1, JailbreakBench, StrongREJECT, WildJailbreak, MATH/AIME, ours.
PROMPT_FIELDS = ("prompt", "question", "Goal", "forbidden_prompt", "adversarial", "problem")
ID_FIELDS = ("id", "Index", "unique_id", "")  # older JailbreakBench files leave the header of the index column empty

# Flags that say where or how fast a stage runs, never what it computes.
VOLATILE_FLAGS = {"device", "out", "command", "save_every", "judge_concurrency",
                  "compile", "defer_sync", "judge_cache", "judge_price_in", "judge_price_out", "max_cost"}


class BadInput(SystemExit, ValueError):
    """A file or value that cannot be used: a ValueError to callers; a command line ends with its message alone."""


# ---------------------------------------------------------------------------------------------------- JSON lines

def read_jsonl(path):
    """Read a JSON-lines file of objects into a list of dicts.

    Raises ValueError naming file, line and remedy when a line is not a JSON object.
    """
    with open(path, encoding="utf-8", newline="\n") as f:
        return parse_jsonl(f, path)


def parse_jsonl(lines, path):
    """The objects of JSON lines that came from the file `path`; see `read_jsonl`."""
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}). "
                           "Each line must hold one JSON object; mend or delete that line.") from None
        if not isinstance(record, dict):
            raise BadInput(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}. "
                           'Write each record as {"id": ..., ...} on a line of its own.')
        records.append(record)
    return records


def dump(record):
    """One record as one JSON line, without the newline."""
    return json.dumps(record, ensure_ascii=False)


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
    write_text(path, "".join(dump(r) + "\n" for r in records))


class Appender:
    """A JSON-lines file that survives being killed: what it holds by id, and a `write` that adds to it.

    A last line without its newline was torn by a kill; it is cut off, and its record is made again.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
    >>> _ = path.write_text('{"id": "a"}\\n{"id": "b", "te')
    >>> records = Appender(path)
    >>> list(records.done)
    ['a']
    >>> records.write({"id": "c"}); records.close(); path.read_text()
    '{"id": "a"}\\n{"id": "c"}\\n'
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as f:
            f.seek(0)
            content = f.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                f.truncate(whole)
        self.done = {r["id"]: r for r in read_jsonl(self.path)}
        self.file = open(self.path, "a", encoding="utf-8", newline="\n")

    def write(self, record):
        """Append one record and hand it to the operating system; a record whose id is there already is not repeated."""
        if record["id"] not in self.done:
            self.done[record["id"]] = record
            self.file.write(dump(record) + "\n")
            self.file.flush()

    def close(self):
        self.file.close()


# ------------------------------------------------------------------------------------------------------- prompts

def load_prompts(name_or_path, limit=0, data_dir=None, column=None, template=None):
    """Read a set of extras/sets.py by name, or a file of prompts, into `[{"id": str, "prompt": str, ...}]`.

    Sets are read from `data_dir` (see `prompts_path`), with the fields that extras/sets.py documents. A file is .jsonl,
    .json, .csv, .tsv or .txt (one a line), also with .gz; its other columns are kept. Its prompt's column is `column`,
    else the first of PROMPT_FIELDS that the row has, so published files load as they are. `template` is a jailbreak
    template with {prompt} in it, for any set; the plain prompt is then kept as `goal`. CHOICE: none, because the
    paper does not say which ones it used. `limit` > 0 keeps the first rows only. Raises ValueError (file, row or line,
    remedy) for what cannot be read, a row without a prompt, an id that comes twice and an empty file.
    """
    from extras import sets
    if template and "{prompt}" not in template:
        raise BadInput(f"the template {template[:60]!r} has no {{prompt}} in it.")
    path = prompts_path(name_or_path, data_dir)
    if str(name_or_path) in sets.SETS:
        prompts = sets.read(str(name_or_path), path)
    else:
        prompts = _read_prompts(path, (column,) if column else PROMPT_FIELDS)
    if template:
        prompts = [{**p, "goal": p["prompt"], "prompt": template.replace("{prompt}", p["prompt"])} for p in prompts]
    return prompts[:limit] if limit else prompts


def prompts_path(name_or_path, data_dir=None):
    """The file that `load_prompts` reads: of a set, the one in `data_dir`, else in $IPO_DATA, else in ./data-sets."""
    from extras import sets
    if str(name_or_path) not in sets.SETS:
        return Path(name_or_path)
    # Not ./datasets: a folder of that name makes transformers believe that the package `datasets` is installed.
    return Path(data_dir or os.environ.get("IPO_DATA") or "data-sets") / sets.SETS[str(name_or_path)].file


def _read_prompts(path, fields):
    from extras.files import read_rows
    prompts, seen = [], set()
    for number, row in enumerate(read_rows(path), 1):
        field = next((f for f in fields if isinstance(row.get(f), str) and row[f].strip()), None)
        if field is None:
            raise BadInput(f"{path}, row {number}: no prompt. A row needs one of the columns "
                           f"{', '.join(fields)} with text in it; this one has {', '.join(map(str, row))}.")
        key = next((str(row[f]) for f in ID_FIELDS if row.get(f) not in (None, "")), str(number - 1))
        if key in seen:
            raise BadInput(f"{path}, row {number}: the id {key!r} comes twice. Ids name results; make them unique.")
        seen.add(key)
        prompts.append({**row, "id": key, "prompt": row[field]})
    if not prompts:
        raise BadInput(f"{path}: no prompts in it.")
    return prompts


def load_triggers(path):
    """Read the pool of safety triggers (the paper's T), one sentence a line; `#` starts a comment line."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    triggers = [line for line in lines if line and not line.startswith("#")]
    if not triggers:
        raise BadInput(f"{path}: no triggers in it. Write one sentence a line.")
    return triggers


# ------------------------------------------------------------------------------------------------ pairs and batches

def load_pairs(paths, max_length):
    """Read pair records, drop those with a side longer than `max_length` tokens; returns (pairs, number dropped).

    Raises ValueError for a record that lacks a field, has an empty side, or whose id comes twice.
    """
    pairs, seen, dropped = [], set(), 0
    for path in paths:
        for number, pair in enumerate(read_jsonl(path), 1):
            for key in ("prefix_ids", "chosen_ids", "rejected_ids"):
                if not pair.get(key) or not all(isinstance(t, int) for t in pair[key]):
                    raise BadInput(f"{path}, record {number}: {key} must be a non-empty list of token ids. "
                                   "Make the file with `intervene.py pairs` or `intervene.py benign`.")
            if pair["id"] in seen:
                raise BadInput(f"{path}, record {number}: the id {pair['id']!r} comes twice.")
            seen.add(pair["id"])
            if len(pair["prefix_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) > max_length:
                dropped += 1
            else:
                pairs.append(pair)
    return pairs, dropped


def collate(sequences, device="cpu"):
    """Right-pad (prefix_ids, completion_ids) sequences into the three (B, T) tensors of `completion_logps`.

    >>> batch = collate([([5, 6], [7]), ([5], [8, 9, 1])])
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[5, 6, 7, 0], [5, 8, 9, 1]], [[0, 0, 1, 0], [0, 1, 1, 1]])
    """
    shape = len(sequences), max(len(p) + len(c) for p, c in sequences)
    batch = {k: torch.zeros(shape, dtype=torch.long) for k in ("input_ids", "attention_mask", "completion_mask")}
    for row, (prefix, completion) in enumerate(sequences):
        end = len(prefix) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(list(prefix) + list(completion))
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prefix):end] = 1
    return {k: v.to(device) for k, v in batch.items()}


def pack(sequences):
    """Lay (prefix, completion) sequences out as one row of trees: `prefix[:-1] | prefix[-1] + b1[:-1] | ...`, and so on.

    All sequences with one prefix form a tree; the prefix is its trunk, and equal completions are one branch of it.
    A branch begins with a copy of the prefix's last token, which is what predicts the branch's first token.
    Returns input_ids and position_ids (1, T); tree, for each tree the tokens of its trunk and of its branches;
    scored, targets and branch (N,): the positions that predict a scored token, that token, and the branch it is in;
    branch_of (B,): each sequence's branch.

    >>> row = pack([([5, 6, 7], [8, 9]), ([5, 6, 7], [4]), ([5, 6, 7], [8, 9])])
    >>> row["input_ids"], row["position_ids"], row["tree"]
    ([[5, 6, 7, 8, 7]], [[0, 1, 2, 3, 2]], [[2, 2, 1]])
    >>> row["scored"], row["targets"], row["branch"], row["branch_of"]
    ([2, 3, 4], [8, 9, 4], [0, 0, 1], [0, 1, 0])
    """
    trees, numbers = {}, {}
    for prefix, completion in sequences:
        trees.setdefault(tuple(prefix), {})[tuple(completion)] = None
    ids, positions, scored, targets, branch = [], [], [], [], []
    for prefix, completions in trees.items():
        ids += prefix[:-1]
        positions += range(len(prefix) - 1)
        for completion in completions:
            scored += range(len(ids), len(ids) + len(completion))
            positions += range(len(prefix) - 1, len(prefix) - 1 + len(completion))
            branch += [len(numbers)] * len(completion)
            ids += prefix[-1:] + completion[:-1]
            targets += completion
            numbers[prefix, completion] = len(numbers)
    return {"input_ids": [ids], "position_ids": [positions], "scored": scored, "targets": targets, "branch": branch,
            "tree": [[len(p) - 1, *map(len, cs)] for p, cs in trees.items()],
            "branch_of": [numbers[tuple(p), tuple(c)] for p, c in sequences]}


def tree_parts(sequences):
    """What `pack` would lay down for some sequences, `{part: tokens}`; equal parts have equal keys, the trunk is first.

    >>> list(tree_parts([([5, 6, 7], [8, 9]), ([5, 6, 7], [4])]).values())
    [2, 2, 1]
    """
    parts = {}
    for prefix, completion in sequences:
        parts[hash(tuple(prefix))] = len(prefix) - 1
        parts[hash((tuple(prefix), tuple(completion)))] = len(completion)
    return parts


def _by_tree(indices, parts):
    trees = {}
    for i in indices:
        trees.setdefault(next(iter(parts[i])), []).append(i)
    return list(trees.values())


def tokens_of(indices, parts):
    """Tokens in the row of some examples, equal parts once. parts: for each example its `tree_parts`."""
    return sum({k: n for i in indices for k, n in parts[i].items()}.values())


def global_batches(parts, batch_size, epochs, seed):
    """Index lists, one a step: every example once an epoch, in an order that depends on the seed and epoch alone.

    parts: for each example its `tree_parts`. Whole trees are shuffled, so that their examples meet in one batch
    (CHOICE) and the trunk is computed once; a batch holds `batch_size` examples even if that divides a tree.

    >>> [sorted(b) for b in global_batches([{"x": 2}, {"y": 2}, {"x": 2}], 3, 2, seed=0)]
    [[0, 1, 2], [0, 1, 2]]
    """
    batches = []
    for epoch in range(epochs):
        trees = _by_tree(range(len(parts)), parts)
        random.Random(f"{seed} {epoch}").shuffle(trees)
        order = [i for tree in trees for i in tree]
        batches += [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def micro_batches(indices, parts, budget, rank=0, world=1):
    """This rank's share of a global batch, cut so that no micro-batch of several examples exceeds `budget` tokens.

    Trees go to the rank with the least to do, the largest first. Every rank gets the same number of lists (some may
    be empty), because sharded ranks that make different numbers of forward passes wait for each other for ever.

    >>> parts = [{"x": 9, "a": 4}, {"y": 9, "b": 4}, {"x": 9, "c": 4}]               # 0 and 2 share a trunk
    >>> [micro_batches([0, 1, 2], parts, 17, rank, world=2) for rank in (0, 1)]
    [[[0, 2]], [[1]]]
    >>> [micro_batches([0, 1, 2], parts, 13, rank, world=2) for rank in (0, 1)]
    [[[0], [2]], [[1], []]]
    """
    loads, shares = [0] * world, [[[]] for _ in range(world)]
    for tree in sorted(_by_tree(indices, parts), key=lambda tree: -tokens_of(tree, parts)):
        r = loads.index(min(loads))
        loads[r] += tokens_of(tree, parts)
        for i in tree:
            if shares[r][-1] and tokens_of(shares[r][-1] + [i], parts) > budget:
                shares[r].append([])
            shares[r][-1].append(i)
    return shares[rank] + [[]] * (max(map(len, shares)) - len(shares[rank]))


def in_files(sizes, limit):
    """Names in lists, each of about `limit` bytes at most: which weights go to which file.

    >>> in_files({"a": 5, "b": 3, "c": 3}, limit=6)
    [['a'], ['b', 'c']]
    """
    files, room = [], 0
    for name, size in sizes.items():
        if size > room:
            files, room = files + [[]], limit
        files[-1].append(name)
        room -= size
    return files


def weight_files(path):
    """The safetensors files of a model directory, or of a model on the hub, which is fetched first."""
    from huggingface_hub import snapshot_download
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.json", "model*.safetensors"]))
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
    return [folder / name for name in sorted(set(names))]


# ------------------------------------------------------------------------------------------- the books of a stage

def beside(out, kind):
    """The path of a stage's `config` or `funnel` file.

    >>> beside("runs/toy/rollouts.jsonl", "funnel").as_posix()
    'runs/toy/rollouts.funnel.json'
    """
    out = Path(out)
    return out.with_name(f"{out.stem if out.suffix == '.jsonl' else out.name}.{kind}.json")


def begin(out, flags, inputs, **more):
    """Open a stage: write its config beside `out`; return its funnel if the stage is finished already, else None.

    `flags` is a dict of everything that decides the result, `inputs` the files that it reads. Raises SystemExit when
    an input is missing, and when `out` was made with other flags or inputs, because its records could not be mixed
    with new ones. Where `out` is gone it is made again, and what else was left of it is removed.
    """
    inputs = [prompts_path(p) for p in inputs]  # a set stands for its file
    for p in inputs:  # a model may be a name on the hub; a file with an ending is a file
        if Path(p).suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt") and not Path(p).is_file():
            raise SystemExit(f"{p}: no such file. (Published sets come by `python data.py fetch NAME`.)")
    config = {"flags": {k: public(v) for k, v in flags.items() if k not in VOLATILE_FLAGS},
              "inputs": {str(p): fingerprint(p) for p in inputs}, **more}
    path, done, changed = beside(out, "config"), beside(out, "funnel"), []
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{k}: {old[part].get(k)!r} then, {config[part].get(k)!r} now" for part in ("flags", "inputs")
                   for k in {**old[part], **config[part]} if old[part].get(k) != json.loads(json.dumps(config[part].get(k)))]
        if changed and Path(out).exists():
            raise SystemExit(f"{out} was made with other settings ({'; '.join(changed)}). "
                             f"Use another run folder (RUN=...), or delete {out} to make it again.")
    if not Path(out).exists():
        done.unlink(missing_ok=True)
    if changed or not path.exists():
        shutil.rmtree(Path(out).with_suffix(".rounds"), ignore_errors=True)
        write_json(path, {**config, "versions": versions(), "commit": git_commit()})
    return json.loads(done.read_text(encoding="utf-8")) if done.exists() else None


def finish(out, stage, counts, **more):
    """Close a stage: store its funnel beside `out`, print it as one line, and return it."""
    funnel = {"stage": stage, "counts": counts, **more}
    write_json(beside(out, "funnel"), funnel)
    print(funnel_line(funnel), flush=True)
    return funnel


def stage(out, flags, inputs, work):
    """Run `work() -> (counts, more to keep in the funnel)` between `begin` and `finish`; not if it is finished already."""
    finished = begin(out, flags, inputs)
    if finished:
        return print(funnel_line(finished), "(finished before)")
    counts, more = work()
    return finish(out, Path(out).name.removesuffix(".jsonl"), counts, **{k: v for k, v in more.items() if v})


def funnel_line(funnel):
    """A funnel as one readable line.

    >>> funnel_line({"stage": "pairs", "counts": {"unsafe": 40, "cue found": 38, "pairs": 30}})
    'pairs: 40 unsafe -> 38 cue found -> 30 pairs'
    """
    line = f"{funnel['stage']}: " + " -> ".join(f"{n} {name}" for name, n in funnel["counts"].items())
    bill = ", ".join(f"{n} {name}" for name, n in funnel.get("judge", {}).items())
    return line + (f" (judge: {bill})" if bill else "")


def fingerprint(path):
    """The first 16 hex digits of a file's SHA-256; of a model directory's, over its weights and settings.

    A name that is no local path (a model on the hub) stands for itself. Of a file over 64 MB the size, the first and
    the last megabyte are hashed: training changes every weight, and 16 GB would take a minute at each stage.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for p in files:
        size, megabyte = p.stat().st_size, 1 << 20
        with open(p, "rb") as f:
            if size > 64 * megabyte:
                digest.update(f"{p.name} {size}".encode() + f.read(megabyte))
                f.seek(-megabyte, os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()[:16]


def digest(text):
    """The first 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions():
    """Versions of Python and of the packages that decide results."""
    return {"python": sys.version.split()[0],
            **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}}


def git_commit():
    """The commit of this checkout, with `+changes` if files differ from it; None outside a repository."""
    def git(*command):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True)
    if not shutil.which("git") or git("rev-parse", "HEAD").returncode:
        return None
    return git("rev-parse", "HEAD").stdout.strip() + ("+changes" if git("status", "--porcelain").stdout else "")


def public(value):
    """A flag's value as it may stand in a file: user and password are taken out of URLs."""
    return re.sub(r"(?<=://)[^/\s]*@", "", value) if isinstance(value, str) else value


# ---------------------------------------------------------------------------------------------------- command line

def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="data.py", description="Get data sets; check training prompts against them.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fetch", help="download sets", description="Download sets at fixed commits, and check them.")
    p.add_argument("sets", nargs="+", help="names of sets (see extras/sets.py), or `all`")
    p.add_argument("--data-dir", help="folder of their files (default: $IPO_DATA, else ./data-sets)")
    p = commands.add_parser("leakage", help="evaluation prompts among training prompts", description="Find exact and near "
                            "duplicates between training prompts and evaluation sets; drop them.")
    p.add_argument("--train", required=True, help="training prompts: a file or the name of a set")
    p.add_argument("--eval", nargs="+", help="evaluation sets, names or files (default: all that are in --data-dir)")
    p.add_argument("--data-dir", help="folder of the sets' files (default: $IPO_DATA, else ./data-sets)")
    p.add_argument("--column", help="column of the prompts in the file --train, if it has an unusual name")
    p.add_argument("--threshold", type=float, default=0.5, help="score of a near duplicate, up to 1 (default: 0.5)")
    p.add_argument("--show", action="store_true", help="print the texts too")
    p.add_argument("--drop-leaked", metavar="OUT", help="write the training prompts that do not leak to this .jsonl file")
    return parser


def main(argv=None):
    """Run one command of the command line."""
    from extras import leakage, sets
    args = build_parser().parse_args(argv)
    command = sets.fetch_all if args.command == "fetch" else leakage.report
    command(**{k: v for k, v in vars(args).items() if k != "command"})


if __name__ == "__main__":
    main()
