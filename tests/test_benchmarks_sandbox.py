"""Hostile code against the sandbox: the evaluator goes on, nothing is left running, nothing is written."""
import os
import resource
import shutil
import socket
import sys
import time
from importlib import util
from pathlib import Path

import pytest

from benchmarks import sandbox as original
from support.errors import InputError

linux = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """The module under a path of its own, by which its processes are told from those of other runs."""
    path = tmp_path_factory.mktemp("box") / "sandbox.py"
    shutil.copy(original.__file__, path)
    spec = util.spec_from_file_location("sandbox_under_test", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def running(sandbox):
    """Processes of this sandbox that are still there."""
    found = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [p.parent.name] if sandbox.__file__.encode() in p.read_bytes() else []
        except OSError:
            pass
    return found


@pytest.fixture
def outside(tmp_path):
    """A folder that generated code must not change."""
    (tmp_path / "kept.txt").write_text("kept")
    return tmp_path


def all_over(sandbox, seconds=2):
    end = time.monotonic() + seconds
    while running(sandbox) and time.monotonic() < end:
        time.sleep(0.01)
    return not running(sandbox)


def test_code_that_is_right_passes_and_code_that_is_wrong_does_not(sandbox):
    test = "def check(f):\n    assert f(2) == 4\n"
    assert sandbox.run_code(["def f(x):\n    return x + 2", test, "check(f)"])
    assert not sandbox.run_code(["def f(x):\n    return x + 3", test, "check(f)"])
    for wrong in ("raise SystemExit(0)", "import os; os._exit(0)", "def f(:", "\ud800", "f(", "exit()", "while True: print(input())",
                  "import os; os.closerange(0, 100)", "import ctypes; ctypes.string_at(0)"):
        assert not sandbox.run_code([wrong, test], 5), wrong
    assert sandbox.run_code(["from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int",
                        "assert A(1).x == 1 and __name__ != '__main__'", "open('a', 'w').write('b'); assert open('a').read() == 'b'",
                        "import asyncio; asyncio.run(asyncio.sleep(0))"])
    assert all_over(sandbox)


def test_a_verdict_cannot_be_written_without_the_token(sandbox):
    assert not sandbox.run_code(["import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'0' * 32 + b' limits')\n"
                            "    except OSError:\n        pass\nos._exit(0)"])
    assert not sandbox.run_code(["import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'0' * 10**6)\n"
                            "    except OSError:\n        pass"], 2), "the pipe is full, and nobody reads more of it"
    assert all_over(sandbox)


HOSTILE = {  # code, and whether it gets to its end: what it tries is denied, or it is killed
    "fork bomb": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", False),
    "10 GB": ("x = bytearray(10 * 1024 ** 3)", False),
    "infinite loop": ("while True: pass", False),
    "kills its parent": ("import os, signal\nfor pid in (os.getppid(), {evaluator}):\n    try:\n"
                         "        os.kill(pid, signal.SIGKILL)\n    except OSError:\n        pass", True),
    "writes outside": ("import os, shutil\nfor act in (lambda: open('{outside}/new.txt', 'w'), lambda: open('{outside}/kept.txt', 'a').write('x'),\n"
                       "            lambda: os.remove('{outside}/kept.txt'), lambda: os.mkdir('{outside}/d'), lambda: os.chmod('{outside}', 0o777),\n"
                       "            lambda: os.utime('{outside}/kept.txt', (0, 0)), lambda: os.rename('{outside}', '{outside}2'),\n"
                       "            lambda: os.link('{outside}/kept.txt', 'l'), lambda: os.truncate('{outside}/kept.txt', 0),\n"
                       "            lambda: shutil.rmtree('{outside}')):\n    try:\n        act()\n    except OSError:\n        continue\n"
                       "    raise SystemExit('it worked')", True),
    "reads the environment": ("import glob, os\nassert not {{k for k in os.environ}} - {{'HOME', 'TMPDIR', 'OPENBLAS_NUM_THREADS', 'LC_CTYPE'}}\n"
                              "for path in [*glob.glob('/proc/*/environ'), '/proc/self/environ', '/proc/{evaluator}/environ', '{outside}/kept.txt',\n"
                              "             '/etc/passwd']:\n"
                              "    try:\n        text = open(path).read()\n    except OSError:\n        continue\n    raise SystemExit(path)", True),
    "opens a socket": ("import socket\nfor family, kind in ((2, 1), (2, 2), (10, 1), (1, 1), (16, 3), (17, 3)):\n    try:\n"
                       "        s = socket.socket(family, kind)\n        s.connect(('127.0.0.1', {port}))\n    except OSError:\n        continue\n"
                       "    raise SystemExit('it worked')", True),
    "closes stdout": ("import os, sys\nsys.stdout.close()\nfor fd in (0, 1, 2):\n    os.close(fd)", True),
    "prints 1 GB": ("for _ in range(1024):\n    print('x' * 2**20)", None),
    "daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\nos.wait()", False)}


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_is_contained(sandbox, name, outside):
    if {"limits", "landlock", "seccomp"} - set(sandbox.active_layers()):
        pytest.skip("this kernel lacks a layer, and hostile code is not run without")
    code, ends = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        code = code.format(outside=outside, evaluator=os.getpid(), port=server.getsockname()[1])
        start = time.monotonic()
        passed = sandbox.run_code([code], 8 if ends else 1)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert time.monotonic() - start < 10 and (ends is None or passed is ends)
    assert all_over(sandbox), "something is left running"
    assert [p.name for p in outside.iterdir()] == ["kept.txt"] and (outside / "kept.txt").read_text() == "kept"
    assert (outside / "kept.txt").stat().st_mtime > 1e9 and outside.stat().st_mode & 0o777 != 0o777
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "its output was kept in memory (kB)"
    assert sandbox.run_code(["assert True"]), "the evaluator goes on"


@pytest.mark.parametrize("name", ["writes outside", "reads the environment", "opens a socket"])
def test_the_hostile_code_does_what_it_says_where_nothing_holds_it_back(sandbox, name, outside):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = HOSTILE[name][0].format(outside=outside, evaluator=os.getpid(), port=server.getsockname()[1])
        assert not sandbox.run_code([code], without=sandbox.LAYERS), "it stops where something worked"


ALONE = {  # what each layer holds back with the others off; bounded, because it may not
    "namespaces": ["import os\nassert os.getpid() == 1 and os.getppid() == 0",
                   "import socket\ns = socket.socket()\ntry:\n    s.connect(('127.0.0.1', {port}))\n    raise SystemExit('it worked')\n"
                   "except OSError:\n    pass",
                   "for i in range(100):\n    try:\n        open(str(i), 'wb').write(bytes(2**20))\n    except OSError:\n        break\n"
                   "else:\n    raise SystemExit('no end of the disk')"],
    "limits": ["try:\n    x = bytearray(2 * 1024**3)\n    raise SystemExit('it worked')\nexcept MemoryError:\n    pass",
               "try:\n    open('big', 'wb').write(bytes(32 * 2**20))\n    raise SystemExit('it worked')\nexcept OSError:\n    pass"],
    "landlock": HOSTILE["writes outside"][0].replace("lambda: os.chmod('{outside}', 0o777),\n", "\n").replace(
        "lambda: os.utime('{outside}/kept.txt', (0, 0)),", "").split("\0") + [
            HOSTILE["reads the environment"][0], "import ctypes\nassert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1  # no new privileges"],
    "seccomp": [HOSTILE["opens a socket"][0], HOSTILE["kills its parent"][0].replace("(os.getppid(), {evaluator})", "(os.getppid(),)"),
                "assert 'CapEff:\t0000000000000000\\n' in open('/proc/self/status').read()  # also root's",
                "import os\ntry:\n    os.fork()\nexcept PermissionError:\n    pass\nelse:\n    os._exit(0)"]}


@linux
@pytest.mark.parametrize("layer", ALONE)
def test_each_layer_holds_without_the_others(sandbox, layer, outside):
    others = set(sandbox.LAYERS) - {layer}
    if layer not in sandbox.active_layers():
        pytest.skip(f"no {layer} on this machine")
    assert sandbox.active_layers(others) == [layer]
    with socket.create_server(("127.0.0.1", 0)) as server:
        for code in ALONE[layer]:
            code = code.format(outside=outside, evaluator=os.getpid(), port=server.getsockname()[1])
            assert sandbox.run_code([code], without=others), code
    assert [p.name for p in outside.iterdir()] == ["kept.txt"] and (outside / "kept.txt").read_text() == "kept"
    assert all_over(sandbox)


@linux
def test_a_daemon_without_seccomp_ends_with_its_namespace_and_a_sleeper_without_any_layer_is_killed(sandbox):
    daemon = HOSTILE["daemon"][0]
    if "namespaces" in sandbox.active_layers():
        assert sandbox.run_code([daemon], without=("limits", "landlock", "seccomp"))
        assert all_over(sandbox)
    assert not sandbox.run_code(["import os, time\nos.setsid() if os.getpgrp() == os.getpid() else os.setpgid(0, 0)\ntime.sleep(60)"], 1,
                           without=sandbox.LAYERS)
    assert all_over(sandbox)
    assert sandbox.run_code(["import os, time\nif os.fork() == 0:\n    time.sleep(60)"], without=sandbox.LAYERS)
    assert all_over(sandbox), "a child in the code's own session"


def test_nothing_is_left_when_the_evaluator_itself_is_killed(sandbox, killed, tmp_path):
    def evaluator():
        sandbox.tempfile.tempdir = str(tmp_path)  # whose folder is left, empty
        sandbox.select.select = lambda *_: sandbox.os.read(0, 0)  # the verdict is being waited for
        sandbox.run_code(["import time; time.sleep(60)"], 60)
    killed(evaluator, sandbox.os, "read", 1)
    assert all_over(sandbox)


def test_the_folder_is_gone_whatever_is_in_it(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(1010):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w').close()"
    assert sandbox.run_code([deep], without=("namespaces",)) and list(tmp_path.iterdir()) == []


def test_a_machine_that_runs_nothing_says_so(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "_run_child", lambda *_: None)
    with pytest.raises(InputError, match="cannot run even harmless code"):
        sandbox.active_layers()
