"""Interventions without training (Section 3, Figure 6), with two controls.

    python -m studies.curve --model M --traces ... --steps ... --verdicts ... --judge ... \\
        --out runs/my/curve.jsonl

In each unsafe trace a safety trigger replaces the first compliance cue and the model continues; an
unsafe outcome is treated the same way again, up to five times. The controls put a neutral sentence,
or nothing, in the cue's place. Only reasoning is sampled and judged.
"""
from pathlib import Path

import numpy as np

from data import load_triggers
from intervene import (
    DEFAULT_TRIGGERS,
    add_judge_flags,
    add_sampler_flags,
    judge_from_flags,
    recorded_flags,
    sampler_from_flags,
)
from studies.common import (
    Replacement,
    cues_by_trace,
    prompt_ids_of,
    reasoning_only,
    replace_steps,
    steps_by_trace,
    study_parser,
    unsafe_traces_in_turn,
)
from support.errors import InputError, exit_cleanly
from support.files import read_jsonl, write_json, write_jsonl
from support.judges import require_questions
from support.ranks import with_hands
from support.stages import run_stage, sidecar
from support.statistics import DIFFERENCE, SHARE, UNBOUNDED, average, column_estimates

NEUTRAL = "Let me read the request once more."  # fits any prompt, says nothing for or against it


def intervention_curve(traces, steps, cues, texts, sampler, judge, folder, rounds):
    """Harmful or not after 0 to `rounds` interventions: float (texts, traces, rounds + 1).

    steps: {trace id: steps}; cues: {trace id: number of the cue step}. Each unsafe trace starts as
    harmful (1) under each text. Its first cue is replaced by the text, and the model continues. A
    safe outcome (0) stays so; an unsafe one is intervened upon again at its new first cue. A trace
    without a cue, or without room in the context, keeps its value; one without a verdict is nan
    from there on.
    """
    harmful = np.ones((len(texts), len(traces), rounds + 1))
    unsafe = {}  # {(text number, trace number): what to intervene upon next}
    for a in range(len(texts)):
        for k, trace in enumerate(traces):
            unsafe[a, k] = trace, steps[trace["id"]], cues[trace["id"]]
    for n in range(1, rounds + 1):
        harmful[:, :, n] = harmful[:, :, n - 1]
        replacements = {}
        for (a, k), (trace, its_steps, cue) in unsafe.items():
            if cue:
                key = f"{traces[k]['id']}|{a}@{n}"
                replacements[a, k] = Replacement(key, trace, its_steps, cue, texts[a])
        outcomes = replace_steps(replacements.values(), sampler, judge, folder / f"round{n}")
        unsafe = {}  # a trace that is left out here is never tried again
        for (a, k), replacement in replacements.items():
            if replacement.id not in outcomes:  # no room left in the context
                continue
            trace, its_steps, verdict = outcomes[replacement.id]
            safe = verdict["reasoning_safe"]
            if safe is None:
                harmful[a, k, n] = np.nan
            elif safe:
                harmful[a, k, n] = 0
            else:
                unsafe[a, k] = trace, its_steps, verdict["cue"]
    return harmful


def curve_records(traces, arms, harmful):
    """Records of the study, one for each trace and arm.

    arms: [(kind, text)]; harmful: float (arms, traces, rounds + 1). Record: {"id": "TRACE|ARM",
    "trace", "prompt_id", "arm": "trigger", "neutral" or "removal", "text", "harmful": [1, 0 or None
    after 0, 1, ... interventions]}.
    """
    records = []
    for a, (arm, text) in enumerate(arms):
        for trace, row in zip(traces, harmful[a]):
            outcomes = []
            for value in row:
                outcomes.append(None if np.isnan(value) else int(value))
            records.append({
                "id": f"{trace['id']}|{a}",
                "trace": trace["id"],
                "prompt_id": trace["prompt_id"],
                "arm": arm,
                "text": text,
                "harmful": outcomes,
            })
    return records


def round_estimates(table, prompts, invented=SHARE):
    """Estimates after 0, 1, ... interventions; table: float (traces, rounds + 1).

    The first is no estimate: before any intervention all traces are harmful by choice.
    """
    before = column_estimates(table[:, :1], prompts, invented=UNBOUNDED)
    after = column_estimates(table[:, 1:], prompts, invented=invented)
    return before + after


def summarise_curve(arms, harmful, prompts):
    """The summary of the study; its lists have an entry for 0, 1, ... interventions.

    arms: [(kind, text)], the last two the controls; harmful: float (arms, traces, rounds + 1);
    prompts: the prompt of each trace. `overall`: the mean over the triggers;
    `neutral_minus_overall`, `removal_minus_overall`: the difference on the same traces; `arms`:
    [{"arm", "text", "harmful": estimates}].
    """
    # Each trace counts once, however many triggers were tried on it.
    overall = average(harmful[:-2], 0)  # (traces, rounds + 1)
    neutral, removal = harmful[-2:]
    by_arm = []
    for (arm, text), table in zip(arms, harmful):
        by_arm.append({"arm": arm, "text": text, "harmful": round_estimates(table, prompts)})
    return {
        "interventions": list(range(harmful.shape[2])),
        "overall": round_estimates(overall, prompts),
        "neutral_minus_overall": round_estimates(neutral - overall, prompts, DIFFERENCE),
        "removal_minus_overall": round_estimates(removal - overall, prompts, DIFFERENCE),
        "arms": by_arm,
    }


def print_curve(name, estimates):
    """Print harmful shares in per cent on one line."""
    cells = []
    for estimate in estimates:
        value = estimate["value"]
        cells.append("  -  " if value is None else f"{100 * value:5.1f}")
    print(f"  {' '.join(cells)}  {name}")


# ------------------------------------------------------------------------------------ command line

def build_parser():
    """The command line of this study."""
    parser = study_parser(
        "curve",
        "Harmful share after 0, 1, ... interventions, and two controls (Figure 6).",
        ("traces", "steps", "verdicts"),
    )
    add_sampler_flags(parser)
    add_judge_flags(parser)
    parser.add_argument("--triggers", default=str(DEFAULT_TRIGGERS),
                        help="safety triggers, one per line")
    parser.add_argument("--interventions", type=int, default=5,
                        help="interventions on each trace at most")
    parser.add_argument("--neutral", default=NEUTRAL,
                        help="a sentence that is no trigger: the first control")
    parser.add_argument("--limit", type=int, default=100,
                        help="unsafe traces to start from; 0 = all")
    return parser


def main(argv=None):
    """Run this study from the command line."""
    args = build_parser().parse_args(argv)
    judge = judge_from_flags(args)
    require_questions(judge, ("reasoning", "cue"))

    def work():
        verdicts = read_jsonl(args.verdicts)
        cues = cues_by_trace(verdicts)
        steps = steps_by_trace(read_jsonl(args.steps))
        traces = unsafe_traces_in_turn(read_jsonl(args.traces), verdicts, args.limit)
        if not traces:
            raise InputError(f"{args.verdicts}: no complete trace with unsafe reasoning, "
                             "so there is nothing to intervene upon.")
        arms = [("trigger", text) for text in load_triggers(args.triggers)]
        arms += [("neutral", args.neutral), ("removal", None)]
        harmful = intervention_curve(
            traces,
            steps,
            cues,
            [text for _, text in arms],
            reasoning_only(sampler_from_flags(args)),
            judge,
            Path(args.out).with_suffix(".rounds"),
            args.interventions,
        )
        prompts = prompt_ids_of(traces)
        summary = summarise_curve(arms, harmful, prompts)
        write_jsonl(args.out, curve_records(traces, arms, harmful))
        write_json(sidecar(args.out, "summary"), summary)
        print_curve("all triggers", summary["overall"])
        for arm in summary["arms"]:
            print_curve(arm["text"] or "(the cue removed)", arm["harmful"])
        counts = {
            "prompts": len(set(prompts)),
            "unsafe": len(traces),
            "cue found": sum(bool(cues[trace["id"]]) for trace in traces),
            "arms": len(arms),
            "unjudged": int(np.isnan(harmful[:, :, -1]).sum()),
        }
        return counts, {"judge": judge.summary()}

    flags = recorded_flags(args, judge=judge.name)
    inputs = [args.model, args.triggers, args.traces, args.steps, args.verdicts]
    run_stage(__file__, args.out, flags, inputs, work)


if __name__ == "__main__":
    exit_cleanly(with_hands(main))
