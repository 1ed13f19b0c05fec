"Textual inversion on a small pipeline: what changes, against the canonical way, resume, files that diffusers opens, bad input."
import gzip
import json
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pipelines
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cxr_nb.checkpoints import package_folder
from cxr_nb.stable_diffusion import encode, encoder_hidden_states, load_pipeline, sample
from cxr_nb.textual_inversion import (
    CONCEPTS, NewRows, add_tokens, few_shot_latents, image_concepts, initial_vectors, inversion_loss, invert, inverted, load_tokens, save_tokens,
    set_vectors, token_ids, training_texts, vectors_along, with_tokens)
from cxr_nb.checkpointing import checkpoints
from cxr_nb.diffusion import denoising_losses
from cxr_nb.training import TrainingSettings

PARTS = "vae", "unet", "text_encoder"
ROWS = pd.DataFrame({"image_id": list("abcd"), "concept": ["no finding", "pleural effusion"] * 2, "sex": list("FFMM")})
IMAGES = np.random.default_rng(0).integers(256, size=(4, 32, 32), dtype=np.uint8)
FOUND = image_concepts(ROWS, ["procedure", "abnormality"])
TEXTS = [texts[:6] for texts in training_texts(FOUND, "object")]
SETTINGS = {"batch_size": 4, "learning_rate": 0.02, "weight_decay": 0.1, "device": "cpu"}


@pytest.fixture(scope="module")
def latents(folder, tmp_path_factory):
    vae = load_pipeline(str(folder)).vae
    return few_shot_latents(vae, IMAGES, tmp_path_factory.mktemp("cache") / "latents.safetensors", {})


def begin(folder, vectors=2):
    pipeline = load_pipeline(str(folder))
    tokens = dict.fromkeys(("<lung-xray>", "<no-findings>", "<pleural-effusion>"), initial_vectors(pipeline, "lung", vectors))
    return pipeline, tokens


@pytest.fixture(scope="module")
def learned(folder, latents, tmp_path_factory):
    "A finished training: pipeline, tokens it began with, vectors, folder, log."
    pipeline, tokens = begin(folder)
    at = tmp_path_factory.mktemp("training")
    log, vectors = invert(pipeline, tokens, latents, TEXTS, TrainingSettings(6, checkpoint_every=3, sample_every=2, **SETTINGS), at)
    return pipeline, tokens, vectors, at, log


def test_every_other_weight_is_bit_identical(folder, learned):
    pipeline, tokens, vectors, at, _ = learned
    untouched = load_pipeline(str(folder))
    embedding, n = "token_embedding.weight", len(untouched.tokenizer)
    compared = 0
    for part in PARTS:
        before, after = (getattr(p, part).state_dict() for p in (untouched, pipeline))
        assert before.keys() == after.keys()
        for name, weight in before.items():
            same = after[name][:n] if name.endswith(embedding) else after[name]
            assert torch.equal(same, weight), f"{part}: {name}"
            compared += 1
    assert compared > 100
    rows = pipeline.text_encoder.get_input_embeddings().weight[n:]
    assert torch.equal(rows, torch.cat(list(vectors.values())))
    assert all((vectors[token] != begun).any(1).all() for token, begun in tokens.items()), "all vectors of each token are learnt"
    assert not any(p.requires_grad for part in PARTS for p in getattr(pipeline, part).parameters())


def test_the_optimizer_knows_the_new_rows_only(learned):
    saved = torch.load(checkpoints(learned[3])[-1], weights_only=True)
    assert {name: tuple(p.shape) for name, p in saved["weights"].items()} == {"rows": (6, pipelines.WIDTH)}
    (state,) = saved["optimizer"]["state"].values()
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (6, pipelines.WIDTH)


def test_a_step_is_that_of_the_whole_matrix_with_old_rows_put_back(folder, latents, tmp_path):
    "The public scripts' way: the whole embedding is trained, and the old rows are restored."
    pipeline, tokens = begin(folder)
    settings = TrainingSettings(1, max_grad_norm=1e9, seed=3, **SETTINGS)
    _, vectors = invert(pipeline, tokens, latents, TEXTS, settings, tmp_path)
    theirs, _ = begin(folder)
    add_tokens(theirs, tokens)
    weight = theirs.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    order = np.random.default_rng([3, 0, 0, 0]).permutation(4)
    seeds = torch.tensor([[3, 0, p, 1] for p in range(4)])
    chosen = [TEXTS[i][np.random.default_rng([3, 0, p, 3]).integers(6)] for p, i in enumerate(order)]
    words = theirs.tokenizer(theirs.maybe_convert_prompt(chosen, theirs.tokenizer), padding="max_length", max_length=77, return_tensors="pt")
    states = theirs.text_encoder(words.input_ids).last_hidden_state
    mean, std = encode(theirs.vae, IMAGES[order])
    denoising_losses(theirs.unet, theirs.scheduler, mean, std, states, seeds).mean().backward()
    optimizer = torch.optim.AdamW([weight], lr=0.02, weight_decay=0.1)
    optimizer.step()
    new = torch.cat(list(vectors.values()))
    assert (new - torch.cat(list(tokens.values()))).abs().max() > 0.01
    torch.testing.assert_close(weight.detach()[-6:], new, atol=1e-4, rtol=0)


def test_a_killed_run_ends_with_the_same_bits(folder, latents, learned, tmp_path, monkeypatch):
    _, tokens, vectors, _, whole = learned
    settings = TrainingSettings(6, checkpoint_every=3, sample_every=2, **SETTINGS)

    def killed(model, scheduler, texts, batch):
        if batch["seeds"][0, 1] == 4: raise KeyboardInterrupt
        return inversion_loss(model, scheduler, texts, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cxr_nb.textual_inversion.inversion_loss", killed)
        invert(begin(folder)[0], tokens, latents, TEXTS, settings, tmp_path)
    log, again = invert(begin(folder)[0], tokens, latents, TEXTS, settings, tmp_path)
    assert all(torch.equal(again[token], vectors[token]) for token in tokens)
    assert log.loss.tolist() == whole.loss.tolist()
    assert list(vectors_along(tmp_path)) == [2, 4, 6]
    pipeline = begin(folder)[0]
    invert(pipeline, tokens, latents, TEXTS, settings, tmp_path)  # finished: read, not trained
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[-6:], torch.cat(list(vectors.values())))


def test_a_checkpoint_of_another_configuration_is_refused(folder, latents, learned):
    _, tokens, _, at, _ = learned
    pipeline, _ = begin(folder)
    with pytest.raises(ValueError, match=r"is of another configuration: configuration\[texts\]"):
        invert(pipeline, tokens, latents, [texts[::-1] for texts in TEXTS], TrainingSettings(6, **SETTINGS), at)
    with pytest.raises(ValueError, match=r"is of another configuration: .*trained weights"):
        invert(begin(folder)[0], begin(folder, 1)[1], latents, TEXTS, TrainingSettings(6, **SETTINGS), at)


class Told(torch.nn.Module):
    "A U-Net that sees the first two words alone: noise is independent of them, so its best answer is zero."
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(pipelines.WIDTH, pipelines.CHANNELS, generator=torch.Generator().manual_seed(0)))

    def answer(self, states): return states[:, 1:3].mean(1) @ self.weight

    def forward(self, noisy, timesteps, states):
        return SimpleNamespace(sample=self.answer(states)[:, :, None, None].expand_as(noisy))


def test_it_finds_the_vectors_that_lower_the_loss(folder, latents, tmp_path):
    pipeline, answers = load_pipeline(str(folder)), []
    pipeline.unet, tokens = Told(), {"<lung-xray>": initial_vectors(pipeline, "lung", 2)}
    settings = TrainingSettings(40, **SETTINGS | {"learning_rate": 0.05})
    _, vectors = invert(pipeline, tokens, latents, [["<lung-xray>"]] * 4, settings, tmp_path)
    for known in (tokens, vectors):
        set_vectors(pipeline, known)
        answers.append(pipeline.unet.answer(encoder_hidden_states(pipeline, "<lung-xray>")).square().mean().item())
    assert answers[1] < answers[0] / 4


@pytest.mark.parametrize("vectors", [1, 3])
def test_files_open_with_plain_diffusers(folder, tmp_path, vectors):
    random = {token: torch.randn(vectors, pipelines.WIDTH) for token in ("<lung-xray>", "<pleural-effusion>")}
    paths = save_tokens(tmp_path, random)
    (only,) = load_file(paths[0]).items()
    assert only[0] == "<lung-xray>" and only[1].shape == (vectors, pipelines.WIDTH)
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    for path in paths: theirs.load_textual_inversion(str(path))
    theirs.set_progress_bar_config(disable=True)
    ours = load_pipeline(str(folder))
    assert load_tokens(ours, tmp_path) == list(random)
    prompt = with_tokens("A photo of a lung xray with a visible pleural effusion", CONCEPTS)
    assert (token_ids(ours, prompt) >= len(load_pipeline(str(folder)).tokenizer)).sum() == 2 * vectors, "every vector is used"
    states = encoder_hidden_states(ours, prompt)
    torch.testing.assert_close(theirs.encode_prompt(prompt, "cpu", 1, False)[0], states)
    noise = torch.randn(1, pipelines.CHANNELS, pipelines.SIDE, pipelines.SIDE, generator=torch.Generator().manual_seed(5))
    wanted = theirs(prompt, num_inference_steps=3, latents=noise, output_type="np").images
    drawn = sample(ours, prompt, [5], steps=3).permute(0, 2, 3, 1)
    assert (drawn - torch.from_numpy(wanted * 255).round()).abs().max() <= 1
    for i in range(vectors):
        other = {token: rows.clone() for token, rows in random.items()}
        other["<pleural-effusion>"][i] = torch.randn(pipelines.WIDTH)
        set_vectors(ours, other)
        assert not torch.allclose(encoder_hidden_states(ours, prompt), states), f"vector {i} is not used"


def test_saving_leaves_no_other_tokens(tmp_path):
    save_tokens(tmp_path, {"<old>": torch.zeros(1, 4)})
    save_tokens(tmp_path, {"<new>": torch.zeros(1, 4)})
    assert [path.name for path in tmp_path.iterdir()] == ["new.safetensors"]


def test_an_image_depends_on_its_seed_alone(learned):
    pipeline, prompt = learned[0], "A photo of a <lung-xray>"
    together = sample(pipeline, prompt, [0, 1, 2], steps=3, batch_size=3)
    apart = sample(pipeline, prompt, [2, 0], steps=3, batch_size=1)
    assert (together[[2, 0]].float() - apart.float()).abs().max() <= 1
    assert (together[0].float() - together[1].float()).abs().max() > 5


def test_templates_change_from_step_to_step(folder, latents):
    "Over many samples every template is drawn, about equally often."
    pipeline, tokens = begin(folder)
    model = NewRows(pipeline, tokens)
    shown = []
    model.forward = lambda ids: shown.append(ids) or torch.zeros(len(ids), 77, pipelines.WIDTH)
    texts = torch.arange(4 * 6).view(4, 6, 1)
    batch = {key: torch.stack([latents[i % 4][key] for i in range(600)]) for key in ("mean", "std", "row")}
    with torch.no_grad(): inversion_loss(model, pipeline.scheduler, texts, batch | {"seeds": torch.tensor([[0, 1, p, 1] for p in range(600)])})
    image, template = shown[0].flatten() // 6, shown[0].flatten() % 6
    assert torch.equal(image, batch["row"])
    assert 60 < torch.bincount(template, minlength=6).min() and torch.bincount(template).max() < 140


def test_bad_input_is_one_clear_line(folder, latents, tmp_path):
    pipeline, tokens = begin(folder)
    settings = TrainingSettings(1, **SETTINGS)
    long = [["<lung-xray> <no-findings> <pleural-effusion> " + "x " * 80]] * 4
    add_tokens(pipeline, {"<there>": torch.zeros(2, pipelines.WIDTH)})
    logging.disable()
    cases = {
        "has <there> already; take another name": lambda: add_tokens(pipeline, {"<there>": torch.zeros(1, pipelines.WIDTH)}),
        "form <name>": lambda: add_tokens(pipeline, {"<Lung>": torch.zeros(1, pipelines.WIDTH)}),
        "vectors are 2 × 768; this text encoder takes n × 16": lambda: add_tokens(pipeline, {"<wide>": torch.zeros(2, 768)}),
        "'radiology': is not one token but 9": lambda: initial_vectors(pipeline, "radiology"),
        "a token has 1 or more, not 0": lambda: initial_vectors(pipeline, "lung", 0),
        "there is 'pleural effusion' only": lambda: image_concepts(ROWS[1::2], ["procedure"]),
        "there is no image only": lambda: image_concepts(ROWS[:0], ["procedure"]),
        "few-shot image a: sex is 'U'; tokens are for 'F', 'M'": lambda: image_concepts(ROWS.assign(sex="U"), ["patient"]),
        "tokens; the text encoder reads 77: shorten it": lambda: invert(begin(folder)[0], tokens, latents, long, settings, tmp_path),
        "token <pleural-effusion>: no training text": lambda: invert(pipeline, tokens, latents, [TEXTS[0]] * 4, settings, tmp_path),
        "holds no learnt token": lambda: load_tokens(pipeline, tmp_path),
        "has none of the words": lambda: with_tokens("A photo of a dog", CONCEPTS),
    }
    try:
        for message, bad in cases.items():
            with pytest.raises((ValueError, FileNotFoundError)) as error: bad()
            assert message in str(error.value) and "\n" not in str(error.value)
    finally: logging.disable(logging.NOTSET)


@pytest.mark.parametrize("scheduler", ["dpm_solver++", "ddim"])
def test_the_sampler_does_not_change_the_training(folder, latents, learned, tmp_path, scheduler):
    pipeline = load_pipeline(str(folder), scheduler=scheduler)
    pipeline.scheduler.set_timesteps(4)
    log, vectors = invert(pipeline, learned[1], latents, TEXTS, TrainingSettings(6, checkpoint_every=3, sample_every=2, **SETTINGS), tmp_path)
    assert log.loss.tolist() == learned[4].loss.tolist() and all(torch.equal(vectors[token], x) for token, x in learned[2].items())


def test_another_schedule_is_another_configuration(folder, latents, learned):
    pipeline = load_pipeline(str(folder))
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, trained_betas=[0.01] * 1000)
    with pytest.raises(ValueError, match=r"is of another configuration: configuration\[noise\]"):
        invert(pipeline, learned[1], latents, TEXTS, TrainingSettings(6, **SETTINGS), learned[3])


def test_an_image_whose_latents_are_not_finite_is_named_and_not_kept(folder, tmp_path):
    vae, cache = load_pipeline(str(folder)).vae, tmp_path / "latents.safetensors"
    with torch.no_grad(): vae.encoder.conv_in.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"the VAE's mean is not finite for sample 0 \(a\)"): few_shot_latents(vae, IMAGES, cache, {}, list("abcd"))
    assert not list(tmp_path.iterdir())


def test_damaged_tokens_come_back_from_the_checkpoint_alone(folder, latents, tmp_path, monkeypatch):
    steps, loss = [], inversion_loss
    def counted(*given): steps.append(1); return loss(*given)
    monkeypatch.setattr("cxr_nb.textual_inversion.inversion_loss", counted)
    settings = TrainingSettings(2, sample_every=1, **SETTINGS)
    def run(name):
        pipeline, tokens = begin(folder)
        return inverted(pipeline, tokens, latents, TEXTS, settings, tmp_path / "models" / name, tmp_path / "work", {"images": "ab"})
    record, other = run("a"), run("b")
    assert len(steps) == 4 and run("a") == record and len(steps) == 4
    for name in ("lung_xray.safetensors", "log.csv", "along/vectors_00000001.safetensors", "training.json"):
        path = tmp_path / "models/a" / name
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.warns(UserWarning, match="a: is not a whole training .*; it is trained again"): again = run("a")
        assert again["sha256"] == record["sha256"] and run("b") == other and len(steps) == 4, name
    (next((tmp_path / "work").glob("a-*")) / "step_00000002.pt").unlink()
    (tmp_path / "models/a/no_findings.safetensors").unlink()
    with pytest.warns(UserWarning, match="no_findings.safetensors is missing"): assert run("a")["sha256"] == record["sha256"]
    assert len(steps) == 6


def test_tokens_that_share_a_file_name_are_refused_before_training(folder, latents, tmp_path):
    pipeline, _ = begin(folder)
    tokens = dict.fromkeys(("<lung-xray>", "<lung--xray>"), initial_vectors(pipeline, "lung"))
    with pytest.raises(ValueError, match="tokens: '<lung--xray>' and '<lung-xray>' would share the file name lung_xray"):
        invert(pipeline, tokens, latents, [["<lung-xray> <lung--xray>"]] * 4, TrainingSettings(1, **SETTINGS), tmp_path)
    with pytest.raises(ValueError, match="would share the file name lung_xray"): save_tokens(tmp_path, tokens)
    assert not list(tmp_path.iterdir())


def test_the_papers_initialisers_are_single_tokens_of_clips_real_vocabulary(tmp_path):
    "As it comes in open-clip-torch: bytes, bytes that end a word, merges, two special tokens."
    lines = gzip.open(package_folder("package:open_clip", "test") / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8").read().split("\n")
    merges, letters = lines[1 : 49152 - 256 - 2 + 1], [*bytes_to_unicode().values()]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(["radiology", "lung", "xray", "A photo of a lung xray with a visible pleural effusion"], add_special_tokens=False).input_ids
    assert (len(tokenizer), ids[:2]) == (49408, [[29684], [16271]]) and len(ids[2]) == 2 and len(ids[3]) == 14
