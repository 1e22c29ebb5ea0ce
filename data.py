"""Records, prompts, text and tokens, batches: what the other four modules pass to each other.

This is the first of five files (data -> model -> intervene -> ipo -> evaluate). A run is a folder
of JSON-lines files; stages append records as they are made and skip the ids that they find. The
stages are those of run.sh; "eval." is evaluate.py. In comments, `PAPER:` marks a deviation from the
paper, `CHOICE:` a decision that the paper leaves open.

  field              type         written by         read by          what it is

  PROMPT: prompt files, one record per line
  id, prompt         str          you                rollouts, eval.  further columns are kept
  label, answer      str          you                eval.            where the kind of set needs it

  TRACE: rollouts.jsonl, benign_*.jsonl, *.rounds/*.traces.jsonl, eval/MODEL/SET.traces.jsonl
  id                 str          rollouts, pairs,   every later one  PROMPT_ID#SAMPLE, + @ROUND or
                                  benign, eval.                       @reverse after an intervention
  prompt_id, sample  str, int     as id              pairs, eval.     sample k, trigger k
  prompt             str          as id              judge, report
  prompt_ids         [int]        as id              pairs, benign    prompt in the chat template
  ids                [int]        as id              pairs, benign    every token after the prompt
  forced             int          as id              pairs, studies   z[:h] + trigger: how many of
                                                                      `ids` were not sampled
  opening, reasoning, closing, response
                     str          as id              judge, report    the text of `ids`, taken apart
  finished           str          as id                               "stop" or "length"
  truncated          bool         as id              judge, pairs     cut off before its end

  STEPS: steps.jsonl, eval/MODEL/SET.steps.jsonl
  id, steps          str, [str]   steps, eval.       judge, pairs     joined, they are `reasoning`

  VERDICT: verdicts.jsonl, *.rounds/*.verdicts.jsonl, eval/MODEL/SET.verdicts.jsonl
  id                 str          judge, eval.       pairs, report    of the trace
  reasoning_safe, response_safe
                     bool, None   judge, eval.       pairs, report    None: not asked (a truncated
  cue                int, None    judge, eval.       pairs, report    trace has no response, a safe
                                                                      one no cue), or not valid
  class, correct     str, bool    eval.              report           of benign sets, of tasks

  PAIR: pairs.jsonl, benign_pairs.jsonl
  id, prompt_id      str          pairs, benign      train, report    id of the intervened trace
  source, interventions
                     str, int     pairs, benign                       "harmful", "benign"; round
  h, n_prompt        int, int     pairs, benign      train            tokens in z[:h], in the prompt
  prompt, prefix, trigger, chosen, rejected
                     str          pairs, benign      report           as text; `prefix` is z[:h]
  prefix_ids         [int]        pairs, benign      train            prompt_ids + ids[:h]
  chosen_ids, rejected_ids
                     [int]        pairs, benign      train            from h to the end of each

  METRICS of training: stage1/metrics.jsonl, one record per update
  step, loss/..., rewards/..., logps/..., grad_norm, lr, tokens_per_s
                     float        train              report           means over the batch's pairs

  METRICS of evaluation: eval/MODEL/metrics.json
  sets               dict         eval.              report, compare  {set: {metric: estimate}}
  estimate           dict         eval.              report, compare  value, low, high, n, ...
"""
import random
from pathlib import Path
from typing import NamedTuple

from support.compact import compact_record
from support.errors import InputError
from support.files import (
    cut_torn_line,
    json_line,
    read_rows,
    read_text,
    refuse_half_characters,
    refuse_repeated_id,
    stream_jsonl,
    writing,
)

# The column that holds the prompt, by data set: ours, STAR-1, JailbreakBench, StrongREJECT,
# WildJailbreak, MATH and AIME.
PROMPT_FIELDS = ("prompt", "question", "Goal", "forbidden_prompt", "adversarial", "problem")
# Older JailbreakBench files leave the header of the index column empty.
ID_FIELDS = ("id", "Index", "unique_id", "")

OPEN, CLOSE = "<think>", "</think>"


# ------------------------------------------------------------------------------- prompts, triggers

def load_prompts(path, limit=0, column=None):
    """Read a file of prompts into `[{"id": str, "prompt": str, ...}]`, its other columns kept.

    The file is .jsonl, .json, .csv, .tsv or .txt (one prompt a line), also with .gz. The prompt's
    column is `column`, else the first of PROMPT_FIELDS that the row has, so published files load
    as they are. `limit` > 0 keeps the first rows only. Raises InputError (file, row or line,
    remedy) for what cannot be read, a row without a prompt, a repeated id and an empty file.
    """
    fields = (column,) if column else PROMPT_FIELDS
    prompts = []
    seen = set()
    for number, row in enumerate(read_rows(path), 1):
        prompt = _first_text(row, fields)
        if prompt is None:
            raise InputError(
                f"{path}, row {number}: no prompt. A row needs one of the columns "
                f"{', '.join(fields)} with text in it; this one has {', '.join(map(str, row))}."
            )
        prompt_id = _id_of(row, number - 1)
        refuse_half_characters(prompt_id + prompt, f"{path}, row {number}")
        if prompt_id in seen:
            raise InputError(
                f"{path}, row {number}: the id {prompt_id!r} comes twice. "
                "Ids name results; make them unique."
            )
        seen.add(prompt_id)
        prompts.append({**row, "id": prompt_id, "prompt": prompt})
    if not prompts:
        raise InputError(f"{path}: no prompts in it.")
    return prompts[:limit] if limit else prompts


def _first_text(row, fields):
    for field in fields:
        value = row.get(field)
        if isinstance(value, str) and value.strip():
            return value
    return None


def _id_of(row, number):
    for field in ID_FIELDS:
        if row.get(field) not in (None, ""):
            return str(row[field])
    return str(number)


def load_triggers(path):
    """The pool of safety triggers (T in the paper), a sentence a line; `#` starts a comment."""
    lines = read_text(path).splitlines()
    stripped = [line.strip() for line in lines]
    triggers = [line for line in stripped if line and not line.startswith("#")]
    if not triggers:
        raise InputError(f"{path}: no triggers in it. Write one sentence a line.")
    return triggers


# ------------------------------------------------------------------------------- records on disk

class Appender:
    """A JSON-lines file that survives being killed: the ids that it holds, and how to add to it.

    A last line without its newline was torn by a kill; it is cut off, and its record is made again.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
    >>> _ = path.write_text('{"id": "a"}\\n{"id": "b", "te')
    >>> records = Appender(path)
    >>> records.done
    {'a'}
    >>> records.write({"id": "c"}); records.close(); path.read_text()
    '{"id": "a"}\\n{"id": "c"}\\n'
    >>> records.read(["c", "a"])
    [{'id': 'c'}, {'id': 'a'}]
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        # Ids only: the records of a large run are more than the memory holds.
        self.done = {record["id"] for record in stream_jsonl(self.path, needs_id=True)}
        self.file = open(self.path, "a", encoding="utf-8", newline="\n")

    def write(self, record):
        """Append one record and hand it to the operating system, unless its id is there already."""
        if record["id"] not in self.done:
            self.done.add(record["id"])
            with writing(self.path):
                self.file.write(json_line(record) + "\n")
                self.file.flush()

    def read(self, ids):
        """The records with these ids, in this order, read back from the file."""
        wanted = set(ids)
        found = {}
        for record in stream_jsonl(self.path):
            if record["id"] in wanted:
                found[record["id"]] = record
        return [found[record_id] for record_id in ids]

    def close(self):
        self.file.close()


# -------------------------------------------------------------------------------- text and tokens

def render_prompt(tokenizer, prompt):
    """Token ids of one user turn up to the place where the model starts to write.

    The model's own chat template decides, without a system prompt. R1-Distill templates end with
    `<think>\\n`, so the model's output begins inside the reasoning; Qwen3's end before it, and the
    model opens the tag itself.
    """
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(ids)


class Trace(NamedTuple):
    """A generation taken apart; the first four joined give its text back exactly."""
    opening: str     # "<think>\n" where the model wrote it, else ""
    reasoning: str   # z of the paper
    closing: str     # "</think>" and the white space after it
    response: str    # y of the paper; "" if truncated
    truncated: bool  # no </think>: the reasoning never ended, so there is no response to judge


def split_reasoning(text):
    """Split a generation once, at the first `</think>`.

    >>> split_reasoning("<think>\\nIs it safe? Yes.\\n</think>\\n\\nDone.")[:2]
    ('<think>\\n', 'Is it safe? Yes.\\n')
    >>> split_reasoning("<think>\\nIs it safe? Yes.\\n</think>\\n\\nDone.")[2:]
    ('</think>\\n\\n', 'Done.', False)
    >>> split_reasoning("It goes on and")
    Trace(opening='', reasoning='It goes on and', closing='', response='', truncated=True)
    """
    opening = ""
    body = text
    if text.lstrip().startswith(OPEN):
        body = text.lstrip()[len(OPEN):].lstrip("\n")
        opening = text[:len(text) - len(body)]
    reasoning, tag, rest = body.partition(CLOSE)
    response = rest.lstrip()
    closing = tag + rest[:len(rest) - len(response)]
    return Trace(opening, reasoning, closing, response, truncated=not tag)


def decode(tokenizer, ids, eos=()):
    """Text of generated ids, without the end-of-sequence token and with nothing else cleaned up."""
    if ids and ids[-1] in eos:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_index(tokenizer, ids, char):
    """How many of `ids` lie wholly before character `char` of their decoded text.

    This maps a sentence to its token without encoding anything again: sampled ids need not be the
    canonical tokenisation of their text. Where a token straddles `char` it is not counted, so
    `decode(ids[:i])` is always a prefix of the text and at most `char` long.
    """
    text = decode(tokenizer, ids)
    low = 0
    high = len(ids)
    while low < high:  # the decoded length grows with the ids, but for a few broken characters
        middle = (low + high + 1) // 2
        if len(decode(tokenizer, ids[:middle])) <= char:
            low = middle
        else:
            high = middle - 1
    # Half a character decodes to one or more replacement characters: step back over such ends.
    for i in range(min(low + 4, len(ids)), -1, -1):
        head = decode(tokenizer, ids[:i])
        if len(head) <= char and text.startswith(head):
            return i
    return 0


# -------------------------------------------------------------- what samplers are asked and answer

class Request(NamedTuple):
    """One generation to make: `id` names it and seeds its own random numbers."""
    id: str
    prefix: list  # token ids: prompt, or prompt + z[:h] + trigger


class Completion(NamedTuple):
    """What the model wrote after a prefix. `ids` end with EOS unless `finished` is "length"."""
    id: str
    ids: list
    finished: str  # "stop" or "length"


# ---------------------------------------------------------------------------------- pairs, batches

TOKEN_FIELDS = ("prefix_ids", "chosen_ids", "rejected_ids")  # of a pair


def load_pairs(paths, max_length):
    """Read pair records; returns (pairs, how many were dropped as longer than `max_length` tokens).

    Only what training needs is kept: `id`, `n_prompt` and the three lists of ids, as arrays. Raises
    InputError for a record that lacks one or has an empty side, and for a repeated id.
    """
    pairs = []
    seen = set()
    dropped = 0
    for path in paths:
        for number, record in enumerate(stream_jsonl(path), 1):
            place = f"{path}, record {number}"
            pair = compact_record(record, TOKEN_FIELDS, ("id", "n_prompt"), place)
            pair["id"] = str(pair["id"])  # as JSON keeps it where it is a key
            refuse_repeated_id(pair["id"], seen, place)
            longer_side = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
            if len(pair["prefix_ids"]) + longer_side > max_length:
                dropped += 1
            else:
                pairs.append(pair)
    return pairs, dropped


def collate(sequences, device="cpu"):
    """Right-pad (prefix_ids, completion_ids) sequences into the long (B, T) tensors of a batch.

    `completion_mask` is 1 on completion tokens, `attention_mask` on all but padding.

    >>> batch = collate([([5, 6], [7]), ([5], [8, 9, 1])])
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[5, 6, 7, 0], [5, 8, 9, 1]], [[0, 0, 1, 0], [0, 1, 1, 1]])
    """
    import torch  # here, because most stages that import this module need no torch
    longest = max(len(prefix) + len(completion) for prefix, completion in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for row, (prefix, completion) in enumerate(sequences):
        end = len(prefix) + len(completion)
        input_ids[row, :end] = torch.tensor(list(prefix) + list(completion))
        attention_mask[row, :end] = 1
        completion_mask[row, len(prefix):end] = 1
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
        "completion_mask": completion_mask.to(device),
    }


# Sequences with one prefix are computed as a tree: the prefix is its trunk, computed once, and
# each different completion a branch (support/trees.py).
#
#     prompt, z[:h] ──┬── chosen: trigger, continuation, response      one trunk,
#                     └── rejected: cue, rest, response                 two branches
#
# Below, `parts` says what each example costs: for each a dict {part: tokens}, the trunk first.
# Equal parts have equal keys, so that what examples share is counted once.

def batch_tokens(indices, parts):
    """Tokens in the row of some examples, equal parts counted once."""
    row = {}
    for i in indices:
        row.update(parts[i])
    return sum(row.values())


def _by_tree(indices, parts):
    """The examples grouped by their trunk."""
    trees = {}
    for i in indices:
        trunk = next(iter(parts[i]))
        trees.setdefault(trunk, []).append(i)
    return list(trees.values())


def global_batches(parts, batch_size, epochs, seed):
    """Index lists, one per update: every example once per epoch, in an order drawn from the seed.

    CHOICE: whole trees are shuffled, so that examples with one trunk usually share a batch and the
    trunk is computed once. A batch holds `batch_size` examples, even where that divides a tree.

    >>> [sorted(b) for b in global_batches([{"x": 2}, {"y": 2}, {"x": 2}], 3, 2, seed=0)]
    [[0, 1, 2], [0, 1, 2]]
    """
    batches = []
    for epoch in range(epochs):
        trees = _by_tree(range(len(parts)), parts)
        random.Random(f"{seed} {epoch}").shuffle(trees)
        order = [i for tree in trees for i in tree]
        for start in range(0, len(order), batch_size):
            batches.append(order[start:start + batch_size])
    return batches


def micro_batches(indices, parts, budget, rank=0, world=1):
    """This rank's share of a global batch, cut into micro-batches of at most `budget` tokens.

    A single example may exceed the budget. Trees go to the rank with the least to do, the largest
    first. Every rank gets the same number of lists (some may be empty), because sharded ranks that
    make different numbers of forward passes wait for each other forever.

    >>> parts = [{"x": 9, "a": 4}, {"y": 9, "b": 4}, {"x": 9, "c": 4}]  # 0 and 2 share a prefix
    >>> [micro_batches([0, 1, 2], parts, 17, rank, world=2) for rank in (0, 1)]
    [[[0, 2]], [[1]]]
    >>> [micro_batches([0, 1, 2], parts, 13, rank, world=2) for rank in (0, 1)]
    [[[0], [2]], [[1], []]]
    """
    loads = [0] * world
    shares = [[[]] for _ in range(world)]  # for each rank a list of micro-batches
    trees = _by_tree(indices, parts)
    trees.sort(key=lambda tree: -batch_tokens(tree, parts))
    for tree in trees:
        lightest = loads.index(min(loads))
        loads[lightest] += batch_tokens(tree, parts)
        share = shares[lightest]
        for i in tree:
            if share[-1] and batch_tokens(share[-1] + [i], parts) > budget:
                share.append([])
            share[-1].append(i)
    longest = max(map(len, shares))
    missing = longest - len(shares[rank])
    return shares[rank] + [[]] * missing
