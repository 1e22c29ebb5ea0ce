"""Training at full size, on a small scale: trees against separate passes, ranks against one process, files, memory."""
import json
import math
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

import data
import ipo
import model as lm_code
from extras import plan
from tests.conftest import random_model

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {"llama": dict(config=LlamaConfig, cls=LlamaForCausalLM, tie_word_embeddings=True),
            "qwen2": dict(config=Qwen2Config, cls=Qwen2ForCausalLM),
            "qwen3": dict(config=Qwen3Config, cls=Qwen3ForCausalLM, tie_word_embeddings=True)}
CPU = torch.device("cpu")


def some_ids(g, low, high):
    return torch.randint(2, 60, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()


def some_trees(seed=0):
    """Ragged trees, shuffled: six branches and one rejected side, a single pair, a prefix of one token, a lone row."""
    g = torch.Generator().manual_seed(seed)
    sequences = []
    for length, branches in ((9, 6), (5, 2), (1, 3), (4, 1)):
        prefix, rejected = some_ids(g, length, length + 1), some_ids(g, 1, 8)
        for _ in range(branches):
            sequences += [(prefix, some_ids(g, 1, 8)), (prefix, rejected)]
    return [sequences[i] for i in torch.randperm(len(sequences), generator=g)]


def separately(model, sequences, weights):
    """The oracle: one forward pass a sequence, all logits; log-probabilities, and gradients of their weighted sum."""
    logps = []
    for prefix, completion in sequences:
        table = model(torch.tensor([prefix + completion])).logits[0].log_softmax(-1)
        logps.append(sum(table[len(prefix) + i - 1, t] for i, t in enumerate(completion)))
    model.zero_grad()
    (torch.stack(logps) * weights).sum().backward()
    return torch.stack(logps).detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def fork_ranks(world, function, timeout=60):
    """Run `function()` in `world` forked processes as torchrun would; returns their exit codes (negative: killed)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                function()
                code = 0
            except BaseException:  # a child must never run the parent's tests
                import traceback
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes, end = {}, time.monotonic() + timeout
    while len(codes) < world:
        for pid in set(children) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in set(children) - set(codes):
                os.kill(pid, 9)
        time.sleep(0.02)
    return [codes[pid] for pid in children]


# ------------------------------------------------------------------------------------------------------------- trees

@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_equals_separate_passes(family, checkpointed):
    model = random_model(60, spread=0.15, **FAMILIES[family]).train()
    sequences = some_trees()
    weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(1)) / len(sequences)
    logps, gradients = separately(model, sequences, weights)
    if checkpointed:
        model.activation_checkpointing_enable()
    policy = ipo.Policy(model, share=True)
    row = policy.rows(sequences, "cpu")
    assert row["input_ids"].shape[1] == sum(data.tree_parts(sequences).values()) < sum(len(p + c) for p, c in sequences)
    model.zero_grad()
    got = policy(**row)
    (got * weights).sum().backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.detach(), logps, atol=1e-5, rtol=1e-6)
    assert max(g.abs().max() for g in gradients.values()) > 0.1
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-5)


def test_a_branch_sees_its_trunk_and_nothing_of_its_siblings():
    policy = ipo.Policy(random_model(60), share=True)
    prefix, other = [5, 6, 7], [5, 9, 7]
    alone = policy(**policy.rows([(prefix, [8, 9])], "cpu"))
    for company in ([(prefix, [30, 31])], [(other, [8, 9])], [(prefix, [8, 9, 10]), (other, [1])]):
        for sequences in ([(prefix, [8, 9]), *company], [*company, (prefix, [8, 9])]):
            got = policy(**policy.rows(sequences, "cpu"))[sequences.index((prefix, [8, 9]))]
            torch.testing.assert_close(got, alone[0], atol=1e-5, rtol=0)
    assert (policy(**policy.rows([(other, [8, 9])], "cpu")) - alone).abs() > 0.01


def test_sliding_windows_are_refused():
    model = random_model(60, config=Qwen2Config, cls=Qwen2ForCausalLM, use_sliding_window=True, sliding_window=4,
                         max_window_layers=0)
    policy = ipo.Policy(model, share=True)
    with pytest.raises(ValueError, match="--no-share"):
        policy(**policy.rows([([5, 6], [7])], "cpu"))


@pytest.mark.parametrize("chunk, keep", [(1, 0), (3, 40), (3, 1000), (100, 0)])
def test_the_chunked_head_equals_log_softmax(chunk, keep):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g, requires_grad=True) for n in (7, 11))
    targets, grad = torch.randint(11, (7,), generator=g), torch.randn(7, generator=g)
    expected = (hidden @ weight.T).log_softmax(-1)[range(7), targets]
    wanted = torch.autograd.grad(expected, (hidden, weight), grad)
    got = lm_code.TokenLogps.apply(hidden, weight, targets, chunk, keep)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight), grad), wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    frozen = lm_code.TokenLogps.apply(hidden, weight.detach(), targets, chunk, keep)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden, grad)[0], wanted[0], atol=1e-5, rtol=0)


def test_whole_trees_meet_in_a_batch_and_epochs_cover_everything():
    parts = [data.tree_parts([([i // 3, 5], [i])]) for i in range(12)]
    batches = data.global_batches(parts, 6, 2, seed=1)
    assert sorted(i for b in batches[:2] for i in b) == sorted(i for b in batches[2:] for i in b) == list(range(12))
    assert all(len({i // 3 for i in b}) == 2 for b in batches), "six pairs are two whole trees"
    assert batches[:2] != batches[2:] and batches == data.global_batches(parts, 6, 2, seed=1)


# ---------------------------------------------------------------------------------------------------- several ranks

@pytest.fixture(scope="module")
def directories(tokenizer, tmp_path_factory):
    """A tied Llama, an untied Qwen2 and a tied Qwen3, as directories; Qwen2's is cut into several files."""
    paths = {}
    for family, settings in FAMILIES.items():
        paths[family] = tmp_path_factory.mktemp("models") / family
        random_model(len(tokenizer), spread=0.15, **settings).save_pretrained(
            paths[family], max_shard_size="20KB" if family == "qwen2" else "5GB")
        tokenizer.save_pretrained(paths[family])
    assert (paths["qwen2"] / "model.safetensors.index.json").exists()
    return paths


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """Ragged pairs, 21 of them in trees of 3, 1, 3, 1, ...: no batch of 4 divides evenly among ranks or trees."""
    g = torch.Generator().manual_seed(3)
    pairs = []
    while len(pairs) < 21:
        prefix, rejected = some_ids(g, 3, 14), some_ids(g, 2, 12)
        for _ in range(3 if len(pairs) % 4 == 0 else 1):
            pairs.append({"id": f"p{len(pairs)}", "n_prompt": 2, "prefix_ids": prefix, "rejected_ids": rejected,
                          "chosen_ids": some_ids(g, 2, 12) + [1]})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    data.write_jsonl(path, pairs[:21])
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_trees_equal_separate_passes_and_no_rank_holds_the_model(family, directories, tmp_path):
    sequences = some_trees()
    weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(1)) / len(sequences)

    def rank_main():
        device, rank, world = ipo.start_distributed("cpu")
        policy, _ = ipo.load_policy(directories[family], device, rank, world, torch.float32, checkpoint_activations=True)
        held = sum(p.to_local().numel() for p in policy.parameters())
        assert held < 0.55 * sum(p.numel() for p in policy.parameters())
        logps = policy(**policy.rows(sequences, device))
        (logps * weights).sum().backward()  # both ranks alike, so FSDP's average is the gradient itself
        gradients = {n: p.grad.full_tensor() for n, p in policy.lm.named_parameters()}
        if rank == 0:
            torch.save((logps.detach(), gradients), tmp_path / "got.pt")

    assert fork_ranks(2, rank_main) == [0, 0]
    got, gradients = torch.load(tmp_path / "got.pt")
    expected, wanted = separately(AutoModelForCausalLM.from_pretrained(directories[family]), sequences, weights)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], atol=1e-5, rtol=1e-5)


def train(model, pairs, out, *more, after=None):
    """Run `ipo.py train` for 24 steps here; `after` kills this process at that step."""
    if after is not None:
        real, calls = ipo.step_line, []

        def line(*arguments):
            calls.append(0)
            if len(calls) == after:
                os.kill(os.getpid(), 9)
            return real(*arguments)
        ipo.step_line = line
    ipo.main(["train", "--model", str(model), "--pairs", str(pairs), "--out", str(out), "--lr", "3e-4",
              "--batch-size", "4", "--epochs", "4", "--micro-tokens", "60", "--save-every", "5", "--device", "cpu",
              *map(str, more)])


def log_of(out):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in data.read_jsonl(out / "metrics.jsonl")]


def assert_same_run(a, b, steps=24):
    """Losses to 1e-5 and weights to 1e-4, of runs that really moved."""
    one, two = log_of(a), log_of(b)
    assert len(one) == len(two) == steps
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], abs=1e-5)
    assert [x["grad_norm"] for x in two] == pytest.approx([x["grad_norm"] for x in one], rel=1e-3)
    weights, others = (load_file(p / "model.safetensors") for p in (a, b))
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(directories, pairs_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    train(directories["qwen3"], pairs_file, out)
    log, start, end = log_of(out), *(load_file(p / "model.safetensors") for p in (directories["qwen3"], out))
    assert log[0]["rewards/margins"] == 0, "the reference pass and the first step are the same computation"
    assert log[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"] and max((end[k] - start[k]).abs().max() for k in end) > 2e-3
    return out


@pytest.mark.parametrize("more", [["--micro-tokens", 1], ["--micro-tokens", 10 ** 6, "--checkpoint-activations"],
                                  ["--no-share"]], ids=str)
def test_accumulation_checkpointing_and_sharing_do_not_change_the_result(directories, pairs_file, undisturbed, tmp_path,
                                                                         more):
    train(directories["qwen3"], pairs_file, tmp_path / "other", *more)
    if "--no-share" in more:  # it draws other batches, because every pair is a tree of its own; the first one is full
        return assert_unshared(tmp_path / "other", undisturbed)
    assert_same_run(undisturbed, tmp_path / "other")


def assert_unshared(out, undisturbed):
    """Padded rows shuffle differently, so only the whole can be compared: both learn the same pairs."""
    plain, trees = log_of(out), log_of(undisturbed)
    assert plain[0]["rewards/margins"] == 0 and len(plain) == len(trees)
    for lines in (plain, trees):
        assert sum(x["loss"] for x in lines[-6:]) < sum(x["loss"] for x in lines[:6])


@pytest.mark.parametrize("more", [[], ["--defer-sync"]], ids=str)
def test_two_ranks_equal_one(directories, pairs_file, undisturbed, tmp_path, more):
    assert fork_ranks(2, lambda: train(directories["qwen3"], pairs_file, tmp_path / "two", *more)) == [0, 0]
    assert_same_run(undisturbed, tmp_path / "two")


@pytest.mark.parametrize("before, later", [(2, 1), (1, 2), (2, 3)])
def test_killed_and_restarted_on_another_number_of_ranks(directories, pairs_file, undisturbed, tmp_path, before, later):
    out, model = tmp_path / "killed", directories["qwen3"]
    codes = fork_ranks(before, lambda: train(model, pairs_file, out, after=13))
    assert codes[0] == -9 and all(codes), "rank 0 was killed, and no rank finished without it"
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-10"] and len(log_of(out)) == 13
    reference = (tmp_path / "killed.reference.json").stat().st_mtime_ns
    assert fork_ranks(later, lambda: train(model, pairs_file, out)) == [0] * later
    assert_same_run(undisturbed, out)
    assert (tmp_path / "killed.reference.json").stat().st_mtime_ns == reference, "it was not computed again"


def test_bfloat16_keeps_float32_masters_and_agrees(directories, pairs_file, undisturbed, tmp_path):
    def rank_main():
        device, rank, world = ipo.start_distributed("cpu")
        policy, _ = ipo.load_policy(directories["qwen3"], device, rank, world, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert fork_ranks(2, rank_main) == [0, 0]
    assert fork_ranks(2, lambda: train(directories["qwen3"], pairs_file, tmp_path / "two", "--dtype", "bfloat16")) == [0, 0]
    train(directories["qwen3"], pairs_file, tmp_path / "one", "--dtype", "bfloat16")
    for run in ("one", "two"):
        log = log_of(tmp_path / run)
        assert log[0]["rewards/margins"] == 0
        assert [x["loss"] for x in log] == pytest.approx([x["loss"] for x in log_of(undisturbed)], abs=0.05)


def test_a_rank_that_dies_ends_the_job_with_its_own_error(directories, pairs_file, tmp_path):
    (tmp_path / "job.py").write_text(f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}]
import ipo, torch
from tests import test_fullsize as t
torch.set_num_threads(1)
real = ipo.pair_losses
def fail(*args, **keywords):
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank one is out of luck")
    return real(*args, **keywords)
ipo.pair_losses = fail
ipo.record(t.train)({str(directories["llama"])!r}, {str(pairs_file)!r}, {str(tmp_path / "out")!r})
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(tmp_path / "job.py")], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    errors = re.findall(r"^(?:\[rank\d\]: )?\w+(?:Error|Exception): .*", done.stderr, re.MULTILINE)
    assert errors[0].endswith("RuntimeError: rank one is out of luck"), errors


# ------------------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_directory_opens_and_has_the_same_keys(family, directories, tokenizer, tmp_path):
    """Without training, what is saved in small files on two ranks is what was loaded, bit for bit."""
    def rank_main():
        device, rank, world = ipo.start_distributed("cpu")
        policy, _ = ipo.load_policy(directories[family], device, rank, world, torch.float32)
        (tmp_path / "out").mkdir(exist_ok=True)
        ipo.save_model(policy, tokenizer, tmp_path / "out", rank, torch.float32, limit=20_000)

    assert fork_ranks(2, rank_main) == [0, 0]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    start, end = ({k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()}
                  for p in (directories[family], tmp_path / "out"))
    assert start.keys() == end.keys() == index["weight_map"].keys()
    assert all(torch.equal(start[k], end[k]) for k in start)
    assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in end.values())
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == FAMILIES[family].get("tie_word_embeddings", False)


def test_weights_that_do_not_match_the_architecture_are_named(directories, tmp_path):
    import shutil
    for change, message in ((lambda w: w.pop("model.norm.weight"), "lack model.norm.weight"),
                            (lambda w: w.update(extra=torch.zeros(1)), "extra has no place in a Qwen3ForCausalLM")):
        shutil.copytree(directories["qwen3"], tmp_path / "bad", dirs_exist_ok=True)
        change(weights := load_file(directories["qwen3"] / "model.safetensors"))
        save_file(weights, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
        with pytest.raises(SystemExit, match=message):
            ipo.load_policy(tmp_path / "bad", CPU, 0, 1, torch.float32)


# -------------------------------------------------------------------------------------------------------------- LoRA

def test_lora_starts_as_the_model_and_trains_only_its_adapters(directories):
    policy, _ = ipo.load_policy(directories["qwen2"], CPU, 0, 1, torch.float32, lora_rank=2)
    sequences = some_trees()
    expected, _ = separately(AutoModelForCausalLM.from_pretrained(directories["qwen2"]), sequences, torch.zeros(1))
    torch.testing.assert_close(policy(**policy.rows(sequences, CPU)).detach(), expected, atol=1e-5, rtol=1e-6)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all("lora_" in n for n in trained), "two layers of seven linear layers"


def test_lora_is_merged_on_saving_and_ranks_and_restarts_do_not_matter(directories, pairs_file, tmp_path):
    model, more = directories["qwen2"], ["--lora-rank", 4, "--lr", "1e-2"]
    train(model, pairs_file, tmp_path / "one", *more)
    assert fork_ranks(2, lambda: train(model, pairs_file, tmp_path / "two", *more, after=8))[0] == -9
    assert fork_ranks(2, lambda: train(model, pairs_file, tmp_path / "two", *more)) == [0, 0]
    log = log_of(tmp_path / "one")
    assert log[0]["rewards/margins"] == 0 and log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    start = {k: v for f in model.glob("*.safetensors") for k, v in load_file(f).items()}
    end = load_file(tmp_path / "one" / "model.safetensors")
    assert start.keys() == end.keys()
    for key in start:  # what was merged has the rank of the adapters; everything else is untouched
        change = end[key] - start[key]
        if key.endswith("proj.weight"):
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-4) <= 4
        else:
            assert not change.any(), key
    pairs = data.read_jsonl(pairs_file)[:4]  # the merged model is the model that was trained
    ipo.reference_logps(ipo.Policy(AutoModelForCausalLM.from_pretrained(model)), pairs, [range(4)], CPU,
                        ipo.contextlib.nullcontext)
    _, metrics = ipo.pair_losses(ipo.Policy(AutoModelForCausalLM.from_pretrained(tmp_path / "one")), pairs, CPU, 0.1, 0.2)
    assert metrics["rewards/margins"].mean() > 5 * abs(log[0]["rewards/margins"]) + 0.1


# -------------------------------------------------------------------------------------------------------------- plan

MEASURE = """
import re, sys, torch
sys.path[:0] = [{root!r}]
import ipo, data
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
def step(folder, share=True):
    policy, _ = ipo.load_policy(folder, torch.device("cpu"), 0, 1, torch.float32, lora_rank={lora})
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6, fused=True)
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(3, 300, (4, {tokens} // 4), generator=g).tolist()
        loss = policy(**policy.rows([(i[:len(i) // 2], i[len(i) // 2:]) for i in ids], "cpu")).sum()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
step({tiny!r})
base = peak()
step({folder!r})
print(peak() - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read as Linux shows it")
@pytest.mark.parametrize("vocab, tokens, lora", [(32000, 64, 0), (16000, 1024, 4)])
def test_plan_agrees_with_measured_memory(vocab, tokens, lora, directories, tmp_path):
    """Peak memory of two steps in a process of its own, over that of a tiny model; weights-bound, activations-bound."""
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
                                 num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    lm = ipo.skeleton(tmp_path, lora_rank=lora)
    total, trained, kinds, _ = plan.memory(lm, 1, tokens, torch.float32, False, lora, "cpu")
    script = MEASURE.format(root=str(ROOT), tiny=str(directories["llama"]), folder=str(tmp_path), lora=lora, tokens=tokens)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})  # what is freed, is given back
    weights = load_file(tmp_path / "model.safetensors")
    adapters = 6 * lora * (256 * 2 * 2 + 2 * (256 + 128) + 3 * (256 + 704))
    assert total == sum(w.numel() for w in weights.values()) + adapters
    assert trained == (adapters if lora else total)
    assert sum(kinds.values()) == pytest.approx(float(done.stdout), rel=0.25), kinds


def test_plan_of_an_8b_model_reads_the_config_only(tmp_path, capsys):
    LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False).save_pretrained(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = []
    for more in (["--gpus", "8", "--checkpoint-activations"], ["--gpus", "1", "--checkpoint-activations"],
                 ["--gpus", "1", "--lora-rank", "16", "--checkpoint-activations"]):
        ipo.main(["plan", "--model", str(tmp_path), *more])
        shown = capsys.readouterr().out
        assert "8.0" in shown.splitlines()[0]
        verdicts.append("does NOT fit" not in shown)
    assert verdicts == [True, False, True]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "in kB: nothing of 32 GB was made"
