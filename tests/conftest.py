import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest

# the tests run in several processes at once: with a thread per core in each they would wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent


def tracked(*patterns):
    "Files of the project that git tracks or would: what a commit holds."
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(path for path in {ROOT / name for name in names} if path.is_file())


KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}  # the metadata of a notebook


def cells(name, kind="code"):
    "A notebook's cells of a kind, with their source as one text."
    result = json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"]
    return [c | {"text": "".join(c["source"])} for c in result if c["cell_type"] == kind]


def python_of(text):
    "A cell's code without Jupyter's own commands."
    return re.sub(r"^[%!].*", "", text, flags=re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small Stable Diffusion of random weights, in diffusers' layout."
    import pipelines  # not above: most tests need no torch
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    pipelines.small_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def copy_project():
    "A function that copies the project without its results; commands in the copy use the copy's modules."
    def copy(target):
        for path in tracked():
            name = path.relative_to(ROOT)
            if name.parts[0] != "outputs":
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target / name)
        return target
    return copy


@pytest.fixture(scope="session")
def run_in():
    "A function that runs a command of the environment in a folder, with that folder's modules."
    def run(folder, command, *args, **environment):
        env = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"} | environment
        env.pop("CXR_NB_OUTPUTS", None)
        return subprocess.run([str(Path(sys.executable).parent / command), *map(str, args)], cwd=folder, env=env, capture_output=True, text=True)
    return run


@pytest.fixture
def hub():
    """A function that serves folders as repositories of a Hugging Face hub on this machine: (address, list of paths asked for).

    Weights are announced as large files. It can misbehave: `served` has other bytes for some names, `listing` changes the list of
    files, `following` says where that goes on, `etag` the name of a file's content, `status` refuses a path, of a path that is `silent`
    nothing is heard, and of one that `drips` a byte now and then. A body is `cut` where the network goes in mid-download.
    """
    servers, end = [], threading.Event()

    def entry(folder, name):
        content = (folder / name).read_bytes()
        result = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        large = name.endswith((".bin", ".safetensors"))
        return result | ({"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}} if large else {})

    def serve(repositories, revision, served={}, listing=lambda tree: tree, etag=lambda entry: entry.get("lfs", entry)["oid"],
              status=lambda path: None, silent=lambda method, path: False, drips=lambda path: False, following=lambda path: None,
              cut=lambda path: False):
        asked = []

        class Hub(BaseHTTPRequestHandler):
            def answer(self, body, **headers):
                self.send_response(200)
                for key, value in {"Content-Length": len(body), "X-Repo-Commit": revision, **headers}.items(): self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET": self.wfile.write(body[:len(body) // 2] if cut(self.path) else body)

            def drip(self):
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):
                    while not end.wait(0.1): self.wfile.write(b" ")

            def do_GET(self):
                asked.append(self.path)
                path = urlparse(self.path).path.lstrip("/")
                if silent(self.command, path): return end.wait()
                if drips(path): return self.drip()
                if status(path): return self.send_error(status(path))
                for repository, folder in repositories.items():
                    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
                    if path.startswith(f"api/models/{repository}"):
                        tree = listing([entry(folder, name) for name in names])
                        info = {"id": repository, "modelId": repository, "sha": revision, "siblings": [{"rfilename": name} for name in names]}
                        more = {"Link": f'<{following(self.path)}>; rel="next"'} if "/tree/" in path and following(self.path) else {}
                        return self.answer(json.dumps(tree if "/tree/" in path else info).encode(), Content_Type="application/json", **more)
                    if path.startswith(f"{repository}/resolve/{revision}/"):
                        name = path.split(f"/resolve/{revision}/")[1]
                        if name in names: return self.answer(served.get(name, (folder / name).read_bytes()), ETag=f'"{etag(entry(folder, name))}"')
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *args): pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    end.set()
    for server in servers: server.shutdown()


def pytest_collection_modifyitems(items):
    "The longest files go first: else they would run at the end, beside an idle worker."
    longest = ["report", "contract", "report_command", "cohorts", "runner", "training", "jupyterlab", "miniature", "wheel"]
    place = {f"test_{name}.py": i for i, name in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path.name, len(longest)))
