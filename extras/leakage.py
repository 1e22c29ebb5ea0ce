"""Training prompts that are also evaluation prompts, or nearly: `python data.py leakage --train star1`."""
import math
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import data
from extras.sets import SETS


def words(text):
    """Words of a text, without case and punctuation; of one without words, what stands between its blanks.

    >>> words("Don't -- STOP, it's 3.5!")
    ['dont', 'stop', 'its', '3', '5']
    """
    text = re.sub("['’]", "", unicodedata.normalize("NFKC", text).casefold())
    return re.findall(r"[^\W_]+", text) or text.split()


def grams(words, n):
    """The n-grams of a list of words as a set."""
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def leaks(train, evals, threshold=0.5):
    """Exact and near duplicates of two lists of texts: [(number in train, in evals, score, exact)], the highest first.

    The score is the weight of the word n-grams that two texts share, as a part of the lighter text's weight, so that a
    prompt inside a longer one has score 1. An n-gram that is in c of all N texts weighs log(1 + N / c): without that,
    "What is the best way to" makes duplicates. CHOICE: n = 3, but 2 where the shorter text has under 12 words.
    Measured on STAR-1 against JBB, StrongREJECT, XSTest, MATH-500, AIME and HumanEval: of 1.6 million pairs 8 are called
    near duplicates; of copies of the first three sets' prompts with one word replaced it finds 97%, with two 70%.
    """
    train, evals = [words(text) for text in train], [words(text) for text in evals]
    same = defaultdict(list)
    for e, w in enumerate(evals):
        same[tuple(w)].append(e)
    found = [(t, e, 1.0, True) for t, w in enumerate(train) for e in same.get(tuple(w), ())]
    for n in (2, 3):
        found += [(t, e, score, False) for t, e, score in _shared(train, evals, n) if score >= threshold
                  and train[t] != evals[e] and n == (2 if min(len(train[t]), len(evals[e])) < 12 else 3)]
    return sorted(found, key=lambda hit: (-hit[3], -hit[2], *hit[:2]))


def _shared(train, evals, n):
    """Yield (number in train, in evals, score) of each pair that shares an n-gram."""
    mine, theirs = [grams(w, n) for w in train], [grams(w, n) for w in evals]
    count = Counter(gram for texts in (mine, theirs) for text in texts for gram in text)
    weight = {gram: math.log(1 + (len(mine) + len(theirs)) / c) for gram, c in count.items()}
    totals, index = [sum(weight[gram] for gram in text) for text in theirs], defaultdict(list)
    for e, text in enumerate(theirs):
        for gram in text:
            index[gram].append(e)
    for t, text in enumerate(mine):
        total, shared = sum(weight[gram] for gram in text), Counter()
        for gram in text:
            for e in index.get(gram, ()):
                shared[e] += weight[gram]
        for e, value in shared.items():
            yield t, e, round(value / min(total, totals[e]), 6)  # rounded: sums depend on the order of a set


def plain(record, name):
    """What a record of a set asks, without our words around it."""
    kind = SETS[name].kind if name in SETS else None
    return record[{"math": "problem", "choice": "question", "code": "code_prompt"}.get(kind, "prompt")]


def report(train, eval=None, data_dir=None, column=None, threshold=0.5, show=False, drop_leaked=None):
    """Command `leakage`: print the duplicates by set, write the training prompts without them; {set: `leaks`}."""
    if not 0 < threshold <= 1:
        raise SystemExit(f"--threshold {threshold}: give a share above 0, up to 1.")
    if not eval:
        there = {n: data.prompts_path(n, data_dir).exists() for n, s in SETS.items() if s.kind != "train"}
        eval = [n for n in there if there[n]]
        print("not checked, as the file is missing:", ", ".join(n for n in there if not there[n]) or "none")
    inputs = [data.prompts_path(n, data_dir).resolve() for n in (train, *eval)]
    if drop_leaked and (Path(drop_leaked).suffix != ".jsonl" or Path(drop_leaked).resolve() in inputs):
        raise SystemExit(f"--drop-leaked {drop_leaked}: give a .jsonl file that is none of the inputs.")
    prompts, result, leaked = data.load_prompts(train, data_dir=data_dir, column=column), {}, set()
    print(f"{'set':16}{'prompts':>8}{'exact':>7}{'near':>6}{'to drop':>9}  training id ~ id in the set: score")
    for name in eval:
        records = data.load_prompts(name, data_dir=data_dir)
        hits = result[name] = leaks([plain(p, train) for p in prompts], [plain(r, name) for r in records], threshold)
        exact, drop = {e for _, e, _, same in hits if same}, {t for t, *_ in hits}
        near = {e for _, e, *_ in hits} - exact
        few = ", ".join(f"{prompts[t]['id']} ~ {records[e]['id']}: {'exact' if same else f'{score:.2f}'}"
                        for t, e, score, same in hits[:4]) + ", ..." * (len(hits) > 4)
        print(f"{Path(name).name:16}{len(records):8}{len(exact):7}{len(near):6}{len(drop):9}  {few}")
        shown = show and not (name in SETS and SETS[name].kind == "choice")  # GPQA's authors ask to show none in plain text
        for t, e, score, _ in hits if shown else ():
            print(f"    {score:.2f}  {prompts[t]['prompt']!r}\n          {records[e]['prompt']!r}")
        leaked |= drop
    print(f"{len(leaked)} of {len(prompts)} training prompts leak")
    if drop_leaked:
        data.write_jsonl(drop_leaked, [p for t, p in enumerate(prompts) if t not in leaked])
        print(f"the other {len(prompts) - len(leaked)}: {drop_leaked}")
    return result
