import pytest

from support.errors import InputError
from support.stages import close_stage, open_stage, run_stage


def test_a_stage_refuses_other_settings_and_other_inputs(tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="in.txt: no such file"):
        open_stage(out, {"seed": 1}, [source])
    source.write_text("one\n")
    # Nothing was made with it, so it does not bind.
    assert open_stage(out, {"seed": 0}, [source]) is None
    assert open_stage(out, {"seed": 1, "device": "cpu"}, [source]) is None
    out.write_text("")
    # Where it runs does not matter.
    assert open_stage(out, {"seed": 1, "device": "cuda"}, [source]) is None
    with pytest.raises(InputError, match="seed: 1 then, 2 now"):
        open_stage(out, {"seed": 2}, [source])
    source.write_text("two\n")
    with pytest.raises(InputError, match="in.txt"):
        open_stage(out, {"seed": 1}, [source])
    source.write_text("one\n")
    close_stage(out, {"pairs": 3})
    assert open_stage(out, {"seed": 1}, [source])["counts"] == {"pairs": 3}
    (tmp_path / "out.rounds").mkdir()
    out.unlink()  # the remedy that the message gives: made again, with nothing left of the old settings
    assert open_stage(out, {"seed": 2}, [source]) is None
    assert not (tmp_path / "out.rounds").exists() and not (tmp_path / "out.funnel.json").exists()


def test_passwords_in_urls_do_not_reach_the_config(tmp_path):
    open_stage(tmp_path / "o.jsonl", {"judge": "https://me:secret@host/v1"}, [])
    assert "secret" not in (tmp_path / "o.config.json").read_text()


def test_a_finished_stage_is_not_run_again(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    calls = []

    def work():
        calls.append(1)
        out.write_text("{}\n")
        return {"pairs": 3}, {"judge": {}}

    run_stage(out, {"seed": 1}, [], work)
    run_stage(out, {"seed": 1}, [], work)
    assert len(calls) == 1
    assert capsys.readouterr().out == "out: 3 pairs\nout: 3 pairs (finished before)\n"
