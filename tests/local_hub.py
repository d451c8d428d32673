"""A hub on this machine: the requests of huggingface_hub that create repositories, commit files and read them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import transformers.utils.hub
import yaml


class LocalHub(ThreadingHTTPServer):
    """The hub; `files` holds the content of each file by repository and path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits = 0  # a cache keeps the files of a commit

    @property
    def commit(self) -> str:
        return f"{self.commits:040x}"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub(monkeypatch, cache) -> Iterator[LocalHub]:
    """Serve a hub that huggingface_hub and transformers use in place of their own, with a cache folder."""
    with LocalHub() as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_local")
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Requests(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        match path:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repository = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
                self.server.files.setdefault(repository, {})
                self._answer({"url": f"{self.server.endpoint}/{repository}", "id": "0", "name": repository})
            case ["api", "validate-yaml"]:
                header = json.loads(body)["content"].split("---\n")[1]
                yaml.safe_load(header)
                self._answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _] if f"{owner}/{name}" in self.server.files:
                asked = [file["path"] for file in json.loads(body)["files"]]
                told = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self._answer({"files": [{"path": file, **told} for file in asked]})
            case ["api", "models", owner, name, "commit", _] if f"{owner}/{name}" in self.server.files:
                self.server.commits += 1
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.server.files[f"{owner}/{name}"][line["value"]["path"]] = content
                commit = self.server.commit
                url = f"{self.server.endpoint}/{owner}/{name}/commit/{commit}"
                self._answer({"commitUrl": url, "commitOid": commit})
            case _:
                self._missing("RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", "models", owner, name, "tree", *_] if f"{owner}/{name}" in self.server.files:
                self._missing("EntryNotFound")  # no repository has folders
            case ["api", "models", owner, name, *_] if (files := self.server.files.get(f"{owner}/{name}")) is not None:
                siblings = [{"rfilename": file} for file in files]
                self._answer({"id": f"{owner}/{name}", "sha": self.server.commit, "siblings": siblings})
            case [owner, name, "resolve", _, *file] if (files := self.server.files.get(f"{owner}/{name}")) is not None:
                content = files.get("/".join(file))
                if content is None:
                    self._missing("EntryNotFound")
                else:
                    tag = f'"{hashlib.sha1(content).hexdigest()}"'
                    self._send(200, content, {"ETag": tag, "X-Repo-Commit": self.server.commit})
            case _:
                self._missing("RepoNotFound")

    def _answer(self, content) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": self.server.commit})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Write nothing."""
