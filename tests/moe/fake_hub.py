"""A server on the loopback that plays a hub's API for huggingface_hub, in this process."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Offers the files of ``folders`` by model name. Close it, or use it in a with statement."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.gated: set[str] = set()
        """Models whose files no one may read without a token."""
        self.cuts: dict[str, int] = {}
        """By file: how many of its bytes are sent before a connection breaks."""
        self.times_cut = 1
        """How often each file of ``cuts`` breaks."""
        self.served: Counter[str] = Counter()
        """Answers with content, by file."""
        self.ranges: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        poll = {"poll_interval": 0.02}
        threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        request.close_connection = True  # so that a closed hub answers no more
        parts = unquote(request.path.partition("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.folders.get(name)
        if folder is None:
            return self._refuse(request, 401, "RepoNotFound", with_body)
        if rest[1:2] and rest[1] not in ("main", COMMIT):
            return self._refuse(request, 404, "RevisionNotFound", with_body)
        if rest[:1] == ["resolve"]:
            if name in self.gated:
                return self._refuse(request, 403, "GatedRepo", with_body)
            return self._send_file(request, folder / "/".join(rest[2:]), with_body)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": _etag(path),
            }
            for path in files
        ]
        if rest[:1] == ["tree"]:
            return self._send_json(request, entries)
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        values = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": []}
        return self._send_json(request, values | {"siblings": siblings, "downloads": 0})

    def _send_json(self, request: BaseHTTPRequestHandler, values: object) -> None:
        body = json.dumps(values).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(body)

    def _refuse(
        self, request: BaseHTTPRequestHandler, status: int, code: str, with_body: bool
    ) -> None:
        body = json.dumps({"error": code}).encode() if with_body else b""
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(body)

    def _send_file(self, request: BaseHTTPRequestHandler, path: Path, with_body: bool) -> None:
        if not path.is_file():
            return self._refuse(request, 404, "EntryNotFound", with_body)
        content = path.read_bytes()
        wanted = request.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        request.send_response(206 if wanted else 200)
        request.send_header("ETag", f'"{_etag(path)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(content) - start))
        if wanted:
            whole = len(content)
            request.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        request.send_header("Connection", "close")
        request.end_headers()
        if not with_body:
            return None
        if wanted:
            self.ranges.append(f"{path.name} from {start}")
        self.served[path.name] += 1
        cut = self.cuts.get(path.name)
        if cut is not None and self.served[path.name] <= self.times_cut:
            request.wfile.write(content[start : start + cut])
            request.wfile.flush()
            request.connection.shutdown(2)
            return None
        request.wfile.write(content[start:])
        return None


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
