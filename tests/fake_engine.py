"""A server for tests of what starts servers: it answers one token, and misbehaves on demand.

    python tests/fake_engine.py --model M --port P --log FILE [--slow SECONDS] ...

Lines in FILE say what happens, as in `start M PID`, `ask M` and `end M`. Standard library only.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, {"status": "healthy"})

    def do_POST(self):
        args = self.server.args
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if args.status != 200:
            self.reply(args.status, {"detail": "not now"})
            return
        if body["prompt"] != "Hello":  # not the request that waits for the server
            note(args, "ask", body["model"])
        if body["prompt"] == "die":
            os._exit(3)
        self.reply(200, {"choices": [{"text": args.model, "finish_reason": "length"}]})

    def reply(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def note(args, *words):
    with open(args.log, "a") as log:
        log.write(" ".join(map(str, words)) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True)
    add("--port", type=int, required=True)
    add("--log", required=True)
    add("--slow", type=float, default=0, help="seconds to start")
    add("--slow-end", type=float, default=0, help="seconds to end after SIGTERM")
    add("--status", type=int, default=200, help="of every reply to a completion")
    add("--die", action="store_true", help="at the start")
    add("--worker", action="store_true", help="start a process that is not ended with this one")
    add("--gpus", default="")
    args = parser.parse_args()

    def end(*_):
        time.sleep(args.slow_end)
        note(args, "end", args.model)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    note(args, "start", args.model, os.getpid())
    note(args, "GPUs", args.model, os.environ.get("CUDA_VISIBLE_DEVICES"), args.gpus)
    keys = [name for name in os.environ if name.endswith("_API_KEY")]
    note(args, "keys", *sorted(keys))
    if args.worker:
        sleep = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(100)"])
        note(args, "start", "worker", sleep.pid)
    if args.die:
        sys.exit("no memory for the model")
    time.sleep(args.slow)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.args = args
    server.serve_forever(0.02)


if __name__ == "__main__":
    main()
