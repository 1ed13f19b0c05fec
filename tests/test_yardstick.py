"The yardstick against other implementations, and its runs that are stopped, repeated or shared by processes."
import json

import numpy as np
import pytest
import test_prompts
import torch
from PIL import Image

from cxr_nb.asked_findings import asked_findings
from cxr_nb.image_lists import list_images
from cxr_nb.image_scan import scan
from cxr_nb.image_text import load_image_text
from cxr_nb.places import slug


@pytest.mark.parametrize("shortened", [False, True])
def test_findings_are_read_as_effusions_are(shortened):
    "Wherever the grammar of §2.8 says what a prompt asks for, the reading by finding says the same of the effusion it names."
    known = {**test_prompts.BOTH} | ({} if shortened else test_prompts.TEXT)
    for prompt, finding in known.items():
        read = asked_findings(slug(prompt) if shortened else prompt)["Pleural Effusion"]
        if finding == test_prompts.EFFUSION: assert read == 1, prompt
        if finding == test_prompts.NONE: assert not read > 0 and read != -1, prompt


# of these §2.8 refuses to say whether they ask for an effusion or for no finding; that no effusion is asked for is clear
RULED_OUT = {"no pleural effusion but cardiomegaly", "lung xray: no effusion; pneumothorax", "no effusion, and cardiomegaly",
             "a pneumothorax instead of a pleural effusion"}


def test_what_is_unclear_stays_open():
    for prompt, finding in (test_prompts.BOTH | test_prompts.TEXT).items():
        if finding != test_prompts.REFUSED: continue
        assert asked_findings(prompt)["Pleural Effusion"] not in ({1} if prompt in RULED_OUT else {0, 1}), prompt


@pytest.fixture
def whole_clip(tmp_path):
    "A small CLIP of random weights in transformers' layout, with its model and tokenizer."
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    letters = [*map(chr, range(97, 123))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}))
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = side | {"vocab_size": len(tokens), "max_position_embeddings": 16, "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=side | {"image_size": 32, "patch_size": 8}, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path, model, CLIPTokenizer.from_pretrained(tmp_path, trust_remote_code=False)


def test_a_whole_clip_gives_transformers_own_similarities(whole_clip):
    folder, model, tokenizer = whole_clip
    ours, words, images = load_image_text(folder), ["no effusion", "an effusion"], torch.rand(3, 1, 32, 32)
    tokens = tokenizer(words, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(pixel_values=(images.expand(-1, 3, -1, -1) - 0.5) / 0.2, **tokens).logits_per_image / model.logit_scale.exp()
        assert torch.allclose(ours.images(images) @ ours.texts(words).T, expected, atol=1e-5)
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say size, image_mean and image_std"): load_image_text(folder)


def test_processes_share_a_scan_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for i in range(9): Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(folder / f"{i}.png")
    images, tower = list_images(folder, "generated"), ["cxr_nb/miniature/image_tower"]

    def scanned(name, processes=1): return scan(images, tower, tmp_path / name, 64, processes, "cpu", at_once=3)
    import cxr_nb.image_scan as module
    whole, looks = module.scan_chunk, []

    def stopped(chunk, extractors):
        if chunk.number == 2: raise KeyboardInterrupt
        looks.append(chunk.number)
        return whole(chunk, extractors)
    monkeypatch.setattr(module, "scan_chunk", stopped)
    with pytest.raises(KeyboardInterrupt): scanned("one")
    monkeypatch.undo()
    seen = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").glob("*.safetensors")}
    one, two = scanned("one"), scanned("two", processes=2)
    assert looks == [0, 1] and len(seen) == 4 and all(path.stat().st_mtime_ns == time for path, time in seen.items())
    assert np.allclose(one.features["image_tower"], two.features["image_tower"], atol=1e-4) and len(one) == len(two) == 9
    assert one.rows.digest.tolist() == two.rows.digest.tolist()
