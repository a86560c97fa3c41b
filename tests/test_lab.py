"""Notebook 01 in JupyterLab, driven through a browser as a reader steps through it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import websocket
from nbformat import read

from kit import paths

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--window-size=1280,900")
# The widget of the open notebook; outputs of its code cells as text, and the names of their errors.
PANEL = "const panel = window.jupyterapp.shell.currentWidget;"
RUN = PANEL + "return await window.jupyterapp.commands.execute('notebook:run-all-cells');"
READY = "return !!window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;"
SHOWN = (
    PANEL
    + """
const cells = panel.content.widgets.map(cell => cell.model).filter(cell => cell.type === 'code');
const outputs = cells.flatMap(cell => cell.outputs.toJSON());
return {
  counts: cells.map(cell => cell.executionCount),
  errors: outputs.filter(out => out.output_type === 'error').map(out => out.evalue),
  text: outputs.map(out => out.text ?? out.data?.['text/plain'] ?? '').join('\\n'),
};"""
)
SET = (
    PANEL
    + """
const cell = panel.content.widgets.map(cell => cell.model)
  .find(cell => (cell.getMetadata('tags') ?? []).includes('parameters'));
for (const [name, value] of Object.entries(VALUES))
  cell.sharedModel.setSource(
    cell.sharedModel.getSource().replace(new RegExp(`^${name} = .*$`, 'm'), `${name} = ${value}`));
await panel.context.save();"""
)


class Page:
    """One tab of a browser, by the DevTools protocol."""

    def __init__(self, port: int):
        target = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        url = next(tab["webSocketDebuggerUrl"] for tab in target if tab["type"] == "page")
        self.socket = websocket.create_connection(url, timeout=240, suppress_origin=True)
        self.sent = 0

    def call(self, method: str, **params) -> dict:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            pass
        return answer.get("result", {})  # none where the page has just gone elsewhere

    def run(self, body: str):
        """What the body of an asynchronous function returns in the page."""
        answer = self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{{body}}})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer.get("result", {}).get("value")


def awaited(ready, seconds: float = 120):
    """What `ready` returns once it returns something true."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def process(command: list[str], log: Path, env: dict):
    """A process, ended with all its children when the block is left."""
    with log.open("w") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, env=env, start_new_session=True
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        started.wait(30)


@pytest.fixture
def page(tmp_path):
    """JupyterLab on a copy of 01, open in a browser."""
    home, root = tmp_path / "home", tmp_path / "root"
    home.mkdir()
    root.mkdir()
    shutil.copy(paths.ROOT / "notebooks" / "01_baseline.ipynb", root)
    env = os.environ | {"HOME": str(home), "KIT_OUTPUTS": str(tmp_path / "outputs")}
    env |= {"KIT_CACHE": str(paths.CACHE), "PYTHONPATH": str(paths.ROOT)}
    lab = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    lab += [f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    lab += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    browser = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/browser"]
    browser += ["--remote-debugging-port=0", "about:blank"]
    with (
        process(lab, tmp_path / "lab.log", env),
        process(browser, tmp_path / "browser.log", env),
    ):
        runtime = home / ".local" / "share" / "jupyter" / "runtime"
        written = awaited(lambda: "".join(f.read_text() for f in runtime.glob("jpserver-*.json")))
        server = json.loads(written)
        port = tmp_path / "browser" / "DevToolsActivePort"
        tab = Page(int(awaited(lambda: port.exists() and port.read_text()).split()[0]))
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        tab.call("Page.navigate", url=f"{server['url']}lab/tree/01_baseline.ipynb")
        awaited(lambda: tab.run(READY))
        yield tab


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
def test_01_runs_in_jupyterlab_and_again_with_another_parameter(page, tmp_path):
    page.run(SET.replace("VALUES", '{"MAX_NEW_TOKENS": "8"}'))
    for problems in (4, 6):
        page.run(SET.replace("VALUES", json.dumps({"PROBLEMS": str(problems)})))
        done, shown = page.run(RUN), page.run(SHOWN)
        assert done and not shown["errors"], shown["errors"]
        assert all(shown["counts"])
        assert f"laptop test: {problems} problems" in shown["text"]
    cells = read(tmp_path / "root" / "01_baseline.ipynb", 4).cells
    parameters = next(c.source for c in cells if "parameters" in c.metadata.get("tags", ()))
    assert "\nPROBLEMS = 6\n" in parameters and "\nMAX_NEW_TOKENS = 8\n" in parameters
