"""One deadline for a whole reply: `requests` only limits the wait for each piece of it."""
import functools
import http.client
import io
import time
import zlib

import requests
import urllib3

# What an exchange raises where no reply comes, or none that is HTTP and short enough.
NO_REPLY = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
    zlib.error,
)
LONGEST_CONNECT = 20  # seconds; the rest of a request's time is for the reply


class DeadlineAdapter(requests.adapters.HTTPAdapter):
    """Connections on which a timeout covers the whole reply, headers and body."""

    def get_connection_with_tls_context(self, *args, **keywords):
        pool = super().get_connection_with_tls_context(*args, **keywords)
        pool.ConnectionCls = _with_deadline(pool.ConnectionCls)
        return pool


def whole_timeout(seconds):
    """The `timeout` argument for one exchange: from connecting to the last byte."""
    return urllib3.Timeout(total=seconds, connect=min(seconds, LONGEST_CONNECT))


@functools.cache
def _with_deadline(connection_class):
    """A class of connections, made to read each reply against one deadline."""
    if issubclass(connection_class, _Marked):
        return connection_class

    class Connection(_Marked, connection_class):
        response_class = _Response

    return Connection


class _Marked:
    """What marks a class that `_with_deadline` has made already."""


class _Response(http.client.HTTPResponse):
    """A reply that is read through a `_Reader`."""

    def __init__(self, sock, *args, **keywords):
        super().__init__(_Opener(sock), *args, **keywords)


class _Opener:
    """Stands in for a socket where http.client makes a file of it, which is all that it does."""

    def __init__(self, sock):
        self.sock = sock

    def makefile(self, mode):
        assert mode == "rb"
        return io.BufferedReader(_Reader(self.sock))


class _Reader(io.RawIOBase):
    """Reads a socket. Its timeout, which urllib3 has set to the time left, is for all reads."""

    def __init__(self, sock):
        self.sock = sock
        # Python's own file keeps the socket open until the reply is read.
        self.file = sock.makefile("rb", buffering=0)
        timeout = sock.gettimeout()
        self.deadline = None if timeout is None else time.monotonic() + timeout

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self.sock.settimeout(left)
        return self.file.readinto(buffer)

    def close(self):
        self.file.close()
        super().close()


def read_body(reply, limit):
    """The body of a streamed reply, decompressed. Raises ValueError if it has over `limit` bytes.

    A few kilobytes can decompress to gigabytes, so no more than the limit is ever decompressed.
    """
    decoder = None
    if reply.headers.get("Content-Encoding", "identity") != "identity":
        decoder = zlib.decompressobj(wbits=47)  # gzip or zlib, as the data says
    body = bytearray()
    for piece in reply.raw.stream(1 << 16, decode_content=False):
        if decoder:
            piece = decoder.decompress(piece, limit + 1 - len(body))
        body += piece
        if len(body) > limit:
            raise ValueError("the reply is too long")
    return body
