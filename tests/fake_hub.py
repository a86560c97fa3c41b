"""A hub without a network: a cache folder in the hub's layout, and a server that talks like it."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def build_cache(
    root: Path, repo_type: str, repo: str, files: dict[str, bytes], commit: str = "a" * 40
) -> Path:
    """Write `files` as the snapshot `commit` of a repository, with main pointing at it."""
    folder = root / f"{repo_type}s--{repo.replace('/', '--')}"
    for name, content in files.items():
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder


@contextmanager
def serve(files: dict[str, bytes], commits: dict[str, str], gated: str = "") -> Iterator[list[str]]:
    """Serve `files` ({"datasets/org/name/file": bytes}); yields [address, requests seen...].

    `commits` maps a revision to the commit it stands for and may be changed while serving; the
    repository `gated` answers as a gated one does.
    """
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            log.append(f"{self.command} {self.path}")
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            content = files.get(f"{repo}/{name}")
            known = any(file.startswith(f"{repo}/") for file in files)
            if repo == gated:
                return self.fail(403, "GatedRepo")
            if not known:
                return self.fail(404, "RepoNotFound")
            if revision not in commits:
                return self.fail(404, "RevisionNotFound")
            if content is None:
                return self.fail(404, "EntryNotFound")
            self.send_response(200)
            self.send_header("X-Repo-Commit", commits[revision])
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    log.append(f"http://127.0.0.1:{server.server_address[1]}")
    try:
        yield log
    finally:
        server.shutdown()
        server.server_close()
