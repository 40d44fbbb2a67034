"""Servers on this machine, for tests of data that lies elsewhere: HTTP that fails as asked, S3, GCS, and the Hub."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import boto3
import fsspec
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
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


@contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """A server of Google's storage with a bucket; the URL by which STORAGE_EMULATOR_HOST names it.

    It knows no conditions: a file that must be new is written over.
    """
    storage = Storage(use_memory_fs=True)
    create_bucket(bucket, storage)
    with _GoogleServer(("127.0.0.1", 0), functools.partial(RequestHandler, storage)) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _GoogleServer(ThreadingHTTPServer):
    """The emulator's own takes one connection at a time."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are no news."""


def upload_to_gcs(folder: Path, bucket: str) -> str:
    """Put the files of a folder in a bucket; its URL."""
    system = fsspec.filesystem("gs")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{bucket}/data/{path.relative_to(folder)}", path.read_bytes())
    return f"gs://{bucket}/data"


class HubServer(ThreadingHTTPServer):
    """Answers as the Hugging Face Hub does of one data set, `owner/name`, whose files are those of a folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_HubHandler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(SimpleHTTPRequestHandler):
    REPOSITORY = "datasets/owner/name"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.removeprefix("/")
        tree, file = f"api/{self.REPOSITORY}/tree/main", f"{self.REPOSITORY}/resolve/main/"
        if path in (f"api/{self.REPOSITORY}", f"api/{self.REPOSITORY}/revision/main"):
            self.answer({"_id": "1", "id": "owner/name", "sha": "0" * 40, "siblings": []})
        elif path.startswith(tree):
            found = [self.entry(path) for path in Path(self.directory, path.removeprefix(tree).strip("/")).iterdir()]
            self.answer(found)
        elif path.startswith(file):
            self.path = f"/{path.removeprefix(file)}"
            super().do_GET()
        else:
            self.send_error(404)

    def entry(self, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(self.directory))
        kind = "directory" if path.is_dir() else "file"
        oid = hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()
        return {"type": kind, "path": name, "size": path.stat().st_size, "oid": oid}

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests print nothing."""
