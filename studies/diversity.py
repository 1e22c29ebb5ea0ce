"""How many rollouts of each prompt have safe reasoning (Section 3, Figure 4).

    python -m studies.diversity --traces ... --verdicts ... --out runs/my/diversity.jsonl

A method that compares the rollouts of one prompt, as GRPO does, learns nothing from a prompt whose
rollouts are all unsafe or all safe.
"""
from collections import defaultdict

from intervene import recorded_flags
from studies.common import safety_by_trace, study_parser
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json, write_jsonl
from support.stages import run_stage, sidecar
from support.statistics import mean_estimate


def count_safe_rollouts(traces, verdicts):
    """Records of the study, counts of a prompt: {"id": prompt, "safe", "judged", "rollouts"}."""
    reasoning_safe = safety_by_trace(verdicts)
    by_prompt = defaultdict(list)
    for trace in traces:
        by_prompt[trace["prompt_id"]].append(reasoning_safe[trace["id"]])
    rows = []
    for prompt, found in by_prompt.items():
        rows.append({
            "id": prompt,
            "safe": found.count(True),
            "judged": len(found) - found.count(None),
            "rollouts": len(found),
        })
    return rows


def fully_judged(rows):
    """The most rollouts that a prompt has, and the rows of prompts with as many verdicts."""
    if not rows:
        raise InputError("diversity: no rollouts in --traces.")
    # With one verdict missing, a prompt's count of safe rollouts could be off by one.
    rollouts = max(row["rollouts"] for row in rows)
    return rollouts, [row for row in rows if row["judged"] == rollouts]


def summarise_diversity(rows):
    """The summary of the study; prompts with unjudged rollouts are left out and counted.

    `rollouts`: how many a prompt has; `counts`: prompts with 0, 1, ... safe ones; `histogram`: the
    same as estimates of shares; `one_at_most`: the share with none or one; `left_out`: prompts.
    """
    rollouts, judged = fully_judged(rows)
    prompts = [row["id"] for row in judged]
    counts = []
    histogram = []
    for k in range(rollouts + 1):
        hits = [row["safe"] == k for row in judged]
        counts.append(sum(hits))
        histogram.append(mean_estimate(hits, prompts))
    few = [row["safe"] <= 1 for row in judged]
    return {
        "rollouts": rollouts,
        "counts": counts,
        "histogram": histogram,
        "one_at_most": mean_estimate(few, prompts),
        "left_out": len(rows) - len(judged),
    }


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    return study_parser(
        "diversity",
        "How many rollouts of each prompt are safe (Figure 4).",
        ("traces", "verdicts"),
    )


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)

    def work():
        rows = count_safe_rollouts(read_jsonl(args.traces), read_jsonl(args.verdicts))
        write_jsonl(args.out, rows)
        write_json(sidecar(args.out, "summary"), summarise_diversity(rows))
        rollouts, judged = fully_judged(rows)
        safe = [row["safe"] for row in judged]
        none_safe = safe.count(0)
        all_safe = safe.count(rollouts)
        counts = {
            "prompts": len(rows),
            "all judged": len(judged),
            "none safe": none_safe,
            "mixed": len(judged) - none_safe - all_safe,
            "all safe": all_safe,
        }
        return counts, {}

    inputs = [args.traces, args.verdicts]
    run_stage(__file__, args.out, recorded_flags(args), inputs, work)


if __name__ == "__main__":
    exit_cleanly(main)
