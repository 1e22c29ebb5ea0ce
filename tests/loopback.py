"""A chat and completion server on 127.0.0.1 that misbehaves on demand, over real HTTP. Standard library only.

In a test: `with Loopback(plan) as server: ... server.url ... server.log`. As a process of its own (for tests that
kill or time the client): `python tests/loopback.py --latency 0.05 --log FILE`, which prints its URL.

The judge's true answer stands in the judged text as `truth=ANSWER`. `plan(key, attempt)` names the fault that the
attempt-th request (from 0) with this `key` (the text between `<` and `>` before the truth) meets; None is a good answer.
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

FAULTS = ("429 seconds", "429 date", "500", "hang", "reset", "truncated", "empty choices", "html", "html 502", "refusal",
          "content filter", "wrong schema", "out of range", "huge", "latin-1", "text for json", "null content")
FINAL = ("refusal", "content filter")  # not asked again: the judge has answered, if only with a refusal


def chat(content, finish="stop", **message):
    return {"choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else headers and body of each reply wait for the client's delayed acknowledgement

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        loop = self.server.loop
        with loop.lock:
            loop.log.append({"path": self.path, "headers": dict(self.headers), "body": body})
            loop.active += 1
            loop.most = max(loop.most, loop.active)
        try:
            time.sleep(loop.latency)
            loop.serve(self, body)
        except OSError:
            self.close_connection = True
            loop.cut += 1
        finally:
            with loop.lock:
                loop.active -= 1

    def reply(self, status, content, kind="application/json", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        head, self._headers_buffer = b"".join(self._headers_buffer), []
        self.wfile.write(head + b"\r\n" + content)


class Loopback:
    """The server; `respond(handler, body)` may be replaced to answer in another way."""

    def __init__(self, plan=lambda key, attempt: None, latency=0.0, respond=None, log_file=None, hang=1.5):
        self.plan, self.latency, self.respond, self.log_file, self.hang = plan, latency, respond, log_file, hang
        self.log, self.attempts, self.lock, self.cut, self.active, self.most = [], Counter(), threading.Lock(), 0, 0, 0

    def __enter__(self):
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.handle_error = lambda *_: None  # clients that are killed or hang up are what the tests are about
        self.httpd.daemon_threads, self.httpd.loop, self.httpd.request_queue_size = True, self, 128
        self.httpd.socket.listen(256)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()

    def serve(self, handler, body):
        if self.respond:
            return self.respond(handler, body)
        content = body["messages"][-1]["content"]
        key, truth = re.search(r"<([^<>]*)> truth=(\w+)", content).groups()
        with self.lock:
            attempt = self.attempts[key]
            self.attempts[key] += 1
            if self.log_file:
                self.log_file.write(key + "\n")
                self.log_file.flush()
        fault = self.plan(key, attempt)
        answer = int(truth) if truth.isdigit() else truth
        good = json.dumps({"reason": "because", "answer": answer}) if "response_format" in body else f"Why.\nANSWER: {answer}"
        self.misbehave(handler, fault, good) if fault else handler.reply(200, chat(good))

    def misbehave(self, handler, fault, good):
        if fault == "429 seconds":
            handler.reply(429, {"error": {"message": "slow down"}}, Retry_After="0.05")
        elif fault == "429 date":
            handler.reply(429, {"error": {"message": "slow down"}}, Retry_After=formatdate(time.time() + 1, usegmt=True))
        elif fault == "500":
            handler.reply(500, {"error": {"message": "oops"}})
        elif fault == "hang":
            time.sleep(self.hang)
            handler.close_connection = True
        elif fault == "reset":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{\"choices\":")
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RD)
        elif fault == "truncated":
            handler.reply(200, json.dumps(chat(good)).encode()[:-20])
        elif fault == "empty choices":
            handler.reply(200, {"choices": []})
        elif fault in ("html", "html 502"):
            handler.reply(200 if fault == "html" else 502, b"<html><body>Bad gateway: safe</body></html>", "text/html")
        elif fault == "refusal":
            handler.reply(200, chat(None, refusal="I can't look at that. ANSWER: safe"))
        elif fault == "content filter":
            handler.reply(200, chat('{"reason": "", "answer": "safe"}', "content_filter"))
        elif fault == "wrong schema":
            handler.reply(200, chat('{"reason": "", "verdict": "safe", "answer": "SAFE or unsafe"}'))
        elif fault == "out of range":
            handler.reply(200, chat('{"reason": "", "answer": 99}'))
        elif fault == "huge":
            handler.reply(200, chat(json.dumps({"reason": "x" * 10_000_000, "answer": "safe"})))
        elif fault == "latin-1":
            handler.reply(200, json.dumps(chat('{"reason": "é", "answer": "safe"}'), ensure_ascii=False).encode("latin-1"))
        elif fault == "text for json":
            handler.reply(200, chat("I think this is safe. It is not unsafe."))
        elif fault == "null content":
            handler.reply(200, chat(None))
        else:
            raise AssertionError(fault)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that every answer takes")
    parser.add_argument("--log", help="file that gets the key of every request as it arrives")
    args = parser.parse_args()
    with Loopback(latency=args.latency, log_file=open(args.log, "a") if args.log else None) as server:
        print(server.url, flush=True)
        sys.stdin.read()  # until the parent goes
