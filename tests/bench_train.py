"""Step time and peak memory of training against TRL's DPOTrainer and against padded rows.

Run by hand:

    python tests/bench_train.py --trl-python OTHER/venv/bin/python   # one with trl; or without TRL
    python tests/bench_train.py --table scaling               # time against tokens, ranks 1 and 2

Every cell is a process of its own: the same random Llama, the same pairs in the same order, the
same loss (sigmoid + 0.2 SFT), AdamW, clipping. TRL runs with precomputed reference
log-probabilities, without truncation, and both with and without gradient checkpointing, of which
the faster is shown; its tokenizer is stepped around, so that both sides train on the same ids.
Times are medians over the steps after the first, by the clock and of the processor (on a machine
with other work the second is the fairer); memory is the peak resident size of the process, and in
brackets what it adds to the size after the imports. The last column is the largest difference of
the losses from those of `tree`.
"""
import argparse
import contextlib
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CASES = {
    "256:128": dict(prefix=256, suffix=128),
    "128:128": dict(prefix=128, suffix=128),
    "512:128": dict(prefix=512, suffix=128),
    "256:128 128k": dict(prefix=256, suffix=128, vocab=128000),
    "1024:128 x6": dict(prefix=1024, suffix=128, branches=6),
    "128:128 x6": dict(prefix=128, suffix=128, branches=6),
}


def peak_kb():
    """Peak resident size of this process; getrusage's would begin with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def make(folder, prefix, suffix, vocab=32000, branches=1, pairs=8, steps=4, hidden=256, layers=4):
    """Write a random Llama and `steps` batches of `pairs` pairs.

    `branches` pairs share a prefix and the rejected side.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=4096)
    LlamaForCausalLM(config).save_pretrained(folder)

    def ids(n):
        return torch.randint(3, vocab, (n,)).tolist()
    records = []
    for _ in range(steps * max(1, pairs // branches)):
        shared = {"prefix_ids": ids(prefix), "rejected_ids": ids(suffix), "n_prompt": 1}
        for _ in range(branches):
            records.append({**shared, "id": str(len(records)), "chosen_ids": ids(suffix)})
    (Path(folder) / "pairs.json").write_text(json.dumps(records))


def train_here(folder, share, steps):
    """Train with this code; returns (losses, times at which steps ended, memory before, rank)."""
    import torch

    import ipo
    from data import micro_batches
    from support.trees import tree_parts
    torch.set_num_threads(1)
    device, rank, world = ipo.start_distributed("cpu")
    base = peak_kb()
    policy, autocast = ipo.load_policy(folder, device, rank, world, torch.float32, share=share)
    pairs = json.loads((Path(folder) / "pairs.json").read_text())
    parts = [{i: 1} for i in range(len(pairs))]
    if share:
        parts = [tree_parts(ipo.pair_sequences(pair)) for pair in pairs]
    size = len(pairs) // steps
    batches = [list(range(i, i + size)) for i in range(0, len(pairs), size)]
    micros = []
    for batch in batches:
        micros += micro_batches(batch, parts, 10 ** 9, rank, world)
    ipo.reference_logps(policy, pairs, micros, device, autocast)
    mine = {pair["id"]: pair["ref"] for pair in pairs if "ref" in pair}
    logps = ipo.merge_over_ranks(mine, world)
    for pair in pairs:
        pair["ref"] = logps[pair["id"]]

    stamps = []

    def step_line(*_):
        stamps.append((time.monotonic(), time.process_time()))
        return ""
    ipo.step_line = step_line
    losses_of = functools.partial(ipo.pair_losses, device=device, beta=0.1, sft_weight=0.2)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        log = ipo.fit(policy, pairs, losses_of, parts, out=Path(out), rank=rank, world=world,
                      autocast=autocast, batches=batches, lr=1e-6, micro_tokens=10 ** 9)
    return [line["loss"] for line in log], stamps, base, rank


def train_with_trl(folder, checkpointing, steps):
    """Train the same with TRL's DPOTrainer; returns what `train_here` does."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    torch.set_num_threads(1)
    base = peak_kb()
    pairs = json.loads((Path(folder) / "pairs.json").read_text())
    rows = []
    for pair in pairs:
        rows.append({"prompt_ids": pair["prefix_ids"], "chosen_ids": pair["chosen_ids"],
                     "rejected_ids": pair["rejected_ids"]})
    stamps, losses = [], []

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset                                   # token ids already

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)     # the order of the file

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append((time.monotonic(), time.process_time()))

        def on_log(self, *_, logs=None, **__):
            if "loss" in logs:
                losses.append(logs["loss"])

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")),
        pad_token="a", eos_token="b")
    size = len(pairs) // steps
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        settings = DPOConfig(
            output_dir=out, per_device_train_batch_size=size, precompute_ref_log_probs=True,
            precompute_ref_batch_size=size, gradient_checkpointing=checkpointing,
            loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.1, max_length=None,
            learning_rate=1e-6, num_train_epochs=1, lr_scheduler_type="constant", bf16=False,
            use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", max_grad_norm=1.0,
            disable_tqdm=True)
        trainer = Trainer(model, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                          callbacks=[Clock()], args=settings)
        trainer.train()
    return losses, stamps, base, 0


def worker(method, folder, steps):
    """One cell: print its figures as the last line."""
    if method.startswith("trl"):
        losses, stamps, base, rank = train_with_trl(folder, method == "trl-gc", steps)
    else:
        losses, stamps, base, rank = train_here(folder, method != "no-share", steps)
    peak = peak_kb()
    if rank != 0:
        return
    wall = [later[0] - earlier[0] for earlier, later in zip(stamps, stamps[1:])]
    cpu = [later[1] - earlier[1] for earlier, later in zip(stamps, stamps[1:])]
    figures = {"step": statistics.median(wall), "cpu": statistics.median(cpu), "losses": losses,
               "peak": peak / 1024, "added": (peak - base) / 1024}
    print(json.dumps(figures))


def cell(method, folder, steps, python=sys.executable, ranks=1):
    """Run one method in a process of its own (or under torchrun); returns its figures."""
    command = [python]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(Path(__file__).resolve()), "--worker", method, str(folder),
                "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{method} failed:\n{done.stderr[-3000:]}")
    figures = [line for line in done.stdout.splitlines() if line.startswith('{"step"')]
    return json.loads(figures[-1])


def compare(cases, steps, trl_python):
    """The table of ratios."""
    print(f"{'case':14} {'method':9} {'s/step':>7} {'CPU s':>7} {'peak MB (added)':>16} "
          f"{'time':>7} {'CPU':>7} {'memory':>7} {'loss diff':>9}")
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            make(folder, steps=steps, **CASES[name])
            results = {method: cell(method, folder, steps) for method in ("tree", "no-share")}
            if trl_python:
                both = [cell(method, folder, steps, trl_python) for method in ("trl", "trl-gc")]
                results["trl"] = min(both, key=lambda r: r["step"])
        tree = results["tree"]
        for method, r in results.items():
            losses = zip(r["losses"], tree["losses"], strict=True)
            off = max(abs(a - b) for a, b in losses)
            print(f"{name:14} {method:9} {r['step']:7.2f} {r['cpu']:7.2f} "
                  f"{r['peak']:7.0f} ({r['added']:6.0f}) "
                  f"{r['step'] / tree['step']:6.1f}x {r['cpu'] / tree['cpu']:6.1f}x "
                  f"{r['peak'] / tree['peak']:6.2f}x {off:9.1e}", flush=True)


def scaling(steps):
    """Step time against tokens and ranks."""
    print(f"{'pairs a step':>12} {'ranks':>5} {'s/step':>7} {'ms/pair':>8} {'CPU ms/pair':>12}")
    for pairs, ranks in ((4, 1), (8, 1), (16, 1), (32, 1), (16, 2)):
        with tempfile.TemporaryDirectory() as folder:
            make(folder, 256, 128, pairs=pairs, steps=steps)
            r = cell("tree", folder, steps, ranks=ranks)
        print(f"{pairs:12} {ranks:5} {r['step']:7.2f} {1000 * r['step'] / pairs:8.0f} "
              f"{1000 * r['cpu'] * ranks / pairs:12.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON"),
                        help="a Python that has trl")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--table", choices=("compare", "scaling"), default="compare")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker, args.steps)
    elif args.table == "scaling":
        scaling(args.steps)
    else:
        compare(args.cases, args.steps, args.trl_python)


if __name__ == "__main__":
    main()
