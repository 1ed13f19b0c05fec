"Chromium as a person uses it, driven by its own protocol: pages are opened, keys pressed, buttons clicked."
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import websocket

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Browser:
    "A page of a headless Chromium of its own; closed at the end of the `with` block."

    def __init__(self, folder):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1000",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0"]
        self.process = subprocess.Popen([CHROMIUM, *flags, f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.number, self.console = 0, []
        try:
            port = until(lambda: (folder / "DevToolsActivePort").read_text().split()[0], "Chromium did not start")
            pages = until(lambda: [p for p in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list")) if p["type"] == "page"], "Chromium opened no page")
            self.socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
            for domain in ("Page", "Runtime", "Log"): self.call(f"{domain}.enable")
            self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as the window in front
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self): return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(20)

    def call(self, method, **parameters):
        "A command of the protocol, and its result; what the page writes to the console meanwhile is kept."
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Runtime.exceptionThrown": self.console.append(message["params"]["exceptionDetails"].get("exception", {}).get("description", "an exception"))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error": self.console.append(message["params"]["entry"]["text"])
            if message.get("id") == self.number: break
        assert "error" not in message, message["error"]
        return message["result"]

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def value(self, expression):
        "What a JavaScript expression gives."
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        return until(lambda: self.value(expression), f"{expression} is not true after {seconds} s", seconds)

    def press(self, key):
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text): self.call("Input.insertText", text=text)

    def picture(self, path):
        "What the window shows, as a PNG file."
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


def until(attempt, complaint, seconds=60):
    "The first true result of a function, which may fail until then."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if result := attempt(): return result
        except (OSError, AssertionError, IndexError, ValueError): pass
        time.sleep(0.2)
    raise AssertionError(complaint)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def jupyter_lab(tmp_path, root, **environment):
    "JupyterLab on a folder; gives its address."
    port = free_port()
    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "RUNTIME")} | {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    command = [Path(sys.executable).parent / "jupyter", "lab", "--no-browser", "--allow-root", "--expose-app-in-browser", f"--ServerApp.port={port}",
               "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={root}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | places | environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: "is running at" in (tmp_path / "lab.log").read_text(), "JupyterLab did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


NOTEBOOK = "[...window.jupyterapp?.shell?.widgets('main') ?? []][0]"


def run_all(browser, address):
    "Open a notebook in JupyterLab and choose Run All; `window.ended` says when all cells have run."
    browser.open(f"{address}?reset")
    browser.wait(f"{NOTEBOOK}?.context?.sessionContext?.session?.kernel?.status == 'idle'")
    browser.value(f"jupyterapp.shell.activateById({NOTEBOOK}.id)")
    browser.wait("jupyterapp.shell.currentWidget != null")
    browser.call("Runtime.evaluate", expression="window.ended = false; jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ended = true; })")
