"""The plan of a run: against a finished run's files, measured memory, and sums done by hand."""
import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launch import assumptions, costs, measure, plan, speed
from launch.estimate import disk_needed, estimates, measured_training, stage_memory
from launch.shape import read_shape, shape_of_config, training_needs
from launch.stages import processes_of, read_stages
from launch.world import World
from support.errors import InputError
from support.gpus import Gpu
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parents[1]
EIGHT_B = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"

# Counted from the files of a default run that had finished: `ids` less `forced` of each file of
# traces, the questions that each stage asks about them, the tokens of all batches of a training.
REAL_TOKENS = {
    "rollouts of the base model": 85946,
    "interventions": 33552,
    "benign rollouts of the base model": 29123,
    "evaluation of base": 85171,
    "benign rollouts of stage 1": 31344,
    "benign pairs": 12524,
    "evaluation of stage1": 83053,
    "evaluation of stage2": 80331,
}
REAL_QUESTIONS = {
    "verdicts and compliance cues": 1847,
    "interventions": 1335,
    "evaluation of base": 1104,
    "benign pairs": 1050,
    "evaluation of stage1": 858,
    "evaluation of stage2": 841,
}
REAL_BATCHES = {
    "training, stage 1 (safety)": 67952,
    "training, stage 2 (against over-refusal)": 114352,
}


def options(**more):
    """The runner's options."""
    given = dict(run="runs/x", separate=True, engine=None, judge_engine=None, judge_gpus=1, port=8700,
                 gpu=None, gpus=None)
    return argparse.Namespace(**{**given, **more})


def run_sh(**variables):
    """The stages of run.sh with these variables."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable}
    listed = subprocess.run(["bash", "run.sh", "stages"], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={**environment, **variables}).stdout.splitlines()
    lines = [f"{title.removeprefix('# ')}: {command}" for title, command in zip(listed[::2], listed[1::2])]
    return read_stages(lines)


def full_size(**variables):
    """The stages of a run of an 8B model, published sets."""
    return run_sh(**{"MODEL": EIGHT_B, "PROMPTS": "no-such-folder/star1.jsonl", "RUN": "no-such-folder/run",
                     "BENIGN": "no-such-folder/star-benign-915.jsonl", "SETS": "jbb,xstest,math500", "NPROC": "8",
                     "JUDGE": "https://judge.example/v1", "JUDGE_MODEL": "gpt-4o", **variables})


def planned(stages, **more):
    """{title: Estimate} of stages on the machine of some options."""
    world = World(stages, costs.machine_of(options(**more)))
    return {one.title: one for one in estimates(stages, world)}


def hours(stages, **more):
    return sum(one.seconds for one in planned(stages, **more).values()) / 3600


def test_the_default_run_is_planned_as_a_finished_one_was(monkeypatch):
    monkeypatch.setattr(costs, "visible_gpus", list)
    monkeypatch.chdir(ROOT)
    by_title = planned(run_sh(), separate=False)
    for title, tokens in REAL_TOKENS.items():
        assert by_title[title].cost.sampled == pytest.approx(tokens, rel=0.1), title
    for title, questions in REAL_QUESTIONS.items():
        assert by_title[title].cost.calls == pytest.approx(questions, rel=0.1), title
    for title, tokens in REAL_BATCHES.items():  # the reference's pass reads them once more
        assert by_title[title].cost.read == pytest.approx(2 * tokens, rel=0.1), title
    asked = {title for title, one in by_title.items() if one.cost.calls}
    assert asked == set(REAL_QUESTIONS)
    assert {title for title, one in by_title.items() if one.cost.sampled} == set(REAL_TOKENS)


def test_a_small_plan_as_by_hand(tmp_path, monkeypatch):
    """3 prompts x 2 samples of 100 tokens; half of the reasoning unsafe, a fifth of a trace before its cue."""
    monkeypatch.setattr(costs, "visible_gpus", list)
    model = tmp_path / "model"
    random_model(400).save_pretrained(model)
    prompts = tmp_path / "harmful.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt": "x" * 40}) + "\n" for i in range(3)))
    judge = "--judge https://judge.example/v1 --judge-model j --judge-price-in 2 --judge-price-out 10"
    stages = read_stages([
        f"one: python3 intervene.py rollouts --model {model} --prompts {prompts} --samples 2 --out r.jsonl",
        f"two: python3 intervene.py judge {judge} --traces r.jsonl --steps s.jsonl --out v.jsonl",
        f"three: python3 intervene.py pairs {judge} --model {model} --traces r.jsonl --steps s.jsonl --verdicts v.jsonl "
        "--out p.jsonl",
        f"four: python3 ipo.py train --model {model} --pairs p.jsonl --epochs 2 --out m",
    ])
    world = World(stages, costs.machine_of(options()))
    world.profile = assumptions.REASONING_MODEL._replace(
        template=10, characters=4, tokens={"harmful": 100}, loops=0, spread=0, reasoning=0.5, unsafe=(0.5, 0, 0),
        cue=1, cue_at=0.2, trigger=5, continuation=30, chosen=35, safe_after=1, unsafe_after=0)
    one, two, three, four = (estimate.cost for estimate in estimates(stages, world))
    assert (one.sampled, one.read) == (600, 3 * 20)
    # 6 traces: 6 reasonings, 6 responses, 3 cues, about 20 + 50 tokens each.
    assert two.calls == 15
    sizes = assumptions.QUESTION_TOKENS
    sent = 6 * (sizes["reasoning"] + 70) + 6 * (sizes["response"] + 70) + 3 * (sizes["cue"] + 70)
    assert two.read == sent
    assert two.dollars == pytest.approx((2 * sent + 10 * 15 * assumptions.CHAT_OUT) / 1e6)
    # 3 interventions at token 20: 30 tokens each, then two questions about each, no cue.
    assert (three.sampled, three.calls) == (90, 6)
    # 3 pairs: prompt 20, shared 20, chosen 35, rejected 80; the reference's pass and two epochs.
    assert four.read == 3 * (40 + 35 + 80) * 3


def test_rows_take_turns_as_by_hand():
    """Rows of 4, 2 and 3 tokens in two slots: steps 1-2 both, 3-4 both, 5 the last alone."""
    rows = [speed.Row(10, 4), speed.Row(10, 2), speed.Row(10, 3)]
    times = speed.Speed(step=100.0, row=10.0, key=0.0, padded=False, prefix=0.0, prefill=0.0)
    assert speed.sampling_seconds(rows, 2, times) == (4 * 120 + 110, [])
    # A padded step reads the longest row's tokens for every row: 10 + 0.5 on average in the first step.
    padded = times._replace(step=0.0, row=0.0, key=1.0, padded=True)
    assert speed.sampling_seconds([speed.Row(10, 1), speed.Row(0, 1)], 2, padded) == (2 * 10.5, [])


def test_published_configs_have_the_parameters_that_transformers_makes_of_them():
    for name, config in assumptions.PUBLIC_CONFIGS.items():
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        assert read_shape(name).parameters == lm.num_parameters(), name


def test_more_or_better_gpus_take_less_time_and_half_the_prompts_about_half(monkeypatch):
    monkeypatch.chdir(ROOT)
    for variables in ({}, {"ENGINE": "vllm", "IN_FLIGHT": "2048"}):
        times = []
        for count in (2, 4, 8):
            stages = full_size(NPROC=str(count), **variables)
            times.append(hours(stages, gpu="H100", gpus=count))
        assert times == sorted(times, reverse=True)
    times = [hours(full_size(), gpu=name, gpus=8) for name in ("A100", "H100", "H200")]
    assert times == sorted(times, reverse=True)
    few, many = (planned(full_size(LIMIT=limit), gpu="H100", gpus=8) for limit in ("400", "800"))
    for title in ("rollouts of the base model", "interventions", "training, stage 1 (safety)"):
        for part in ("sampled", "read", "calls", "dollars"):
            assert 2 * getattr(few[title].cost, part) == pytest.approx(getattr(many[title].cost, part), rel=0.02)


def test_a_guard_costs_nothing_and_is_asked_more_often_for_a_cue(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = full_size(JUDGE="serve:Qwen/Qwen3Guard-Gen-4B", JUDGE_MODEL="")
    title = "verdicts and compliance cues"
    guard = planned(stages, gpu="H100", gpus=8)[title].cost
    chat = planned(full_size(), gpu="H100", gpus=8)[title].cost
    cues = 6000 * assumptions.REASONING_MODEL.unsafe[0]
    assert guard.calls - chat.calls == pytest.approx(cues * (assumptions.GUARD_CUE_CALLS - 1))
    assert guard.dollars == 0 and guard.where == "judge"


def test_the_printed_plan(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    prices = "--judge-price-in 2.5 --judge-price-out 10 --max-cost 1"
    stages = full_size(JUDGE_ARGS=prices, NPROC="1")
    plan.print_plan(stages, options(gpu="H100"))
    shown = capsys.readouterr().out
    assert all(len(line) <= 110 for line in shown.splitlines())
    # 8B does not train in full on one GPU, and the judge costs more than a dollar.
    assert "training, stage 1 (safety): does NOT fit" in shown and "--max-cost 1 would stop the run" in shown
    assert "star1 (1,000)" in shown and "python -m benchmarks.fetch star1" in shown
    plan.print_plan(full_size(JUDGE_ARGS=prices, NPROC="1", LORA="16"), options(gpu="H100"))
    assert "does NOT fit" not in capsys.readouterr().out
    plan.print_plan(full_size(JUDGE_ARGS=prices, ENGINE="vllm"), options(gpu="H100", gpus=8))
    shown = capsys.readouterr().out
    assert all(len(line) <= 110 for line in shown.splitlines())
    assert "--judge-concurrency 32" in shown


def test_a_gpu_is_known_by_its_whole_name():
    hopper = speed.hardware_named("H100")
    assert speed.hardware_named("NVIDIA H100 80GB HBM3") == hopper
    assert speed.hardware_named("NVIDIA H100 PCIe") != hopper
    assert speed.hardware_named("rtx4090") == speed.hardware_named("NVIDIA GeForce RTX 4090")
    for other in ("H1000", "NVIDIA L40S", "NVIDIA GH200 480GB"):
        with pytest.raises(InputError, match="does not know this GPU"):
            speed.hardware_named(other)


def test_what_the_plan_cannot_know_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "visible_gpus", list)
    with pytest.raises(InputError, match="RTX 9999: the plan does not know this GPU. It knows H200.*--gpu"):
        costs.machine_of(options(gpu="RTX 9999"))
    with pytest.raises(InputError, match="--gpus without --gpu"):
        costs.machine_of(options(gpus=8))
    with pytest.raises(InputError, match="--nnodes \\$NOT_SET: a number from 1 on is needed"):
        processes_of(["torchrun", "--nnodes", "$NOT_SET", "ipo.py", "train"])
    with pytest.raises(InputError, match="mixture of experts"):
        shape_of_config({"num_experts": 8}, "moe")
    with pytest.raises(InputError, match="bare: its config.json has no hidden_size"):
        shape_of_config({}, "bare")
    missing = read_stages(["one: python3 intervene.py rollouts --model toy/model --prompts nowhere.jsonl --out r.jsonl"])
    with pytest.raises(InputError, match="nowhere.jsonl: no such file. The plan needs to know how many prompts"):
        estimates(missing, World(missing, costs.machine_of(options())))
    assert disk_needed(missing) == 0  # other checks say what is wrong


def test_memory_of_a_stage_whose_model_does_not_exist_yet(monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = full_size()
    by_title = {stage.title: stage for stage in stages}
    eight = [Gpu(i, "H100", 80 << 30, 80 << 30) for i in range(8)]
    trained = stage_memory(by_title["training, stage 2 (against over-refusal)"], stages, eight)
    assert 30e9 < trained < 45e9  # docs/full-size.md: 35 GB a rank on 8 GPUs, and the framework's own
    assert 16e9 < stage_memory(by_title["evaluation of stage1"], stages, eight) < 80e9
    assert stage_memory(by_title["report"], stages, eight) == 0
    # Two trained models of 2 bytes a parameter, and at the peak of stage 2 two checkpoints of 12.
    assert disk_needed(stages) == pytest.approx((2 * 2 + 2 * 12) * 8.03e9, rel=0.02)


# ------------------------------------------------------------------------------- measured speeds

def test_measurements_are_kept_found_again_and_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(costs, "visible_gpus", list)
    monkeypatch.setattr(measure, "ROWS", (1, 4))
    monkeypatch.setattr(measure, "MANY", 12)
    monkeypatch.setattr(measure, "PREFIX", 16)
    monkeypatch.setattr(measure, "PREFILL_PREFIXES", 2)
    path = tmp_path / "machine.json"
    monkeypatch.setattr(measure, "MACHINE_FILE", path)
    model = tmp_path / "model"
    random_model(400).save_pretrained(model)
    stages = read_stages([
        f"one: python3 intervene.py rollouts --model {model} --prompts x.jsonl --out r.jsonl",
        f"two: python3 ipo.py train --model {model} --pairs p.jsonl --out m",
        "three: python3 intervene.py rollouts --model m --prompts x.jsonl --out r.jsonl",
    ])
    measure.measure(stages, options())
    assert "4 rows:" in capsys.readouterr().out
    shape = read_shape(model)
    [found] = speed.read_measurements(path)
    assert found.shape == list(shape) and [rows for rows, _ in found.steps] == [1, 4]
    assert found.training["0, kept"] > 0
    assert speed.measurement_for([found], shape, "CPU", assumptions.CPU) == found
    assert speed.measurement_for([found], shape, "H100", assumptions.GPUS["H100"]) is None
    assert speed.measurement_for([found], shape._replace(layers=3), "CPU", assumptions.CPU) is None
    world = World(stages, costs.machine_of(options()), [found])
    assert measured_training(world, shape, 0, False) == found.training["0, kept"]
    assert "measured on CPU, torch" in plan.speed_source(world)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_with_a_few_of_many_layers():
    config = dict(assumptions.PUBLIC_CONFIGS["Qwen/Qwen3-0.6B"])
    shape = shape_of_config(config, "small")
    machine = costs.machine_of(options())
    found = measure.measured(config, shape, machine, [(0, True), (8, True)])
    assert found.layers == [2, 6] and set(found.training) == {"0, recomputed", "8, recomputed"}
    assert all(seconds > 0 for _, seconds in found.steps)


# ------------------------------------------------------------------------------- memory of training

MEASURE = """
import re, sys, torch
sys.path[:0] = [{root!r}]
import ipo
torch.set_num_threads(1)
def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024
def step(folder):
    policy, _ = ipo.load_policy(folder, torch.device("cpu"), 0, 1, torch.float32, lora_rank={lora})
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(3, 300, (4, {tokens} // 4), generator=g).tolist()
        sequences = [(i[:len(i) // 2], i[len(i) // 2:]) for i in ids]
        policy(**policy.rows(sequences, "cpu")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
step({tiny!r})
base = peak()
step({folder!r})
print(peak() - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory")
@pytest.mark.parametrize("vocab, tokens, lora", [(32000, 64, 0), (16000, 1024, 4)])
def test_planned_memory_agrees_with_measured_memory(vocab, tokens, lora, tmp_path):
    """Peak memory of two steps in a process of its own, over that of a tiny model.

    Bound by the weights, and by the activations.
    """
    tiny, folder = tmp_path / "tiny", tmp_path / "model"
    random_model(400, tie_word_embeddings=True, spread=0.15).save_pretrained(tiny)
    config = LlamaConfig(vocab_size=vocab, hidden_size=256, intermediate_size=704,
                         num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    needs = training_needs(read_shape(folder), 1, tokens, 4, False, lora, "cpu")
    script = MEASURE.format(root=str(ROOT), tiny=str(tiny), folder=str(folder), lora=lora,
                            tokens=tokens)
    # The threshold makes glibc give back what is freed.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True, env=environment)
    weights = load_file(folder / "model.safetensors")
    adapters = 6 * lora * (256 * 2 * 2 + 2 * (256 + 128) + 3 * (256 + 704))
    assert needs.parameters == sum(w.numel() for w in weights.values()) + adapters
    assert needs.trained == (adapters if lora else needs.parameters)
    memory = sum(needs.memory.values())
    assert memory == pytest.approx(float(done.stdout), rel=0.25), needs.memory


def test_the_memory_of_an_8b_model_is_known_from_its_config_alone():
    """The table of docs/full-size.md: what fits into 80 GB."""
    shape = read_shape(EIGHT_B)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    together = []
    for gpus, lora in ((8, 0), (4, 0), (2, 0), (1, 0), (1, 16)):
        needs = training_needs(shape, gpus, 16384, 2, True, lora)
        together.append(round(sum(needs.memory.values()) / 1e9, 1))
    assert together == [35.4, 51.5, 83.6, 156.7, 26.9]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, "in kB: nothing of 32 GB was made"
