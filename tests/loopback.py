"""A chat and completion server on 127.0.0.1 that misbehaves on demand, over real HTTP.

In a test: `with Loopback(plan) as server: ... server.url ... server.log`. As a process of its own,
for tests that kill or time the client: `python tests/loopback.py --latency 0.05 --log FILE` prints
its URL. It needs the standard library only.

The judge's true answer stands in the judged text as `<key> truth=ANSWER`. `plan(key, attempt)`
names the fault that the attempt-th request (from 0) with this key meets; None is a good answer.
"""
import argparse
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<html><body>Bad gateway: safe</body></html>"
HALF_A_REPLY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    b'{"choices":'
)
FAULTS = (
    "429 seconds",
    "429 date",
    "500",
    "hang",
    "reset",
    "truncated",
    "empty choices",
    "html",
    "html 502",
    "refusal",
    "content filter",
    "wrong schema",
    "out of range",
    "huge",
    "latin-1",
    "text for json",
    "null content",
)
# Not asked again: the judge has answered, if only with a refusal.
FINAL = ("refusal", "content filter")


def chat(content, finish="stop", **message):
    """A reply of /v1/chat/completions."""
    message = {"role": "assistant", "content": content, **message}
    return {
        "choices": [{"message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else headers and body of each reply would wait for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        loopback = self.server.loopback
        with loopback.lock:
            loopback.log.append({"path": self.path, "headers": dict(self.headers), "body": body})
            loopback.active += 1
            loopback.most = max(loopback.most, loopback.active)
        try:
            time.sleep(loopback.latency)
            loopback.serve(self, body)
        except OSError:
            self.close_connection = True
            loopback.cut += 1
        finally:
            with loopback.lock:
                loopback.active -= 1

    def reply(self, status, content, kind="application/json", **headers):
        """Send bytes as they are, anything else as JSON. `Retry_After="3"` becomes a header."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        head = b"".join(self._headers_buffer)  # in one write with the body
        self._headers_buffer = []
        self.wfile.write(head + b"\r\n" + content)

    def reset(self):
        """Break the connection off in the middle of a reply."""
        self.wfile.write(HALF_A_REPLY)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)

    def hang(self, seconds):
        """Say nothing for a while, then break off."""
        time.sleep(seconds)
        self.close_connection = True


class Loopback:
    """The server; `respond(handler, body)` may be replaced to answer in another way."""

    def __init__(
        self,
        plan=lambda key, attempt: None,
        latency=0.0,
        respond=None,
        log_file=None,
        hang=1.5,
    ):
        self.plan = plan
        self.latency = latency  # seconds that every answer takes
        self.respond = respond
        self.log_file = log_file
        self.hang = hang  # seconds that a client waits for a server that hangs

        self.lock = threading.Lock()
        self.log = []  # every request: path, headers, body
        self.attempts = Counter()  # requests of each key
        self.cut = 0  # replies that the client did not read to their end
        self.active = 0  # requests being answered
        self.most = 0  # the most that there were at once

    def __enter__(self):
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Clients that are killed or hang up are what the tests are about: no tracebacks.
        self.httpd.handle_error = lambda *_: None
        self.httpd.daemon_threads = True
        self.httpd.loopback = self
        self.httpd.request_queue_size = 128
        self.httpd.socket.listen(256)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        serve = self.httpd.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()

    def serve(self, handler, body):
        if self.respond:
            return self.respond(handler, body)
        content = body["messages"][-1]["content"]
        key, truth = re.search(r"<([^<>]*)> truth=(\w+)", content).groups()
        attempt = self.count(key)
        answer = int(truth) if truth.isdigit() else truth
        if "response_format" in body:
            good = json.dumps({"reason": "because", "answer": answer})
        else:
            good = f"Why.\nANSWER: {answer}"
        fault = self.plan(key, attempt)
        if fault is None:
            handler.reply(200, chat(good))
        else:
            self.misbehave(handler, fault, good)

    def count(self, key):
        """Note a request, and return how many there were before it with the same key."""
        with self.lock:
            attempt = self.attempts[key]
            self.attempts[key] += 1
            if self.log_file:
                self.log_file.write(key + "\n")
                self.log_file.flush()
        return attempt

    def misbehave(self, handler, fault, good):
        slow_down = {"error": {"message": "slow down"}}
        match fault:
            case "429 seconds":
                handler.reply(429, slow_down, Retry_After="0.05")
            case "429 date":
                handler.reply(429, slow_down, Retry_After=formatdate(time.time() + 1, usegmt=True))
            case "500":
                handler.reply(500, {"error": {"message": "oops"}})
            case "hang":
                handler.hang(self.hang)
            case "reset":
                handler.reset()
            case "truncated":
                handler.reply(200, json.dumps(chat(good)).encode()[:-20])
            case "empty choices":
                handler.reply(200, {"choices": []})
            case "html":
                handler.reply(200, PAGE, "text/html")
            case "html 502":
                handler.reply(502, PAGE, "text/html")
            case "refusal":
                handler.reply(200, chat(None, refusal="I can't look at that. ANSWER: safe"))
            case "content filter":
                handler.reply(200, chat('{"reason": "", "answer": "safe"}', "content_filter"))
            case "wrong schema":
                verdict = '{"reason": "", "verdict": "safe", "answer": "SAFE or unsafe"}'
                handler.reply(200, chat(verdict))
            case "out of range":
                handler.reply(200, chat('{"reason": "", "answer": 99}'))
            case "huge":
                handler.reply(200, chat(json.dumps({"reason": "x" * 10_000_000, "answer": "safe"})))
            case "latin-1":
                reply = json.dumps(chat('{"reason": "é", "answer": "safe"}'), ensure_ascii=False)
                handler.reply(200, reply.encode("latin-1"))
            case "text for json":
                handler.reply(200, chat("I think this is safe. It is not unsafe."))
            case "null content":
                handler.reply(200, chat(None))
            case _:
                raise AssertionError(fault)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0, help="seconds that every answer takes")
    parser.add_argument("--log", help="file that gets the key of every request as it arrives")
    args = parser.parse_args()
    log_file = open(args.log, "a") if args.log else None
    with Loopback(latency=args.latency, log_file=log_file) as server:
        print(server.url, flush=True)
        sys.stdin.read()  # until the parent goes
