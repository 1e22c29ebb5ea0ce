"""How long a request waits before it is tried again, and which failures end what."""
import gzip
import time
import tracemalloc
import zlib
from email.utils import formatdate

import pytest

from support.errors import ServiceError
from support.http import PASSING, REJECTED, Endpoint, RequestFailed, retry_after
from tests.loopback import HALF_A_REPLY, MEGABYTE, Loopback, bomb


def http_date(seconds):
    """A date so many seconds from now, as in a Retry-After header."""
    return formatdate(time.time() + seconds, usegmt=True)


def pauses_of(monkeypatch, tries, status, **headers):
    """The pauses of a request that is answered with the same status again and again."""
    pauses = []
    with Loopback(respond=lambda h, _: h.reply(status, {}, **headers)) as server:
        endpoint = Endpoint(server.url, ("NO_KEY",), tries=tries)
        monkeypatch.setattr(endpoint.stopping, "wait", pauses.append)
        with pytest.raises(RequestFailed, match=f"status {status}, tried {tries} times"):
            endpoint.post({})
    assert len(pauses) == tries - 1
    return pauses


def test_waits_as_long_as_the_server_asks(monkeypatch):
    assert retry_after({"retry-after": http_date(30)}) == pytest.approx(30, abs=2)
    for headers, low, high in (
        ({"Retry_After": "7"}, 7, 7),
        ({"Retry_After": http_date(50)}, 40, 51),
        ({"retry_after_ms": "30"}, 0.03, 0.03),
    ):
        pauses = pauses_of(monkeypatch, 3, 429, **headers)
        assert all(low <= pause <= high for pause in pauses), pauses


def test_else_waits_longer_each_time(monkeypatch):
    pauses = pauses_of(monkeypatch, 10, 503)
    for k, pause in enumerate(pauses):
        assert 0.75 <= pause / min(120, 0.5 * 2 ** k) <= 1
    assert len(set(pauses)) == 9


def test_a_wait_that_the_server_asks_for_has_a_limit(monkeypatch):
    assert pauses_of(monkeypatch, 3, 429, Retry_After="86400") == [120, 120]


# ------------------------------------------------------------------------------ time and memory

def seconds_to_fail(respond, **options):
    """How long a request takes to fail, and how many attempts it makes."""
    with Loopback(respond=respond) as server:
        endpoint = Endpoint(server.url, ("NO_KEY",), **options)
        start = time.monotonic()
        with pytest.raises(RequestFailed) as failure:
            endpoint.post({})
        assert failure.value.kind == PASSING
        return time.monotonic() - start, len(server.log)


@pytest.mark.parametrize("at_once, dripped", [
    (b"", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100),
    (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 50),
    (HALF_A_REPLY, b" " * 100),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 50),
])
def test_the_timeout_is_for_the_whole_exchange(at_once, dripped):
    def drip(handler, _):
        handler.drip(at_once + dripped, 20, at_once=len(at_once))

    took, attempts = seconds_to_fail(drip, timeout=0.7, tries=2, longest_pause=0.01)
    assert attempts == 2
    assert 1.4 <= took < 2.5


def test_all_tries_of_a_request_have_one_deadline():
    options = {"tries": 1000, "patience": 1, "longest_pause": 0.05}
    took, attempts = seconds_to_fail(lambda h, _: h.reply(503, {}), **options)
    assert 5 < attempts < 100
    assert took < 1.5
    took, attempts = seconds_to_fail(lambda h, _: h.hang(5), timeout=0.6, **options)
    assert attempts == 2
    assert took < 1.5


def test_no_pause_is_begun_that_goes_beyond_the_deadline():
    def busy(handler, _):
        handler.reply(429, {}, Retry_After="60")

    took, attempts = seconds_to_fail(busy, tries=6, patience=30)
    assert attempts == 1
    assert took < 5


@pytest.mark.parametrize("sent", [
    b"",
    b"\x00\xff\xfe\x16\x03\x01",
    b"HTTP/1.1 abc\r\n\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX\xff\xfe: \x80\r\n y\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n{}   ",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n{}\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\n\x0b\x02\x80{}",
    b"HTTP/1.1 200 OK\r\nContent-Type: a; charset=nonsense\r\n\r\n[1]",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000,
])
def test_what_is_no_reply_passes(sent):
    def respond(handler, _):
        handler.wfile.write(sent)
        handler.close_connection = True

    took, attempts = seconds_to_fail(respond, tries=2, timeout=1, longest_pause=0.01)
    assert attempts == 2
    assert took < 4


@pytest.mark.parametrize("packed", [gzip.compress, zlib.compress])
def test_a_compressed_reply_is_read(packed):
    body = packed(b'{"answer": "' + b"x" * 5000 + b'"}')
    with Loopback(respond=lambda h, _: h.reply(200, body, Content_Encoding="gzip")) as server:
        assert Endpoint(server.url, ("NO_KEY",)).post({}) == {"answer": "x" * 5000}


def test_a_gzip_bomb_is_not_decompressed():
    body = bomb(500)
    with Loopback(respond=lambda h, _: h.reply(200, body, Content_Encoding="gzip")) as server:
        endpoint = Endpoint(server.url, ("NO_KEY",), tries=1)
        tracemalloc.start()
        try:
            with pytest.raises(RequestFailed, match="no reply"):
                endpoint.post({})
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 20 * MEGABYTE


# ------------------------------------------------------------------------ what the environment adds

def test_a_netrc_does_not_replace_the_key(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password sesame\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("THE_KEY", "sk-1")
    with Loopback(respond=lambda h, _: h.reply(200, {})) as server:
        assert Endpoint(server.url, ("THE_KEY",)).post({}) == {}
        assert server.log[0]["headers"]["Authorization"] == "Bearer sk-1"


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with Loopback(respond=lambda h, _: h.reply(200, {"by": "proxy"})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "")
        assert Endpoint("http://judge.invalid/v1", ("NO_KEY",)).post({}) == {"by": "proxy"}
        assert proxy.log[0]["path"] == "http://judge.invalid/v1"


# ------------------------------------------------------------------------- which failures end what

@pytest.mark.parametrize("status", [400, 403, 413, 418, 422])
def test_a_rejected_request_is_not_sent_again_and_ends_no_other(status):
    used = {"usage": {"prompt_tokens": 1}}
    with Loopback(respond=lambda h, body: h.reply(body["status"], used)) as server:
        endpoint = Endpoint(server.url, ("NO_KEY",))
        endpoint.post({"status": 200})  # the key is accepted, so a 403 is about one text
        with pytest.raises(RequestFailed, match=f"status {status}") as failure:
            endpoint.post({"status": status})
        assert failure.value.status == status
        assert failure.value.kind == REJECTED
        assert endpoint.post({"status": 200}) == used
        assert len(server.log) == 3


def test_rejections_in_a_row_stop_the_endpoint_with_the_servers_words():
    def respond(handler, body):
        handler.reply(body["status"], {"error": "no seats left"})

    with Loopback(respond=respond) as server:
        endpoint = Endpoint(server.url, ("NO_KEY",), concurrency=2)
        for _ in range(2):
            for _ in range(10):
                with pytest.raises(RequestFailed):
                    endpoint.post({"status": 418})
            endpoint.post({"status": 200})
        for _ in range(10):
            with pytest.raises(RequestFailed):
                endpoint.post({"status": 418})
        with pytest.raises(ServiceError, match="11 requests in a row .* 418.*no seats left"):
            endpoint.post({"status": 418})


def test_a_403_at_once_is_about_the_key():
    with Loopback(respond=lambda h, _: h.reply(403, {})) as server:
        endpoint = Endpoint(server.url, ("FIRST_KEY", "SECOND_KEY"))
        with pytest.raises(ServiceError, match="Set FIRST_KEY or SECOND_KEY"):
            endpoint.post({})
        with pytest.raises(ServiceError, match="Set FIRST_KEY or SECOND_KEY"):
            endpoint.post({})
        assert len(server.log) == 1, "a stopped endpoint sends nothing any more"


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_a_transient_failure_is_tried_again(status):
    left = [status, 200]
    with Loopback(respond=lambda h, _: h.reply(left.pop(0), {}, retry_after="0")) as server:
        endpoint = Endpoint(server.url, ("NO_KEY",))
        assert endpoint.post({}) == {}
        assert endpoint.counts["requests"] == 2
        assert endpoint.counts["retries"] == 1


def test_only_failures_in_a_row_mean_that_the_server_is_down():
    with Loopback(respond=lambda h, body: h.reply(body["status"], {})) as server:
        endpoint = Endpoint(server.url, ("NO_KEY",), concurrency=2, tries=1)
        for _ in range(2):
            for _ in range(10):
                with pytest.raises(RequestFailed):
                    endpoint.post({"status": 500})
            endpoint.post({"status": 200})
        for _ in range(10):
            with pytest.raises(RequestFailed):
                endpoint.post({"status": 500})
        with pytest.raises(ServiceError, match="11 requests in a row failed"):
            endpoint.post({"status": 500})


def test_the_first_reason_to_stop_is_the_one_that_is_told():
    endpoint = Endpoint("http://127.0.0.1:9/v1", ("NO_KEY",))
    for message in ("First.", "Second."):
        with pytest.raises(ServiceError, match="First. What came back so far is kept"):
            endpoint.stop(message)
