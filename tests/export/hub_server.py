"""A stand-in for the Hugging Face Hub on 127.0.0.1: the calls that uploads and downloads make.

Repositories are kept in memory. A request without the token TOKEN is refused as the Hub does.
"""

import base64
import hashlib
import http.server
import json
import re
import threading

TOKEN = "hf_" + "x" * 34


class Hub(http.server.ThreadingHTTPServer):
    """Serves while the block runs; `url` is its address, `repositories` what was pushed.

    {OWNER/NAME: {"private": bool, "commits": [(commit, {file: content})]}}.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories, self.requested = {}, []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def find(self, name: str, revision: str):
        """(commit, files) of a repository at main or at a commit; None without it."""
        commits = self.repositories.get(name, {"commits": []})["commits"]
        found = [pair for pair in commits if revision in ("main", pair[0])]
        return found[-1] if found else None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requested.append(self.path)
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self._answer(200, {"type": "user", "name": "me", "auth": {}})
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = info or tree or file
        name, revision = match[1], match[2] or "main"
        if name not in self.server.repositories:
            return self._missing("RepoNotFound", 401)
        found = self.server.find(name, revision)
        if found is None and not (info and match[2] is None):
            return self._missing("RevisionNotFound", 404)
        commit, files = found or ("0" * 40, {})
        if info:
            return self._answer(200, {
                "id": name, "modelId": name, "sha": commit, "tags": [],
                "private": self.server.repositories[name]["private"],
                "siblings": [{"rfilename": file} for file in files]})
        if tree:
            return self._answer(200, [
                {"type": "file", "path": file, "size": len(content), "oid": _oid(content)}
                for file, content in files.items()])
        content = files[file[3]]
        return self._answer(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repositories = self.server.repositories
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._missing("", 401)
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if name in repositories:
                return self._answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            private = asked.get("private") or asked.get("visibility") == "private"
            repositories[name] = {"private": bool(private), "commits": []}
            return self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        name, action = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main",
                                self.path).groups()
        if action == "preupload":
            return self._answer(200, {"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]]})
        files = dict(repositories[name]["commits"][-1][1] if repositories[name]["commits"] else {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repositories[name]["commits"].append((commit, files))
        return self._answer(200, {
            "success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}"})

    def _answer(self, status: int, content, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str, status: int):
        self._answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": "no"})

    def log_message(self, *_):
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
