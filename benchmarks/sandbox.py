"""Runs code that a model wrote: it may compute, read Python's own files, write to its folder.

`run_code` starts this file as a program, `python -I sandbox.py`, with a minimal environment, no
file descriptor but a pipe, and a session of its own. Before that process touches the code it gives
up as many rights as the machine allows, in four layers:

    limits      everywhere: CPU time, memory, size of a file, open files; no further processes or
                threads (root is exempt from that)
    namespaces  Linux, where a user may create them: own network, own processes, and a folder in
                64 MB of memory
    landlock    Linux 5.13 or newer: reads Python's own files only, writes into its folder only,
                signals nobody (6.12)
    seccomp     Linux on x86-64 and ARM64: no processes, programs, signals, sockets, changes of
                modes or owners

`active_layers` tells which of them hold. This is no virtual machine: a hole in the kernel is a way
out. Nor does it prevent cheating: code that searches its own interpreter for the token that makes a
verdict could pass untested.
"""
import ctypes
import json
import os
import platform
import resource
import secrets
import select
import signal
import struct
import subprocess
import sys
import tempfile
import types
from contextlib import suppress

LAYERS = ("namespaces", "limits", "landlock", "seccomp")
HARMLESS = "import collections, datetime, hashlib, heapq, math, random, re, typing"
GIGABYTE = 1 << 30


def run_code(parts, seconds=10.0, memory=GIGABYTE, without=()):
    """Whether `parts`, pieces of Python that run in order in one module, end without an exception.

    seconds: wall clock, after which all is killed;
    memory: bytes of address space; without: layers to leave out, for tests. Output is thrown away:
    the verdict is a secret that comes through the pipe once the last piece has ended.
    """
    return _run_child(parts, seconds, memory, without) is not None


def active_layers(without=()):
    """The layers that hold on this machine. Raises InputError where not even harmless code runs."""
    held = _run_child([HARMLESS], 60, GIGABYTE, without)
    if held is None:
        # Imported here: as a program, this file has nothing but Python's own library.
        from support.errors import InputError
        raise InputError(
            "The sandbox cannot run even harmless code on this machine; leave the sets of kind "
            "`code` out."
        )
    return held.split()


def _run_child(parts, seconds, memory, without):
    """The layers that held, as text, if all parts succeeded, else None."""
    job = {
        "token": secrets.token_hex(16),
        "parts": parts,
        "seconds": seconds,
        "memory": memory,
        "without": list(without),
    }
    folder = tempfile.mkdtemp(prefix="sandbox-")
    reader, writer = os.pipe()
    reply = b""
    try:
        try:
            child = _start_child(folder, writer)
        finally:
            os.close(writer)
        try:
            # The end of its input tells the child to kill the code, also if this process dies.
            with suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()
                readable, _, _ = select.select([reader], [], [], seconds)
                if readable:
                    # The verdict; or nothing: the code's process ended or closed the pipe.
                    reply = os.read(reader, 256)
            with suppress(subprocess.TimeoutExpired):
                child.wait(10)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    finally:
        os.close(reader)
        with suppress(subprocess.TimeoutExpired):
            # Not shutil.rmtree, which would fail on folders a thousand deep.
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, timeout=60)
    token, _, held = reply.decode("latin-1").partition(" ")
    return held if token == job["token"] else None


def _start_child(folder, writer):
    environment = {
        "HOME": folder,
        "TMPDIR": folder,
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", __file__, str(writer)],
        cwd=folder,
        env=environment,
        pass_fds=[writer],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


# --------------------------------------------------------------------------------- inside the child

def _child_main(writer):
    """The program: split off into namespaces, run the code in a child, kill that on request."""
    job = json.loads(sys.stdin.readline())
    held = _apply([_namespaces], job)
    child = os.fork()  # the first process of its namespace, with which all others in it end
    if child:
        os.close(writer)
        sys.stdin.read()  # until our input ends
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.killpg(0, signal.SIGKILL)
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        held += _apply([_limits, _landlock, _seccomp], job)
        # Not named __main__: code under `if __name__ == "__main__"` is a demonstration, not tested.
        module = types.ModuleType("generated")
        sys.modules["generated"] = module
        for part in job["parts"]:
            exec(compile(part, "<generated>", "exec"), module.__dict__)
        os.write(writer, f"{job['token']} {' '.join(held)}".encode())
    finally:
        os._exit(0)


def _apply(layers, job):
    """Apply layers; returns the names of those that hold, since a machine may lack some."""
    held = []
    for layer in layers:
        name = layer.__name__.removeprefix("_")
        if name in job["without"]:
            continue
        with suppress(OSError, AttributeError, ValueError, KeyError):
            layer(job)
            held.append(name)
    return held


def _libc(name, *arguments):
    """Call a function of the C library. Raises OSError if it fails, AttributeError without it."""
    if sys.platform != "linux":
        raise AttributeError(name)
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    converted = []
    for argument in arguments:
        if isinstance(argument, int):
            argument = ctypes.c_long(argument)
        converted.append(argument)
    result = function(*converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


# ------------------------------------------------------------------------------------------- limits

def _limits(job):
    limits = {
        "CPU": int(job["seconds"]) + 1,
        "FSIZE": 16 << 20,
        "NOFILE": 64,
        "CORE": 0,
        "NPROC": 0,
        "AS": job["memory"],
    }
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


# --------------------------------------------------------------------------------------- namespaces

CLONE_NEWNS = 0x20000  # mounts
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID = 2
MS_NODEV = 4


def _namespaces(job):
    user = os.getuid()
    group = os.getgid()
    folder = os.getcwd().encode()
    _libc("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{user} {user} 1")
    _write("/proc/self/gid_map", f"{group} {group} 1")
    options = b"size=64m,nr_inodes=10000,mode=700"
    _libc("mount", b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(folder)


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


# ----------------------------------------------------------------------------------------- landlock

LANDLOCK_CREATE_RULESET = 444  # numbers of system calls, the same on all machines
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_VERSION = 1  # a flag: create nothing, tell the version
LANDLOCK_PATH_BENEATH = 1
READ_FILE = 4
READ_FOLDER = 8


def _landlock(job):
    version = _libc("syscall", LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    files = _file_rights(version)
    network = 3 if version >= 4 else 0  # to bind and connect TCP
    scope = 3 if version >= 6 else 0  # signals, abstract sockets
    rules = struct.pack("QQQ", files, network, scope)
    ruleset = _libc("syscall", LANDLOCK_CREATE_RULESET, rules, len(rules), 0)

    _allow(ruleset, os.getcwd(), files)
    for path in {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"}:
        if os.path.isdir(path):
            _allow(ruleset, path, READ_FILE | READ_FOLDER)
    _no_new_privileges()
    _libc("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _file_rights(version):
    """All rights on files that this version of Landlock knows, as bits."""
    if version < 2:
        count = 13
    elif version < 3:
        count = 14
    elif version < 5:
        count = 15
    else:
        count = 16
    return (1 << count) - 1


def _allow(ruleset, path, rights):
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    rule = struct.pack("=Qi", rights, fd)
    _libc("syscall", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_PATH_BENEATH, rule, 0)
    os.close(fd)


# ------------------------------------------------------------------------------------------ seccomp

# By machine: the column of its numbers in DENIED, and its name in the kernel (AUDIT_ARCH).
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# System calls that seccomp denies, with their numbers on x86-64 and ARM64.
DENIED = """
clone 56 220 fork 57 - vfork 58 - clone3 435 435 execve 59 221 execveat 322 281 setsid 112 157
setpgid 109 154 kill 62 129 tkill 200 130 tgkill 234 131 rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240 pidfd_send_signal 424 424 pidfd_open 434 434 ptrace 101 117
process_vm_readv 310 270 process_vm_writev 311 271 prlimit64 302 261 setpriority 141 140
prctl 157 167 socket 41 198 io_uring_setup 425 425 bpf 321 280 perf_event_open 298 241
userfaultfd 323 282 chmod 90 - fchmod 91 52 fchmodat 268 53 fchmodat2 452 452 chown 92 -
fchown 93 55 lchown 94 - fchownat 260 54 utime 132 - utimes 235 - futimesat 261 -
utimensat 280 88 setxattr 188 5 lsetxattr 189 6 fsetxattr 190 7 setxattrat 463 463
removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16 removexattrat 466 466 unshare 272 97
setns 308 268 mount 165 40 chroot 161 51 shmget 29 194 msgget 68 186 semget 64 190
mq_open 240 180 add_key 248 217 request_key 249 218 keyctl 250 219
"""
# An instruction of the kernel's filter programs: (what, lines to skip if true, if false, value).
LOAD = 0x20  # the word at offset k of the call: 0 is its number, 4 the machine's
JUMP_IF_EQUAL = 0x15
JUMP_IF_AT_LEAST = 0x35
RETURN = 0x06
KILL = 0x80000000
DENY = 0x50001  # the call fails with EPERM
ALLOW = 0x7FFF0000
X32_CALLS = 0x40000000  # from here on, calls of another numbering
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2


def _seccomp(job):
    column, architecture = ARCHITECTURES[platform.machine()]
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (JUMP_IF_AT_LEAST, 0, 1, X32_CALLS),
        (RETURN, 0, 0, DENY),
    ]
    for number in _denied_calls(column):
        program.append((JUMP_IF_EQUAL, 0, 1, number))
        program.append((RETURN, 0, 0, DENY))
    program.append((RETURN, 0, 0, ALLOW))
    packed = [struct.pack("HBBI", *instruction) for instruction in program]
    code = ctypes.create_string_buffer(b"".join(packed))
    _no_new_privileges()
    filter_program = struct.pack("HP", len(program), ctypes.addressof(code))
    _libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_program)


def _denied_calls(column):
    """Numbers of the denied calls on the machine with this column."""
    words = DENIED.split()
    numbers = words[1 + column::3]
    return [int(number) for number in numbers if number != "-"]


# --------------------------------------------------------------------------------------- privileges

PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION_3 = 0x20080522


def _no_new_privileges():
    _libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    _libc("capset", header, bytes(24))  # no capabilities: root is no longer almighty


if __name__ == "__main__":
    _child_main(int(sys.argv[1]))
