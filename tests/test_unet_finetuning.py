"U-Net fine-tuning on a small pipeline: what changes and what does not, what diffusers opens, resume, and bad input."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pipelines
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from cxr_nb import trained_variants, unet_finetuning
from cxr_nb.checkpointing import checkpoints
from cxr_nb.few_shot import CONCEPTS
from cxr_nb.diffusion import denoising_losses
from cxr_nb.places import sha256
from cxr_nb.stable_diffusion import encode, load_pipeline, sample
from cxr_nb.trained_variants import RECORD_FILE, read_record
from cxr_nb.training import TrainingSettings, global_batch
from cxr_nb.unet_finetuning import (
    LORA_FILE, VARIANTS, Variant, few_shot_images, finetune, finetuned, finetuning_record, open_finetuned, training_samples)

PIXELS = pipelines.SIDE * pipelines.FACTOR
PROMPTS = {"no finding": "a lung", "pleural effusion": "a lung with water", "class": "lung"}
SETTINGS = TrainingSettings(6, batch_size=2, learning_rate=1e-3, seed=3, device="cpu")
PRIOR = VARIANTS["no findings and abnormality, with prior a"]


@pytest.fixture(scope="module")
def source(folder): return str(folder)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return {name: torch.randint(256, (n, 3, PIXELS, PIXELS), dtype=torch.uint8) for name, n in zip([*CONCEPTS, "drawn"], (3, 2, 4))}


@pytest.fixture(scope="module")
def saved(source, images, tmp_path_factory):
    "A whole variant with prior and an adapter, trained and saved."
    folder = tmp_path_factory.mktemp("models")
    for name, variant in {"prior": PRIOR, "lora": Variant(tuple(CONCEPTS), lora_rank=2)}.items():
        finetuned(source, variant, images, PROMPTS, replace(SETTINGS, learning_rate=0.02), folder / name, folder / "work")
    return folder


def plain(folder):
    opened = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    opened.set_progress_bar_config(disable=True)
    return opened


def same(a, b):
    assert a.keys() == b.keys()
    return [name for name, x in a.items() if not torch.equal(x, b[name])] == []


def tuned(source, variant, images, folder, settings=SETTINGS, prompts=PROMPTS, scheduler="", **options):
    pipeline = load_pipeline(source, scheduler=scheduler)
    log, n = finetune(pipeline, variant, training_samples(variant, images, prompts), prompts, settings, folder, **options)
    return pipeline, log, n


def test_plain_diffusers_opens_it_and_all_but_the_unet_is_bit_identical(source, saved):
    before, after = plain(source), plain(saved / "prior")
    for part in ("vae", "text_encoder"): assert same(getattr(before, part).state_dict(), getattr(after, part).state_dict()), part
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab() and type(before.scheduler) is type(after.scheduler)
    assert before.scheduler.config == after.scheduler.config
    changed = {n for n, x in before.unet.state_dict().items() if not torch.equal(x, after.unet.state_dict()[n])}
    assert len(changed) == len(before.unet.state_dict()), "every tensor of the U-Net was trained"
    noise = torch.randn(1, pipelines.CHANNELS, pipelines.SIDE, pipelines.SIDE, generator=torch.Generator().manual_seed(5))
    theirs = after("a lung", num_inference_steps=3, latents=noise, output_type="np").images[0]
    ours = sample(open_finetuned(saved / "prior", source), "a lung", [5], steps=3)[0].permute(1, 2, 0)
    assert np.abs(ours.numpy() - (theirs * 255).round()).max() <= 1


def test_the_original_model_is_not_written_to(source, images, tmp_path):
    "Its weights are mapped from its files, and trained in place."
    before = {path: sha256(path) for path in Path(source).rglob("*.safetensors")}
    tuned(source, PRIOR, images, tmp_path, replace(SETTINGS, learning_rate=0.1))
    assert {path: sha256(path) for path in before} == before


def test_an_adapter_is_what_diffusers_adds_to_the_original_model(source, saved):
    assert sorted(p.name for p in (saved / "lora").iterdir()) == sorted(["log.csv", LORA_FILE, "training.json"])
    opened, name = plain(source), "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    x = torch.randn(2, pipelines.CHANNELS, pipelines.SIDE, pipelines.SIDE), 500, torch.randn(2, 77, pipelines.WIDTH)
    with torch.no_grad():
        before = opened.unet(*x).sample
        opened.load_lora_weights(saved / "lora", weight_name=LORA_FILE)
        after, layer = opened.unet(*x).sample, opened.unet.get_submodule(name)
        file = load_file(saved / "lora" / LORA_FILE)
        a, b = (file[f"unet.{name}.lora.{kind}.weight"] for kind in ("down", "up"))
        torch.testing.assert_close(layer(x[2]), F.linear(x[2], layer.base_layer.weight + b @ a))
        assert b.abs().max() > 0 and not torch.allclose(before, after)
        base = {n.replace(".base_layer", ""): w for n, w in opened.unet.state_dict().items() if ".lora_" not in n}
        assert same(base, plain(source).unet.state_dict())
        opened.unload_lora_weights()
        assert torch.equal(opened.unet(*x).sample, before)


def test_the_adapter_saved_is_the_one_trained(source, images, saved, tmp_path):
    mine, *_ = tuned(source, Variant(tuple(CONCEPTS), lora_rank=2), images, tmp_path, replace(SETTINGS, learning_rate=0.02))
    theirs = open_finetuned(saved / "lora", source)
    drawn = sample(mine, "a lung", [1, 2], steps=3)
    assert (drawn.int() - sample(theirs, "a lung", [1, 2], steps=3).int()).abs().max() <= 1
    assert not torch.equal(drawn, sample(load_pipeline(source), "a lung", [1, 2], steps=3))


@pytest.mark.parametrize("name", ["prior", "lora"])
def test_an_image_depends_on_its_seed_alone(source, saved, name):
    pipeline, seeds = open_finetuned(saved / name, source), [0, 1, 2, 3]
    together = sample(pipeline, "a lung", seeds, steps=3, guidance_scale=4)
    apart = sample(pipeline, "a lung", seeds[::-1], steps=3, guidance_scale=4, batch_size=3).flip(0)
    assert (together.int() - apart.int()).abs().max() <= 1 and len({image.numpy().tobytes() for image in together}) == 4


def test_the_first_loss_is_the_formula_written_out(source, images, tmp_path):
    "Images unmirrored, each with its own prompt, the class prompt for class images, and the weight."
    weight, pipeline = 0.5, load_pipeline(source)
    unet, schedule = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    def error(image, prompt, seed):
        rng = np.random.default_rng(seed)
        mean, std = encode(pipeline.vae, image[None])
        draw = lambda: torch.from_numpy(rng.standard_normal(mean.shape[1:], dtype=np.float32))[None]
        latents, noise, t = mean + std * draw(), draw(), int(rng.integers(1000))
        kept = schedule.alphas_cumprod[t]
        words = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipeline.text_encoder(words).last_hidden_state
            return ((unet(kept.sqrt() * latents + (1 - kept).sqrt() * noise, t, states).sample - noise) ** 2).mean().item()
    samples, losses = list(zip(images["pleural effusion"][[0, 1, 0, 1]], images["drawn"])), []
    for p, i in enumerate(global_batch(4, 2, 0, SETTINGS.seed)):
        few_shot, other = samples[i]
        losses.append(error(few_shot, "a lung with water", [3, 0, p, 1]) + weight * error(other, "lung", [3, 0, p, 2]))
    _, log, _ = tuned(source, replace(PRIOR, prior_weight=weight), images, tmp_path, replace(SETTINGS, steps=1))
    assert log.loss[0] == pytest.approx(np.mean(losses), rel=1e-4)


def test_cached_is_as_uncached_and_runs_the_frozen_parts_once(source, images, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("cxr_nb.unet_finetuning.encode", lambda vae, x: ran.append(len(x)) or encode(vae, x))
    _, first, _ = tuned(source, PRIOR, images, tmp_path / "a")
    assert sum(ran) == 2 * 4, "four pairs"
    _, again, _ = tuned(source, PRIOR, images, tmp_path / "b", cache=False)
    assert sum(ran) == 2 * 4 + 2 * 2 * SETTINGS.steps
    assert again.loss.tolist() == pytest.approx(first.loss.tolist(), rel=1e-4)


def test_the_sampler_does_not_change_the_training(source, images, tmp_path):
    _, log, _ = tuned(source, PRIOR, images, tmp_path / "a")
    _, other, _ = tuned(source, PRIOR, images, tmp_path / "b", scheduler="dpm_solver++")
    assert other.loss.tolist() == log.loss.tolist()


def test_a_models_own_schedule_is_trained_by_and_recorded(source, images, tmp_path):
    pipeline, samples = load_pipeline(source), training_samples(PRIOR, images, PROMPTS)
    records = [finetuning_record(pipeline, PRIOR, samples, PROMPTS)]
    assert list(records[0]["noise"]) == ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"]
    for stated in ({"trained_betas": [0.01] * 1000}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
        pipeline.scheduler = DDPMScheduler.from_config(load_pipeline(source).scheduler.config, **stated)
        records.append(finetuning_record(pipeline, PRIOR, samples, PROMPTS))
        at = tmp_path / str(len(records))
        records[-1]["loss"] = finetune(pipeline, PRIOR, samples, PROMPTS, replace(SETTINGS, steps=1), at)[0].loss[0]
    assert len({json.dumps(record) for record in records}) == 3 and records[1]["loss"] != records[2]["loss"]


@pytest.mark.parametrize("rank", [0, 2])
def test_interrupted_it_ends_the_same_and_is_not_trained_twice(source, images, tmp_path, rank):
    variant, settings = Variant(tuple(CONCEPTS), lora_rank=rank), replace(SETTINGS, checkpoint_every=2, sample_every=2)
    def look(pipeline): return {"a lung": sample(pipeline, "a lung", [0], steps=2)[0]}
    def stop(pipeline):
        stop.calls += 1
        if stop.calls == 4: raise KeyboardInterrupt  # after the fourth step, before its checkpoint
        return look(pipeline)
    stop.calls = 0
    def run(name, look): return finetuned(source, variant, images, PROMPTS, settings, tmp_path / name, tmp_path / "work", look)
    whole = run("both/whole", look)
    with pytest.raises(KeyboardInterrupt): run("again/whole", lambda p: stop(p))
    assert not (tmp_path / "again/whole").exists() and len(list((tmp_path / "work").iterdir())) == 1
    resumed = run("again/whole", look)
    assert resumed["sha256"] == whole["sha256"] and resumed["made_of"] == whole["made_of"]
    assert list((tmp_path / "work").iterdir()) == []
    pictures = [{p.relative_to(tmp_path / of): p.read_bytes() for p in (tmp_path / of).rglob("*.png")} for of in ("both", "again")]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4
    columns = ["step", "loss", "learning_rate", "gradient_norm"]
    logs = [pd.read_csv(tmp_path / of / "whole/log.csv")[columns] for of in ("both", "again")]
    assert logs[0].equals(logs[1]) and len(logs[0]) == 6
    untouched = (tmp_path / "again/whole/training.json").stat().st_mtime_ns
    assert run("again/whole", None) == resumed
    assert (tmp_path / "again/whole/training.json").stat().st_mtime_ns == untouched
    settings = replace(settings, steps=2)
    assert run("again/whole", None)["results"]["steps"] == 2, "other settings, another training"


def test_it_learns_its_images(source, images, tmp_path):
    "Noise of other seeds than in training is found better in the images that were shown."
    one = {"no finding": images["no finding"][:1]}
    def error(pipeline):
        mean, std = (x.expand(64, -1, -1, -1) for x in encode(pipeline.vae, one["no finding"]))
        states = pipeline.encode_prompt("a lung", "cpu", 1, False)[0].expand(64, -1, -1)
        schedule, seeds = DDPMScheduler.from_config(pipeline.scheduler.config), torch.tensor([[99, i, 0, 0] for i in range(64)])
        with torch.no_grad(): return denoising_losses(pipeline.unet, schedule, mean, std, states, seeds).mean().item()
    before = error(load_pipeline(source))
    pipeline, *_ = tuned(source, VARIANTS["no findings"], one, tmp_path, replace(SETTINGS, steps=30, batch_size=8, learning_rate=5e-3))
    assert error(pipeline) < 0.9 * before


def test_a_checkpoint_of_another_configuration_is_refused(source, images, tmp_path):
    variant = Variant(tuple(CONCEPTS), lora_rank=2)
    tuned(source, variant, images, tmp_path, replace(SETTINGS, steps=1))
    def again(**change): return lambda: tuned(**({"source": source, "variant": variant, "images": images, "folder": tmp_path, "settings": replace(SETTINGS, steps=1)} | change))
    for change, message in [
        ({"settings": replace(SETTINGS, steps=2)}, "steps is 1 there and 2 here"),
        ({"variant": VARIANTS["no findings and abnormality"]}, r"configuration\[variant\] is"),
        ({"prompts": PROMPTS | {"no finding": "lung"}}, r"configuration\[frozen\] is"),
        ({"images": images | {"no finding": images["no finding"].flip(-1)}}, r"configuration\[frozen\] is"),
    ]:
        with pytest.raises(ValueError, match=f"is of another configuration: .*{message}.*; take another folder"): again(**change)()
    assert len(checkpoints(tmp_path)) == 1


def steps_counted(monkeypatch, module):
    "The trainings that a module does, by their number of steps."
    real, done = getattr(module, "finetune"), []
    def counted(*given, **options):
        log, n = real(*given, **options)
        done.append(len(log))
        return log, n
    monkeypatch.setattr(module, "finetune", counted)
    return done


def flip(path):
    bent = bytearray(path.read_bytes())
    bent[len(bent) // 2] ^= 1
    path.write_bytes(bent)


def test_a_damaged_variant_is_reported_and_trained_again_alone(source, images, tmp_path, monkeypatch, recwarn):
    settings = replace(SETTINGS, steps=1, sample_every=1)
    def look(pipeline): return {"a lung": sample(pipeline, "a lung", [0], steps=2)[0]}
    def run(name): return finetuned(source, VARIANTS["no findings"], images, PROMPTS, settings, tmp_path / name, tmp_path / "work", look)
    record, other, done = run("m"), run("n"), steps_counted(monkeypatch, unet_finetuning)
    assert read_record(tmp_path / "m", RECORD_FILE, record["made_of"]) == record == json.loads((tmp_path / "m/training.json").read_text())
    assert run("m") == record and done == []
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "n").rglob("*")}
    for name, spoil in [("unet/diffusion_pytorch_model.safetensors", flip), ("log.csv", Path.unlink), ("samples/000001/a_lung/0000.png", flip),
                        ("unet/config.json", Path.unlink), ("training.json", Path.unlink), ("training.json", flip)]:
        spoil(tmp_path / "m" / name)
        done.clear(); recwarn.clear()
        assert run("m")["sha256"] == record["sha256"] and done == [1], name
        messages = [str(w.message) for w in recwarn if "is not a whole training" in str(w.message)]
        assert len(messages) == 1 and str(tmp_path / "m") in messages[0] and messages[0].endswith("it is trained again"), name
        assert run("n") == other and done == [1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "n").rglob("*")} == untouched
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "n", "work"]


def test_two_runs_in_one_folder_both_end(source, images, tmp_path, monkeypatch):
    "A second run of the same saves, and clears the checkpoints, while the first is about to save."
    given = source, VARIANTS["no findings"], images, PROMPTS, replace(SETTINGS, steps=1), tmp_path / "m", tmp_path / "work"
    save, ended = trained_variants.save_variant, []
    def later(*rest):
        monkeypatch.setattr(trained_variants, "save_variant", save)
        monkeypatch.setattr("cxr_nb.trained_variants.os.getpid", lambda: 1)
        ended.append(finetuned(*given))
        monkeypatch.undo()
        return save(*rest)
    monkeypatch.setattr(trained_variants, "save_variant", later)
    assert finetuned(*given)["sha256"] == ended[0]["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "work"] and list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("cache", [True, False])
def test_the_image_whose_latents_are_not_finite_is_named_and_nothing_kept(source, images, tmp_path, monkeypatch, cache):
    def broken(vae, x):
        mean, std = encode(vae, x)
        return mean, std.masked_fill((x == images["drawn"][3]).flatten(1).all(1)[:, None, None, None], float("nan"))
    monkeypatch.setattr("cxr_nb.unet_finetuning.encode", broken)
    message = r"the VAE's standard deviation of the class sample is not finite for sample 3 \(image 3 of 'pleural effusion'\)"
    with pytest.raises(ValueError, match=message): tuned(source, PRIOR, images, tmp_path, cache=cache)
    assert not list(tmp_path.rglob("*.*"))


def test_bad_variants_and_prompts(source, images, tmp_path):
    with pytest.raises(ValueError, match="there are no class images 'drawn'; set class_images above 0"):
        training_samples(PRIOR, {name: images[name] for name in CONCEPTS}, PROMPTS)
    long = PROMPTS | {"pleural effusion": "lung " * 80}
    with pytest.raises(ValueError, match="the prompt 'lung lung .* has 82 tokens; the text encoder reads 77: shorten it"):
        tuned(source, PRIOR, images, tmp_path, prompts=long)
    assert not list(tmp_path.rglob("*.pt"))


def write(path, pixels, mode=None):
    Image.fromarray(pixels).convert(mode).save(path) if mode else Image.fromarray(pixels).save(path)


def test_few_shot_folders(tmp_path):
    "Sizes and modes that are read, and one line for those that are not."
    rng = np.random.default_rng(0)
    write(tmp_path / "gray.png", rng.integers(256, size=(64, 48), dtype=np.uint8))
    write(tmp_path / "colour.png", rng.integers(256, size=(40, 90, 3), dtype=np.uint8))
    write(tmp_path / "palette.png", rng.integers(256, size=(64, 64), dtype=np.uint8), "P")
    write(tmp_path / "deep.png", rng.integers(60000, size=(64, 64)).astype(np.uint16))
    (tmp_path / "text.png").write_text("no image")
    def read(first, size=32, concepts=CONCEPTS):
        rows = pd.DataFrame({"concept": list(concepts), "source": "X", "image_path": [first, "gray.png"][: len(concepts)]})
        return few_shot_images(rows, {"X": tmp_path}, size)
    result = read("colour.png")
    assert {x.shape for x in result.values()} == {(1, 3, 32, 32)} and {x.dtype for x in result.values()} == {torch.uint8}
    middle = Image.open(tmp_path / "colour.png").convert("L").crop((25, 0, 65, 40)).resize((32, 32), Image.Resampling.BICUBIC)
    inner = np.s_[:, 2:-2]  # at the cut the pixels beyond it count too
    assert np.abs(result["no finding"][0].numpy()[0][inner] - np.asarray(middle)[inner].astype(int)).max() <= 1
    assert torch.equal(result["no finding"][0, 0], result["no finding"][0, 2])
    for name, message in {"palette.png": "has a colour palette", "deep.png": "has more than 8 bits", "text.png": "is no PNG or JPEG"}.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"): read(name)
    with pytest.raises(FileNotFoundError, match="none.png: no such image file"): read("none.png")
    with pytest.raises(ValueError, match="colour.png: has 40 pixels on a side, training takes 48; lower size"): read("colour.png", 48)
    with pytest.raises(ValueError, match="few-shot images: none shows 'pleural effusion'"): read("gray.png", concepts=["no finding"])
    with pytest.raises(ValueError, match="concept 'pneumonia' is none of"): read("gray.png", concepts=["pneumonia", "no finding"])
