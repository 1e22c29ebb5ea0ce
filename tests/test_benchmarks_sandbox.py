"""Hostile code against the sandbox: the evaluator goes on, nothing is left running, nothing is written, no pass is forged."""
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
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


def ends(sandbox, parts, seconds=10.0, without=()):
    """Whether code runs to its end in the sandbox."""
    program = [*parts, "def reached():\n    return True"]
    return sandbox.run_code(program, ["assert candidate_function('reached')() is True"], seconds, without=without)


def passes(sandbox, code, test, seconds=10.0):
    """Whether a function f, which should double its argument, passes a test in the manner of HumanEval."""
    return sandbox.run_code([code], ["f = candidate_function('f')", test, "check(f)"], seconds)


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
    assert passes(sandbox, "def f(x):\n    return x + 2", test)
    assert not passes(sandbox, "def f(x):\n    return x + 3", test)
    assert not passes(sandbox, "def g(x):\n    return x + 2", test)
    for wrong in ("raise SystemExit(0)", "import os; os._exit(0)", "def f(:", "\ud800", "f(", "exit()", "while True: print(input())",
                  "import os; os.closerange(0, 100)", "import ctypes; ctypes.string_at(0)"):
        assert not ends(sandbox, [wrong], 5), wrong
    assert ends(sandbox, ["from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int",
                        "assert A(1).x == 1 and __name__ != '__main__'", "open('a', 'w').write('b'); assert open('a').read() == 'b'",
                        "import asyncio; asyncio.run(asyncio.sleep(0))"])
    assert all_over(sandbox)


TEST = "def check(f):\n    assert all(map(lambda x: f(x) == 2 * x, (2, 3, 7)))\n    assert not set(map(f, 'ab')) - {'aa', 'bb'}\n"
YES = "    def __eq__(self, other):\n        return True\n    def __ne__(self, other):\n        return False\n    __hash__ = None\n"
FORGED = {
    "an object that equals everything": f"class Yes:\n{YES}def f(x):\n    return Yes()",
    "a number that equals everything": f"class Yes(int):\n{YES}def f(x):\n    return Yes(1)",
    "a text that equals everything": f"class Yes(str):\n{YES}def f(x):\n    return Yes('a')",
    "a list that equals everything": f"class Yes(list):\n{YES}def f(x):\n    return Yes([1])",
    "a decimal that equals everything": f"from decimal import Decimal\nclass Yes(Decimal):\n{YES}    def __str__(self):\n        return '1'\n"
                                        "def f(x):\n    return Yes(1)",
    "an item that equals everything": f"class Yes:\n{YES}    def item(self):\n        return self\ndef f(x):\n    return Yes()",
    "exec replaced": "import builtins\nbuiltins.exec = lambda *_: None\ndef f(x):\n    return None",
    "compile replaced": "import builtins\nreal = compile\nbuiltins.compile = lambda *_, **__: real('', '', 'exec')\ndef f(x):\n    return None",
    "the parts cleared by frame": "import sys\nframe = sys._getframe()\nwhile frame:\n    for value in list(frame.f_locals.values()):\n"
                                  "        value = value.get('parts', value) if isinstance(value, dict) else value\n"
                                  "        if isinstance(value, list):\n            value.clear()\n    frame = frame.f_back\ndef f(x):\n    return None",
    "a verdict by frame": "import os, sys\nframe = sys._getframe()\nwords = ['passed']\nwhile frame:\n    for value in list(frame.f_locals.values()):\n"
                          "        if isinstance(value, dict) and 'token' in value:\n            words = [value['token']]\n    frame = frame.f_back\n"
                          "for fd in range(64):\n    try:\n        os.write(fd, ' '.join([*words, 'limits']).encode())\n    except OSError:\n        pass\n"
                          "def f(x):\n    return None",
    "a verdict by gc": "import gc, os\nfor job in gc.get_objects():\n    if isinstance(job, dict) and 'token' in job:\n"
                       "        for fd in range(64):\n            try:\n                os.write(fd, (job['token'] + ' limits').encode())\n"
                       "            except OSError:\n                pass\ndef f(x):\n    return None",
    "the encoder replaced": "import sys\nmain = sys.modules['__main__']\nmain.encode = lambda value: ['iterator', []]\ndef f(x):\n    return None",
    "another protocol": "import json\njson.dumps = lambda value: '[\"passed\", [\"limits\"]]'\ndef f(x):\n    return None",
    "the end of a loop": "def f(x):\n    raise StopIteration",
    "an exit": "def f(x):\n    raise SystemExit(0)",
    "an exit by name": "import json\njson.dumps = lambda value: '[\"raised\", \"SystemExit\"]'\ndef f(x):\n    return None",
    "an answer of its own type": "import json\njson.dumps = lambda value: '[\"returned\", {\"__eq__\": true}]'\ndef f(x):\n    return None"}


def test_an_honest_program_passes_the_test_that_the_forgeries_fail(sandbox):
    assert passes(sandbox, "def f(x):\n    return x + x", TEST)


@pytest.mark.parametrize("name", FORGED)
def test_a_pass_cannot_be_forged(sandbox, name):
    assert not passes(sandbox, FORGED[name], TEST), name
    assert all_over(sandbox)


def test_the_tests_are_not_in_the_memory_of_the_process_that_runs_the_candidate(sandbox):
    search = ("import gc\ndef f(reversed_mark):\n    mark = reversed_mark[::-1]\n    count = 0\n    for owner in gc.get_objects():\n"
              "        for o in gc.get_referents(owner):\n            count += isinstance(o, str) and mark in o and o is not mark\n    return count")
    ask = "SECRET = 'k7-never-sent'\nassert (candidate_function('f')(SECRET[::-1]) > 0) is {}"
    assert sandbox.run_code([search, "FOUND = 'here: k7-never-sent'"], [ask.format(True)], 60), "it finds what is there"
    assert sandbox.run_code([search], [ask.format(False)], 60)


PLAIN = [None, True, False, 0, -1, 10**60, 0.1, -0.0, float("inf"), 1e-300, "", "a\n\u2028'\"é\ud800", b"a\x00", bytearray(b"b"), [], [[1], (2,)], (1,), {},
         {(1, "a"): [{3}], None: frozenset({4})}, set(), {1.5, "x"}, 1 + 2j, Decimal("0.10"), Fraction(1, 3), ["returned", ["list", []]]]


def test_plain_values_come_back_as_they_were_and_nothing_else_does(sandbox):
    for value in PLAIN:
        back = sandbox.decode(sandbox.json.loads(sandbox.json.dumps(sandbox.encode(value))))
        assert back == value and type(back) is type(value)
        assert not isinstance(value, float) or repr(back) == repr(value), "-0.0"
    assert sandbox.run_code(["def same(x):\n    return x"], ["assert candidate_function('same')(10**6000) == 10**6000"])
    assert sandbox.run_code(["def same(*values, **named):\n    return values, named"],
                            [f"values = {PLAIN[:8]!r}\nassert candidate_function('same')(*values, a=1) == (tuple(values), {{'a': 1}})"])
    program = ("import collections\nPoint = collections.namedtuple('Point', 'x y')\nclass Scalar:\n    def item(self):\n        return 3\n"
               "def f(what):\n    return {'point': Point(1, 2), 'count': collections.Counter('aab'), 'keys': {'a': 1}.keys(), 'scalar': Scalar(),\n"
               "            'range': range(3), 'generator': (i for i in 'ab'), 'object': object(), 'function': f}[what]")
    good = ["assert f('point') == (1, 2) and f('count') == {'a': 2, 'b': 1} and f('keys') == {'a'} and f('scalar') == 3",
            "assert list(f('range')) == [0, 1, 2] and f('range') != [0, 1, 2] and sorted(f('generator')) == ['a', 'b']"]
    assert sandbox.run_code([program], ["f = candidate_function('f')", *good])
    for what in ("object", "function"):
        assert not sandbox.run_code([program], [f"candidate_function('f')({what!r})"])


def test_what_a_function_raises_reaches_the_tests_but_its_death_does_not(sandbox):
    tests = ["f = candidate_function('f')\nfor kind, x in ((ValueError, 1), (ZeroDivisionError, 2), (RuntimeError, 3)):\n    try:\n        f(x)\n"
             "    except kind:\n        continue\n    raise AssertionError\nassert f(4) == 4"]
    program = ("class Mine(Exception):\n    pass\ndef f(x):\n    if x == 1:\n        raise ValueError('no')\n    if x == 3:\n        raise Mine\n"
               "    return x if x != 2 else 1 / 0")
    assert sandbox.run_code([program], tests)
    tolerant = ["try:\n    candidate_function('f')(1)\nexcept BaseException:\n    pass"]
    assert sandbox.run_code([program], tolerant)
    for dies in ("import os\ndef f(x):\n    os._exit(0)", "def f(x):\n    raise SystemExit", "import os\ndef f(x):\n    os.closerange(0, 64)",
                 "raise SystemExit", "import os\nos.closerange(0, 64)\ndef f(x):\n    return x"):
        assert not sandbox.run_code([dies], tolerant), dies


def test_a_verdict_cannot_be_written_by_the_candidate(sandbox):
    assert not ends(sandbox, ["import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'0' * 32 + b' limits')\n"
                            "    except OSError:\n        pass\nos._exit(0)"])
    assert not ends(sandbox, ["import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'0' * 10**6)\n"
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
    code, comes_to_its_end = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        code = code.format(outside=outside, evaluator=os.getpid(), port=server.getsockname()[1])
        start = time.monotonic()
        passed = ends(sandbox, [code], 8 if comes_to_its_end else 1)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert time.monotonic() - start < 10 and (comes_to_its_end is None or passed is comes_to_its_end)
    assert all_over(sandbox), "something is left running"
    assert [p.name for p in outside.iterdir()] == ["kept.txt"] and (outside / "kept.txt").read_text() == "kept"
    assert (outside / "kept.txt").stat().st_mtime > 1e9 and outside.stat().st_mode & 0o777 != 0o777
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "its output was kept in memory (kB)"
    assert ends(sandbox, ["assert True"]), "the evaluator goes on"


@pytest.mark.parametrize("name", ["writes outside", "reads the environment", "opens a socket"])
def test_the_hostile_code_does_what_it_says_where_nothing_holds_it_back(sandbox, name, outside):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = HOSTILE[name][0].format(outside=outside, evaluator=os.getpid(), port=server.getsockname()[1])
        assert not ends(sandbox, [code], without=sandbox.LAYERS), "it stops where something worked"


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
            assert ends(sandbox, [code], without=others), code
    assert [p.name for p in outside.iterdir()] == ["kept.txt"] and (outside / "kept.txt").read_text() == "kept"
    assert all_over(sandbox)


@linux
def test_a_daemon_without_seccomp_ends_with_its_namespace_and_a_sleeper_without_any_layer_is_killed(sandbox):
    daemon = HOSTILE["daemon"][0]
    if "namespaces" in sandbox.active_layers():
        assert ends(sandbox, [daemon], without=("limits", "landlock", "seccomp"))
        assert all_over(sandbox)
    assert not ends(sandbox, ["import os, time\nos.setsid() if os.getpgrp() == os.getpid() else os.setpgid(0, 0)\ntime.sleep(60)"], 1,
                           without=sandbox.LAYERS)
    assert all_over(sandbox)
    assert ends(sandbox, ["import os, time\nif os.fork() == 0:\n    time.sleep(60)"], without=sandbox.LAYERS)
    assert all_over(sandbox), "a child in the code's own session"


def test_nothing_is_left_when_the_evaluator_itself_is_killed(sandbox, killed, tmp_path):
    def evaluator():
        sandbox.tempfile.tempdir = str(tmp_path)  # whose folder is left, empty
        sandbox.select.select = lambda *_: sandbox.os.read(0, 0)  # the verdict is being waited for
        ends(sandbox, ["import time; time.sleep(60)"], 60)
    killed(evaluator, sandbox.os, "read", 1)
    assert all_over(sandbox)


def test_the_folder_is_gone_whatever_is_in_it(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor _ in range(1010):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w').close()"
    assert ends(sandbox, [deep], without=("namespaces",)) and list(tmp_path.iterdir()) == []


def test_a_machine_that_runs_nothing_says_so(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "_layers_if_passed", lambda *_: None)
    with pytest.raises(InputError, match="cannot run even harmless code"):
        sandbox.active_layers()


SIGNALLED = {  # ways to have the kernel send SIGKILL to another process of the same user when a pipe becomes readable
    "owner": "fcntl.fcntl(reader, fcntl.F_SETOWN, {victim})",
    "owner, extended": "fcntl.fcntl(reader, 15, struct.pack('ii', 1, {victim}))",
    "owner by ioctl": "fcntl.ioctl(socket.socket(), 0x8901, struct.pack('i', {victim}))",
    "owner by the older ioctl": "fcntl.ioctl(socket.socket(), 0x8902, struct.pack('i', {victim}))",
    "signal": "fcntl.fcntl(reader, 10, signal.SIGKILL)",
    "asynchronous": "fcntl.ioctl(reader, 0x5452, struct.pack('i', 1))"}


@linux
def test_the_kernel_cannot_be_made_to_signal_the_evaluator(sandbox):
    if {"limits", "seccomp"} - set(sandbox.active_layers()):
        pytest.skip("this kernel lacks a layer")
    head = "import fcntl, os, signal, socket, struct\nreader, writer = os.pipe()\n"
    whole = head + "\n".join(f"try:\n    {SIGNALLED[step]}\nexcept OSError:\n    pass" for step in ("owner", "owner, extended", "signal"))
    whole += "\nfcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(writer, b'x')\nos.read(reader, 1)"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        try:
            assert ends(sandbox, [whole.format(victim=victim.pid)], without=("namespaces", "landlock")), "fcntl itself is allowed"
            with pytest.raises(subprocess.TimeoutExpired):
                victim.wait(0.3)
            for name, step in SIGNALLED.items():
                if "socket" not in step:  # of which there are none, by seccomp
                    code = f"{head}try:\n    {step}\nexcept PermissionError:\n    pass\nelse:\n    os._exit(1)".format(victim=victim.pid)
                    assert ends(sandbox, [code], without=("namespaces", "landlock")), name
            assert ends(sandbox, [whole.format(victim=victim.pid)], without=sandbox.LAYERS)
            assert victim.wait(5) == -signal.SIGKILL, "without the layer it does what it says"
        finally:
            victim.kill()


@linux
def test_memory_beside_the_limit_is_denied(sandbox):
    if "seccomp" not in sandbox.active_layers():
        pytest.skip("no seccomp on this machine")
    hidden = ("import os\ntry:\n    fd = os.memfd_create('x')\nexcept PermissionError:\n    pass\nelse:\n    os._exit(1)")
    callback = "import ctypes\nassert ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3)() == 3"
    assert ends(sandbox, [hidden, callback], without=("namespaces", "landlock"))
