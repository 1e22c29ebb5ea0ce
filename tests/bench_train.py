"""Step time and peak memory of training against TRL's DPOTrainer and against padded rows. Run by hand:

    python tests/bench_train.py --trl-python /path/to/other/venv/bin/python   # with trl installed; leave out to skip TRL
    python tests/bench_train.py --table scaling                               # time against tokens, ranks 1 and 2

Every cell is a process of its own: the same random Llama, the same pairs in the same order, the same loss (sigmoid
+ 0.2 SFT), AdamW, clipping. TRL runs with precomputed reference log-probabilities, without truncation, and both with
and without gradient checkpointing, of which the faster is shown; its tokenizer is stepped around, so that both sides
train on the same ids. Times are medians over the steps after the first, by the clock and of the
processor (on a machine with other work the second is the fairer); memory is the peak resident size of the
process, and in brackets what it adds to the size after the imports. The last column is the largest difference of the
losses from those of `tree`.
"""
import argparse
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
CASES = {"256:128": dict(prefix=256, suffix=128), "128:128": dict(prefix=128, suffix=128),
         "512:128": dict(prefix=512, suffix=128), "256:128 128k": dict(prefix=256, suffix=128, vocab=128000),
         "1024:128 x6": dict(prefix=1024, suffix=128, branches=6), "128:128 x6": dict(prefix=128, suffix=128, branches=6)}


def peak_kb():
    """Peak resident size of this process; getrusage's would begin with that of the process that started it."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def make(folder, prefix, suffix, vocab=32000, branches=1, pairs=8, steps=4, hidden=256, layers=4, **_):
    """Write a random Llama and `steps` batches of pairs; `branches` pairs share a prefix and the rejected side."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096)).save_pretrained(folder)

    def ids(n):
        return torch.randint(3, vocab, (n,)).tolist()
    records = []
    for _ in range(steps * max(1, pairs // branches)):
        shared = {"prefix_ids": ids(prefix), "rejected_ids": ids(suffix), "n_prompt": 1}
        records += [{**shared, "id": str(len(records) + b), "chosen_ids": ids(suffix)} for b in range(branches)]
    (Path(folder) / "pairs.json").write_text(json.dumps(records))


def own(folder, share, steps, dtype="float32", device="cpu"):
    """Train with this code; returns the losses and the moments at which steps ended."""
    import contextlib
    import functools

    import torch

    import data
    import ipo
    torch.set_num_threads(1)
    device, rank, world = ipo.start_distributed(device)
    base = peak_kb()
    policy, autocast = ipo.load_policy(folder, device, rank, world, getattr(torch, dtype), share=share)
    pairs = json.loads((Path(folder) / "pairs.json").read_text())
    parts = [data.tree_parts(ipo.pair_sequences(p)) if share else {i: 1} for i, p in enumerate(pairs)]
    size = len(pairs) // steps
    batches = [list(range(i, i + size)) for i in range(0, len(pairs), size)]
    ipo.reference_logps(policy, pairs, [m for b in batches for m in data.micro_batches(b, parts, 10 ** 9, rank, world)],
                        device, autocast)
    if world > 1:
        every = [None] * world
        ipo.dist.all_gather_object(every, {p["id"]: p["ref"] for p in pairs if "ref" in p})
        for p in pairs:
            p["ref"] = next(refs[p["id"]] for refs in every if p["id"] in refs)
    stamps, ipo.step_line = [], lambda *_: stamps.append((time.monotonic(), time.process_time()))
    losses_of = functools.partial(ipo.pair_losses, device=device, beta=0.1, sft_weight=0.2)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        log = ipo.fit(policy, pairs, losses_of, parts, out=Path(out), rank=rank, world=world, autocast=autocast,
                      batches=batches, lr=1e-6, micro_tokens=10 ** 9)
    return [line["loss"] for line in log], stamps, base, rank


def trl(folder, checkpointing, steps):
    """Train the same with TRL's DPOTrainer."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    torch.set_num_threads(1)
    base = peak_kb()
    pairs = json.loads((Path(folder) / "pairs.json").read_text())
    rows = Dataset.from_list([{"prompt_ids": p["prefix_ids"], "chosen_ids": p["chosen_ids"],
                               "rejected_ids": p["rejected_ids"]} for p in pairs])
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
            losses.extend([logs["loss"]] if "loss" in logs else [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")),
                                        pad_token="a", eos_token="b")
    size = len(pairs) // steps
    with tempfile.TemporaryDirectory() as out:
        Trainer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), train_dataset=rows,
                processing_class=tokenizer, callbacks=[Clock()], args=DPOConfig(
                    output_dir=out, per_device_train_batch_size=size, precompute_ref_log_probs=True,
                    precompute_ref_batch_size=size, gradient_checkpointing=checkpointing, loss_type=["sigmoid", "sft"],
                    loss_weights=[1.0, 0.2], beta=0.1, max_length=None, learning_rate=1e-6, num_train_epochs=1,
                    lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to=[], logging_steps=1,
                    save_strategy="no", max_grad_norm=1.0, disable_tqdm=True)).train()
    return losses, stamps, base, 0


def worker(method, folder, steps):
    """One cell: print its figures as the last line."""
    losses, stamps, base, rank = (own(folder, method != "no-share", steps) if not method.startswith("trl")
                                  else trl(folder, method == "trl-gc", steps))
    peak = peak_kb()
    if rank == 0:
        wall, cpu = ([b[i] - a[i] for a, b in zip(stamps, stamps[1:])] for i in (0, 1))
        print(json.dumps({"step": statistics.median(wall), "cpu": statistics.median(cpu), "losses": losses,
                          "peak": peak / 1024, "added": (peak - base) / 1024}))


def cell(method, folder, steps, python=sys.executable, ranks=1):
    """Run one method in a process of its own (or under torchrun); returns its figures."""
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(launcher if ranks > 1 else [python]), str(Path(__file__).resolve()), "--worker", method, str(folder),
               "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"step"')))


def compare(cases, steps, trl_python):
    """The table of ratios."""
    print(f"{'case':14} {'method':9} {'s/step':>7} {'CPU s':>7} {'peak MB (added)':>16} {'time':>7} {'CPU':>7} "
          f"{'memory':>7} {'loss diff':>9}")
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            make(folder, steps=steps, **CASES[name])
            results = {m: cell(m, folder, steps) for m in ("tree", "no-share")}
            if trl_python:
                both = [cell(m, folder, steps, trl_python) for m in ("trl", "trl-gc")]
                results["trl"] = min(both, key=lambda r: r["step"])
        tree = results["tree"]
        for method, r in results.items():
            off = max(abs(a - b) for a, b in zip(r["losses"], tree["losses"], strict=True))
            print(f"{name:14} {method:9} {r['step']:7.2f} {r['cpu']:7.2f} {r['peak']:7.0f} ({r['added']:6.0f}) "
                  f"{r['step'] / tree['step']:6.1f}x {r['cpu'] / tree['cpu']:6.1f}x {r['peak'] / tree['peak']:6.2f}x "
                  f"{off:9.1e}", flush=True)


def scaling(steps):
    """Step time against tokens and ranks."""
    print(f"{'pairs a step':>12} {'ranks':>5} {'s/step':>7} {'ms/pair':>8} {'CPU ms/pair':>12}")
    for pairs, ranks in ((4, 1), (8, 1), (16, 1), (32, 1), (16, 2)):
        with tempfile.TemporaryDirectory() as folder:
            make(folder, 256, 128, pairs=pairs, steps=steps)
            r = cell("tree", folder, steps, ranks=ranks)
        print(f"{pairs:12} {ranks:5} {r['step']:7.2f} {1000 * r['step'] / pairs:8.0f} {1000 * r['cpu'] * ranks / pairs:12.0f}",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON"), help="a Python that has trl")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--table", choices=("compare", "scaling"), default="compare")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args.steps)
    return scaling(args.steps) if args.table == "scaling" else compare(args.cases, args.steps, args.trl_python)


if __name__ == "__main__":
    main()
