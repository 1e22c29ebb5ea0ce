"""Training prompts that are also evaluation prompts, word for word or nearly.

    python -m benchmarks.leakage --train data-sets/star1.jsonl --drop-leaked clean.jsonl

A set may be given by its name (star1, jbb, ...) or as a file. Without --eval, the training prompts
are compared with all published sets that `benchmarks.fetch` has written.
"""
import argparse
import math
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.sets import SETS, find_prompts, records_file
from data import load_prompts
from support.errors import InputError, exit_cleanly
from support.files import write_jsonl

SHORT_TEXT = 12  # words: of shorter texts pairs of words are compared, of others triples


# ---------------------------------------------------------------------------------------- measuring

class Leak(NamedTuple):
    """A training prompt that is, or nearly is, an evaluation prompt."""
    train: int       # number of the training prompt
    evaluation: int  # number of the evaluation prompt
    score: float     # 1 where one contains the other
    exact: bool      # equal but for case and punctuation


def text_words(text):
    """Words of a text without case and punctuation; if it has none, its parts between blanks.

    >>> text_words("Don't -- STOP, it's 3.5!")
    ['dont', 'stop', 'its', '3', '5']
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub("['’]", "", folded)
    return re.findall(r"[^\W_]+", folded) or folded.split()


def word_ngrams(words, n):
    """The n-grams of a list of words as a set."""
    starts = range(len(words) - n + 1)
    return {tuple(words[start:start + n]) for start in starts}


def find_leaks(train, evaluation, threshold=0.5):
    """Exact and near duplicates of two lists of texts, as Leaks: the exact first, then by score.

    The score is the weight of the word n-grams in both texts, as a share of the lighter
    text's weight, so that a prompt inside a longer one has score 1. An n-gram that is in c of all N
    texts weighs log(1 + N / c): without that, "What is the best way to" makes duplicates.
    CHOICE: n = 3, but 2 where the shorter text has under 12 words. Measured on STAR-1 against JBB,
    StrongREJECT, XSTest, MATH-500, AIME and HumanEval: of 1.6 million pairs 8 are called near
    duplicates; of copies of the first three sets' prompts with one word replaced it finds 97%, with
    two 70%.
    """
    train = [text_words(text) for text in train]
    evaluation = [text_words(text) for text in evaluation]
    leaks = exact_leaks(train, evaluation)
    for n in (2, 3):
        for t, e, score in shared_weights(train, evaluation, n):
            shorter = min(len(train[t]), len(evaluation[e]))
            right_n = 2 if shorter < SHORT_TEXT else 3
            if n == right_n and score >= threshold and train[t] != evaluation[e]:
                leaks.append(Leak(t, e, score, exact=False))

    def order(leak):
        return (-leak.exact, -leak.score, leak.train, leak.evaluation)
    return sorted(leaks, key=order)


def exact_leaks(train, evaluation):
    """Leaks of the texts, as lists of words, that are equal."""
    numbers = defaultdict(list)  # of the evaluation texts with these words
    for e, words in enumerate(evaluation):
        numbers[tuple(words)].append(e)
    leaks = []
    for t, words in enumerate(train):
        for e in numbers.get(tuple(words), ()):
            leaks.append(Leak(t, e, 1.0, exact=True))
    return leaks


def shared_weights(train, evaluation, n):
    """Yield (number in train, in evaluation, score) of each pair of texts that share an n-gram."""
    train_grams = [word_ngrams(words, n) for words in train]
    eval_grams = [word_ngrams(words, n) for words in evaluation]
    weights = gram_weights(train_grams + eval_grams)

    eval_totals = []
    containing = defaultdict(list)  # the evaluation texts that hold an n-gram
    for e, grams in enumerate(eval_grams):
        eval_totals.append(sum(weights[gram] for gram in grams))
        for gram in grams:
            containing[gram].append(e)

    for t, grams in enumerate(train_grams):
        total = sum(weights[gram] for gram in grams)
        shared = Counter()
        for gram in grams:
            for e in containing.get(gram, ()):
                shared[e] += weights[gram]
        for e, weight in shared.items():
            lighter = min(total, eval_totals[e])
            # Rounded, because a sum over a set depends on the set's order.
            yield t, e, round(weight / lighter, 6)


def gram_weights(texts):
    """The weight of each n-gram of the texts, which are sets of n-grams."""
    count = Counter()
    for grams in texts:
        count.update(grams)
    return {gram: math.log(1 + len(texts) / c) for gram, c in count.items()}


# ---------------------------------------------------------------------------------------- reporting

def published_name(path):
    """The name of the published set whose records this file holds, or None."""
    stem = Path(path).stem
    return stem if stem in SETS else None


def plain_texts(prompts, path):
    """What the prompts of a file ask, without our words around it if it is a published set."""
    name = published_name(path)
    field = SETS[name].plain if name else "prompt"
    return [prompt.get(field, prompt["prompt"]) for prompt in prompts]


def available_sets(data_dir=None):
    """Names of the published evaluation sets whose records are there; prints which are not."""
    available = []
    missing = []
    for name, published in SETS.items():
        if published.kind == "train":
            continue
        if records_file(name, data_dir).exists():
            available.append(name)
        else:
            missing.append(name)
    print("not checked, as the file is missing:", ", ".join(missing) or "none")
    return available


def report_leaks(train, evaluations, column=None, threshold=0.5, show=False, drop_leaked=None):
    """Print the leaks of each evaluation set; write the training prompts without them.

    train: file of training prompts, `column` their column; evaluations: {name: file of prompts};
    show: print the texts too; drop_leaked: the file to write. Returns {name: leaks}.
    """
    prompts = load_prompts(train, column=column)
    texts = plain_texts(prompts, train)
    leaks_by_set = {}
    leaked = set()
    print(f"{'set':16}{'prompts':>8}{'exact':>7}{'near':>6}{'to drop':>9}"
          "  training id ~ id in the set: score")
    for name, path in evaluations.items():
        records = load_prompts(path)
        leaks = find_leaks(texts, plain_texts(records, path), threshold)
        print(leak_line(name, leaks, prompts, records))
        set_name = published_name(path)
        # GPQA's authors ask to show none of its questions in plain text.
        hidden = set_name and SETS[set_name].kind == "choice"
        if show and not hidden:
            print_texts(leaks, prompts, records)
        leaks_by_set[name] = leaks
        leaked.update(leak.train for leak in leaks)

    print(f"{len(leaked)} of {len(prompts)} training prompts leak")
    if drop_leaked:
        kept = [prompt for number, prompt in enumerate(prompts) if number not in leaked]
        write_jsonl(drop_leaked, kept)
        print(f"the other {len(kept)}: {drop_leaked}")
    return leaks_by_set


def leak_line(name, leaks, prompts, records):
    """A set's line of the table: how many leaks of each sort, and the first four by their ids."""
    exact = {leak.evaluation for leak in leaks if leak.exact}
    near = {leak.evaluation for leak in leaks} - exact
    to_drop = {leak.train for leak in leaks}
    examples = []
    for leak in leaks[:4]:
        score = "exact" if leak.exact else f"{leak.score:.2f}"
        train_id = prompts[leak.train]["id"]
        eval_id = records[leak.evaluation]["id"]
        examples.append(f"{train_id} ~ {eval_id}: {score}")
    if len(leaks) > 4:
        examples.append("...")
    counts = f"{len(records):8}{len(exact):7}{len(near):6}{len(to_drop):9}"
    return f"{Path(name).name:16}{counts}  {', '.join(examples)}"


def print_texts(leaks, prompts, records):
    """Print both texts of each leak."""
    for leak in leaks:
        print(f"    {leak.score:.2f}  {prompts[leak.train]['prompt']!r}")
        print(f"          {records[leak.evaluation]['prompt']!r}")


# ------------------------------------------------------------------------------------- command line

def build_parser():
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leakage",
        description="Find exact and near duplicates between training prompts and evaluation sets; "
        "drop them.",
    )
    parser.add_argument(
        "--train",
        required=True,
        help="training prompts: a file, or the name of a published set",
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        dest="evaluations",
        help="evaluation sets, files or names (default: all that are in --data-dir)",
    )
    parser.add_argument(
        "--data-dir",
        help="folder of the published sets (default: $IPO_DATA, else ./data-sets)",
    )
    parser.add_argument(
        "--column",
        help="column of the prompts in the file --train, if it has an unusual name",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="score of a near duplicate, up to 1 (default: 0.5)",
    )
    parser.add_argument("--show", action="store_true", help="print the texts too")
    parser.add_argument(
        "--drop-leaked",
        metavar="OUT",
        help="write the training prompts that do not leak to this .jsonl file",
    )
    return parser


def main(argv=None):
    """Compare the sets that the command line names."""
    args = build_parser().parse_args(argv)
    if not 0 < args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: give a share above 0, up to 1.")
    train = find_prompts(args.train, args.data_dir)
    names = args.evaluations or available_sets(args.data_dir)
    evaluations = {name: find_prompts(name, args.data_dir) for name in names}
    if args.drop_leaked:
        out = Path(args.drop_leaked)
        inputs = [path.resolve() for path in (train, *evaluations.values())]
        if out.suffix != ".jsonl" or out.resolve() in inputs:
            raise InputError(
                f"--drop-leaked {out}: give a .jsonl file that is none of the inputs."
            )
    report_leaks(
        train, evaluations, args.column, args.threshold, args.show, args.drop_leaked
    )


if __name__ == "__main__":
    exit_cleanly(main)
