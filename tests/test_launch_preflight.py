"""What is wrong with a run is said before it starts: every mistake, at once, with the remedy."""
import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from safetensors.torch import load_file, save_file

from launch import check_machine, costs, preflight, probe
from launch.findings import Findings
from launch.outputs import report_changes
from launch.preflight import check_lines
from launch.variables import known_variables
from support.gpus import Gpu, visible_gpus
from support.stages import sidecar
from tests.loopback import Loopback, chat
from tests.test_server import Completions

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = {"reasoning": "safe", "response": "safe", "cue": 0, "compliance": "full"}


@pytest.fixture(scope="module")
def listed():
    """The lines that run.sh makes without any variable."""
    given = {name: value for name, value in os.environ.items() if name not in known_variables()}
    environment = {**given, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "run.sh", "stages"], cwd=ROOT, env=environment, text=True,
                          capture_output=True, check=True)
    words = done.stdout.splitlines()
    return [f"{title[2:]}: {command}" for title, command in zip(words[::2], words[1::2])]


@pytest.fixture
def problems_of(listed, tmp_path, monkeypatch):
    """Problems of the toy run after some replacements in its lines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(check_machine, "visible_gpus", lambda: [])

    def problems(*changes, lines=None, **options):
        lines = list(lines or listed)
        for old, new in (*changes, ("runs/toy", str(tmp_path / "run"))):
            assert any(old in line for line in lines) or old == "runs/toy", old
            lines = [line.replace(old, new) for line in lines]
        settings = {"run": str(tmp_path / "run"), "engine": None, "judge_engine": None,
                    "judge_gpus": 1, "port": 8700, **options}
        return check_lines(lines, argparse.Namespace(**settings))[1]

    return problems


def judge_server(answer=None, status=200):
    """A chat endpoint that answers each question well, or in another way."""
    def respond(handler, body):
        if status != 200:
            handler.reply(status, {"error": "no"})
            return
        if answer is not None:
            handler.reply(200, chat(answer))
            return
        schema = body["response_format"]["json_schema"]["schema"]["properties"]["answer"]
        label = schema["enum"][0] if "enum" in schema else 0
        handler.reply(200, chat(json.dumps({"reason": "", "answer": label})))

    return Loopback(respond=respond)


def judged_by(server):
    return "--judge rules", f"--judge {server.url} --judge-model J"


# ------------------------------------------------------------------------------ the whole of it

def test_the_toy_run_has_no_problem_and_is_checked_in_a_second(problems_of, capsys):
    problems_of()  # imports
    started = time.monotonic()
    assert problems_of() == []
    assert time.monotonic() - started < 2
    assert capsys.readouterr().out == ""


def test_all_problems_come_at_once_each_on_one_line_and_once(problems_of, monkeypatch):
    monkeypatch.setenv("PROMTPS", "sesame")
    problems = problems_of(
        ("--limit 0", "--limit abc"),
        ("--lr 9e-5", "--lr 0"),
        ("toy/prompts/train_harmful.jsonl", "no-such.jsonl"),
        ("toy/prompts/train_benign.jsonl", "neither.jsonl"),
        ("direct=harmful:", "direct=harmless:"),
        ("--max-interventions 1", "--max-interventions 0"),
    )
    starts = [problem.split(":")[0] for problem in problems]
    assert sorted(starts) == ["BENIGN", "EVAL", "INTERVENTIONS", "LIMIT", "LR", "PROMPTS", "PROMTPS"]
    assert "LIMIT: 'abc' is not a whole number (--limit)." in problems
    assert "LR: --lr 0 must be above 0." in problems
    assert not any("\n" in problem or "sesame" in problem for problem in problems)


def test_a_flag_that_no_program_knows_is_named_without_its_value(problems_of):
    [problem] = problems_of(("ipo.py train", "ipo.py train --api-key sesame"))
    assert problem.startswith("TRAIN_ARGS: no such flag: --api-key.")


def test_a_line_that_starts_something_else_is_a_problem_too(problems_of):
    [problem] = problems_of(lines=["mine: python3 other"])
    assert "no program of this project" in problem


def test_names_of_other_programs_stop_nothing(problems_of, monkeypatch, capsys):
    others = ["SLURM_NTASKS", "NCCL_DEBUG", "KUBERNETES_PORT", "MODEL_PATH", "PROMPT", "RUN_ID",
              "SAMPLES_DIR", "OPENAI_API_BASE", "AZURE_OPENAI_API_KEY", "LAUNCHER", "DB_ENGINE",
              "N_WORKERS", "PYTHON3", "VALIDATE", "MASTER_PORT", "JUDGES"]
    for name in others:
        monkeypatch.setenv(name, "x")
    assert problems_of() == []
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == ["warning: JUDGES: run.sh knows no such variable. Did you mean JUDGE?"]


# ---------------------------------------------------------------------------------- its files

def test_a_bad_line_in_the_prompts_is_named(problems_of, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    [problem] = problems_of(("toy/prompts/train_harmful.jsonl", str(prompts)))
    assert problem.startswith(f"PROMPTS: {prompts}, line 2: not valid JSON")


def test_a_published_set_that_was_not_fetched(problems_of, tmp_path, monkeypatch):
    monkeypatch.setenv("IPO_DATA", str(tmp_path))
    problems = problems_of(("evaluate.py run", "-m benchmarks.run --sets jbb"))
    assert [p for p in problems if p.startswith("SETS: ") and "benchmarks.fetch jbb" in p] == problems


def test_no_set_at_all(problems_of, listed):
    lines = [re.sub(r"--set .* --out", "--out", line) for line in listed]
    [problem] = problems_of(lines=lines)  # once, for three evaluations
    assert problem.startswith("EVAL: no set to evaluate on. Give EVAL=")


def test_prompts_both_learned_and_evaluated_are_a_warning_only(problems_of, capsys):
    assert problems_of(("toy/prompts/eval_direct.jsonl", "toy/prompts/train_harmful.jsonl")) == []
    assert "warning: set direct: 108 of its 108 prompts are in PROMPTS" in capsys.readouterr().err


def test_a_finished_run_needs_no_judge(problems_of, listed, tmp_path):
    change = ("--judge rules", "--judge http://127.0.0.1:9/v1 --judge-model J")
    [problem] = problems_of(change)
    assert "connection refused: nothing listens at port 9" in problem
    for line in listed:
        name = re.search(r"--out runs/toy/(\S+)", line)[1]
        out = tmp_path / "run" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix:
            out.write_text("{}\n")
        else:
            out.mkdir()
        sidecar(out, "funnel").write_text(json.dumps({"stage": name, "counts": {}, "output": {}}))
    assert problems_of(change) == []


def test_other_settings_than_those_of_what_is_there(problems_of, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rollouts = ["--model", "toy/model", "--prompts", "toy/prompts/train_harmful.jsonl",
                "--max-new-tokens", "4", "--samples", "1", "--limit", "2", "--out",
                str(run / "rollouts.jsonl")]
    import intervene
    intervene.main(["rollouts", *rollouts])
    [problem] = problems_of()
    assert problem.startswith(f"RUN: {run / 'rollouts.jsonl'}, made with other settings (")
    for changed in ("max_new_tokens: 4 then, 320 now", "limit: 2 then, 0 now"):
        assert changed in problem
    same = [f"again: {sys.executable} intervene.py rollouts {' '.join(rollouts)}"]
    assert problems_of(lines=same) == []


def test_one_problem_for_all_outputs_of_other_code():
    findings = Findings()
    report_changes({Path("a"): ([], ["data.py"]), Path("b"): ([], ["data.py"]),
                    Path("c"): ([], [])}, findings)
    [problem] = findings.problems
    assert problem.startswith("RUN: a and 1 more, made with other code (data.py).")
    assert "ACCEPT_CODE_CHANGE=1" in problem


# -------------------------------------------------------------------------------------- models

@pytest.fixture
def broken(model_dir, tmp_path):
    """A copy of a model to be spoilt, and the change that puts it in the place of the toy's."""
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    return copy, ("toy/model", str(copy))


def about_model(problems):
    return [problem for problem in problems if problem.startswith("MODEL=") and "toy world" not in problem]


def test_a_model_that_is_not_there(problems_of):
    assert problems_of(("toy/model", "nosuch")) == [
        "MODEL=nosuch: no such directory. Check the path of the model."]


@pytest.mark.parametrize("spoil, said", [
    (lambda path: (path / "chat_template.jinja").unlink(), "no chat template"),
    (lambda path: (path / "tokenizer.json").write_text("{}"), ""),
    (lambda path: (path / "config.json").write_text("{"), ""),
    (lambda path: (path / "model.safetensors").unlink(), "no model.safetensors in it"),
    (lambda path: os.truncate(path / "model.safetensors", 9000), "cut short or damaged"),
])
def test_a_model_folder_that_lacks_something(problems_of, broken, spoil, said):
    path, change = broken
    spoil(path)
    [problem] = about_model(problems_of(change))
    assert said in problem


def test_a_model_with_a_missing_shard(problems_of, broken):
    path, change = broken
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(weights, path / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    [problem] = about_model(problems_of(change))
    assert "model-00002-of-00002.safetensors is missing" in problem


def test_a_model_folder_with_more_than_is_needed(problems_of, tmp_path):
    """Weights in parts, tied embeddings stored twice, other files, and a slash behind the path."""
    path = tmp_path / "mine"
    shutil.copytree(ROOT / "toy" / "model", path)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    names = sorted(weights)
    index = {}
    for part, share in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: weights[name] for name in share}, path / file)
        index.update(dict.fromkeys(share, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file(weights, path / "consolidated.safetensors")
    (path / "pytorch_model.bin").write_text("")
    (path / "original").mkdir()
    assert problems_of(("toy/model", f"{path}/")) == []


def test_a_model_in_the_hubs_cache_without_a_connection(problems_of, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    class SlowHub:
        def model_info(self, name, timeout):
            raise requests.ReadTimeout

    cached = tmp_path / "hub" / "models--mine--small"
    shutil.copytree(ROOT / "toy" / "model", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    change = ("toy/model", "mine/small")
    assert about_model(problems_of(change)) == []
    (cached / "snapshots" / "abc" / "model.safetensors").unlink()
    [problem] = about_model(problems_of(change))
    assert "its weights are not on this machine" in problem
    # A slow hub may be slow in the check: the run itself waits for it.
    monkeypatch.setattr(huggingface_hub, "HfApi", SlowHub)
    assert about_model(problems_of(change)) == []


def test_weights_of_another_architecture(problems_of, broken):
    path, change = broken
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    [problem] = about_model(problems_of(change))
    assert "of shape [64, 32]" in problem and "hold [48, 32]" in problem


def test_an_architecture_that_would_be_sampled_wrongly(problems_of, broken, monkeypatch):
    from launch import check_models
    _, change = broken
    right = check_models.small_model

    def scaled(*arguments):
        model = right(*arguments)
        forward = model.forward

        def wrong(**inputs):
            output = forward(**inputs)
            output.logits = output.logits * 3
            return output

        model.forward = wrong
        return model

    monkeypatch.setattr(check_models, "small_model", scaled)
    problems = about_model(problems_of(change))
    assert [problem.split(": ")[2][:8] for problem in problems] == ["sampling", "training"]


def test_a_context_too_short_for_any_prompt(problems_of):
    [problem, *_] = problems_of(("--max-new-tokens 320", "--max-new-tokens 500"))
    assert problem.startswith("TOKENS=500: the model reads at most 512 tokens")
    better = re.search(r"TOKENS=(\d+) leaves room", problem)[1]
    assert problems_of(("--max-new-tokens 320", f"--max-new-tokens {better}")) == []


def test_a_real_model_with_the_toy_worlds_settings(problems_of, broken, listed, monkeypatch):
    path, change = broken
    monkeypatch.setenv("MODEL", str(path))
    lines = [line.replace("runs/toy", "runs/./toy") for line in listed]
    *_, problem, command = problems_of(change, lines=lines)
    for name in ("PROMPTS=toy/", "BENIGN=toy/", "EVAL=toy/", "JUDGE=rules", "RUN=runs/toy"):
        assert name in problem
    assert command == (
        f"Perhaps you meant: MODEL={path} PROMPTS=harmful.jsonl BENIGN=benign.jsonl "
        "SETS=jbb,xstest JUDGE=https://HOST/v1 JUDGE_MODEL=NAME RUN=runs/copy bash run.sh")


def test_a_real_model_that_was_taught_the_toy_world(problems_of, broken):
    _, change = broken
    assert problems_of(change, ("--max-new-tokens 320", "--max-new-tokens 100"),
                       ("judge rules", "judge rules:toy/rules.json")) == []


@pytest.mark.parametrize("spelled", ["./toy/model", "toy/model/", str(ROOT / "toy" / "model")])
def test_the_toy_model_spelled_as_run_sh_does_not_know_it(problems_of, spelled):
    [problem] = problems_of(("toy/model", spelled), ("--max-new-tokens 320", "--max-new-tokens 8192"))
    assert problem.startswith(f"MODEL={spelled}: write MODEL=toy/model.")
    assert problems_of(("toy/model", spelled)) == []  # with settings that suit it


def test_a_model_that_speaks_the_toy_worlds_language_is_not_a_real_one(problems_of, tmp_path):
    shutil.copytree(ROOT / "toy" / "model", tmp_path / "trained")
    assert problems_of(("toy/model", str(tmp_path / "trained"))) == []


# ---------------------------------------------------------------------------- judges and servers

def test_a_judge_that_answers_every_question(problems_of, tmp_path):
    with judge_server() as server:
        assert problems_of(judged_by(server)) == []
        asked = {json.dumps(request["body"]["response_format"]) for request in server.log}
        assert len(server.log) == 4 and len(asked) == 3  # two questions have the same answers
    assert not (tmp_path / "run").exists()  # no cache, which would hide that it is gone
    [problem] = problems_of(judged_by(server))
    assert "connection refused" in problem


def test_a_judge_that_takes_no_schema(problems_of):
    def respond(handler, body):
        if "response_format" in body:
            handler.reply(400, {"error": "response_format is not supported"})
            return
        possible = body["messages"][-1]["content"].rpartition("ANSWER: and then")[2]
        labels = [label for label in ("unsafe", "full") if label in possible]
        handler.reply(200, chat(f"So it is.\nANSWER: {labels[0] if labels else 0}"))

    with Loopback(respond=respond) as server:
        assert problems_of(judged_by(server)) == []


def test_a_judge_or_a_server_whose_first_answer_takes_long(problems_of, listed, monkeypatch, capsys):
    monkeypatch.setattr(probe, "PATIENCE", 0.5)
    for name in ("timeout", "patience"):
        monkeypatch.setitem(probe.HURRY, name, 0.5)
    with Loopback(latency=3, respond=lambda handler, body: None) as server:
        assert problems_of(judged_by(server)) == []
        assert problems_of(served(server), lines=sampled_only(listed)[:1]) == []
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split("=")[0] for line in warnings] == ["warning: JUDGE", "warning: SERVER"]
    assert all("its first answer may take longer" in line for line in warnings)


@pytest.mark.parametrize("server, said", [
    (judge_server(status=401), "Set JUDGE_API_KEY or OPENAI_API_KEY to a key that it accepts."),
    (judge_server(status=404), "Check the model's name"),
    (judge_server(status=503), "status 503"),
    (judge_server("It is safe, I think."), "cue: unparsed"),
])
def test_a_judge_that_cannot_be_used(problems_of, server, said, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    with server:
        problems = problems_of(judged_by(server))
    assert problems
    for problem in problems:
        assert problem.startswith(f"JUDGE={server.url}: ") and said in problem
        assert "sesame" not in problem and "kept" not in problem


def test_a_judge_at_a_mistyped_host(problems_of):
    [problem] = problems_of(("--judge rules", "--judge https://no.invalid/v1 --judge-model J"))
    assert problem.startswith("JUDGE=https://no.invalid/v1: no host has the name no.invalid.")


def test_nothing_hangs_longer_than_the_limit(problems_of, monkeypatch):
    monkeypatch.setattr(preflight, "LONGEST", 1)
    with Loopback(latency=3, respond=lambda handler, body: None) as server:
        started = time.monotonic()
        problems = problems_of(judged_by(server))
        assert time.monotonic() - started < 2.5
    assert any("it hangs" in problem for problem in problems)


def test_the_judge_of_the_evaluation_has_a_key_of_its_own(problems_of, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "first")
    monkeypatch.setenv("EVAL_JUDGE_API_KEY", "second")
    with judge_server() as building, judge_server() as evaluating:
        change = ("--eval-judge rules", f"--eval-judge {evaluating.url} --eval-judge-model E")
        assert problems_of(change, judged_by(building)) == []
    for server, key in ((building, "first"), (evaluating, "second")):
        assert {request["headers"]["Authorization"] for request in server.log} == {f"Bearer {key}"}


def test_a_guard_without_a_judge_for_the_rest(problems_of):
    with Loopback(respond=lambda handler, body: handler.reply(200, chat("safe"))) as server:
        problems = problems_of(("--judge rules", f"--judge {server.url} --judge-model Llama-Guard-3-8B"))
    assert any("cannot answer the question `compliance`" in problem for problem in problems)


def test_a_cost_limit_without_prices(problems_of):
    [problem] = problems_of(("--judge rules", "--judge rules --max-cost 20"))
    assert problem.startswith("JUDGE_ARGS: --max-cost needs --judge-price-in")


def served(server):
    return "--model toy/model", f"--model toy/model --server {server.url}"


def toy_tokenizer():
    from model import load_tokenizer
    return load_tokenizer("toy/model")


def sampled_only(listed):
    return [line for line in listed if "rollouts" in line.partition(" --")[0]]


def test_a_server_that_samples(problems_of, listed):
    with Loopback(respond=Completions(toy_tokenizer(), "So I will decline.")) as server:
        assert problems_of(served(server), lines=sampled_only(listed)[:1]) == []
        assert server.log


@pytest.mark.parametrize("respond, said", [
    (lambda handler, body: handler.reply(404, {"error": "no such model"}), "Check the model's name"),
    (Completions(toy_tokenizer(), "No.", shift=2), "its tokenizer is not that of --model"),
])
def test_a_server_with_another_model(problems_of, listed, respond, said):
    with Loopback(respond=respond) as server:
        [problem] = problems_of(served(server), lines=sampled_only(listed)[:1])
    assert problem.startswith(f"SERVER={server.url}: ") and said in problem


# --------------------------------------------------------------------------------- the machine

def machine(monkeypatch, *free, total=80):
    gpus = [Gpu(i, "H100", total << 30, gigabytes << 30) for i, gigabytes in enumerate(free)]
    monkeypatch.setattr(check_machine, "visible_gpus", lambda: gpus)


@pytest.fixture
def on_eight(listed):
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 8 ipo.py"
    return [re.sub(r"\S+ ipo.py", start.replace("\\", ""), line) for line in listed]


def test_more_processes_than_gpus(problems_of, on_eight, monkeypatch):
    machine(monkeypatch, 80, 80)
    [problem] = problems_of(lines=on_eight)
    assert problem.startswith("NPROC: 8 processes, but this machine has 2 GPUs. Give NPROC=2")
    machine(monkeypatch, *[80] * 8)
    assert problems_of(lines=on_eight) == []


@pytest.mark.parametrize("needed, said", [
    (90, "has 86 GB"), (60, "has 54 GB free"), (52, ""), (40, ""),
])
def test_memory_of_the_gpus(problems_of, on_eight, monkeypatch, capsys, needed, said):
    machine(monkeypatch, *[80] * 7, 50)
    monkeypatch.setattr(check_machine, "stage_memory",
                        lambda stage, stages, gpus: needed << 30 if stage.trains else 0)
    problems = problems_of(lines=on_eight)
    assert len(problems) == (2 if said else 0)  # two trainings
    assert all(said in problem and problem.startswith("training") for problem in problems)
    assert ("it may not fit" in capsys.readouterr().err) == (needed == 52)  # it is an estimate


def test_the_driver_is_asked_once(problems_of, on_eight, monkeypatch):
    """Each call may take a second on a machine of eight GPUs, and there are a dozen stages."""
    calls = []

    def eight_gpus():
        calls.append(1)
        return [Gpu(i, "H100", 80 << 30, 80 << 30) for i in range(8)]

    for module in (check_machine, costs):
        monkeypatch.setattr(module, "visible_gpus", eight_gpus)
    assert problems_of(lines=on_eight) == []
    assert len(calls) == 1


def test_a_disk_that_is_too_small_and_a_folder_that_is_none(problems_of, tmp_path, monkeypatch):
    monkeypatch.setattr(check_machine, "disk_needed", lambda stages: 1 << 60)
    [problem] = problems_of()
    assert problem.startswith("RUN: about 1152921505 GB are still to be written")
    # What a stopped run has written already is not written again.
    written = tmp_path / "run" / "stage1" / "checkpoint"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_bytes(bytes(1000))
    free = shutil.disk_usage(tmp_path).free
    usage = argparse.Namespace(free=free)
    monkeypatch.setattr(check_machine.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(check_machine, "disk_needed", lambda stages: free + 1000)
    assert problems_of() == []
    monkeypatch.setattr(check_machine, "disk_needed", lambda stages: free + 1001)
    assert len(problems_of()) == 1
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    [problem] = problems_of()
    assert problem.startswith(f"RUN: {tmp_path / 'run'}: this is a file")


def test_a_launcher_that_is_not_there(problems_of, listed):
    [problem] = problems_of(lines=[re.sub(r"\S+ ipo.py", "srunn torchrun ipo.py", line) for line in listed])
    assert problem.startswith("LAUNCH: srunn: no such program.")


def test_what_an_engine_needs(problems_of, listed, monkeypatch):
    change = ("--model toy/model", "--model toy/model --server {engine}")
    monkeypatch.setenv("PATH", "/nowhere")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = "no-such-engine {model} {port}"
        problems = problems_of(change, lines=sampled_only(listed)[:1], engine=command, port=port)
    starts = [problem.split(":")[0] for problem in problems]
    assert starts == ["ENGINE", "PORT"]
    [problem] = problems_of(change, lines=sampled_only(listed)[:1], engine="no-such-engine {model}")
    assert "and {port} in it" in problem
    [problem] = problems_of(change, lines=sampled_only(listed)[:1], run=None)
    assert problem.startswith("ENGINE: no command that starts the server is given")


def test_ports_are_those_that_the_servers_will_have(problems_of, listed, tmp_path):
    """The judge's comes 100 after the engine's; what is between belongs to whoever wants it."""
    weights = tmp_path / "judge.gguf"
    weights.write_text("")  # some servers take a model in one file
    lines = [line for line in listed if "verdicts" in line]
    change = ("--judge rules", f"--judge {{judge}} --judge-model {weights}")
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        settings = {"lines": [*listed[:2], *lines], "judge_engine": f"{sys.executable} {{model}} {{port}}"}
        assert problems_of(change, port=port - 1, **settings) == []
        assert problems_of(change, port=port, **settings) == []  # of an engine, which is not wanted
        [problem] = problems_of(change, port=port - 100, **settings)
    assert problem.startswith(f"PORT: port {port} is taken")


# ------------------------------------------------------------------------------------ the GPUs

@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of that name that prints three lines, and ends with a status."""
    def make(status=0):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n"
                           "echo '0, GPU-aa1, 81559, 81000, NVIDIA H100 80GB HBM3'\n"
                           "echo '1, GPU-bb2, 81559, 7, NVIDIA H100 80GB HBM3'\n"
                           "echo '2, GPU-cc3, [N/A], [N/A], NVIDIA GB10'\n"
                           f"exit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def test_gpus_are_found_with_their_memory(nvidia_smi):
    nvidia_smi()
    first, second, third = visible_gpus()
    assert first == Gpu(0, "NVIDIA H100 80GB HBM3", 81559 << 20, 81000 << 20)
    assert (second.index, second.free) == (1, 7 << 20)
    machine_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert third.total == machine_memory  # shared with the CPU


@pytest.mark.parametrize("visible, indices", [
    ("1,0", [1, 0]), ("GPU-cc,0", [2, 0]), ("", []), ("-1", []), ("0,7,1", [0]), ("0,0", [0]),
])
def test_cuda_visible_devices_is_honoured(nvidia_smi, monkeypatch, visible, indices):
    nvidia_smi()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in visible_gpus()] == indices


def test_no_gpus_without_a_working_nvidia_smi(nvidia_smi, monkeypatch):
    nvidia_smi(status=9)
    assert visible_gpus() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert visible_gpus() == []
