"""kit.hub against a local server and local caches: commits, downloads, and each failure."""

import json
import threading

import pytest

from kit import hub, paths
from tests.fake_hub import build_cache, serve

OLD, NEW = "1" * 40, "2" * 40
REPO, KEY = "org/name", "dataset:org/name"


@pytest.fixture(autouse=True)
def empty_cache(hub_cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return hub_cache


def recorded() -> dict:
    return json.loads(paths.REVISIONS.read_text())


def test_a_file_is_announced_downloaded_once_and_its_commit_recorded(monkeypatch, capsys):
    content = b"x" * 1_500_000
    with serve({f"datasets/{REPO}/a/b.jsonl": content}, {"main": OLD, OLD: OLD}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        path, commit = hub.fetch(REPO, "a/b.jsonl", "dataset")
        assert path.read_bytes() == content and commit == OLD
        assert capsys.readouterr().out == (
            f"download dataset org/name/a/b.jsonl at {OLD[:12]} (1.5 MB)\n"
        )
        requests = len(log)
        assert hub.fetch(REPO, "a/b.jsonl", "dataset") == (path, OLD)
        assert len(log) == requests, "a cached file needs no request"
        assert capsys.readouterr().out == ""
    assert recorded() == {KEY: OLD}


def test_the_recorded_commit_is_used_after_main_has_moved(monkeypatch):
    commits = {"main": OLD, OLD: OLD, NEW: NEW}
    files = {f"datasets/{REPO}/{name}": name.encode() for name in ("one", "two", "three")}
    with serve(files, commits) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        hub.fetch(REPO, "one", "dataset")
        commits["main"] = NEW
        assert hub.fetch(REPO, "two", "dataset")[1] == OLD
        with pytest.raises(hub.HubError, match=f"first used at commit {OLD[:12]}.*remove '{KEY}'"):
            hub.fetch(REPO, "two", "dataset", revision=NEW)
        with pytest.raises(hub.HubError, match=f"first used at commit {OLD[:12]}"):
            hub.fetch(REPO, "three", "dataset", revision="main")
        assert not any("GET" in line and "three" in line for line in log), "nothing is fetched"
    assert recorded() == {KEY: OLD}


def test_a_commit_that_is_gone_from_the_hub_says_how_to_go_on(monkeypatch):
    hub.record_revision("dataset", REPO, OLD)
    with serve({f"datasets/{REPO}/one": b"1"}, {"main": NEW}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        with pytest.raises(hub.HubError, match=f"not on the hub; remove '{KEY}'"):
            hub.fetch(REPO, "one", "dataset")


@pytest.mark.parametrize(
    ("repo", "file", "error", "words"),
    [
        ("org/secret", "one", hub.HubError, "gated: accept its terms at .*/datasets/org/secret"),
        ("org/none", "one", hub.HubError, "not on the hub, or private"),
        ("not a name", "one", hub.HubError, "not on the hub, or private"),
        (REPO, "other", hub.HubFileMissing, "has no such file"),
    ],
)
def test_each_refusal_of_the_hub_is_one_sentence(monkeypatch, repo, file, error, words):
    with serve({f"datasets/{REPO}/one": b"1"}, {"main": OLD}, gated="datasets/org/secret") as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        with pytest.raises(error, match=words) as caught:
            hub.fetch(repo, file, "dataset")
    assert "\n" not in str(caught.value)
    assert not paths.REVISIONS.exists()


def test_without_a_network(empty_cache, monkeypatch):
    with pytest.raises(hub.HubError, match="not in the hub cache and the hub cannot be reached"):
        hub.fetch(REPO, "one", "model")
    build_cache(empty_cache, "model", REPO, {"one": b"1"}, commit=OLD)
    path, commit = hub.fetch(REPO, "one", "model")
    assert (path.read_bytes(), commit) == (b"1", OLD)
    assert hub.pinned_revision("model", REPO) == OLD
    assert hub.pinned_revision("dataset", REPO) is None
    with pytest.raises(hub.HubFileMissing, match="not among the cached files"):
        hub.fetch(REPO, "two", "model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch(REPO, "one", "model") == (path, OLD)
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set"):
        hub.fetch("org/none", "one", "model")


def test_a_cache_at_another_commit_than_the_recorded_one_is_refused(empty_cache):
    build_cache(empty_cache, "model", REPO, {"one": b"1"}, commit=NEW)
    hub.record_revision("model", REPO, OLD)
    words = f"first used at commit {OLD[:12]} and is now asked for or offered at {NEW[:12]}"
    with pytest.raises(hub.HubError, match=words):
        hub.fetch(REPO, "one", "model")


def test_plan_tells_size_and_records_nothing(monkeypatch):
    with serve({f"{REPO}/weights": b"12345"}, {"main": OLD}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        assert hub.plan_fetch(REPO, "weights", "model") == hub.FetchPlan(OLD, 5, cached=False)
        assert not any(line.startswith("GET") for line in log)
    assert not paths.REVISIONS.exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_snapshot_is_complete_and_then_needs_no_network(monkeypatch, sharded):
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin"]
    shards = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    files = {f"{REPO}/{name}": name.encode() for name in names}
    if sharded:
        weight_map = {"a": shards[0], "b": shards[1], "c": shards[0]}
        files |= {f"{REPO}/{name}": b"weights" for name in shards}
        files[f"{REPO}/{hub.SHARDS}"] = json.dumps({"weight_map": weight_map}).encode()
    else:
        files[f"{REPO}/{hub.WEIGHTS}"] = b"weights"
    with serve(files, {"main": OLD, OLD: OLD}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        folder, commit = hub.snapshot(REPO)
        got = {file.name for file in folder.iterdir()}
        assert commit == OLD and got == {n.split("/")[-1] for n in files} - {"pytorch_model.bin"}
        requests = len(log)
        assert hub.snapshot(REPO) == (folder, OLD) and len(log) == requests
        if sharded:  # an interrupted download is taken up again
            (folder / shards[1]).unlink()
            assert hub.snapshot(REPO)[0].joinpath(shards[1]).read_bytes() == b"weights"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.snapshot(REPO) == (folder, OLD)


def test_a_model_with_pickles_alone_is_refused(monkeypatch):
    files = {f"{REPO}/config.json": b"{}", f"{REPO}/pytorch_model.bin": b"pickle"}
    with serve(files, {"main": OLD, OLD: OLD}) as log:
        monkeypatch.setenv("HF_ENDPOINT", log[0])
        with pytest.raises(hub.HubError, match="pickled weights are not read"):
            hub.snapshot(REPO)


def test_records_written_at_once_are_all_kept():
    repos = [f"org/{i}" for i in range(40)]
    threads = [
        threading.Thread(target=hub.record_revision, args=("model", repo, OLD)) for repo in repos
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorded() == {f"model:{repo}": OLD for repo in repos}
    with pytest.raises(hub.HubError, match="results would not compare"):
        hub.record_revision("model", "org/7", NEW)
    paths.REVISIONS.write_text("{")
    with pytest.raises(hub.HubError, match="is not JSON"):
        hub.pinned_revision("model", "org/7")
