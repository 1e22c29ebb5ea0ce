"""Files in, files out: prompts, JSONL records, the books of every stage, requests to servers, batches of pairs.

This is the first of five files (data <- model <- intervene <- ipo <- evaluate). It reads prompt sets in the formats that
safety research uses, talks HTTP to judges and samplers, lays pairs out in batches, and gives each stage three habits:

* records are JSON lines with an `id`, appended as results arrive and skipped by id on restart;
* whole files are written to a temporary name and renamed, so a killed run leaves no half file behind;
* beside every output stand `NAME.config.json` (flags, input hashes, versions) and, once the stage is finished,
  `NAME.funnel.json` (what came in, what was dropped and why, what went out).
"""
import csv
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from tqdm import tqdm

# The column that holds the prompt, by data set: STAR-1, JailbreakBench, StrongREJECT, WildJailbreak, MATH/AIME, ours.
PROMPT_FIELDS = ("prompt", "question", "Goal", "forbidden_prompt", "adversarial", "problem")
ID_FIELDS = ("id", "Index", "unique_id", "")  # older JailbreakBench files leave the header of the index column empty

# Flags that say where or how fast a stage runs, never what it computes.
VOLATILE_FLAGS = {"device", "out", "command", "save_every", "judge_concurrency",
                  "compile", "defer_sync", "judge_cache", "judge_price_in", "judge_price_out", "max_cost"}


# ---------------------------------------------------------------------------------------------------- JSON lines

def read_jsonl(path):
    """Read a JSON-lines file of objects into a list of dicts.

    Raises ValueError naming file, line and remedy when a line is not a JSON object.
    """
    records = []
    with open(path, encoding="utf-8", newline="\n") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}). "
                                 "Each line must hold one JSON object; mend or delete that line.") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}. "
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


class Cache:
    """Append-only JSON lines `{"id", ...}` that threads and processes share: what it holds is never paid for twice.

    A record is one write under a file lock, so a kill can tear no line but the last, and the next writer cuts that off.
    Lines that are no records are passed over. Without a path the cache lives in memory.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "cache.jsonl"
    >>> mine, other = Cache(path), Cache(path)
    >>> _ = path.write_text('{"id": "a", "answer": 1}\\n{"id": "b", "ans')
    >>> mine.put({"id": "c", "answer": 3}), mine.put({"id": "a", "answer": 2})  # the first answer stays
    ({'id': 'c', 'answer': 3}, {'id': 'a', 'answer': 1})
    >>> other.get("c"), other.get("b"), path.read_text().count("\\n")
    ({'id': 'c', 'answer': 3}, None, 2)
    """

    def __init__(self, path=None):
        self.path, self.records, self.offset, self.lock, self.file = path, {}, 0, threading.Lock(), None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab+", buffering=0)
            self.get("")

    def get(self, id):
        """The record of that id, or None; what other processes have written since is seen."""
        with self.lock:
            if self.file and id not in self.records:
                self._read()
            return self.records.get(id)

    def put(self, record):
        """Add a record, unless its id is there already; returns the one that is kept."""
        with self.lock:
            if self.file:
                fcntl.flock(self.file, fcntl.LOCK_EX)  # let go by the kernel if this process dies
                try:
                    if self._read():
                        self.file.truncate(self.offset)
                    line = (json.dumps(record) + "\n").encode()  # ASCII: a reply may hold half a surrogate pair
                    if record["id"] not in self.records and self.file.write(line) != len(line):
                        raise OSError(f"{self.path}: a record could not be written whole. Is the disk full?")
                finally:
                    fcntl.flock(self.file, fcntl.LOCK_UN)
            return self.records.setdefault(record["id"], record)

    def _read(self):
        """Take in the whole lines that are new; returns whether a torn one stands behind them."""
        self.file.seek(self.offset)
        new = self.file.readall()
        whole = new.rfind(b"\n") + 1
        for line in new[:whole].splitlines():
            try:
                record = json.loads(line)
                self.records.setdefault(record["id"], record)
            except (ValueError, KeyError, TypeError):
                continue
        self.offset += whole
        return whole < len(new)


# ------------------------------------------------------------------------------------------------ requests to servers

class Fault(Exception):
    """A request that failed for good. `status` is the last reply's (0 if there was none), `text` what it said."""

    def __init__(self, url, status, problem, text=""):
        super().__init__(f"{url}: {problem}" + (f": {text[:300]!r}" if text else ""))
        self.status, self.text = status, text


def retry_after(headers):
    """Seconds that a server asks to wait, given in milliseconds, in seconds or as a date; None if it does not ask.

    >>> retry_after({"retry-after-ms": "250"}), retry_after({"retry-after": "3"}), retry_after({"retry-after": "soon"})
    (0.25, 3.0, None)
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            pass
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


class Endpoint:
    """One URL of an OpenAI-compatible server: keep-alive connections that threads share, retries, and counts of both.

    The key is that of the first variable in `keys` that is set. It goes into the header and nowhere else: redirects
    are not followed, and should a server repeat the key, it is cut out of the reply. `timeout` is in seconds, `prices`
    in dollars per million tokens in and out; with `before` spent earlier, no request begins once `max_cost` is reached.
    """

    def __init__(self, url, keys, concurrency=8, tries=6, timeout=600, max_bytes=1 << 20, longest_pause=60,
                 prices=(0, 0), max_cost=0, before=0):
        import requests
        parts, self.url, self.keys = urlsplit(url), _public(url), keys
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise SystemExit(f"{self.url.partition('?')[0]}: write http(s)://HOST/v1; the key belongs into {keys[0]}.")
        key = next((os.environ[k].strip() for k in keys if os.environ.get(k)), "")
        if not (key.isascii() and key.isprintable()):
            raise SystemExit(f"The key in {' or '.join(keys)} holds characters that no HTTP header can carry.")
        self.tries, self.timeout, self.max_bytes, self.longest_pause = tries, timeout, max_bytes, longest_pause
        self.counts, self.lock, self.failures, self.halt, self.stopped = Counter(), threading.Lock(), 0, threading.Event(), ""
        self.prices, self.max_cost, self.before = prices, max_cost, before
        self.concurrency, session = concurrency, requests.Session()
        # All that is the same for each request is prepared once: it costs more than the request itself.
        self._settings = session.merge_environment_settings(self.url, {}, True, None, None)  # proxies, certificates
        session.trust_env = False  # ~/.netrc would replace the key
        login = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key and not login else {})}
        self._request = session.prepare_request(requests.Request("POST", self.url, headers=headers, auth=login))
        self._connections = requests.adapters.HTTPAdapter(pool_maxsize=concurrency)
        self._secrets = [s.encode() for s in (key, unquote(parts.password or "")) if s]

    def post(self, payload, read=dict):
        """POST JSON and return `read(reply)`, a function of the JSON object that came back.

        Tried again, as openai-python does: timeouts, connection errors, 408, 409, 429, 5xx; and replies that are no
        JSON object, are too long, or make `read` raise. Raises Fault when the tries are used up or the server
        rejects this request, SystemExit when it would reject every other one too, or too many in a row have failed.
        """
        import requests
        for attempt in range(self.tries):
            if self.stopped:
                raise SystemExit(self.stopped)
            if self.max_cost and self.cost() >= self.max_cost:
                self.stop(f"--max-cost {self.max_cost:g} is reached, ${self.cost():.2f} are spent. Give a higher one.")
            self.count({"requests": 1, "retries": int(attempt > 0)})
            status, pause, said = 0, None, ""
            try:
                status, headers, body = self._exchange(payload)
                said, problem = body.decode("utf-8", "replace"), f"status {status}"
                if status == 200:
                    reply = json.loads(body)
                    self.count(usage(reply))
                    result, self.failures = read(reply), 0
                    return result
                self._stop_if_hopeless(status, said)
                if status not in (408, 409, 429) and status < 500:
                    raise Fault(self.url, status, problem, said)
                pause = retry_after(headers)
            except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                problem = f"{'bad reply' if status else 'no reply'} ({type(error).__name__})"
            if attempt + 1 == self.tries or (pause or 0) > 120:
                break
            backoff = min(self.longest_pause, 0.5 * 2 ** attempt) * random.uniform(0.75, 1)
            self.halt.wait(backoff if pause is None else pause)
        with self.lock:
            self.failures += status != 200
        if self.failures > max(10, self.concurrency):
            self.stop(f"{self.url}: {self.failures} requests in a row failed, the last with: {problem}. Is the server up?")
        raise Fault(self.url, status, f"{problem}, tried {attempt + 1} times", said)

    def stop(self, message):
        """End this and every other request of the endpoint with SystemExit(message)."""
        self.stopped = self.stopped or message + " What came back so far is kept; run the same command again to go on."
        self.halt.set()
        raise SystemExit(self.stopped)

    def price(self, used):
        """Dollars for the tokens of a `usage`."""
        return (used["prompt_tokens"] * self.prices[0] + used["completion_tokens"] * self.prices[1]) / 1e6

    def cost(self):
        """Dollars spent before and since."""
        return self.before + self.price(self.counts)

    def count(self, numbers):
        """Add to the counts."""
        with self.lock:
            self.counts.update(numbers)

    def _exchange(self, payload):
        deadline, body = time.monotonic() + self.timeout, bytearray()
        request = self._request.copy()
        request.prepare_body(json.dumps(payload).encode(), None)
        with self._connections.send(request, timeout=self.timeout, **self._settings) as reply:
            for piece in reply.iter_content(1 << 16):
                body += piece
                if len(body) > self.max_bytes or time.monotonic() > deadline:
                    raise ValueError("the reply is too long or too slow")
        for secret in self._secrets:
            body = body.replace(secret, b"[key]")
        return reply.status_code, reply.headers, bytes(body)

    def _stop_if_hopeless(self, status, said):
        remedies = {401: f"Set {' or '.join(self.keys)} to a key that it accepts.", 402: "Is the account paid up?",
                    404: "Check the model's name, and that the URL ends before /chat/completions or /completions.",
                    405: "Check the URL.", 429: "The account's quota is used up, so waiting does not help: top it up."}
        remedies[403] = remedies[401]
        if 300 <= status < 400 or (status in remedies and (status != 429 or "insufficient_quota" in said)
                                   and (status != 403 or not self.counts["prompt_tokens"])):  # 403: also moderation
            self.stop(f"{self.url}: status {status}: {said[:300]!r}. {remedies.get(status, 'Give the URL it leads to.')}")


def usage(reply):
    """Tokens that a reply was charged for, `{"prompt_tokens": int, "completion_tokens": int}`; 0 where not told."""
    told = reply.get("usage") or {}
    return {k: told[k] if isinstance(told.get(k), int) else 0 for k in ("prompt_tokens", "completion_tokens")}


def in_parallel(function, items, concurrency, title, unit, note=lambda: ""):
    """Yield `function(item)` for each item, in order, with a progress bar; raises what the function raises."""
    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = [pool.submit(function, item) for item in items]
        for future in (bar := tqdm(futures, desc=title, unit=unit, disable=None)):
            yield future.result()
            bar.set_postfix_str(note(), refresh=False)
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------- prompts

def load_prompts(path, limit=0):
    """Read prompts from .jsonl, .json, .csv, .tsv or .txt (one a line) into `[{"id", "prompt", ...}]`.

    The prompt's column is the first of PROMPT_FIELDS that the row has, so the published files of STAR-1,
    JailbreakBench, StrongREJECT, WildJailbreak, XSTest, MATH and AIME load as they are; the other columns are kept.
    `limit` > 0 keeps the first rows only. Raises ValueError (file, row, remedy) for a row without a prompt,
    for an id that comes twice and for an empty file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file. Give a .jsonl, .json, .csv, .tsv or .txt file of prompts.")
    prompts, seen = [], set()
    for number, row in enumerate(_read_rows(path), 1):
        field = next((f for f in PROMPT_FIELDS if isinstance(row.get(f), str) and row[f].strip()), None)
        if field is None:
            raise ValueError(f"{path}, row {number}: no prompt. A row needs one of the columns "
                             f"{', '.join(PROMPT_FIELDS)} with text in it; this one has {', '.join(map(str, row))}.")
        key = next((str(row[f]) for f in ID_FIELDS if row.get(f) not in (None, "")), str(number - 1))
        if key in seen:
            raise ValueError(f"{path}, row {number}: the id {key!r} comes twice. Ids name results; make them unique.")
        seen.add(key)
        prompts.append({**row, "id": key, "prompt": row[field]})
    if not prompts:
        raise ValueError(f"{path}: no prompts in it.")
    return prompts[:limit] if limit else prompts


def _read_rows(path):
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise ValueError(f"{path}: expected a JSON list of objects.")
        return rows
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize)  # WildJailbreak has cells beyond the 128 KB default
        with open(path, encoding="utf-8-sig", newline="") as f:
            return list(csv.DictReader(f, delimiter="\t" if suffix == ".tsv" else ","))
    if suffix == ".txt":
        return [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    raise ValueError(f"{path}: unknown kind of file {suffix!r}. Use .jsonl, .json, .csv, .tsv or .txt.")


def load_triggers(path):
    """Read the pool of safety triggers (the paper's T), one sentence a line; `#` starts a comment line."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    triggers = [line for line in lines if line and not line.startswith("#")]
    if not triggers:
        raise ValueError(f"{path}: no triggers in it. Write one sentence a line.")
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
                    raise ValueError(f"{path}, record {number}: {key} must be a non-empty list of token ids. "
                                     "Make the file with `intervene.py pairs` or `intervene.py benign`.")
            if pair["id"] in seen:
                raise ValueError(f"{path}, record {number}: the id {pair['id']!r} comes twice.")
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


def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then a cosine to 0.

    >>> [round(learning_rate(s, 20, 1.0), 2) for s in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


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


def step_line(title, line, steps):
    """One step as one line for people."""
    shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy", "grad_norm": "grad norm",
             "tokens_per_s": "tokens/s"}
    return f"{title} {line['step'] + 1}/{steps}: " + ", ".join(
        f"{name} {line[key]:.4g}" for key, name in shown.items() if key in line)


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
    for p in inputs:  # a model may be a name on the hub; a file with an ending is a file
        if Path(p).suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt") and not Path(p).is_file():
            raise SystemExit(f"{p}: no such file.")
    config = {"flags": {k: _public(v) for k, v in flags.items() if k not in VOLATILE_FLAGS},
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


def _public(value):
    """A flag's value as it may stand in a file: user and password are taken out of URLs."""
    return re.sub(r"(?<=://)[^/\s]*@", "", value) if isinstance(value, str) else value
