"""The commands beside run.sh's, and a small sweep: costs, restarts, workers, edited methods."""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

import evaluate
import intervene
import ipo
import studies.methods
from data import load_prompts
from domains.safety import Judge
from studies import lab, leaderboard
from studies.methods import examples
from support.errors import InputError
from support.files import read_json, read_jsonl, write_json, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


# -------------------------------------------------------------------------------------- the pieces

def test_sets_are_thinned_by_the_hash_of_their_ids_and_answers_stay(tmp_path):
    prompts = []
    for k in range(20):
        prompts.append({"id": f"p{k}", "prompt": f"What is {k} + 1?", "answer": str(k + 1)})
    write_jsonl(tmp_path / "sums.jsonl", prompts)
    specs = [f"sums=task:{tmp_path}/sums.jsonl"]
    assert leaderboard.thin_sets(specs, 0, tmp_path / "thin") == specs
    [thinned] = leaderboard.thin_sets(specs, 5, tmp_path / "thin")
    kept = read_jsonl(tmp_path / "thin" / "sums.jsonl")
    assert thinned == f"sums=task:{tmp_path}/thin/sums.jsonl"
    assert len(kept) == 5
    for prompt in kept:
        assert prompt in prompts
    assert [prompt["id"] for prompt in kept] != [f"p{k}" for k in range(5)], "not the first ones"
    write_jsonl(tmp_path / "sums.jsonl", reversed(prompts))
    leaderboard.thin_sets(specs, 5, tmp_path / "thin")
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
            "response": estimate([1, 1, 0, 0, None], 5),  # of ten one has no verdict
        },
        "t": {"kind": "task", "accuracy": estimate([1] * 3 + [0] * 7, 5, scored=True)},
    }
    write_json(tmp_path / "metrics.json", {"sets": sets})
    assert leaderboard.read_metrics(tmp_path) == pytest.approx({
        "b/compliance": 4 / 10,
        "h/reasoning": 6 / 10,
        "h/response": 2.5 / 10,
        "t/accuracy": 3 / 10,
    })


def test_truncated_reasoning_and_sums_have_values_of_their_own():
    # What `read_metrics` relies on: they must not be counted a second time.
    cut = {"id": "p#0", "reasoning_safe": False, "response_safe": None, "truncated": True}
    assert evaluate.collect_harmful([cut]) == {
        "reasoning": ([True], ["p"]), "response": ([], []),
    }
    assert not evaluate.KINDS["harmful"].applies("reasoning", {})
    assert evaluate.KINDS["task"].truncated_scored
    assert not evaluate.KINDS["benign"].truncated_scored


def test_a_model_that_never_answers_has_values_and_one_without_verdicts_is_an_error(tmp_path):
    def metrics(n_truncated, n_unjudged):
        nothing = evaluate.metric_estimate([None] * n_unjudged, ["p"] * n_unjudged, n_truncated)
        sets = {"b": {"kind": "benign", "compliance": nothing}}
        write_json(tmp_path / "metrics.json", {"sets": sets})
        return leaderboard.read_metrics(tmp_path)

    assert metrics(n_truncated=4, n_unjudged=0) == {"b/compliance": 0.0}
    for n_truncated in (0, 4):
        with pytest.raises(InputError, match="b/compliance has no verdicts at all"):
            metrics(n_truncated, n_unjudged=2)
    with pytest.raises(InputError, match="no verdicts"):
        metrics(0, 0)  # all prompts were too long


def test_a_seed_has_one_base_then_what_is_not_trained_then_rate_after_rate():
    lab.load_methods()
    methods = ["ipo-both", "safepath-zero-shot", "ipo", "sft"]
    trials = leaderboard.all_trials(methods, ["1e-4", "0.0003"], [7, 8])
    expected = [
        "base lr=- seed=7",
        "safepath-zero-shot lr=- seed=7",
        "ipo-both lr=1e-4 seed=7",
        "ipo lr=1e-4 seed=7",
        "sft lr=1e-4 seed=7",
        "ipo-both lr=0.0003 seed=7",
        "ipo lr=0.0003 seed=7",
        "sft lr=0.0003 seed=7",
    ]
    assert [trial.id for trial in trials[:8]] == expected
    assert [trial.id for trial in trials[8:]] == [name.replace("=7", "=8") for name in expected]


def test_without_names_all_methods_that_the_files_are_enough_for():
    everything = set(leaderboard.methods_of([], "b.jsonl", "t.jsonl"))
    assert everything == set(lab.load_methods())
    needs_benign = everything - set(leaderboard.methods_of([], "", "t.jsonl"))
    needs_teacher = everything - set(leaderboard.methods_of([], "b.jsonl", ""))
    assert needs_benign >= {"ipo-both", "safepath", "thinksafe", "teacher-mixed"}
    assert needs_teacher == {"teacher", "teacher-mixed"}
    assert not needs_benign & {"ipo", "sft", "dpo", "teacher"}
    assert leaderboard.methods_of(["sft", "ipo"], "", "") == ["sft", "ipo"]
    with pytest.raises(InputError, match="--methods iop: there is no such method") as caught:
        leaderboard.methods_of(["ipo", "iop"], "", "")
    listed = str(caught.value).partition("There are: ")[2]
    assert set(listed.rstrip(".").split(", ")) == everything


# ----------------------------------------------------------------- the commands and those of run.sh

def commands_behind(monkeypatch, settings, name, lr, seed):
    """{output: command} of all that a method would run."""
    commands = {}

    def record(settings, command):
        commands[command.out.as_posix()] = command
        return {}

    monkeypatch.setattr(lab, "run_once", record)
    method = lab.load_methods()[name]
    method.make(lab.Lab(settings, name, lr, seed))
    return commands


def settings_like_run_sh(triggers):
    """The settings of `test_both_stages_of_ipo_are_the_stages_of_run_sh`."""
    return lab.Settings(
        model="toy/model", out=Path("S"), prompts="h.jsonl", benign="b.jsonl", limit=5, samples=3,
        triggers=triggers, instruction="", teacher="",
        sampling=["--max-new-tokens", "99", "--batch-size", "7"], served=[],
        judging=["--judge", "rules", "--judge-concurrency", "2"], train_args=["--epochs", "2"],
        grpo_epochs=1)


def run_sh(command, **variables):
    """What run.sh prints; without variables that this process has for it."""
    environment = {"PYTHON": sys.executable, **variables}
    for name in ("PATH", "HOME"):
        if name in os.environ:
            environment[name] = os.environ[name]
    return subprocess.run(
        ["bash", "run.sh", command],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment,
    )


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


def test_both_stages_of_ipo_are_the_stages_of_run_sh(tmp_path, monkeypatch):
    triggers = tmp_path / "triggers.txt"
    triggers.write_text("Stop.\n\n# a comment\nNo.\nWait.\n")
    shown = run_sh(
        "stages", RUN="R", SEED="3", LR="1.7e-4", LR2="1.7e-4", TOKENS="99", BATCH="7",
        TRIGGERS=str(triggers), LIMIT="5", EPOCHS="2", MODEL="toy/model",
        JUDGE_ARGS="--judge-concurrency 2", PROMPTS="h.jsonl", BENIGN="b.jsonl",
    ).stdout
    theirs = {}
    for line in shown.splitlines():
        if not line.startswith("#"):
            _, program, *words = shlex.split(line)
            theirs[words[words.index("--out") + 1]] = program.removesuffix(".py"), words
    places = {
        "R/rollouts.jsonl": "S/seed3/rollouts.jsonl",
        "R/steps.jsonl": "S/seed3/steps.jsonl",
        "R/verdicts.jsonl": "S/seed3/verdicts.jsonl",
        "R/pairs.jsonl": "S/seed3/pairs.jsonl",
        "R/stage1": "S/seed3/ipo-1.7e-4/model",
        "R/benign_base.jsonl": "S/seed3/benign/rollouts.jsonl",
        "R/benign_stage1.jsonl": "S/seed3/ipo-both-1.7e-4/benign/rollouts.jsonl",
        "R/benign_pairs.jsonl": "S/seed3/ipo-both-1.7e-4/benign_pairs.jsonl",
        "R/stage2": "S/seed3/ipo-both-1.7e-4/model",
    }
    settings = settings_like_run_sh(str(triggers))
    ours = commands_behind(monkeypatch, settings, "ipo-both", "1.7e-4", 3)
    assert set(ours) == set(places.values())
    for out, place in places.items():
        program, words = theirs[out]
        assert ours[place].program == program
        assert parsed(program, ours[place].words, {}) == parsed(program, words, places), place


@pytest.mark.parametrize("name, rounds", [("ipo-n2", 2), ("ipo-n3", 3)])
def test_more_interventions_differ_from_one_in_that_flag_alone(monkeypatch, name, rounds):
    settings = settings_like_run_sh("t.txt")
    one = commands_behind(monkeypatch, settings, "ipo", "1e-4", 0)
    more = commands_behind(monkeypatch, settings, name, "1e-4", 0)
    place = f"S/seed0/{name}/pairs.jsonl"
    places = {place: "S/seed0/pairs.jsonl", f"S/seed0/{name}-1e-4/model": "S/seed0/ipo-1e-4/model"}
    with_one = parsed("intervene", one["S/seed0/pairs.jsonl"].words, {})
    with_more = parsed("intervene", more[place].words, places)
    assert with_one.pop("max_interventions") == 1
    assert with_more.pop("max_interventions") == rounds
    assert with_one == with_more
    trained = parsed("ipo", more[f"S/seed0/{name}-1e-4/model"].words, places)
    assert trained == parsed("ipo", one["S/seed0/ipo-1e-4/model"].words, {})


FAKE_PYTHON = """#!/usr/bin/env bash
if [ "$1" = - ] || [ "$2" = domains ]; then exec {python} "$@"; fi
for word; do echo "$word"; done
"""


def commands_of_run_sh(tmp_path, **variables):
    """The command lines that `bash run.sh leaderboard` starts, by a Python that prints them."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    output = run_sh("leaderboard", **{**variables, "PYTHON": str(python)})
    commands = []
    for line in output.stdout.splitlines():
        _, colon, stage = line.partition(": ")
        if colon:
            commands.append(shlex.split(stage)[1:])
    return commands


def test_run_sh_gives_the_sweep_its_validation_sets(tmp_path):
    sweep, frontier = commands_of_run_sh(
        tmp_path, METHODS="ipo ipo-n2", AGAIN="ipo-n2", SAMPLES="4", GRPO_EPOCHS="3")
    assert sweep[:2] == ["-m", "studies.leaderboard"]
    assert frontier[:2] == ["-m", "studies.frontier"]
    args = leaderboard.build_parser().parse_args(sweep[2:])
    assert [(name, kind) for name, kind, _ in evaluate.parse_sets(args.valid)] == [
        ("valid_harmful", "harmful"), ("valid_benign", "benign"), ("valid_sums", "task")]
    assert evaluate.parse_sets([*args.valid, *args.set]), "their names differ"
    assert (args.methods, args.again) == (["ipo", "ipo-n2"], ["ipo-n2"])
    assert (args.samples, args.limit_sets, args.grpo_epochs) == (4, 60, 3)
    assert args.lrs == leaderboard.DEFAULT_RATES and args.seeds == [0, 1, 2]
    for path in (args.prompts, args.benign, args.teacher, args.instruction, args.triggers):
        assert (ROOT / path).is_file()
    assert args.train_args == ["--epochs", "1"]
    assert args.judging[:2] == args.eval_judging[:2] == ["--judge", "rules"]
    assert frontier[frontier.index("--results") + 1] == f"{args.out}/results.jsonl"

    quick, _ = commands_of_run_sh(tmp_path, QUICK="1", BENIGN="")
    args = leaderboard.build_parser().parse_args(quick[2:])
    assert (args.lrs, args.seeds, args.grpo_epochs, args.limit_sets) == (["6e-5"], [0], 1, 60)
    assert args.benign == ""


def test_a_judge_that_is_served_is_started_for_each_command(tmp_path):
    sweep, _ = commands_of_run_sh(tmp_path, JUDGE="serve:my/judge")
    args = leaderboard.build_parser().parse_args(sweep[2:])
    assert args.runner and "{judge}" in args.judging
    assert args.judging[args.judging.index("--judge-model") + 1] == "my/judge"


def test_another_model_needs_validation_sets_and_rates_of_its_own():
    sets = "a=harmful:a.jsonl"  # rates are missing still
    output = run_sh("leaderboard", MODEL="my/model", JUDGE="local:my/judge", VALID=sets)
    assert output.returncode == 2 and output.stderr.count("\n") == 1
    assert "VALID=" in output.stderr and "LRS=" in output.stderr


# --------------------------------------------------------------------------------------- the sweep

SETS = {
    "valid": ["valid_b=benign:{}/valid_b.jsonl"],
    "set": ["direct=harmful:{}/direct.jsonl", "sums=task:{}/sums.jsonl"],
}
METHODS = ["ipo", "ipo-both", "dpo-independent", "grpo-gap"]


def arguments(folder, *more):
    """The command line of a small sweep whose prompts are those of the toy world."""
    def prompts(name, first, last):
        return load_prompts(ROOT / "toy" / "prompts" / f"{name}.jsonl")[first:last]

    files = {
        "harmful": prompts("train_harmful", 0, 4),
        "train_b": prompts("train_benign", 0, 4),
        "valid_b": prompts("train_benign", 6, 8),
        "direct": prompts("eval_direct", 0, 3),
        "sums": prompts("eval_sums", 0, 2),
    }
    for name, records in files.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    triggers = folder / "triggers.txt"
    triggers.write_text(
        "Wait, I need to put safety first.\nThis is dangerous, so I must decline.\nI stop here.\n")
    sets = []
    for flag, specs in SETS.items():
        sets += [f"--{flag}", *(spec.format(folder) for spec in specs)]
    return [
        "--model", str(ROOT / "toy" / "model"), *sets,
        "--prompts", str(folder / "harmful.jsonl"), "--benign", str(folder / "train_b.jsonl"),
        "--methods", *METHODS, "--lrs", "3e-4", "--seeds", "0", "--grpo-epochs", "1",
        "--triggers", str(triggers), "--instruction", str(ROOT / "prompts" / "instruction.txt"),
        "--sampling=--max-new-tokens 160 --batch-size 64 --device cpu",
        "--train-args=--device cpu", "--out", str(folder / "sweep"), *more,
    ]


REAL_RUN_JOBS = leaderboard.run_jobs


def run_in_turn(jobs, workers):
    """`workers.run_jobs` in this process, where a test can look at what is done."""
    for job in jobs:
        yield job.name, job.function(*job.arguments)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No test starts other processes unless it says so."""
    monkeypatch.setattr(leaderboard, "run_jobs", run_in_turn)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished small sweep, and how many questions the judge was asked by each command."""
    folder = tmp_path_factory.mktemp("leaderboard")
    asked = {}
    real_ask = Judge.ask
    real_command = lab.run_command
    current = [None]

    def ask(self, question, items):
        items = list(items)
        asked[current[0]] = asked.get(current[0], 0) + len(items)
        return real_ask(self, question, items)

    def run_command(settings, command):
        current[0] = command.out.relative_to(folder / "sweep").as_posix()
        return real_command(settings, command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "ask", ask)
        patch.setattr(lab, "run_command", run_command)
        patch.setattr(leaderboard, "run_jobs", run_in_turn)
        leaderboard.main(arguments(folder))
    made = read_jsonl(folder / "sweep" / "seed0" / "pairs.jsonl")
    assert made, "no pairs: nothing would be trained on them"
    return folder, asked


def records_of(folder):
    """The records of a sweep by id, without what differs between two runs: times."""
    found = {}
    for record in read_jsonl(folder / "sweep" / "results.jsonl"):
        for name in (*lab.TIMES, "killed_before"):
            del record[name]
        found[record["id"]] = record
    return found


def test_every_model_is_described_and_measured_on_both_groups_of_sets(sweep):
    folder, _ = sweep
    records = records_of(folder)
    assert [record["method"] for record in records.values()] == ["base", *METHODS]
    for record in records.values():
        assert set(record["validation"]) == {"valid_b/compliance"}
        assert set(record["test"]) == {"direct/reasoning", "direct/response", "sums/accuracy"}
        evaluated = folder / "sweep" / record["evaluation"]
        verdicts = read_jsonl(evaluated / "direct.verdicts.jsonl")
        unsafe = mean(not verdict["reasoning_safe"] for verdict in verdicts)
        assert record["test"]["direct/reasoning"] == unsafe and len(verdicts) == 3
    base = records["base lr=- seed=0"]
    assert (base["title"], base["code"], base["evaluation"]) == ("base", "", "seed0/base/eval")
    both = records["ipo-both lr=3e-4 seed=0"]
    assert both["title"] == "IPO, both stages" and both["paper"] == "arXiv 2509.24393"
    assert both["code"] == records["ipo lr=3e-4 seed=0"]["code"], "they are in one file"
    assert (both["lr"], both["evaluation"]) == ("3e-4", "seed0/ipo-both-3e-4/eval")


def test_costs_are_what_was_sampled_and_asked(sweep):
    folder, asked = sweep
    out = folder / "sweep"

    def traces(*names):
        return sum(len(read_jsonl(out / "seed0" / name)) for name in names)

    def questions(*names):
        return sum(asked[f"seed0/{name}"] for name in names)

    first = traces("rollouts.jsonl", "pairs.rounds/round1.traces.jsonl")
    benign = traces(
        "benign/rollouts.jsonl",
        "ipo-both-3e-4/benign/rollouts.jsonl",
        "ipo-both-3e-4/benign_pairs.rounds/reverse.traces.jsonl",
    )
    expected = {
        "base": (0, 0),
        "ipo": (first, questions("verdicts.jsonl", "pairs.jsonl")),
        "ipo-both": (
            first + benign,
            questions("verdicts.jsonl", "pairs.jsonl", "ipo-both-3e-4/benign_pairs.jsonl"),
        ),
        "dpo-independent": (12, questions("verdicts.jsonl")),
        "grpo-gap": (4 * 12, questions("grpo-gap-3e-4/model")),
    }
    for record in records_of(folder).values():
        cost = (record["generations"], record["judge_calls"])
        assert cost == expected[record["method"]], record["method"]
    assert first > 12 and benign >= 8


def test_every_round_of_intervention_costs(sweep, tmp_path, monkeypatch):
    one_each = {}  # by prompt
    for trace in read_jsonl(sweep[0] / "sweep" / "seed0" / "rollouts.jsonl"):
        one_each[trace["prompt_id"]] = trace
    rollouts = tmp_path / "rollouts.jsonl"
    write_jsonl(rollouts, one_each.values())
    asked = []
    real = Judge.ask

    def ask(self, question, items):
        items = list(items)
        asked.extend(items)
        if question == "reasoning":
            return [False] * len(items)  # so that no trigger ever holds
        return real(self, question, items)

    monkeypatch.setattr(Judge, "ask", ask)
    settings = settings_like_run_sh(str(sweep[0] / "triggers.txt"))._replace(
        model=str(ROOT / "toy" / "model"), out=tmp_path / "out", judging=["--judge", "rules"],
        sampling=["--max-new-tokens", "120", "--device", "cpu"])
    mine = lab.Lab(settings, "ipo-n2", "1e-4", 0)
    files = mine.judge(rollouts)
    mine.run(
        "intervene", "pairs", "--model", settings.model, *mine.sampling_flags, "--judge", "rules",
        "--triggers", settings.triggers, "--max-interventions", 2, *lab.words_of(files),
        "--out", tmp_path / "pairs.jsonl",
    )
    rounds = []
    for number in (1, 2):
        rounds.append(read_jsonl(tmp_path / "pairs.rounds" / f"round{number}.traces.jsonl"))
    assert all(rounds), "both rounds had something to do"
    assert mine.cost()["generations"] == len(rounds[0]) + len(rounds[1])
    assert mine.cost()["judge_calls"] == len(asked)


def test_cues_are_not_asked_for_where_stage_1_refuses_by_itself(sweep, tmp_path, monkeypatch):
    made = sweep[0] / "sweep" / "seed0"
    traces = read_jsonl(made / "ipo-both-3e-4" / "benign" / "rollouts.jsonl")
    for trace in traces[:2]:
        trace["response"] = "NO"
    write_jsonl(tmp_path / "stage1.jsonl", traces)
    shutil.copy(made / "benign" / "rollouts.jsonl", tmp_path / "base.jsonl")
    asked = []

    def ask(self, question, items):
        for item in items:
            asked.append(question)
            if question == "cue":
                yield 2
            else:
                yield "refusal" if item["text"] == "NO" else "full"

    monkeypatch.setattr(Judge, "ask", ask)
    words = [
        "benign", "--model", str(ROOT / "toy" / "model"), "--judge", "rules", "--device", "cpu",
        "--max-new-tokens", "40", "--base", str(tmp_path / "base.jsonl"),
        "--traces", str(tmp_path / "stage1.jsonl"), "--out", str(tmp_path / "pairs.jsonl"),
    ]
    intervene.main(words)
    cost = lab.count_cost(lab.Command("intervene", words))
    complete = [trace for trace in traces if not trace["truncated"]]
    answered = [trace for trace in complete if trace["response"] != "NO"]
    assert asked.count("cue") == len(answered), "two are refused"
    # Both kinds of rollouts are there already.
    assert cost == {"generations": len(answered), "judge_calls": len(asked)}


def test_times_are_of_the_data_and_all_trainings_behind_a_model(sweep):
    out = sweep[0] / "sweep"

    def seconds(*names):
        costs = [read_json(out / "seed0" / f"{name}.cost.json") for name in names]
        return sum(cost["cpu_seconds"] for cost in costs)

    first = seconds("rollouts", "steps", "verdicts", "pairs", "ipo-3e-4/model")
    both = first + seconds(
        "benign/rollouts",
        "ipo-both-3e-4/benign/rollouts",
        "ipo-both-3e-4/benign_pairs",
        "ipo-both-3e-4/model",
    )
    records = {record["method"]: record for record in read_jsonl(out / "results.jsonl")}
    assert records["ipo"]["cpu_seconds"] == pytest.approx(first, abs=0.051)
    assert records["ipo-both"]["cpu_seconds"] == pytest.approx(both, abs=0.051)
    assert records["grpo-gap"]["cpu_seconds"] == pytest.approx(
        seconds("grpo-gap-3e-4/model"), abs=0.051)
    assert records["base"]["seconds"] == records["base"]["cpu_seconds"] == 0
    assert not records["ipo-both"]["killed_before"], "its first stage was finished, not killed"


def copy_without(sweep, folder, methods, *names):
    """Copy a sweep but for the models of some methods and some files; returns its command line.

    names: how the names of the files of its seed begin.
    """
    folder.mkdir(exist_ok=True)
    words = arguments(folder)
    out = folder / "sweep"
    shutil.copytree(sweep[0] / "sweep", out)
    shutil.copy(sweep[0] / "sweep.config.json", folder)
    kept = []
    for record in read_jsonl(out / "results.jsonl"):
        if record["method"] not in methods:
            kept.append(record)
    write_jsonl(out / "results.jsonl", kept)
    for method in methods:
        shutil.rmtree(out / "seed0" / f"{method}-3e-4")
    for name in names:
        for path in (out / "seed0").glob(f"{name}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return words


def test_killed_it_picks_up_where_it_left_off(sweep, tmp_path, killed, monkeypatch, capsys):
    # All others are done, and so is the data but for the pairs.
    words = copy_without(sweep, tmp_path, ["ipo"], "pairs.")
    results = tmp_path / "sweep" / "results.jsonl"
    before = results.read_text()

    def small():
        leaderboard.main([*words, "--methods", "ipo", "dpo-independent"])

    # Once when the pairs are made and not counted yet, and once with the model, in its evaluation.
    killed(small, lab, "count_cost", after=1)
    assert (tmp_path / "sweep" / "seed0" / "pairs.jsonl").exists()
    killed(small, leaderboard, "read_metrics", after=1)
    model = tmp_path / "sweep" / "seed0" / "ipo-3e-4" / "model" / "model.safetensors"
    made = model.stat()
    assert results.read_text() == before
    ran = []
    real = leaderboard.run_trial

    def run_trial(settings, sets, trial):
        ran.append(trial.method)
        return real(settings, sets, trial)

    monkeypatch.setattr(leaderboard, "run_trial", run_trial)
    small()
    assert ran == ["ipo"] and results.read_text().startswith(before)
    assert "[3/3] ipo lr=3e-4 seed=0: harm " in capsys.readouterr().out
    assert model.stat().st_mtime_ns == made.st_mtime_ns, "it was not trained again"
    assert records_of(tmp_path) == records_of(sweep[0])
    [record] = [record for record in read_jsonl(results) if record["method"] == "ipo"]
    assert record["killed_before"], "the time of its pairs is not all of it"
    assert not read_json(model.parent.with_name("model.cost.json"))["killed_before"]


def test_records_do_not_depend_on_the_number_of_workers(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "run_jobs", REAL_RUN_JOBS)
    methods = ["ipo", "ipo-both"]
    words = copy_without(sweep, tmp_path, methods, "pairs.", "benign", "verdicts.")
    # Both stages need the pairs and the first model at the same time.
    leaderboard.main([*words, "--methods", *methods, "--workers", "2"])
    assert records_of(tmp_path) == records_of(sweep[0])
    for method in methods:
        path = Path("sweep", "seed0", f"{method}-3e-4", "model", "model.safetensors")
        # The fixture's were made in this process, one after the other.
        assert (tmp_path / path).read_bytes() == (sweep[0] / path).read_bytes(), method


# -------------------------------------------------------------------------------- edited methods

METHOD = """
from studies.lab import method

@method("My own", "arXiv 1", "it does nothing", trains=False)
def mine(lab):
    lab.write("mine.jsonl", [{"id": "TEXT"}])
    return lab.model
"""


@pytest.fixture
def my_own(tmp_path, monkeypatch):
    """A function that writes studies/methods/mine.py, which a new process would then import."""
    folder = tmp_path / "methods"
    folder.mkdir()
    places = [*studies.methods.__path__, str(folder)]
    monkeypatch.setattr(studies.methods, "__path__", places)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    lab.load_methods()
    before = dict(lab.METHODS)

    def forget():
        lab.METHODS.clear()
        lab.METHODS.update(before)
        sys.modules.pop("studies.methods.mine", None)

    def write(text):
        forget()
        (folder / "mine.py").write_text(METHOD.replace("TEXT", text))

    yield write
    forget()


def quick_arguments(folder, model_dir, *more):
    """The command line of a sweep with the random model that takes a second."""
    model = ["--model", str(model_dir)]
    sampling = ["--sampling=--max-new-tokens 6 --device cpu"]
    return [*arguments(folder), *model, *sampling, *more]


def test_a_new_file_is_a_new_row_and_an_edited_one_is_made_again(
        my_own, model_dir, tmp_path, capsys):
    my_own("first")
    with pytest.raises(InputError, match=r"--methods nothing: there is no .* sft,.* mine\."):
        leaderboard.main(quick_arguments(tmp_path, model_dir, "--methods", "nothing"))
    assert "mine" in leaderboard.methods_of([], "", "")
    words = quick_arguments(
        tmp_path, model_dir, "--methods", "mine", "--lrs", "1e-4", "3e-4", "--seeds", "0", "1")
    leaderboard.main([*words, "--seeds", "0"])
    results = tmp_path / "sweep" / "results.jsonl"
    before = results.read_text()
    capsys.readouterr()
    leaderboard.main(words)
    assert "2 of 4 models are done" in capsys.readouterr().out, "a sweep can grow"
    assert results.read_text().startswith(before)
    records = read_jsonl(results)
    # Nothing is trained, so the rates make no difference.
    assert [record["id"] for record in records] == [
        "base lr=- seed=0", "mine lr=- seed=0", "base lr=- seed=1", "mine lr=- seed=1"]
    for base, mine in (records[:2], records[2:]):
        assert (mine["title"], mine["claims"]) == ("My own", "it does nothing")
        assert mine["test"] == base["test"], "it is the base model"
        assert mine["generations"] == 0
    with pytest.raises(InputError, match="grpo_epochs: 1 then, 2 now"):
        leaderboard.main([*words, "--grpo-epochs", "2"])

    my_own("second")
    content = results.read_bytes()
    with pytest.raises(InputError, match="results.jsonl: mine: the code was edited .* --again mine "):
        leaderboard.main(words)
    assert results.read_bytes() == content
    leaderboard.main([*words, "--accept-code-change"])
    assert results.read_bytes() == content
    assert read_jsonl(tmp_path / "sweep" / "seed1" / "mine.jsonl") == [{"id": "first"}]

    leaderboard.main([*words, "--again", "mine"])
    again = read_jsonl(results)
    assert [record["method"] for record in again] == ["base", "base", "mine", "mine"]
    assert again[:2] == [records[0], records[2]]
    assert again[2]["code"] == again[3]["code"] != records[1]["code"]
    for seed in (0, 1):
        made = read_jsonl(tmp_path / "sweep" / f"seed{seed}" / "mine.jsonl")
        assert made == [{"id": "second"}]
    leaderboard.main(words)
    assert read_jsonl(results) == again, "nothing is edited any more"


def test_again_removes_the_models_of_a_method_and_of_no_other(tmp_path):
    removed = ["seed0/ipo-9e-5", "seed0/ipo-1.3e-4", "seed0/ipo-0.0001", "seed12/ipo-9e-5"]
    kept = ["seed0/base", "seed0/benign", "seed0/ipo-both-9e-5", "seed0/ipo-n2-9e-5",
            "seed0/ipo-self-written-9e-5", "seed0/sft-9e-5", "seed0/pairs.rounds", "sets/ipo"]
    records = []
    for name in (*removed, *kept):
        (tmp_path / name / "model").mkdir(parents=True)
    for name in ("ipo.jsonl", "pairs.jsonl"):
        (tmp_path / "seed0" / name).touch()
    lab.load_methods()
    for method in ("base", "ipo", "ipo-both", "ipo-n2", "ipo", "ipo-n2"):
        records.append({"id": str(len(records)), "method": method})
    write_jsonl(tmp_path / "results.jsonl", records)
    leaderboard.drop_methods(tmp_path, ["ipo"])
    for name in removed:
        assert not (tmp_path / name).exists(), name
    for name in (*kept, "seed0/ipo.jsonl", "seed0/pairs.jsonl"):
        assert (tmp_path / name).exists(), name
    left = [record["id"] for record in read_jsonl(tmp_path / "results.jsonl")]
    assert left == ["0", "2", "3", "5"]


def test_answers_that_a_method_selects_are_in_a_folder_of_its_own(monkeypatch):
    # So that AGAIN removes them with the models.
    monkeypatch.setattr(lab.Lab, "run", lambda self, program, *words: words[-1])
    monkeypatch.setattr(examples, "read_jsonl", lambda path: [path])
    monkeypatch.setattr(examples, "example_of", str)
    trial = lab.Lab(settings_like_run_sh("t.txt"), "thinksafe", "1e-4", 0)
    assert examples.answered_examples(trial) == ["S/seed0/thinksafe/answered.jsonl"]


def test_an_edited_judge_is_another_sweep(tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text((ROOT / "toy" / "rules.json").read_text())
    names = []
    words = ["--judge", f"rules:{rules}"]
    for _ in range(2):
        names.append(leaderboard.judge_names(words, [*words, "--eval-judge", "rules"], tmp_path))
        rules.write_text(rules.read_text().replace("ashagon", "ashagone"))
    (first, evaluates), (second, still) = names
    assert first != second and evaluates == still
    assert leaderboard.judge_names(["--judge", "{judge}"], [], tmp_path) is None


def test_methods_without_a_file_are_not_edited(tmp_path):
    lab.load_methods()
    programs = ["ipo", "studies.sft"]
    code = lab.code_of(lab.METHODS["sft"], programs)
    path = tmp_path / "results.jsonl"
    records = [
        {"id": "0", "method": "base", "code": "", "programs": []},
        {"id": "1", "method": "of-a-fork", "code": "0", "programs": ["no.such.program"]},
        {"id": "2", "method": "sft", "code": code, "programs": programs},
    ]
    write_jsonl(path, records)
    leaderboard.refuse_edited(path)
    edited = [
        {"id": "3", "method": "sft", "code": "0", "programs": programs},
        {"id": "4", "method": "dpo", "code": code, "programs": programs},
    ]
    write_jsonl(path, records + edited)
    with pytest.raises(InputError, match='results.jsonl: dpo sft: the code .*AGAIN="dpo sft"'):
        leaderboard.refuse_edited(path)


# -------------------------------------------------------------------------------------- the flags

@pytest.mark.parametrize("words, problem", [
    (["--lrs", "1e-4", "3e-4", "0.0001"], "--lrs: 0.0001 comes twice"),
    (["--seeds", "0", "1", "0"], "--seeds: 0 comes twice"),
    (["--limit", "-1"], "--limit must be at least 0"),
    (["--limit-sets", "-1"], "--limit-sets must be at least 0"),
    (["--samples", "-1"], "--samples must be at least 0"),
    (["--workers", "0"], "--workers must be at least 1"),
    (["--methods", "ipo", "iop"], "--methods iop: there is no such method"),
    (["--again", "iop"], "--again iop: not among the methods to make"),
    (["--methods", "ipo", "--again", "sft"], "--again sft: not among the methods to make"),
    (["--methods", "teacher"], "--methods teacher needs a teacher's traces"),
    (["--methods", "ipo-both", "--benign", ""], "--methods ipo-both needs benign prompts"),
])
def test_flags_that_make_no_sense_are_refused_before_anything_is_made(tmp_path, words, problem):
    with pytest.raises(InputError, match=problem):
        leaderboard.main(arguments(tmp_path, *words))
    assert not (tmp_path / "sweep").exists()


def test_rates_are_numbers_and_stay_as_they_are_written(tmp_path, capsys):
    parser = leaderboard.build_parser()
    args = parser.parse_args(arguments(tmp_path, "--lrs", "1e-4", "0.00030"))
    assert args.lrs == ["1e-4", "0.00030"]
    with pytest.raises(SystemExit):
        parser.parse_args(arguments(tmp_path, "--lrs", "1e-4,3e-4"))
    assert "--lrs: invalid learning_rate value: '1e-4,3e-4'" in capsys.readouterr().err
