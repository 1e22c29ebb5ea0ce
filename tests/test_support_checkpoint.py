"""Checkpoints that have been damaged on disk."""
import os
import re
import shutil

import pytest
import torch

import ipo
from support.checkpoint import load_checkpoint, save_checkpoint
from support.errors import InputError
from support.files import write_jsonl
from tests.test_fullsize import fork_ranks


@pytest.fixture
def policy():
    return torch.nn.Linear(40, 30)


def stepped(policy):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    policy(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    return optimizer


def flip(path, byte, bit=0):
    with open(path, "r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_a_checkpoint_comes_back_and_any_flipped_bit_is_refused_by_name(tmp_path, policy):
    optimizer = stepped(policy)
    save_checkpoint(tmp_path, policy, optimizer, 5, rank=0)
    weights = policy.weight.detach().clone()
    with torch.no_grad():
        policy.weight.zero_()
    assert load_checkpoint(tmp_path, policy, optimizer) == 5 and torch.equal(policy.weight, weights)
    folder = tmp_path / "checkpoint-5"
    files = sorted(path for path in folder.iterdir() if path.name != "checksums.json")
    assert [path.name for path in files] == [".metadata", "__0_0.distcp"]
    for path in files:
        size = path.stat().st_size
        for place in range(0, size, max(1, size // 40)):
            flip(path, place, place % 8)
            with pytest.raises(InputError, match=f"{re.escape(str(path))} is damaged or missing. Delete {folder}"):
                load_checkpoint(tmp_path, policy, optimizer)
            flip(path, place, place % 8)
    assert load_checkpoint(tmp_path, policy, optimizer) == 5
    files[1].unlink()
    with pytest.raises(InputError, match="distcp is damaged or missing"):
        load_checkpoint(tmp_path, policy, optimizer)
    (folder / "checksums.json").unlink()
    with pytest.raises(InputError, match="checksums.json is missing.*Delete"):
        load_checkpoint(tmp_path, policy, optimizer)
    shutil.rmtree(folder)  # what it says
    assert load_checkpoint(tmp_path, policy, optimizer) == 0


@pytest.fixture
def train(tmp_path, model_dir):
    """A training of four steps with one checkpoint, as a function of its folder's name."""
    pair = lambda n: {"id": str(n), "prompt_id": str(n), "prefix_ids": [5, 6, 7 + n], "n_prompt": 2,
                      "chosen_ids": [8, 1], "rejected_ids": [9 + n, 1]}
    write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(8)])

    def run(out):
        ipo.main(["train", "--model", str(model_dir), "--pairs", str(tmp_path / "pairs.jsonl"), "--lr", "1e-3",
                  "--batch-size", "2", "--save-every", "2", "--device", "cpu", "--out", str(tmp_path / out)])
    return run


def test_training_refuses_a_damaged_checkpoint_and_starts_again_without_it(tmp_path, train, killed):
    train("whole")
    killed(lambda: train("cut"), ipo, "step_line", 4)
    (shard,) = (tmp_path / "cut" / "checkpoint-2").glob("*.distcp")
    flip(shard, os.path.getsize(shard) // 2)
    with pytest.raises(InputError, match="checkpoint-2.* is damaged"):
        train("cut")
    shutil.rmtree(shard.parent)
    train("cut")
    results = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert results[0] == results[1]


def test_every_rank_looks_at_its_share_of_a_checkpoint(tmp_path, train, capfd, monkeypatch):
    real = ipo.log_step

    def stop_after_the_third_step(out, line, steps, rank=0):
        if line["step"] == 3:
            raise KeyboardInterrupt
        real(out, line, steps, rank)
    monkeypatch.setattr(ipo, "log_step", stop_after_the_third_step)
    assert 0 not in fork_ranks(2, lambda: train("out"))
    monkeypatch.undo()
    capfd.readouterr()
    shards = sorted((tmp_path / "out" / "checkpoint-2").glob("*.distcp"))
    assert [shard.name for shard in shards] == ["__0_0.distcp", "__1_0.distcp"]
    for shard in shards:
        flip(shard, os.path.getsize(shard) // 2)
        assert 0 not in fork_ranks(2, lambda: train("out"))
        assert f"{shard} is damaged" in capfd.readouterr().err
        flip(shard, os.path.getsize(shard) // 2)
    assert fork_ranks(2, lambda: train("out")) == [0, 0]
    assert "out 1/4" not in capfd.readouterr().out  # it went on from the checkpoint
