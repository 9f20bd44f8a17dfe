"""A bucket on this machine, gs://bkt, whose server can fail as object storage does."""

import contextlib
import functools
import http.server
import io
import json
import logging
import pathlib
import threading
import time
import urllib.parse
import urllib.request

import pytest

from tests.common import environment

emulator = pytest.importorskip("gcp_storage_emulator.server")
pytest.importorskip("gcsfs")
buckets = pytest.importorskip("gcp_storage_emulator.handlers.buckets")
storage = pytest.importorskip("gcp_storage_emulator.storage")

NAME = "bkt"
_OWN = "of-the-test"  # in the address of calls that do not count
logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # of each missing file


class Bucket:
    """A bucket and its server, which runs within a `with` block.

    every: every so many calls one is answered 503, as of an overloaded server; 0 for none.
    refused: text in the address or the content of calls that are answered `status`; "" for none.
    methods: of these calls, POST and PUT at first.
    slow: text in the address of calls that take 2 seconds more; "" for none.
    calls, failed, slowed: the numbers of calls, of those that failed, and of slow ones.
    """

    def __init__(self):
        self.every, self.refused, self.slow = 0, "", ""
        self.status, self.methods = 403, ("POST", "PUT")
        self.calls = self.failed = self.slowed = 0
        self._storage, self._lock = _Storage(use_memory_fs=True), threading.Lock()
        buckets.create_bucket(NAME, self._storage)
        handler = functools.partial(_Handler, self)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, devices: int = 0, **variables) -> dict[str, str]:
        """The environment of a program that finds the bucket, with --import=tests.bucket_client."""
        return environment(devices, **variables) | {
            "STORAGE_EMULATOR_HOST": self._address,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": self._address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self._address,  # array_record
            "GOOGLE_CLOUD_PROJECT": "t",
        }

    def names(self, folder: str = "") -> list[str]:
        """The names of all files, or of those below a folder, relative to it."""
        start = f"{folder}/" if folder else ""
        with self._lock:
            found, _ = self._storage.get_file_list(NAME, start)
        return [file["name"].removeprefix(start) for file in found]

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with self._lock:
            return self._storage.get_file(NAME, name)

    def copy(self, folder: str, to: pathlib.Path) -> pathlib.Path:
        """Copies all files below a folder of the bucket to a new one on the disk."""
        for name in self.names(folder):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(self.read(f"{folder}/{name}"))
        return to

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, by a call that never fails."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name, _OWN: 1})
        url = f"{self._address}/upload/storage/v1/b/{NAME}/o?{query}"
        urllib.request.urlopen(urllib.request.Request(url, content, method="POST")).close()

    def fault(self, method: str, address: str, content: bytes) -> int:
        """The status by which a call fails; 0 where it does not."""
        if _OWN in address:
            return 0
        with self._lock:
            self.calls += 1
            status = 503 if self.every and self.calls % self.every == 0 else 0
            refused = self.refused.encode()
            if refused and method in self.methods and (
                    refused in urllib.parse.unquote_to_bytes(address) or refused in content[:2000]):
                status = self.status
            self.failed += bool(status)
            slow = bool(self.slow) and self.slow in urllib.parse.unquote(address)
            self.slowed += slow
        if slow:
            time.sleep(2)
        return status


class _Storage(storage.Storage):
    def _write_config_to_file(self):
        """Leaves out the list of all files, which each write would write anew."""


class _Handler(emulator.RequestHandler):
    """The emulator's answers, and the bucket's faults."""

    def __init__(self, bucket: Bucket, *arguments):
        self._bucket = bucket
        super().__init__(bucket._storage, *arguments)

    def _answer(self, handle) -> None:
        content = emulator._read_raw_data(self) or b""
        status = self._bucket.fault(self.command, self.path, content)
        self.rfile.close()
        self.rfile = io.BytesIO(content)
        del self.headers["Transfer-Encoding"]
        self.headers["Content-Length"] = str(len(content))
        with contextlib.suppress(ConnectionError):  # callers leave before an answer
            if status:
                self._refuse(status)
                return
            with self._bucket._lock:
                handle(self)

    def _refuse(self, status: int) -> None:
        answer = {"error": {"code": status, "message": f"the bucket answers {status}"}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


for name in ("do_GET", "do_POST", "do_PUT", "do_DELETE", "do_PATCH"):
    handle = getattr(emulator.RequestHandler, name)
    setattr(_Handler, name, functools.partialmethod(_Handler._answer, handle))
