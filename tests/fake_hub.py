"""A Hugging Face Hub on 127.0.0.1 that knows the four calls of a download and the ways in which the Hub says no."""

import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Repository:
    """One repository as the Hub shows it: its files and, for those who may not have them, (status, headers)."""

    def __init__(self, files=None, refuse_info=None, refuse_files=None):
        self.files = files or {}
        self.refuse_info = refuse_info
        self.refuse_files = refuse_files


class FakeHub(http.server.ThreadingHTTPServer):
    """The four calls that a download makes: model info, tree, HEAD and GET of a file."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = {}
        self.requests = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            self.reply(401, b"{}", {"X-Error-Message": "Invalid username or password."})  # as for private ones
        elif refused := repository.refuse_info if api else repository.refuse_files:
            self.reply(refused[0], b"{}", refused[1])
        elif api and rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in repository.files.items()
            ]
            self.reply(200, json.dumps(tree).encode())
        elif api:
            info = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": COMMIT, "private": False, "tags": []}
            self.reply(200, json.dumps(info | {"siblings": [{"rfilename": f} for f in repository.files]}).encode())
        elif (file := "/".join(rest[2:])) in repository.files:  # /owner/name/resolve/COMMIT/file
            content = repository.files[file]
            self.reply(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def point_library_at(url, cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
