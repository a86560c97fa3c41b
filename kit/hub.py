"""Files of the Hugging Face hub at an enforced commit.

The kit ships no commit hashes. The first use of a repository trusts the commit that "main" points
to and writes it to `paths.REVISIONS`, under "dataset:<repo>" or "model:<repo>"; every later use
asks for that commit. A file that is cached at this commit needs no network.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hf

from kit import paths
from kit.paths import atomic

COMMIT_LENGTH = 40  # hexadecimal digits of a full commit hash
PATIENCE_S = 5  # until the hub answers
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL_FILES = (  # of a model, any of which a repository may lack
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


class HubError(RuntimeError):
    """A file of the hub is not available; the message names it, the reason and the fix."""


class HubFileMissing(HubError):
    """The repository exists and lacks the file: for callers with an alternative."""


@dataclass(frozen=True)
class FetchPlan:
    """Result of `plan_fetch`: the commit and size of a file, and whether it is cached."""

    commit: str
    size_bytes: int | None  # None where the hub does not say
    cached: bool


def cache_dir() -> str:
    """The folder of the hub cache; read at each call, since huggingface_hub reads it at import."""
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE asks for cached files only."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def pinned_revision(repo_type: str, repo: str) -> str | None:
    """The commit that was recorded on first use of this repository, None before that."""
    return _read_revisions().get(f"{repo_type}:{repo}")


def record_revision(repo_type: str, repo: str, commit: str) -> None:
    """Record `commit` for a repository; HubError if another one is recorded."""
    path, key = paths.REVISIONS, f"{repo_type}:{repo}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        revisions = _read_revisions()
        if revisions.get(key, commit) != commit:
            raise HubError(_revision_mismatch(key, revisions[key], commit))
        if key in revisions:
            return
        text = json.dumps({**revisions, key: commit}, indent=1, sort_keys=True) + "\n"
        with atomic(path) as part:
            part.write_text(text)


def plan_fetch(repo: str, filename: str, repo_type: str, revision: str | None = None) -> FetchPlan:
    """Commit, size and cache state of one file, without downloading or recording anything."""
    commit = _resolve_revision(repo, repo_type, revision)
    place = {"repo_type": repo_type, "revision": commit}
    with _explained(repo, filename, repo_type, commit):
        cached = try_to_load_from_cache(repo, filename, cache_dir(), **place)
        if isinstance(cached, str):
            return FetchPlan(_commit(cached), Path(cached).stat().st_size, cached=True)
        if offline():
            raise hf.OfflineModeIsEnabled
        # One HEAD request; hf_hub_download would retry for 20 s without a network.
        url = hf_hub_url(repo, filename, **place, endpoint=_endpoint())
        metadata = get_hf_file_metadata(url, timeout=PATIENCE_S)
    return FetchPlan(metadata.commit_hash or commit, metadata.size, cached=False)


def fetch(
    repo: str, filename: str, repo_type: str, revision: str | None = None
) -> tuple[Path, str]:
    """Local path and commit of one file, downloaded if it is not cached.

    Without `revision` the recorded commit of the repository is used, else "main" of the cache, else
    of the hub. Records the commit. Raises HubError if it is not the recorded one, HubFileMissing if
    the repository lacks the file.
    """
    plan = plan_fetch(repo, filename, repo_type, revision)
    if (pinned := pinned_revision(repo_type, repo) or plan.commit) != plan.commit:
        raise HubError(_revision_mismatch(f"{repo_type}:{repo}", pinned, plan.commit))
    if not plan.cached:
        where = f"{repo_type} {repo}/{filename} at {plan.commit[:12]}"
        print(f"download {where} ({_size(plan.size_bytes)})", flush=True)
    commit = _resolve_revision(repo, repo_type, revision)
    with _explained(repo, filename, repo_type, commit):
        path = hf_hub_download(
            repo,
            filename,
            repo_type=repo_type,
            revision=commit,
            cache_dir=cache_dir(),
            local_files_only=plan.cached,
            endpoint=_endpoint(),
        )
    record_revision(repo_type, repo, _commit(path))
    return Path(path), _commit(path)


def snapshot(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """Folder and commit of a model, or of an adapter: configuration, tokenizer and safetensors.

    Weights are fetched last, so a snapshot with all weights is complete and needs no network.
    HubError if the repository has no safetensors: pickled weights are never read.
    """
    try:
        config, commit = fetch(repo, "config.json", "model", revision)
    except HubFileMissing as missing:
        try:
            config, commit = fetch(repo, ADAPTER_CONFIG, "model", revision)
        except HubFileMissing:
            raise missing from None
    folder, whole = config.parent, config.name != ADAPTER_CONFIG
    if not (_has_weights(folder) if whole else (folder / ADAPTER).exists()):
        for name in SMALL_FILES:
            with suppress(HubFileMissing):
                fetch(repo, name, "model", commit)
        if not whole:
            fetch(repo, ADAPTER, "model", commit)
            return folder, commit
        try:
            fetch(repo, WEIGHTS, "model", commit)
        except HubFileMissing:
            for name in _shards(_index(repo, commit)):
                fetch(repo, name, "model", commit)
    return folder, commit


def _index(repo: str, commit: str) -> Path:
    try:
        return fetch(repo, SHARDS, "model", commit)[0]
    except HubFileMissing as error:
        raise HubError(
            f"model {repo} has neither {WEIGHTS} nor {SHARDS} (at {commit[:12]}): pickled weights "
            "are not read; choose a repository with safetensors, or connect if you are offline"
        ) from error


def _shards(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _has_weights(folder: Path) -> bool:
    index = folder / SHARDS
    names = _shards(index) if index.exists() else [WEIGHTS]
    return all((folder / name).exists() for name in names)


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "size unknown"
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


def _commit(path: str) -> str:
    """The commit in a path <cache>/<repository>/snapshots/<commit>/<file>."""
    return Path(path).relative_to(cache_dir()).parts[2]


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _resolve_revision(repo: str, repo_type: str, revision: str | None) -> str:
    """The revision to request: the given one, else the recorded one, else main."""
    key, pinned = f"{repo_type}:{repo}", pinned_revision(repo_type, repo)
    if revision and pinned and len(revision) == COMMIT_LENGTH and revision != pinned:
        raise HubError(_revision_mismatch(key, pinned, revision))
    return revision or pinned or "main"


def _read_revisions() -> dict[str, str]:
    path = paths.REVISIONS
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise HubError(f"{path} is not JSON: restore it, or delete it to trust anew") from None


@contextmanager
def _explained(repo: str, filename: str, repo_type: str, revision: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one sentence."""
    try:
        yield
    except (hf.EntryNotFoundError, hf.HFValidationError, httpx.HTTPError, OSError) as error:
        raise _explain(error, repo, filename, repo_type, revision) from error


def _explain(error: Exception, repo: str, filename: str, repo_type: str, revision: str) -> HubError:
    what = f"{repo_type} {repo} ({filename}, revision {revision[:12]})"
    page = f"{_endpoint()}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    if isinstance(error, hf.GatedRepoError):
        return HubError(f"{what} is gated: accept its terms at {page}, then run `hf auth login`")
    if isinstance(error, (hf.RepositoryNotFoundError, hf.HFValidationError)):
        return HubError(f"{what} is not on the hub, or private: check the name, or `hf auth login`")
    if isinstance(error, hf.RevisionNotFoundError):
        fix = f"remove '{repo_type}:{repo}' from {paths.REVISIONS} to accept what is there now"
        return HubError(f"{what}: that revision is not on the hub; {fix}")
    if isinstance(error, hf.RemoteEntryNotFoundError):
        return HubFileMissing(f"{what}: the repository has no such file; see {page}/tree/main")
    unreachable = (hf.LocalEntryNotFoundError, hf.OfflineModeIsEnabled, httpx.TransportError)
    if isinstance(error, unreachable):
        return _not_cached(what, repo, repo_type, revision)
    return HubError(f"{what}: {error}; check the network and the free disk, and run again")


def _not_cached(what: str, repo: str, repo_type: str, revision: str) -> HubError:
    """The error for a file that is not cached and cannot be downloaded, in three cases."""
    folder = Path(cache_dir()) / f"{repo_type}s--{repo.replace('/', '--')}"
    main = folder / "refs" / "main"
    cached = main.read_text().strip() if main.exists() else None
    if cached and revision not in ("main", cached):
        return HubError(_revision_mismatch(f"{repo_type}:{repo}", revision, cached))
    if cached and (folder / "snapshots" / cached).is_dir():
        return HubFileMissing(f"{what} is not among the cached files; connect and run again")
    why = "HF_HUB_OFFLINE is set" if offline() else "the hub cannot be reached"
    return HubError(f"{what} is not in the hub cache and {why}: fetch it where there is a network")


def _revision_mismatch(key: str, previous: str, current: str) -> str:
    return (
        f"{key} was first used at commit {previous[:12]} and is now asked for or offered at "
        f"{current[:12]}: results would not compare; to accept the new one, remove '{key}' from "
        f"{paths.REVISIONS}"
    )


def hash_files(files: list[Path]) -> str:
    """SHA-256 of one file, or of the digests of several in the given order."""
    digests = []
    for file in files:
        with open(file, "rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
