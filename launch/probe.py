"""One small question to every judge and server of a run, while nothing is lost yet."""
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from support.errors import InputError, ServiceError
from support.http import without_password
from support.unanswered import NoAnswer

PATIENCE = 6  # seconds until a judge or a server must have answered one question
CONNECTING = 4  # seconds until it must have taken a connection
# For an Endpoint: what takes hours in a run must fail in seconds here.
HURRY = {"tries": 2, "timeout": PATIENCE, "patience": PATIENCE, "longest_pause": 1}
ITEM = {
    "prompt": "Name a fruit.",
    "text": "The user wants the name of a fruit. An apple is one.",
    "steps": ["The user wants the name of a fruit.", " An apple is one.", " I will say so."],
}


class Task:
    """A function in a thread, for which nobody has to wait longer than he likes."""

    def __init__(self, name, function, *arguments):
        self.name = name
        self.error = None
        self.thread = threading.Thread(target=self._run, args=(function, *arguments), daemon=True)
        self.thread.start()

    def _run(self, function, *arguments):
        try:
            function(*arguments)
        except BaseException as error:
            self.error = error


def wait_for(tasks, until, findings):
    """Wait for tasks until a time (of time.monotonic), and name those that still go on then.

    Raises what they raised.
    """
    for task in tasks:
        task.thread.join(max(0.0, until - time.monotonic()))
        if task.error:
            raise task.error
        if task.thread.is_alive():
            findings.problem(f"{task.name}: it hangs: no answer, and no refusal either. "
                             "Look at it, and at the network between.")


# ----------------------------------------------------------------------------------- the address

def address_problem(url):
    """Why no connection can be made to the host of a URL; None where one can.

    Not where a proxy stands between: it alone knows the host then.
    """
    import requests

    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError):
        return "not a URL. Write http(s)://HOST:PORT/v1."
    host = parts.hostname
    if not host:
        return "it names no host. Write http(s)://HOST:PORT/v1."
    if parts.scheme in requests.utils.get_environ_proxies(url):
        return None
    try:
        socket.create_connection((host, port), timeout=CONNECTING).close()
    except socket.gaierror:
        return (f"no host has the name {host}. "
                "Check its spelling, and that this machine has a network.")
    except ConnectionRefusedError:
        return (f"connection refused: nothing listens at port {port} of {host}. "
                "Start the server, or check the port.")
    except TimeoutError:
        return (f"{host} took no connection at port {port} within {CONNECTING} s. "
                "Is it up, and is there a firewall between?")
    except OSError as error:
        return f"no connection to port {port} of {host} ({error.strerror}). Check the URL."
    return None


def models_at(url):
    """The names of a server's models, as far as it says without a key."""
    import requests

    address = without_password(url).rstrip("/") + "/models"
    try:
        reply = requests.get(address, timeout=CONNECTING, allow_redirects=False)
        return [str(model["id"]) for model in reply.json()["data"]]
    except (requests.RequestException, ValueError, LookupError, TypeError):
        return []


def report_answer(name, url, ask, findings):
    """Call ask(), which returns a problem or None, and report that, or what it raises."""
    try:
        problem = ask()
    except (InputError, ServiceError) as error:
        problem = str(error)
    if not problem:
        return
    problem = _without_comfort(problem)
    # The name has the address in it already.
    problem = re.sub(rf"^{re.escape(without_password(url))}\S*: ", "", problem)
    if "status 404" in problem:
        models = models_at(url)
        if models:
            problem += f" It holds: {', '.join(models[:5])}."
    if "status 429" in problem and "quota" not in problem:
        findings.warning(f"{name}: it asks to slow down; the run will wait for it ({problem})")
    elif "Timeout" in problem:
        findings.warning(f"{name}: no answer to a short question within {PATIENCE} s, so it could "
                         "not be tried. If it has just started, its first answer may take longer; "
                         "if it hangs, its first stage will fail")
    else:
        findings.problem(f"{name}: {problem}")


def _without_comfort(message):
    """A message without the sentence that something is kept, which says nothing here."""
    for comfort in (" What came back so far is kept", " All others are kept"):
        message = message.partition(comfort)[0]
    return message


# ------------------------------------------------------------------------------ judges and servers

def try_judge(name, url, judge, questions, findings):
    """Ask a judge one real question of each kind that the run will ask.

    judge: of `make_judge`, without a cache, in a HURRY: a cached verdict would hide a dead one.
    """
    problem = address_problem(url)
    if problem:
        findings.problem(f"{name}: {problem}")
        return

    no_verdict = {}  # question: what became of it

    def ask(question):
        if question == "cue" and not hasattr(judge, "prompts"):
            question = "reasoning"  # a guard is asked about the beginnings of the reasoning
        answer, outcome = judge.verdict(question, ITEM)
        if isinstance(answer, NoAnswer):
            return answer.reason
        if answer is None:
            no_verdict[question] = outcome
        return None

    def ask_and_report(question):
        report_answer(name, url, lambda: ask(question), findings)

    with ThreadPoolExecutor(len(questions)) as pool:
        list(pool.map(ask_and_report, questions))
    if no_verdict:
        outcomes = ", ".join(f"{question}: {no_verdict[question]}" for question in no_verdict)
        findings.problem(f"{name}: it answers, but some of its replies are no verdicts "
                         f"({outcomes}). Take another model, or see docs/judges.md.")


def try_server(name, url, sampler, prefix, findings):
    """Let a server continue a prefix (token ids) by a few tokens; its own probe comes first."""
    problem = address_problem(url)
    if problem:
        findings.problem(f"{name}: {problem}")
        return

    def ask():
        completions = list(sampler([("check", prefix)], title="trying the server"))
        if not completions[0][1]:
            return "it returned no token."
        return None

    report_answer(name, url, ask, findings)
