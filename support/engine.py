"""Servers that hold a model for the stages of a run: start one, wait until it answers, stop it.

Which server is not decided here: any command will do whose server answers `/v1/completions`.
"""
import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.errors import InputError, ServiceError
from support.files import read_json, write_json
from support.gpus import visible_gpus

HOST = "127.0.0.1"  # nobody else can reach a model that follows harmful requests
NAMES = ("engine", "judge")
WATCHER = Path(__file__).with_name("watcher.py")

# What ENGINE=vllm and ENGINE=sglang stand for. No environment variable that begins with VLLM_ is
# set anywhere: VLLM_PORT, for one, would overrule --port.
SGLANG = f"{shlex.quote(sys.executable)} -m sglang.launch_server --model-path {{model}}"
TEMPLATES = {
    "vllm": f"vllm serve {{model}} --host {HOST} --port {{port}}",
    "sglang": f"{SGLANG} --host {HOST} --port {{port}}",
}
# Added for a judge, which is one server on all its GPUs, and where two servers share a GPU.
OVER_GPUS = {"vllm": " --tensor-parallel-size {gpus}", "sglang": " --tp-size {gpus}"}
PART_OF_A_GPU = {
    "vllm": " --gpu-memory-utilization {memory}",
    "sglang": " --mem-fraction-static {memory}",
}

# Keys of other servers, which this one has no use for and might write to its log.
KEYS = ("JUDGE_API_KEY", "CUE_JUDGE_API_KEY", "EVAL_JUDGE_API_KEY", "OPENAI_API_KEY")

# Seconds.
WAIT = 1800  # for a server to start: it may have to download its model
REFUSAL = 60  # for one that runs, but rejects the simplest request
ANSWER = 30  # for one token
POLL = 0.2
LINE = 30  # between two lines that say it is still starting
STOP = 90  # a little more than the watcher takes
MEMORY = 60  # for a GPU's memory to be free again after a server has ended
TAIL = 15  # lines of a log to show


# ---------------------------------------------------------------------------------- its command

def command_template(spec, judge=False, shared=False):
    """The command of `vllm`, `sglang`, or of a user's own words, with its {placeholders}.

    Raises InputError for words that name no model and port.

    >>> command_template("vllm")
    'vllm serve {model} --host 127.0.0.1 --port {port}'
    >>> command_template("serve-it {model}")
    Traceback (most recent call last):
    support.errors.InputError: 'serve-it {model}': write vllm, sglang, or a command with {model} \
and {port} in it.
    """
    if spec in TEMPLATES:
        template = TEMPLATES[spec]
        if judge:
            template += OVER_GPUS[spec]
        if shared:
            template += PART_OF_A_GPU[spec]
        return template
    if "{model}" not in spec or "{port}" not in spec:
        raise InputError(
            f"{spec!r}: write vllm, sglang, or a command with {{model}} and {{port}} in it."
        )
    return spec


def fill_command(template, **values):
    """The words of a command, its placeholders filled in; other braces stay as they are.

    >>> fill_command("serve '{model}' --port {port} --set '{\\"a\\": 1}'", model="my model", port=1)
    ['serve', 'my model', '--port', '1', '--set', '{"a": 1}']
    """
    words = shlex.split(template)
    for name, value in values.items():
        words = [word.replace("{" + name + "}", str(value)) for word in words]
    return words


def find_program(name):
    """The path of a program on PATH or beside this Python; raises InputError where there is none.
    """
    beside = os.path.dirname(sys.executable)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if not found:
        raise InputError(
            f"{name}: no such program. Install it, or give the path of one that is installed "
            "in an environment of its own."
        )
    return found


def split_gpus(gpus, for_judge):
    """(GPUs of the engine, GPUs of the judge, whether they share them).

    for_judge: how many the judge gets, the last ones; 0 where no judge is served.

    >>> split_gpus([0, 1, 2, 3], 1)
    ([0, 1, 2], [3], False)
    >>> split_gpus([0], 1), split_gpus([0], 0), split_gpus([], 1)
    (([0], [0], True), ([0], [], False), ([], [], False))
    """
    if for_judge == 0:
        return gpus, [], False
    if len(gpus) <= for_judge:
        return gpus, gpus, bool(gpus)
    return gpus[:-for_judge], gpus[-for_judge:], False


# ------------------------------------------------------------------------------------ the servers

class Engine:
    """The server that holds one model at a time, or several such servers, one on each GPU.

    name: `engine` or `judge`; run: the run's folder, for logs; gpus: list of Gpu, may be empty;
    port: the first one; memory: of a GPU, for {memory}. A template with {gpus} is started once for
    all GPUs, another once on each, at successive ports; `single` starts one in any case.
    """

    def __init__(self, name, template, run, gpus, port, memory, single=False, wait=WAIT):
        self.name = name
        self.template = template
        self.run = Path(run)
        self.gpus = gpus
        self.memory = memory
        self.wait = wait
        self.model = None  # that it holds now
        self.processes = []  # a watcher for each server
        self.free = {}  # bytes that each GPU had before they were started
        count = 1 if single or "{gpus}" in template else max(1, len(gpus))
        self.ports = [port + i for i in range(count)]
        self.state = _state_file(run, name)

    def urls(self):
        """The servers' addresses, separated by commas."""
        return ",".join(f"http://{HOST}:{port}/v1" for port in self.ports)

    def hold(self, model):
        """Have the servers hold a model: they are started, or are left as they are.

        Raises ServiceError if they do not start, InputError if the program or a port is missing.
        """
        if self.model == model and not self.died():
            return
        self.stop()
        started = time.monotonic()
        self._start(model)
        try:
            self._wait_until_ready(model, started)
        except ServiceError:
            self.stop()
            raise
        self.model = model
        ports = f"{HOST}:{self.ports[0]}"
        if len(self.ports) > 1:
            ports += f" to {self.ports[-1]}"
        seconds = time.monotonic() - started
        print(f"{self.name}: {model} on {ports}, ready in {seconds:.0f} s", flush=True)

    def stop(self):
        """Stop the servers and wait until they have ended and their GPUs' memory is free."""
        if not self.processes:
            return
        self.model = None
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes = []
        _wait_for_memory(self.free)
        self.state.unlink(missing_ok=True)

    def died(self):
        """What there is to say if a server has ended by itself, else an empty text."""
        for port, process in zip(self.ports, self.processes):
            status = process.poll()
            if status is not None:
                return (
                    f"{self.name}: the server at port {port} ended with status {status}. "
                    f"Its last lines:\n{self._log_tail(port)}"
                )
        return ""

    def _start(self, model):
        self.free = {str(gpu.index): gpu.free for gpu in self._gpus_now()}
        for port in self.ports:
            _check_port(port)
        left = []
        for number, port in enumerate(self.ports):
            gpus = self.gpus
            if len(self.ports) > 1:
                gpus = [self.gpus[number]]
            process = self._start_server(model, port, gpus)
            self.processes.append(process)
            left.append([process.pid, start_time(process.pid)])
            # At once: this process may be killed before the next one is started.
            state = {"host": socket.gethostname(), "processes": left, "free": self.free}
            write_json(self.state, state)

    def _start_server(self, model, port, gpus):
        words = fill_command(
            self.template, model=model, port=port, gpus=max(1, len(gpus)), memory=self.memory
        )
        words[0] = find_program(words[0])
        environment = {name: os.environ[name] for name in os.environ if name not in KEYS}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in gpus)
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts
        path = self._log(port)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {model}\n")
            log.flush()
            return subprocess.Popen(
                [sys.executable, "-I", WATCHER, str(os.getpid()), *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the stages
            )

    def _wait_until_ready(self, model, started):
        said = started
        refused_since = None
        waiting = list(self.ports)
        while waiting:
            port = waiting[0]
            status, problem = ask_for_a_token(port, model)
            if status == 200:
                waiting.remove(port)
                continue
            dead = self.died()
            if dead:
                raise ServiceError(dead)
            now = time.monotonic()
            # Others may pass: a server that is still loading says 503.
            if not 400 <= status < 500:
                refused_since = None
            elif refused_since is None:
                refused_since = now
            refuses = refused_since is not None and now - refused_since > REFUSAL
            if refuses or now - started > self.wait:
                raise ServiceError(
                    f"{self.name}: the server at port {port} runs, but after {now - started:.0f} s "
                    f"it does not answer a request for one token of {model}: {problem}. "
                    f"Its last lines:\n{self._log_tail(port)}"
                )
            if now - said >= LINE:
                said = now
                print(
                    f"{self.name}: {model} is starting, {now - started:.0f} s so far "
                    f"(its output: {self._log(port)})",
                    flush=True,
                )
            time.sleep(POLL)

    def _gpus_now(self):
        ours = {gpu.index for gpu in self.gpus}
        return [gpu for gpu in visible_gpus() if gpu.index in ours]

    def _log(self, port):
        return self.run / "logs" / f"{self.name}-{port}.log"

    def _log_tail(self, port):
        lines = self._log(port).read_text(errors="replace").splitlines()
        shown = [f"  {line}" for line in lines[-TAIL:]]
        return "\n".join([*shown, f"All of them: {self._log(port)}"])


def ask_for_a_token(port, model):
    """Ask a server for one token: (status of its reply, what it said); status 0: no reply.

    Its word that it is healthy is not asked for: it gives that while it hangs, too.
    """
    payload = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("SERVER_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key.strip()}"
    # Not through `requests`, which would ask a proxy for it.
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER)
    try:
        connection.request("POST", "/v1/completions", json.dumps(payload), headers)
        reply = connection.getresponse()
        said = reply.read(10_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, f"no reply ({type(error).__name__})"
    finally:
        connection.close()
    if reply.status != 200:
        return reply.status, f"status {reply.status}, {said[:300]!r}"
    if '"choices"' not in said:
        return 0, f"no completion, {said[:300]!r}"
    return 200, said


def reach_directly():
    """See to it that no proxy of the environment is asked for what is on this machine."""
    for name in ("no_proxy", "NO_PROXY"):
        given = os.environ.get(name, "")
        if HOST not in given.split(","):
            os.environ[name] = f"{given},{HOST}".lstrip(",")


def _check_port(port):
    """Raise InputError if another program listens at a port."""
    with socket.socket() as probe:
        # A port is free although connections of the server before are still being closed.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"port {port} cannot be used ({error.strerror}): another program has it. Stop "
                "that, or give the first of other ports that are free (run.sh: PORT=...)."
            ) from None


# --------------------------------------------------------------------------- what a kill has left

def _state_file(run, name):
    """Where a run says which processes it has started, for the next one if it is killed."""
    return Path(run) / f".{name}.json"


def stop_left_over(run):
    """Stop the servers of a run in this folder that was killed, if they still run."""
    for name in NAMES:
        path = _state_file(run, name)
        if not path.exists():
            continue
        left = read_json(path)
        if left["host"] == socket.gethostname():
            for pid, started in left["processes"]:
                _stop_process(pid, started)
            _wait_for_memory(left["free"])
        path.unlink()


def start_time(pid):
    """When a process was started, as a text; empty if it has ended.

    Together with its number it names a process for good: numbers are used again.
    """
    if not os.path.isdir("/proc/self"):  # macOS
        shown = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True
        )
        return shown.stdout.strip()
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    state, started = fields[0], fields[19]
    return "" if state == "Z" else started


def _stop_process(pid, started):
    """Have a watcher stop its server, and wait until both have ended."""
    deadline = time.monotonic() + STOP
    while started and start_time(pid) == started:
        if time.monotonic() > deadline:
            raise ServiceError(
                f"process {pid}, left by an earlier run in this folder, does not end. "
                f"Stop it (kill {pid}), then run the same command again."
            )
        try:
            os.kill(pid, 15)
        except ProcessLookupError:
            return
        time.sleep(POLL)


def _wait_for_memory(free):
    """Wait until GPUs have as much free memory as before; free: {index: bytes}."""
    deadline = time.monotonic() + MEMORY
    while True:
        missing = []
        for gpu in visible_gpus():
            before = free.get(str(gpu.index), 0)
            if gpu.free < before - gpu.total / 20:
                missing.append(str(gpu.index))
        if not missing:
            return
        if time.monotonic() > deadline:
            print(
                f"note: memory of GPU {', '.join(missing)} is still in use although its server "
                "has ended",
                file=sys.stderr,
            )
            return
        time.sleep(1)
