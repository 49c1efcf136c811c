"""A local S3 server on loopback, and a count of what it was asked: what tests and benchmarks of lakes on s3:// share."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KEYS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_LINE = re.compile(r'"(GET|PUT|HEAD|DELETE|POST) (\S+) HTTP')


@dataclass
class Server:
    """Where it listens, the variables that lead a client there, and requests as (kind, path): LIST is a kind of its own."""

    endpoint: str
    requests: list[tuple[str, str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that reads and writes here."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}

    @contextmanager
    def counted(self, uri: str) -> Iterator[list[tuple[str, str]]]:
        """The requests made inside for that URI's bucket: an upload that another test broke off may still be retried."""
        before, found = len(self.requests), []
        bucket = re.compile(rf"/{uri.removeprefix('s3://').split('/')[0]}(?![\w-])")
        yield found
        found += [(kind, path) for kind, path in self.requests[before:] if bucket.match(path)]

    def make_bucket(self, name: str) -> None:
        """An empty bucket; AWS_ENDPOINT_URL must lead here."""
        from lakebed.lake.storage import Storage

        Storage(f"s3://{name}").fs.call_s3("create_bucket", Bucket=name)


class _Log(logging.Handler):
    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        if found := _LINE.search(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())):
            kind, path = found.groups()
            self._server.requests.append(("LIST" if "list-type=2" in path else kind, path))


@contextmanager
def running() -> Iterator[Server]:
    """A server on a free port."""
    from moto.server import ThreadedMotoServer

    threaded = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    threaded.start()
    host, port = threaded.get_host_and_port()
    server, log = Server(f"http://{host}:{port}"), logging.getLogger("werkzeug")
    handler, level, propagate = _Log(server), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield server
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        threaded.stop()
