"""Servers on this machine, for tests of data that lies elsewhere: HTTP that fails as asked, and S3."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
from moto.server import ThreadedMotoServer


class FailingServer(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        faults: for the requests of a path, what each of the next ones meets: an HTTP code, "cut" or "stall".
        requests: the paths of the files that were asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(SimpleHTTPRequestHandler):
    server: FailingServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            self.send_error(fault)
        elif fault is None:
            super().do_GET()
        else:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            if fault == "stall":
                self.wfile.flush()
                time.sleep(2)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests print nothing."""


@contextmanager
def http_server(folder: Path) -> Iterator[FailingServer]:
    with FailingServer(folder) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def s3_server() -> Iterator[Any]:
    """A server of S3 and a client of it; AWS_ENDPOINT_URL and keys must be set as `s3_environment` says."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield server
    server.stop()


def s3_environment(server: ThreadedMotoServer) -> dict[str, str]:
    _, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys}


def upload(folder: Path, bucket: str) -> str:
    """Put the files of a folder in a new bucket; its URL."""
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, f"data/{path.relative_to(folder)}")
    return f"s3://{bucket}/data"
