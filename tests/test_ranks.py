"""Sampling in waves and on several ranks: the same bytes, however often it is killed."""
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data import Appender, Request
from model import LocalSampler, sample
from support import batch_size, ranks
from support.batch_size import rows_that_fit
from support.errors import InputError
from support.stages import open_stage
from support.waves import cut_into_waves
from tests.conftest import random_model
from tests.stages_of_ranks import ROOT, run_stages


def some_requests(n=40):
    g = torch.Generator().manual_seed(0)
    return [Request(f"r{i}", torch.randint(2, 60, (1 + i * 7 % 12,), generator=g).tolist())
            for i in range(n)]


def run(model, **options):
    options = {"eos": {1}, "max_new_tokens": 60, "batch_size": 2, "temperature": 0.8, **options}
    return list(sample(model, some_requests(), **options))


def bytes_of(run):
    """{file: bytes} of the outputs in a folder. The records beside them hold paths."""
    return {path.relative_to(run).as_posix(): path.read_bytes()
            for path in sorted(run.rglob("*"))
            if path.is_file() and not path.name.endswith(".config.json")}


# ----------------------------------------------------------------------------------- put aside

def rows_of_waves(monkeypatch):
    """What is sampled: a list for each wave, (id, tokens that the row begins with)."""
    import model as module
    waves, real = [], module._sample_wave

    def noting(model, wave, **options):
        waves.append([(request.id, len(ids)) for request, ids in wave])
        return real(model, wave, **options)
    monkeypatch.setattr(module, "_sample_wave", noting)
    return waves


def test_rows_that_are_put_aside_end_as_all_others_do(monkeypatch):
    model, waves = random_model(60), rows_of_waves(monkeypatch)
    whole = run(model, temperature=0, drain=None)
    assert len(waves) == 5 and all(n == 0 for wave in waves for _, n in wave)
    waves.clear()
    drained = run(model, temperature=0, drain=3)
    aside = [row for wave in waves[5:] for row in wave]
    assert len(aside) > 5 and all(n > 3 for _, n in aside), "or there is nothing to see here"
    assert sorted(drained) == sorted(whole)
    assert drained != whole, "the long ones come last"
    # With the uniform numbers of each request, too: none is used twice.
    assert sorted(run(model, drain=3)) == sorted(run(model, drain=None))


def test_a_single_wave_goes_on_to_its_end(monkeypatch):
    model, waves = random_model(60), rows_of_waves(monkeypatch)
    run(model, batch_size=10, drain=1)
    assert len(waves) == 1
    run(model, batch_size=9, drain=1)
    assert len(waves) > 3


def test_a_restart_gives_the_same_completions_in_the_same_order(tmp_path, monkeypatch):
    model, waves = random_model(60), rows_of_waves(monkeypatch)
    whole = run(model, drain=3)
    undisturbed = len(waves)
    for killed_after in (1, 9, 31, 40):
        waves.clear()
        folder = tmp_path / str(killed_after)
        got = {}
        for limit in (killed_after, 100):
            completions = sample(model, some_requests(), eos={1}, max_new_tokens=60, batch_size=2,
                                 temperature=0.8, drain=3, parts=folder, done=set(got))
            while len(got) < limit:
                completion = next(completions, None)
                if completion is None:
                    break
                got.setdefault(completion.id, completion)  # as an Appender does
            completions.close()
        assert list(got.values()) == whole
        assert len(waves) == undisturbed, "a wave that was kept is not sampled again"


def test_only_what_a_wave_itself_is_made_of_is_taken_from_the_parts(tmp_path):
    rows = [(request, []) for request in some_requests()]
    names = {wave.path for wave in cut_into_waves(rows, 8, 3, tmp_path)}
    changed = [(Request(r.id, r.prefix + [5] * (r.id == "r0")), ids) for r, ids in rows]
    assert len(names) == 5 and all(name.parent == tmp_path for name in names)
    others = {wave.path for wave in cut_into_waves(changed, 8, 3, tmp_path)}
    assert names != others and not names & {w.path for w in cut_into_waves(rows, 8, 4, tmp_path)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The outputs of one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    run_stages(folder, ["rollouts", "pairs", "evaluation"])
    return bytes_of(folder)


def test_a_stage_that_is_killed_at_a_write_gives_the_same_bytes(tmp_path, killed, alone):
    killed(lambda: run_stages(tmp_path, ["rollouts"]), Appender, "write", 14)
    assert list((tmp_path / "rollouts.parts").iterdir())
    assert not (tmp_path / "rollouts.funnel.json").exists()
    run_stages(tmp_path, ["rollouts"])
    made = bytes_of(tmp_path)
    assert made["rollouts.jsonl"] == alone["rollouts.jsonl"]
    assert set(made) == {"rollouts.jsonl", "rollouts.funnel.json"}, "and nothing is left over"


# --------------------------------------------------------------------------------- several ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(n, *command):
    return subprocess.Popen(
        [*TORCHRUN, str(n), *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ranks_of(process):
    """{rank: process id} of what torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            variables = (folder / "environ").read_text().split("\0")
        except OSError:
            continue
        if int(parent) == process.pid:
            for variable in variables:
                if variable.startswith("RANK="):
                    found[int(variable.removeprefix("RANK="))] = int(folder.name)
    return found


def assert_all_ended(ranks):
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline, "a rank is still running"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_any_number_of_ranks_gives_the_same_bytes_also_after_one_was_killed(tmp_path, alone):
    shared = tmp_path / "shared"
    program = ROOT / "tests" / "stages_of_ranks.py"
    process = start(3, program, shared, "rollouts")
    parts = shared / "rollouts.parts"
    while not (parts.exists() and list(parts.glob("*.jsonl"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1, 2]
    os.kill(ranks[2], signal.SIGKILL)
    process.communicate()
    assert process.returncode
    assert_all_ended(ranks)
    assert not (shared / "rollouts.funnel.json").exists(), "killed too late to see anything"

    process = start(2, program, shared, "rollouts", "pairs", "evaluation")
    out, err = process.communicate()
    assert process.returncode == 0, err
    # Rank 0 alone speaks.
    assert out.count("rollouts: 12 prompts -> 12 short enough -> 24 rollouts") == 1
    assert bytes_of(shared) == alone


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_an_error_of_rank_0_ends_all_ranks_and_is_said_once(tmp_path):
    process = start(2, "evaluate.py", "run", "--model", ROOT / "toy" / "model", "--out",
                    tmp_path / "eval", "--set", f"direct=harmful:{tmp_path}/missing.jsonl")
    ranks = {}
    while process.poll() is None:
        ranks |= ranks_of(process)
        time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode and err.count("error: ") == 1 and "missing.jsonl" in err
    assert len(ranks) == 2
    assert_all_ended(ranks)


def test_ranks_that_torchrun_starts_again_begin_anew(monkeypatch):
    """Its store outlives them (--max-restarts), with what was claimed and who had failed."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([(store, 0, 2)]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        monkeypatch.setattr(ranks, "_jobs", itertools.count())
        ranks._store.cache_clear()
        assert list(ranks.in_order([1, 2, 3], abs, abs)) == [1, 2, 3]
        ranks._store().set(ranks.FAILED, "rank 1")
    ranks._store.cache_clear()


# ---------------------------------------------------------------------------------- batch size

def test_rows_that_fit_leave_room_and_stay_between_8_and_256():
    for gib in (8, 16, 24, 40, 80, 141, 1000):
        rows = rows_that_fit(gib << 30, 3 << 30, 1 << 16, 9216)
        assert rows % 8 == 0 and 8 <= rows <= 256
        taken = (3 << 30) + rows * 9216 * (1 << 16)
        assert rows == 8 or taken < 0.9 * (gib << 30)
    assert rows_that_fit(8 << 30, 30 << 30, 1 << 16, 9216) == 8


def test_auto_is_recorded_as_a_number_and_another_gpu_is_told_which(tmp_path, monkeypatch):
    flags = {"batch_size": "auto", "server": None, "device": "auto", "dtype": "auto",
             "model": ROOT / "toy" / "model", "max_new_tokens": 320, "temperature": 0.6,
             "out": tmp_path / "begun.jsonl"}
    assert batch_size.with_batch_size({"seed": 0}) == {"seed": 0}
    assert batch_size.with_batch_size(flags | {"batch_size": 5})["batch_size"] == 5
    monkeypatch.setattr(batch_size, "device_kind", lambda name: name)
    assert batch_size.with_batch_size(flags | {"device": "cpu"})["batch_size"] == 16
    monkeypatch.setattr(batch_size, "free_memory", lambda: 80 << 30)
    for more in ({"device": "cuda"}, {"device": "cuda", "server": "http://host/v1"}):
        rows = batch_size.with_batch_size(flags | more)["batch_size"]
        assert rows == (16 if "server" in more and more["server"] else 256)
    program = ROOT / "intervene.py"
    # A start that failed at once binds nobody. What was begun with fewer rows goes on with these,
    # although more would fit by now.
    open_stage(program, tmp_path / "begun.jsonl", {"batch_size": 64}, [])
    assert batch_size.with_batch_size(flags | {"device": "cuda"})["batch_size"] == 256
    (tmp_path / "begun.jsonl").write_text('{"id": "a"}\n')
    assert batch_size.with_batch_size(flags | {"device": "cuda"})["batch_size"] == 64
    then, now = ({"batch_size": rows, "temperature": 0.6} for rows in (64, 32))
    out = tmp_path / "rollouts.jsonl"
    open_stage(program, out, then, [])
    out.write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match="64 then, 32 now.*Go on with BATCH=64"):
        open_stage(program, out, now, [])


def test_parts_of_other_settings_are_refused(tmp_path):
    out, parts = tmp_path / "rollouts.jsonl", tmp_path / "rollouts.parts"
    open_stage(ROOT / "intervene.py", out, {"seed": 0}, [])
    parts.mkdir()
    with pytest.raises(InputError, match="rollouts.parts was made with other settings"):
        open_stage(ROOT / "intervene.py", out, {"seed": 1}, [])
    open_stage(ROOT / "intervene.py", out, {"seed": 0}, [])
    assert parts.exists()


def test_groups_are_sampled_as_if_each_was_alone():
    model, requests = random_model(60), some_requests()
    options = dict(eos={1}, max_new_tokens=60, batch_size=2, temperature=0.8, drain=3)
    groups = [requests[:17], requests[17:20], requests[20:]]
    apart = []
    for group in groups:
        apart += sample(model, group, **options)
    together = list(sample(model, requests, groups=groups, **options))
    assert sorted(together) == sorted(apart)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_each_rank_takes_its_own_gpu(monkeypatch):
    last = torch.cuda.device_count() - 1
    monkeypatch.setenv("LOCAL_RANK", str(last))
    sampler = LocalSampler(ROOT / "toy" / "model", temperature=0, top_p=1, max_new_tokens=4, seed=0)
    assert sampler.load().device == torch.device("cuda", last)
