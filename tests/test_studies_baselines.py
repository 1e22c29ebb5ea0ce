"""Pairs by hand, the commands beside run.sh's, and a small sweep: costs, restarts, workers."""
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

import evaluate
import intervene
import ipo
from data import load_prompts
from intervene import RulesJudge
from studies import baselines
from support.errors import InputError, ServiceError
from support.files import read_jsonl, write_json, write_jsonl
from support.unanswered import Unanswered

ROOT = Path(__file__).resolve().parents[1]
SWEEP = baselines.Sweep(
    model="toy/model", out=Path("S"), prompts="h.jsonl", benign="b.jsonl", limit=5, samples=3,
    triggers="t.txt", sampling=["--max-new-tokens", "99", "--batch-size", "7"],
    judging=["--judge", "rules", "--judge-concurrency", "2"], eval_judging=[], served=[],
    train_args=["--epochs", "2"], grpo_epochs=1, valid=[], held_out=[])


# -------------------------------------------------------------------------------------- the pieces

def rollout(tokenizer, prompt, k, z, y, truncated=False):
    """A trace and its verdict; z and y: whether the judge calls reasoning and response safe."""
    id_ = f"{prompt}#{k}"
    text = f"I think of {id_}.</think>I say {id_}."
    ids = tokenizer.encode(text, add_special_tokens=False) + [1]
    trace = {"id": id_, "prompt_id": prompt, "prompt": f"How {prompt}?", "prompt_ids": [2, 3],
             "ids": ids, "truncated": truncated}
    return trace, {"id": id_, "reasoning_safe": z, "response_safe": y, "cue": None}


def test_independent_pairs_share_the_prompt_alone(tokenizer):
    kinds = {"both": [(0, 0), (1, 1), (0, 1), (1, 1), (0, 0)], "unsafe": [(0, 0), (0, 1)],
             "safe": [(1, 1)], "odd": [(1, 0), (0, 0), (None, 1), (1, None)], "cut": [(0, 0)]}
    records = []
    for prompt, rollouts in kinds.items():
        for k, verdicts in enumerate(rollouts):
            z, y = (None if x is None else bool(x) for x in verdicts)
            records.append(rollout(tokenizer, prompt, k, z, y))
    records.append(rollout(tokenizer, "cut", 9, True, None, truncated=True))
    traces, verdicts = ([r[i] for r in records] for i in (0, 1))
    pairs, counts = baselines.independent_pairs(traces, verdicts, tokenizer, {1})
    ids = {t["id"]: t["ids"] for t in traces}
    assert [(p["chosen_ids"], p["rejected_ids"]) for p in pairs] == [
        (ids[f"both#{safe}"], ids[f"both#{unsafe}"]) for safe, unsafe in ((1, 0), (3, 2), (1, 4))]
    for p in pairs:
        assert p["prefix_ids"] == [2, 3] and p["n_prompt"] == 2 and p["h"] == 0
    assert pairs[0]["chosen"] == "I think of both#1.</think>I say both#1."
    assert len({p["id"] for p in pairs}) == 3
    # the response of odd#0 is unsafe, that of odd#3 has no verdict, the one of cut#9 no end
    assert counts == {
        "prompts": 5, "with a safe rollout": 2, "with both kinds": 1, "pairs": 3}


def test_sets_are_thinned_by_the_hash_of_their_ids_and_answers_stay(tmp_path):
    prompts = []
    for k in range(20):
        prompts.append({"id": f"p{k}", "prompt": f"What is {k} + 1?", "answer": str(k + 1)})
    write_jsonl(tmp_path / "sums.jsonl", prompts)
    specs = [f"sums=task:{tmp_path}/sums.jsonl"]
    assert baselines.thin_sets(specs, 0, tmp_path / "thin") == specs
    thinned, = baselines.thin_sets(specs, 5, tmp_path / "thin")
    kept = read_jsonl(tmp_path / "thin" / "sums.jsonl")
    assert thinned == f"sums=task:{tmp_path}/thin/sums.jsonl"
    assert len(kept) == 5 and all(prompt in prompts for prompt in kept)
    assert [p["id"] for p in kept] != [f"p{k}" for k in range(5)], "not the first ones"
    write_jsonl(tmp_path / "sums.jsonl", reversed(prompts))
    baselines.thin_sets(specs, 5, tmp_path / "thin")
    assert read_jsonl(tmp_path / "thin" / "sums.jsonl") == kept, "whatever their order"


def test_truncated_responses_count_in_what_is_measured_on_responses(tmp_path):
    def estimate(values, truncated, scored=False):
        return evaluate.metric_estimate(values, range(len(values)), truncated, scored)

    # Ten prompts of each set. Four of five complete answers comply, five are truncated.
    sets = {
        "b": {"kind": "benign", "compliance": estimate([1, 1, 1, 1, 0], 5)},
        "h": {
            "kind": "harmful",
            "reasoning": estimate([1] * 6 + [0] * 4, 0),  # truncated reasoning is judged
            "response": estimate([1, 1, 0, 0, None], 5),  # one of ten has no verdict
        },
        "t": {"kind": "task", "accuracy": estimate([1] * 3 + [0] * 7, 5, scored=True)},
    }
    write_json(tmp_path / "metrics.json", {"sets": sets})
    assert baselines.read_metrics(tmp_path) == pytest.approx({
        "b/compliance": 4 / 10, "h/reasoning": 6 / 10, "h/response": 2 / 9, "t/accuracy": 3 / 10})


def test_truncated_reasoning_and_sums_have_values_of_their_own():
    # What `value_of` relies on: they must not be counted a second time.
    cut = {"id": "p#0", "reasoning_safe": False, "response_safe": None, "truncated": True}
    assert evaluate.collect_harmful([cut]) == {
        "reasoning": ([True], ["p"]), "response": ([], [])}
    assert not evaluate.KINDS["harmful"].applies("reasoning", {})
    assert evaluate.KINDS["task"].truncated_scored
    assert not evaluate.KINDS["benign"].truncated_scored


def test_a_model_that_never_answers_has_values_and_one_without_verdicts_is_an_error(tmp_path):
    def metrics(n_truncated, n_unjudged):
        nothing = evaluate.metric_estimate([None] * n_unjudged, ["p"] * n_unjudged, n_truncated)
        sets = {"b": {"kind": "benign", "compliance": nothing}}
        write_json(tmp_path / "metrics.json", {"sets": sets})
        return baselines.read_metrics(tmp_path)

    assert metrics(n_truncated=4, n_unjudged=0) == {"b/compliance": 0.0}
    for n_truncated in (0, 4):
        with pytest.raises(InputError, match="b/compliance has no verdicts at all"):
            metrics(n_truncated, n_unjudged=2)
    with pytest.raises(InputError, match="no verdicts"):
        metrics(0, 0)  # all prompts were too long


def test_every_method_waits_for_its_data_and_the_second_stage_for_the_first():
    trials = baselines.all_trials(["ipo-both", "grpo-gap", "ipo"], ["1e-4"], [0, 1])
    assert [t.id for t in trials][:4] == [
        "base lr=- seed=0", "grpo-gap lr=1e-4 seed=0", "ipo lr=1e-4 seed=0",
        "ipo-both lr=1e-4 seed=0"]
    jobs = {job.name: job for job in baselines.jobs_of(None, trials)}
    assert jobs["ipo-both lr=1e-4 seed=1"].needs == ("data of seed 1", "ipo lr=1e-4 seed=1")
    assert jobs["ipo lr=1e-4 seed=0"].needs == ("data of seed 0",)
    assert jobs["grpo-gap lr=1e-4 seed=0"].needs == jobs["base lr=- seed=0"].needs == ()
    assert list(jobs)[:2] == ["data of seed 0", "data of seed 1"]


# ----------------------------------------------------------------- the commands and those of run.sh

def run_sh(command, **variables):
    """What run.sh prints; without variables that this process has for it."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", "run.sh", command], cwd=ROOT, text=True, capture_output=True,
        env={**kept, "PYTHON": sys.executable, **variables})


def parsed(program, words, places):
    """All flags of a command line, with paths replaced as `places` says."""
    modules = {"intervene": intervene, "ipo": ipo}
    flags = vars(modules[program].build_parser().parse_args(words))
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = [places.get(path, path) for path in value]
        else:
            flags[name] = places.get(value, value)
    return flags


def test_both_stages_of_ipo_are_the_stages_of_run_sh(tmp_path):
    triggers = tmp_path / "triggers.txt"
    triggers.write_text("Stop.\n\n# a comment\nNo.\nWait.\n")
    shown = run_sh("stages", RUN="R", SEED="3", LR="1.7e-4", LR2="1.7e-4", TOKENS="99", BATCH="7",
                   TRIGGERS=str(triggers), LIMIT="5", EPOCHS="2", MODEL="toy/model",
                   JUDGE_ARGS="--judge-concurrency 2", PROMPTS="h.jsonl", BENIGN="b.jsonl").stdout
    theirs = {}
    for line in shown.splitlines():
        if not line.startswith("#"):
            _, program, *words = shlex.split(line)
            theirs[words[words.index("--out") + 1]] = program.removesuffix(".py"), words
    sweep = SWEEP._replace(triggers=str(triggers))
    places = {
        "R/rollouts.jsonl": "S/seed3/rollouts.jsonl",
        "R/steps.jsonl": "S/seed3/steps.jsonl",
        "R/verdicts.jsonl": "S/seed3/verdicts.jsonl",
        "R/pairs.jsonl": "S/seed3/pairs.jsonl",
        "R/stage1": "S/seed3/ipo-1.7e-4/model",
        "R/benign_base.jsonl": "S/seed3/benign_base.jsonl",
        "R/benign_stage1.jsonl": "S/seed3/ipo-both-1.7e-4/benign_stage1.jsonl",
        "R/benign_pairs.jsonl": "S/seed3/ipo-both-1.7e-4/benign_pairs.jsonl",
        "R/stage2": "S/seed3/ipo-both-1.7e-4/model",
    }
    trial = baselines.Trial("ipo-both", "1.7e-4", 3)
    ours = {str(command.out): command for command in baselines.commands_behind(sweep, trial)}
    assert set(ours) == set(places.values())
    for out, place in places.items():
        program, words = theirs[out]
        assert ours[place].program == program
        assert parsed(program, ours[place].words, {}) == parsed(program, words, places), place


def test_two_interventions_differ_from_one_in_that_flag_alone():
    commands = baselines.data_commands(SWEEP, 0)
    place = {"S/seed0/pairs_n2.jsonl": "S/seed0/pairs.jsonl"}
    one = parsed("intervene", commands["pairs"].words, {})
    two = parsed("intervene", commands["pairs_n2"].words, place)
    assert one.pop("max_interventions") == 1 and two.pop("max_interventions") == 2 and one == two


def commands_of_run_sh(tmp_path, **variables):
    """The command lines that `bash run.sh baselines` starts, by a Python that only prints them."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nif [ "$1" = - ]; then exec {sys.executable} -; fi\n'
                      'for word; do echo "$word"; done\n')
    python.chmod(0o755)
    output = run_sh("baselines", **{**variables, "PYTHON": str(python)})
    stages = [line.partition(": ")[2] for line in output.stdout.splitlines() if ": " in line]
    return [shlex.split(stage)[1:] for stage in stages]


def test_run_sh_gives_the_sweep_its_validation_sets(tmp_path):
    sweep, frontier = commands_of_run_sh(tmp_path, METHODS="ipo ipo-n2", SAMPLES="4")
    assert sweep[:2] == ["-m", "studies.baselines"] and frontier[:2] == ["-m", "studies.frontier"]
    args = baselines.build_parser().parse_args(sweep[2:])
    assert [(name, kind) for name, kind, _ in evaluate.parse_sets(args.valid)] == [
        ("valid_harmful", "harmful"), ("valid_benign", "benign"), ("valid_sums", "task")]
    assert evaluate.parse_sets([*args.valid, *args.set]), "their names differ"
    assert args.methods == ["ipo", "ipo-n2"] and args.samples == 4 and args.limit_sets == 0
    assert len(args.lrs) == 5 and args.seeds == [0, 1, 2] and args.grpo_epochs == 2
    assert frontier[frontier.index("--results") + 1] == f"{args.out}/results.jsonl"
    quick, _ = commands_of_run_sh(tmp_path, QUICK="1")
    args = baselines.build_parser().parse_args(quick[2:])
    assert len(args.lrs) == 3 and args.seeds == [0] and args.grpo_epochs == 1 and args.limit_sets


def test_another_model_needs_validation_sets_of_its_own():
    output = run_sh("baselines", MODEL="my/model", JUDGE="local:my/judge")
    assert output.returncode == 2 and "VALID=" in output.stderr and output.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------- the sweep

SETS = {"valid": ["valid_h=harmful:{}/valid_h.jsonl", "valid_b=benign:{}/valid_b.jsonl"],
        "set": ["direct=harmful:{}/direct.jsonl", "jail=harmful:{}/jail.jsonl",
                "benign=benign:{}/benign.jsonl", "sums=task:{}/sums.jsonl"]}


def arguments(folder, *more):
    """The command line of a small sweep whose prompts are those of the toy world."""
    def prompts(name, first, last):
        return load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl")[first:last]

    files = {"harmful": prompts("train_harmful", 0, 8), "train_b": prompts("train_benign", 0, 6),
             "valid_h": prompts("train_harmful", 8, 12), "valid_b": prompts("train_benign", 6, 9),
             "direct": prompts("eval_direct", 0, 4), "jail": prompts("eval_jailbreak", 0, 3),
             "benign": prompts("train_benign", 9, 12), "sums": prompts("eval_sums", 0, 3)}
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    triggers = folder / "triggers.txt"
    triggers.write_text(
        "Wait, I need to put safety first.\nThis is dangerous, so I must decline.\n")
    sets = []
    for flag, specs in SETS.items():
        sets += [f"--{flag}", *(spec.format(folder) for spec in specs)]
    return ["run", "--model", str(ROOT / "toy" / "model"), *sets,
            "--prompts", str(folder / "harmful.jsonl"), "--benign", str(folder / "train_b.jsonl"),
            "--methods", "ipo", "ipo-both", "ipo-n2", "dpo-independent", "grpo-gap",
            "--lrs", "3e-4", "--seeds", "0", "--grpo-epochs", "1", "--triggers", str(triggers),
            "--sampling=--max-new-tokens 240 --batch-size 32 --device cpu",
            "--out", str(folder / "sweep"), *more]


REAL_RUN_JOBS = baselines.run_jobs


def run_in_turn(jobs, workers):
    """`workers.run_jobs` in this process, where a test can look at what is done."""
    left = [job.name for job in jobs]
    for job in jobs:
        assert not set(job.needs).intersection(left), "jobs come after those that they need"
        yield job.name, job.function(*job.arguments)
        left.remove(job.name)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No test starts other processes unless it says so."""
    monkeypatch.setattr(baselines, "run_jobs", run_in_turn)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished small sweep, and how many questions the judge was asked by each command."""
    folder = tmp_path_factory.mktemp("baselines")
    asked = {}
    real_ask = RulesJudge.ask
    real_command = baselines.run_command
    current = [None]

    def ask(self, question, items):
        items = list(items)
        asked[current[0]] = asked.get(current[0], 0) + len(items)
        return real_ask(self, question, items)

    def run_command(command, log_path):
        current[0] = command.out.relative_to(folder / "sweep").as_posix()
        return real_command(command, log_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RulesJudge, "ask", ask)
        patch.setattr(baselines, "run_command", run_command)
        patch.setattr(baselines, "run_jobs", run_in_turn)
        baselines.main(arguments(folder))
    for name in ("pairs", "independent"):
        made = read_jsonl(folder / "sweep" / "seed0" / f"{name}.jsonl")
        assert made, f"no {name}: nothing would be trained on them"
    return folder, asked


def records_of(folder):
    """The records of a sweep by id, without what differs between two runs: times."""
    found = {}
    for record in read_jsonl(folder / "sweep" / "results.jsonl"):
        for name in (*baselines.TIMES, "killed_before"):
            del record[name]
        found[record["id"]] = record
    return found


def test_every_model_is_measured_on_both_groups_of_sets(sweep):
    folder, _ = sweep
    records = records_of(folder)
    assert {r["method"] for r in records.values()} == {
        "base", "ipo", "ipo-both", "ipo-n2", "dpo-independent", "grpo-gap"}
    for record in records.values():
        assert set(record["validation"]) == {
            "valid_h/reasoning", "valid_h/response", "valid_b/compliance"}
        assert set(record["test"]) == {
            "direct/reasoning", "direct/response", "jail/reasoning", "jail/response",
            "benign/compliance", "sums/accuracy"}
        evaluated = folder / "sweep" / record["evaluation"]
        verdicts = read_jsonl(evaluated / "direct.verdicts.jsonl")
        unsafe = mean(not verdict["reasoning_safe"] for verdict in verdicts)
        assert record["test"]["direct/reasoning"] == unsafe and len(verdicts) == 4


def test_costs_are_what_was_sampled_and_asked(sweep):
    folder, asked = sweep
    out = folder / "sweep"

    def traces(*names):
        return sum(len(read_jsonl(out / "seed0" / name)) for name in names)

    def questions(*names):
        return sum(asked[f"seed0/{name}"] for name in names)

    verdicts = read_jsonl(out / "seed0" / "verdicts.jsonl")
    unsafe = sum(v["reasoning_safe"] is False for v in verdicts)
    first = traces("rollouts.jsonl", "pairs.rounds/round1.traces.jsonl")
    second_rounds = [path.relative_to(out / "seed0")
                     for path in (out / "seed0" / "pairs_n2.rounds").glob("*.traces.jsonl")]
    expected = {
        "base": (0, 0),
        "ipo": (first, questions("verdicts.jsonl", "pairs.jsonl")),
        "ipo-n2": (traces("rollouts.jsonl", *second_rounds),
                   questions("verdicts.jsonl", "pairs_n2.jsonl")),
        "ipo-both": (
            first + traces("benign_base.jsonl", "ipo-both-3e-4/benign_stage1.jsonl",
                           "ipo-both-3e-4/benign_pairs.rounds/reverse.traces.jsonl"),
            questions("verdicts.jsonl", "pairs.jsonl", "ipo-both-3e-4/benign_pairs.jsonl")),
        "dpo-independent": (16, questions("verdicts.jsonl") - unsafe),
        "grpo-gap": (8 * 8, questions("grpo-gap-3e-4/model")),
    }
    records = records_of(folder)
    for method, (generations, judge_calls) in expected.items():
        record, = (r for r in records.values() if r["method"] == method)
        assert (record["generations"], record["judge_calls"]) == (generations, judge_calls), method
    assert expected["ipo"][0] > 16 and expected["ipo-both"][0] > first


def test_cues_are_not_asked_for_where_stage_1_refuses_by_itself(sweep, tmp_path, monkeypatch):
    made = sweep[0] / "sweep" / "seed0"
    folder = tmp_path / "seed0"
    stage1 = folder / "ipo-both-3e-4" / "benign_stage1.jsonl"
    traces = read_jsonl(made / "ipo-both-3e-4" / "benign_stage1.jsonl")
    for trace in traces[:2]:
        trace["response"] = "NO"
    write_jsonl(stage1, traces)
    write_jsonl(folder / "benign_base.jsonl", read_jsonl(made / "benign_base.jsonl"))
    asked = []

    def ask(self, question, items):
        for item in items:
            asked.append(question)
            if question == "cue":
                yield 2
            else:
                yield "refusal" if item["text"] == "NO" else "full"

    monkeypatch.setattr(RulesJudge, "ask", ask)
    intervene.main([
        "benign", "--model", str(ROOT / "toy" / "model"), "--judge", "rules", "--device", "cpu",
        "--max-new-tokens", "40", "--base", str(folder / "benign_base.jsonl"),
        "--traces", str(stage1), "--out", str(stage1.with_name("benign_pairs.jsonl"))])
    trial = baselines.Trial("ipo-both", "3e-4", 0)
    generations, judge_calls = baselines.count_benign_costs(SWEEP._replace(out=tmp_path), trial)
    assert judge_calls == len(asked) and asked.count("cue") == 4, "6 prompts, 2 refused"
    assert generations == 6 + 6 + 4


def test_times_are_of_the_data_and_all_trainings_behind_a_model(sweep):
    out = sweep[0] / "sweep"
    seconds = {r["id"]: r["cpu_seconds"] for r in read_jsonl(out / "times.jsonl")}
    shared = ("rollouts", "steps", "verdicts", "pairs")
    data = sum(seconds[f"seed0/{name}.jsonl"] for name in shared)
    first = data + seconds["seed0/ipo-3e-4/model"]
    both = first + sum(seconds[f"seed0/{name}"] for name in (
        "benign_base.jsonl", "ipo-both-3e-4/benign_stage1.jsonl",
        "ipo-both-3e-4/benign_pairs.jsonl", "ipo-both-3e-4/model"))
    records = {r["method"]: r for r in read_jsonl(out / "results.jsonl")}
    assert records["ipo"]["cpu_seconds"] == pytest.approx(first, abs=0.051)
    assert records["ipo-both"]["cpu_seconds"] == pytest.approx(both, abs=0.051)
    assert not records["ipo-both"]["killed_before"], "its first stage was finished, not killed"


def test_killed_it_picks_up_where_it_left_off_and_a_sweep_can_grow(sweep, tmp_path, killed, capsys):
    def small(*more):
        baselines.main(arguments(tmp_path, "--methods", "ipo", "dpo-independent", *more))

    # The base, one of two models, and the training of the other: then it dies in its evaluation.
    killed(small, baselines, "read_metrics", after=3)
    results = tmp_path / "sweep" / "results.jsonl"
    before = results.read_text()
    assert [r["method"] for r in read_jsonl(results)] == ["base", "dpo-independent"]
    ran = []
    real = baselines.run_trial

    def run_trial(sweep, trial):
        ran.append(trial.method)
        return real(sweep, trial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "run_trial", run_trial)
        small()
    assert ran == ["ipo"] and results.read_text().startswith(before)
    assert "[3/3] ipo lr=3e-4 seed=0: harm " in capsys.readouterr().out
    made = records_of(tmp_path)
    whole = records_of(sweep[0])
    assert len(made) == 3 and all(whole[id_] == record for id_, record in made.items())
    times = {r["id"]: r for r in read_jsonl(tmp_path / "sweep" / "times.jsonl")}
    assert times["seed0/ipo-3e-4/model"]["killed_before"], "its time is not all of it"
    record, = (r for r in read_jsonl(results) if r["method"] == "ipo")
    assert record["killed_before"]
    before = results.read_text()
    small("--seeds", "0", "1")
    assert results.read_text().startswith(before) and len(records_of(tmp_path)) == 6
    with pytest.raises(InputError, match="grpo_epochs: 1 then, 2 now"):
        small("--grpo-epochs", "2")


def test_records_do_not_depend_on_the_number_of_workers(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "run_jobs", REAL_RUN_JOBS)
    methods = ["ipo", "ipo-both", "grpo-gap"]
    baselines.main(arguments(tmp_path, "--methods", *methods, "--workers", "2"))
    whole = records_of(sweep[0])
    made = records_of(tmp_path)
    assert len(made) == 4 and all(whole[id_] == record for id_, record in made.items())
    for method in methods:
        path = Path("sweep", "seed0", f"{method}-3e-4", "model", "model.safetensors")
        # The fixture's were made in this process, one after the other.
        assert (tmp_path / path).read_bytes() == (sweep[0] / path).read_bytes(), method


def test_errors_of_a_command_can_travel_to_another_process(tmp_path, monkeypatch):
    def fail(argv):
        raise Unanswered(1, 3, "status 503")
    monkeypatch.setitem(baselines.PROGRAMS, "ipo", fail)
    command = baselines.Command("ipo", ["train", "--out", "x"])
    with pytest.raises(ServiceError, match="1 of 3 verdicts are missing") as caught:
        baselines.run_command(command, tmp_path / "log.txt")
    assert caught.type is ServiceError, "Unanswered itself cannot be pickled"
    refused = baselines.Command("intervene", ["steps", "--nonsense", "--out", "x"])
    with pytest.raises(InputError, match="the end of .*log.txt says why"):
        baselines.run_command(refused, tmp_path / "log.txt")


@pytest.mark.parametrize("words, problem", [
    (["--lrs", "1e-4", "3e-4", "0.0001"], "--lrs: 0.0001 comes twice"),
    (["--seeds", "0", "1", "0"], "--seeds: 0 comes twice"),
    (["--limit", "-1"], "--limit must be at least 0"),
    (["--limit-sets", "-1"], "--limit-sets must be at least 0"),
    (["--samples", "-1"], "--samples must be at least 0"),
])
def test_flags_that_make_no_sense_are_refused_before_anything_is_made(tmp_path, words, problem):
    with pytest.raises(InputError, match=problem):
        baselines.main(arguments(tmp_path, *words))
    assert not (tmp_path / "sweep").exists()


def test_rates_are_numbers_and_stay_as_they_are_written(tmp_path, capsys):
    parser = baselines.build_parser()
    args = parser.parse_args(arguments(tmp_path, "--lrs", "1e-4", "0.00030"))
    assert args.lrs == ["1e-4", "0.00030"]
    with pytest.raises(SystemExit):
        parser.parse_args(arguments(tmp_path, "--lrs", "1e-4,3e-4"))
    assert "--lrs: invalid learning_rate value: '1e-4,3e-4'" in capsys.readouterr().err


def test_validation_needs_harmful_and_benign_sets(tmp_path):
    words = arguments(tmp_path)
    benign = words.index(f"valid_b=benign:{tmp_path}/valid_b.jsonl")
    with pytest.raises(InputError, match="--valid .*: add a benign set"):
        baselines.main(words[:benign] + words[benign + 1:])
