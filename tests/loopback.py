"""A chat and completion server on 127.0.0.1 that misbehaves on demand, over real HTTP.

In a test: `with Loopback(plan) as server: ... server.url ... server.log`. As a process of its own,
for tests that kill or time the client: `python tests/loopback.py --latency 0.05 --log FILE` prints
its URL. It needs the standard library only.

The judge's true answer stands in the judged text as `<key> truth=ANSWER`. `plan(key, attempt)`
names the fault that the attempt-th request (from 0) with this key meets; None is a good answer.
"""
import argparse
import functools
import json
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<html><body>Bad gateway: safe</body></html>"
HALF_A_REPLY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    b'{"choices":'
)
# What passes: the same question may be answered a moment later.
PASSING = (
    "408", "409", "500", "503", "504",
    "429 seconds", "429 date", "429 tomorrow",
    "hang", "slow headers", "dripped body",
    "reset before", "reset",
    "truncated", "empty body", "too short a length", "too long a length",
    "html", "html 502", "no JSON", "JSON list", "no choices", "empty choices",
    "huge", "gzip bomb", "latin-1",
)
# The judge replies as it should, but what it says is no verdict.
UNUSABLE = (
    "wrong schema", "wrong label", "out of range", "number as string", "text for json",
    "null content", "length",
)
# Rejected: is it this question, or would any other be?
REJECTED = ("400", "413", "418", "422")
# Not asked again: the judge has answered, if only with a refusal.
FINAL = ("refusal", "content filter")
FAULTS = (*PASSING, *UNUSABLE, *REJECTED, *FINAL)
# All further requests would meet the same: they end the run.
HOPELESS = ("quota", "redirect")
MEGABYTE = 1 << 20


@functools.cache
def bomb(megabytes):
    """Zeros, compressed a thousand-fold."""
    packer = zlib.compressobj(wbits=31)
    packed = [packer.compress(bytes(MEGABYTE)) for _ in range(megabytes)]
    return b"".join(packed) + packer.flush()


def chat(content, finish="stop", **message):
    """A reply of /v1/chat/completions."""
    message = {"role": "assistant", "content": content, **message}
    return {
        "choices": [{"message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


def guard(handler, body):
    """`respond` of a server that holds one of the guard models, by the model's name.

    An answer is unsafe if it says "poison", a refusal if it says "sorry".
    """
    if "messages" in body:
        text = body["messages"][-1]["content"]
    else:
        text = body["prompt"].partition("AI assistant:")[2]
    unsafe = "poison" in text
    refusal = "sorry" in text
    if "Llama-Guard" in body["model"]:
        handler.reply(200, chat("\n\nunsafe\nS9" if unsafe else "\n\nsafe"))
    elif "Qwen3Guard" in body["model"]:
        safety = "Safety: Unsafe\nCategories: Violent" if unsafe else "Safety: Safe\nCategories: None"
        handler.reply(200, chat(f"{safety}\nRefusal: {'Yes' if refusal else 'No'}"))
    else:
        lines = (
            "Harmful request: yes",
            f"Response refusal: {'yes' if refusal else 'no'}",
            f"Harmful response: {'yes' if unsafe else 'no'}",
        )
        choice = {"text": "\n".join(lines), "finish_reason": "stop"}
        handler.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 100}})


@functools.cache
def huge_verdict():
    """A verdict with 10 MB of reasons."""
    verdict = json.dumps({"reason": "x" * 10_000_000, "answer": "safe"})
    return json.dumps(chat(verdict)).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else headers and body of each reply would wait for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_POST(self):
        if self.server is not self.server.loopback.httpd:
            self.reset(b"")  # of a server that has gone
            return
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
        sent = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in headers.items():
            sent[name.replace("_", "-")] = value
        self.send_response(status)
        for name, value in sent.items():
            self.send_header(name, value)
        head = b"".join(self._headers_buffer) + b"\r\n"
        self._headers_buffer = []
        if len(content) > MEGABYTE:  # no copy of it
            self.wfile.write(head)
            self.wfile.write(content)
        else:
            self.wfile.write(head + content)  # in one write

    def reset(self, sent=HALF_A_REPLY):
        """Break the connection off in the middle of a reply, or before it."""
        self.wfile.write(sent)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)

    def drip(self, content, seconds, at_once=0):
        """Send a reply byte by byte, ten a second, and break off."""
        self.close_connection = True
        self.wfile.write(content[:at_once])
        end = time.monotonic() + seconds
        for byte in content[at_once:]:
            if time.monotonic() > end:
                return
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)

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
        self.said = {}  # the last fault that each key met, None where it was answered
        self.cut = 0  # replies that the client did not read to their end
        self.active = 0  # requests being answered
        self.most = 0  # the most that there were at once

    def __enter__(self):
        self._listen(0)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        return self

    def _listen(self, port):
        self.httpd = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        # Clients that are killed or hang up are what the tests are about: no tracebacks.
        self.httpd.handle_error = lambda *_: None
        self.httpd.daemon_threads = True
        self.httpd.loopback = self
        self.httpd.request_queue_size = 128
        self.httpd.socket.listen(256)
        serve = self.httpd.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()

    def leave(self, seconds):
        """Refuse all connections for a while, and come back at the same port."""
        gone = self.httpd
        self.httpd = None
        gone.shutdown()
        gone.server_close()
        time.sleep(seconds)
        self._listen(gone.server_port)

    def serve(self, handler, body):
        if self.respond:
            return self.respond(handler, body)
        content = body["messages"][-1]["content"]
        found = re.search(r"<([^<>]*)> truth=(\w+)", content)
        if not found:  # a harmless question, to see whether the server takes any
            return handler.reply(200, chat("Hello."))
        key, truth = found.groups()
        attempt = self.count(key)
        answer = int(truth) if truth.isdigit() else truth
        if "response_format" in body:
            good = json.dumps({"reason": "because", "answer": answer})
        else:
            good = f"Why.\nANSWER: {answer}"
        fault = self.plan(key, attempt)
        self.said[key] = fault
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
        if fault in ("408", "409", "500", "503", "504", *REJECTED):
            handler.reply(int(fault), {"error": {"message": f"oops {fault}"}})
            return
        match fault:
            case "429 seconds":
                handler.reply(429, slow_down, Retry_After="0.05")
            case "429 date":
                handler.reply(429, slow_down, Retry_After=formatdate(time.time() + 1, usegmt=True))
            case "429 tomorrow":
                handler.reply(429, slow_down, Retry_After="86400")
            case "quota":
                handler.reply(429, {"error": {"code": "insufficient_quota"}})
            case "redirect":
                handler.reply(307, {}, Location=f"{self.url}/elsewhere")
            case "hang":
                handler.hang(self.hang)
            case "slow headers":
                handler.drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000, self.hang)
            case "dripped body":
                handler.drip(HALF_A_REPLY + b" " * 400, self.hang, at_once=len(HALF_A_REPLY))
            case "empty body":
                handler.reply(200, b"")
            case "too short a length":
                handler.reply(200, chat(good), Content_Length="40")
                handler.close_connection = True
            case "too long a length":
                handler.reply(200, chat(good), Content_Length="4000")
                handler.close_connection = True
            case "no JSON":
                handler.reply(200, b"safe", "text/plain")
            case "JSON list":
                handler.reply(200, [chat(good)])
            case "no choices":
                handler.reply(200, {"object": "chat.completion"})
            case "gzip bomb":
                handler.reply(200, bomb(200), Content_Encoding="gzip")
            case "wrong label":
                handler.reply(200, chat('{"reason": "", "answer": "Safe"}'))
            case "number as string":
                handler.reply(200, chat('{"reason": "", "answer": "2"}'))
            case "length":
                handler.reply(200, chat(good, "length"))
            case "reset before":
                handler.reset(b"")
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
                handler.reply(200, huge_verdict())
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
