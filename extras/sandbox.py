"""Code that a model wrote runs here: in a process that may compute, read Python's own files and write to an empty folder.

`run` starts this file as a program, `python -I sandbox.py`, with no environment, no file descriptor but a pipe, and a
session of its own. Before that process touches the code it gives up what the machine lets it give up, in four layers:

    limits      everywhere: CPU time, memory, size of a file, open files; no further processes or threads (but root's)
    namespaces  Linux, where a user may have them: own network, own processes, and the folder as 64 MB of memory
    landlock    Linux 5.13 or newer: reads Python's own files only, writes into its folder only, signals nobody (6.12)
    seccomp     Linux on x86-64 and ARM64: no processes, programs, signals, sockets, changes of modes or owners

`layers` tells which of them hold. This is no virtual machine: a hole in the kernel is a way out. And code that searches
its own interpreter for the token that makes a verdict could pass untested; that is cheating, which nothing here prevents.
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
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# System calls that seccomp denies, with their numbers on x86-64 and ARM64.
DENIED = """clone 56 220 fork 57 - vfork 58 - clone3 435 435 execve 59 221 execveat 322 281 setsid 112 157 setpgid 109 154
kill 62 129 tkill 200 130 tgkill 234 131 rt_sigqueueinfo 129 138 rt_tgsigqueueinfo 297 240 pidfd_send_signal 424 424
pidfd_open 434 434 ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 prlimit64 302 261 setpriority 141 140
prctl 157 167 socket 41 198 io_uring_setup 425 425 bpf 321 280 perf_event_open 298 241 userfaultfd 323 282
chmod 90 - fchmod 91 52 fchmodat 268 53 fchmodat2 452 452 chown 92 - fchown 93 55 lchown 94 - fchownat 260 54 utime 132 -
utimes 235 - futimesat 261 - utimensat 280 88 setxattr 188 5 lsetxattr 189 6 fsetxattr 190 7 setxattrat 463 463
removexattr 197 14 lremovexattr 198 15 fremovexattr 199 16 removexattrat 466 466 unshare 272 97 setns 308 268 mount 165 40
chroot 161 51 shmget 29 194 msgget 68 186 semget 64 190 mq_open 240 180 add_key 248 217 request_key 249 218 keyctl 250 219"""


def run(parts, seconds=10.0, memory=1 << 30, without=()):
    """Whether `parts`, pieces of Python that run one after the other in one module, all end without an exception.

    seconds: wall clock, after which all is killed; memory: bytes of address space; without: layers to leave out, for tests.
    Output is thrown away: the verdict is a secret that comes through the pipe once the last piece has ended.
    """
    return _run(parts, seconds, memory, without) is not None


def layers(without=()):
    """The layers that hold on this machine. Raises SystemExit where not even harmless code runs."""
    held = _run(["import collections, datetime, hashlib, heapq, math, random, re, typing"], 60, 1 << 30, without)
    if held is None:
        raise SystemExit("The sandbox cannot run even harmless code on this machine; leave the sets of kind `code` out.")
    return held.split()


def _run(parts, seconds, memory, without):
    job = {"token": secrets.token_hex(16), "parts": parts, "seconds": seconds, "memory": memory, "without": list(without)}
    folder, (reader, writer), said = tempfile.mkdtemp(prefix="sandbox-"), os.pipe(), b""
    try:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", __file__, str(writer)], cwd=folder, pass_fds=[writer],
                env={"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"}, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finally:
            os.close(writer)
        try:
            with suppress(BrokenPipeError), child.stdin:  # its end tells the child to kill the code, also if we die here
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()
                # Readable: the verdict, or that the code's process has ended or closed the pipe.
                said = os.read(reader, 256) if select.select([reader], [], [], seconds)[0] else b""
            with suppress(subprocess.TimeoutExpired):
                child.wait(10)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    finally:
        os.close(reader)
        with suppress(subprocess.TimeoutExpired):  # rmtree would fail on folders a thousand deep
            subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, timeout=60)
    token, _, held = said.decode("latin-1").partition(" ")
    return held if token == job["token"] else None


# ------------------------------------------------------------------------------------------------- inside the child

def _main(writer):
    """The program: split off into namespaces, run the code in a child, and kill that when our input ends."""
    job = json.loads(sys.stdin.readline())
    held = [layer.__name__[1:] for layer in (_namespaces,) if _holds(layer, job)]
    child = os.fork()  # the first process of its namespace, with which all others in it end
    if child:
        os.close(writer)
        sys.stdin.read()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.killpg(0, signal.SIGKILL)
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        held += [layer.__name__[1:] for layer in (_limits, _landlock, _seccomp) if _holds(layer, job)]
        module = sys.modules["generated"] = types.ModuleType("generated")  # not __main__, whose examples would run too
        for part in job["parts"]:
            exec(compile(part, "<generated>", "exec"), module.__dict__)
        os.write(writer, f"{job['token']} {' '.join(held)}".encode())
    finally:
        os._exit(0)


def _holds(layer, job):
    """Put one layer on; False where this machine has no such thing."""
    try:
        return layer.__name__[1:] not in job["without"] and layer(job) is None
    except (OSError, AttributeError, ValueError, KeyError):
        return False


def _libc(name, *arguments):
    """Call a function of the C library (AttributeError where there is none); raises OSError if it fails."""
    if sys.platform != "linux":
        raise AttributeError(name)
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = function(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def _limits(job):
    limits = {"CPU": int(job["seconds"]) + 1, "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0, "NPROC": 0, "AS": job["memory"]}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def _namespaces(job):
    user, group, folder = os.getuid(), os.getgid(), os.getcwd().encode()
    _libc("unshare", 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x08000000)  # user, mounts, processes, network, IPC
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open("/proc/self/" + name, "w") as f:
            f.write(text)
    _libc("mount", b"tmpfs", folder, b"tmpfs", 2 | 4, b"size=64m,nr_inodes=10000,mode=700")  # no devices, no setuid
    os.chdir(folder)


def _landlock(job):
    abi = _libc("syscall", 444, None, 0, 1)
    everything = (1 << 13 if abi < 2 else 1 << 14 if abi < 3 else 1 << 15 if abi < 5 else 1 << 16) - 1  # of the file system
    rules = struct.pack("QQQ", everything, 3 * (abi >= 4), 3 * (abi >= 6))  # and TCP; and signals, abstract sockets
    ruleset = _libc("syscall", 444, rules, len(rules), 0)
    readable = [(path, 4 | 8) for path in {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"} if os.path.isdir(path)]
    for path, access in [(os.getcwd(), everything), *readable]:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
        _libc("syscall", 445, ruleset, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    _no_new_privileges()
    _libc("syscall", 446, ruleset, 0)
    os.close(ruleset)


def _seccomp(job):
    column, number = ARCHITECTURES[platform.machine()]
    words = DENIED.split()
    denied = [int(words[i + 1 + column]) for i in range(0, len(words), 3) if words[i + 1 + column] != "-"]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, number), (0x06, 0, 0, 0x80000000),           # another machine's calls: kill
               (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x50001)]          # x32 calls: EPERM
    for call in denied:
        program += [(0x15, 0, 1, call), (0x06, 0, 0, 0x50001)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in [*program, (0x06, 0, 0, 0x7FFF0000)]))
    _no_new_privileges()
    _libc("prctl", 22, 2, struct.pack("HP", len(program) + 1, ctypes.addressof(code)))


def _no_new_privileges():
    _libc("prctl", 38, 1, 0, 0, 0)
    _libc("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # root is no longer almighty


if __name__ == "__main__":
    _main(int(sys.argv[1]))
