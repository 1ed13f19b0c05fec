"Loading and sampling, on a small pipeline of random weights, against diffusers' own pipeline and a loop written out."
import json
import multiprocessing
import pickle
import re
import shutil

import diffusers
import nbformat
import pipelines
import pytest
import torch
from diffusers import StableDiffusionPipeline
from groups import join_group, run_two
from safetensors.torch import load_file, save_file

from cxr_nb import checkpoints, places
from cxr_nb.stable_diffusion import (
    SCHEDULERS, check_steps, components_folder, components_record, decode, draw_latents, encode, encoder_hidden_states, gray, image_seeds,
    load_component, load_pipeline, load_scheduler, sample, write_images)
from cxr_nb.text_encoder import embed, load_text_encoder

PINNED = "1234567890abcdef1234567890abcdef12345678"
PARTS = ("vae", "unet", "text_encoder")


@pytest.fixture(scope="module")
def pipeline(folder): return load_pipeline(str(folder))


def noise(seeds):
    shape = pipelines.CHANNELS, pipelines.SIDE, pipelines.SIDE
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def as_bytes(images): return (torch.as_tensor(images) * 255).round()


def embedded_texts():
    encoder = load_text_encoder("Miniature", "cxr_nb/miniature/text_encoders/reports", "cpu")
    return embed(encoder, ["Clear lungs.", "Small effusion.", "No acute disease.", "Effusion.", "Edema."], batch_size=2, progress=False)[0]


def in_group(rank, port, folder, out):
    "What one of two processes does that a launcher started on CPUs."
    join_group(rank, port)
    pipeline, drawn = load_pipeline(str(folder)), []
    whole = pipeline.unet.forward
    def counted(*args, **kwargs): drawn.append(len(args[0])); return whole(*args, **kwargs)
    pipeline.unet.forward = counted
    images, embedded = sample(pipeline, "lung", range(5), steps=2, batch_size=2), embedded_texts()
    if rank == 1: pipeline.vae.post_quant_conv.weight.data.fill_(float("nan"))  # an error of one is known to all
    try: sample(pipeline, "lung", range(5), steps=2, batch_size=2)
    except ValueError as error: torch.save((images, embedded, drawn, str(error)), out / f"{rank}.pt")


def test_two_processes_share_the_drawing_and_the_texts_and_both_get_all(folder, tmp_path):
    run_two(multiprocessing.get_context("spawn"), in_group, folder, tmp_path, seconds=120)
    (first, texts, many, error), (second, others, few, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = sample(load_pipeline(str(folder)), "lung", range(5), steps=2, batch_size=2)
    assert torch.equal(first, alone) and torch.equal(second, alone)
    for name, values in embedded_texts().items(): assert torch.equal(texts[name], values) and torch.equal(others[name], values), name
    assert len(many) > len(few) > 0, "the first drew two batches of three, the second one"
    assert error == same and "finite" in error


def close(a, b): assert (a.float() - b.float()).abs().max() <= 1  # a grey level: rounding falls either way


@pytest.mark.parametrize("scheduler", ["", "ddim", "dpm_solver++"])
def test_images_are_those_of_diffusers(folder, scheduler):
    pipeline = load_pipeline(str(folder), scheduler=scheduler)
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    theirs.scheduler = type(pipeline.scheduler).from_config({**theirs.scheduler.config, "clip_sample": False})
    wanted = theirs("lung", num_images_per_prompt=3, num_inference_steps=5, latents=noise([3, 4, 5]), output_type="np").images
    drawn = sample(pipeline, "lung", [3, 4, 5], steps=5, batch_size=2)
    close(drawn.permute(0, 2, 3, 1), as_bytes(wanted))
    assert drawn.float().std() > 5, "flat images would agree with anything"


@torch.no_grad()
def test_images_are_those_of_the_loop_written_out(folder):
    "DDIM with guidance, from its formula."
    pipeline, steps, scale = load_pipeline(str(folder), scheduler="ddim"), 4, 3.0
    words = pipeline.tokenizer(["", "lung"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipeline.text_encoder(words).last_hidden_state
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0).float()
    z, times = noise([8]), [751, 501, 251, 1]
    for t, before in zip(times, [*times[1:], -1]):
        free, conditioned = pipeline.unet(torch.cat([z, z]), t, encoder_hidden_states=states).sample.chunk(2)
        error = free + scale * (conditioned - free)
        clean = (z - (1 - kept[t]).sqrt() * error) / kept[t].sqrt()
        last = kept[max(before, 0)]
        z = last.sqrt() * clean + (1 - last).sqrt() * error
    wanted = (pipeline.vae.decode(z / 0.5).sample / 2 + 0.5).clamp(0, 1)
    close(sample(pipeline, "lung", [8], steps, scale), as_bytes(wanted))


@pytest.mark.parametrize("scheduler", ["", "ddpm"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(folder, scheduler):
    "Also where the scheduler adds noise at every step (ddpm)."
    pipeline, seeds = load_pipeline(str(folder), scheduler=scheduler), [0, 1, 2, 3, 4]
    together = sample(pipeline, "lung", seeds, steps=4, batch_size=5)
    close(sample(pipeline, "lung", seeds, steps=4, batch_size=2), together)
    close(sample(pipeline, "lung", seeds[::-1], steps=4, batch_size=3), together.flip(0))
    assert torch.equal(sample(pipeline, "lung", seeds, steps=4, batch_size=5), together)
    assert len({image.numpy().tobytes() for image in together}) == 5
    assert not set(image_seeds(100, 0)) & set(image_seeds(100, 1))


def test_states_of_one_token_are_the_same_as_repeated_ones(pipeline):
    states, nothing = torch.randn(2, 1, 1, pipelines.WIDTH, generator=torch.Generator().manual_seed(0))
    one = sample(pipeline, states, [1, 2], steps=3, negative_prompt=nothing)
    close(sample(pipeline, states.expand(-1, 77, -1), [1, 2], steps=3, negative_prompt=nothing.expand(-1, 77, -1)), one)
    assert not torch.equal(sample(pipeline, nothing, [1, 2], steps=3, negative_prompt=states), one)


def test_without_guidance_the_negative_prompt_does_not_count(pipeline):
    plain = sample(pipeline, "lung", [1], steps=3, guidance_scale=1)
    assert torch.equal(sample(pipeline, "lung", [1], steps=3, guidance_scale=1, negative_prompt="x"), plain)
    assert not torch.equal(sample(pipeline, "lung", [1], steps=3, negative_prompt="x"), sample(pipeline, "lung", [1], steps=3))


def test_other_sizes(pipeline):
    assert sample(pipeline, "lung", [1], steps=2, size=48).shape == (1, 3, 48, 48)
    with pytest.raises(ValueError, match="a size divisible by 8, not of 36 pixels"): sample(pipeline, "lung", [1], steps=2, size=36)


def test_prompts_up_to_the_limit_and_not_beyond(pipeline):
    assert encoder_hidden_states(pipeline, "lung " * 75).shape == (1, 77, pipelines.WIDTH)
    with pytest.raises(ValueError, match="has 78 tokens; the text encoder reads 77"): encoder_hidden_states(pipeline, "lung " * 76)


def test_latents_are_those_of_the_pipelines_encoder(pipeline):
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    mean, std = encode(pipeline.vae, images)
    drawn = draw_latents(mean, std, [5, 6])
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    theirs = pipeline.vae.encode(images * 2 - 1).latent_dist.sample(generator=generators) * 0.5
    torch.testing.assert_close(drawn, theirs)
    torch.testing.assert_close(decode(pipeline.vae, drawn), (pipeline.vae.decode(theirs / 0.5).sample / 2 + 0.5).clamp(0, 1))
    as_gray = torch.randint(256, (2, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same = as_gray[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(encode(pipeline.vae, as_gray)[0], encode(pipeline.vae, same)[0])
    torch.testing.assert_close(gray(same), as_gray / 255)


def test_latents_may_be_trained_on(pipeline):
    "Kept latents take part in a graph, which those made in inference mode may not."
    mean, _ = encode(pipeline.vae, torch.zeros(1, 16, 16))
    weight = torch.ones(1, requires_grad=True)
    (weight * mean).square().sum().backward()
    assert weight.grad.isfinite().all()


def test_images_that_are_not_finite_are_refused(folder):
    vae = load_component(str(folder), "vae")
    with pytest.raises(ValueError, match="image 1 of the VAE is not finite"):
        decode(vae, torch.stack([torch.zeros(4, 4, 4), torch.full((4, 4, 4), torch.nan)]))


def test_names_of_schedulers(folder):
    for name, kind in SCHEDULERS.items(): assert type(load_pipeline(str(folder), scheduler=name).scheduler).__name__ == kind
    with pytest.raises(ValueError, match="unknown scheduler 'euler'"): load_pipeline(str(folder), scheduler="euler")


MORE = ["DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler", "SASolverScheduler"]


@pytest.mark.parametrize("settings", [{}, {"skip_prk_steps": False}, {"timestep_spacing": "trailing"}], ids=str)
@pytest.mark.parametrize("kind", [*SCHEDULERS.values(), *MORE])
def test_a_number_of_steps_goes_where_diffusers_own_pipeline_draws_with_it(pipeline, kind, settings, monkeypatch):
    "Up to the number of timesteps; beyond, what some classes return is noise."
    schedule = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")} | {"num_train_timesteps": 9, "original_inference_steps": 9}
    monkeypatch.setattr(pipeline, "scheduler", getattr(diffusers, kind).from_config(schedule | settings))
    states, goes = torch.ones(1, 1, pipelines.WIDTH), set()
    for steps in (1, 3, 4, 8, 9):
        try: latents = pipeline(prompt_embeds=states, num_inference_steps=steps, guidance_scale=1, latents=noise([0]), output_type="latent").images
        except (IndexError, ValueError, AssertionError): continue
        if latents.isfinite().all(): goes.add(steps)
    for steps in (1, 3, 4, 8, 9, 10, 27):
        if steps in goes: assert check_steps(pipeline.scheduler, steps) >= steps
        else:
            with pytest.raises(ValueError, match=rf"^{kind} cannot draw in {steps} steps \(.+\); choose another number of steps$"): sample(pipeline, states, [0], steps)
    assert 4 in goes


def test_a_scheduler_that_takes_fewer_steps_than_asked_is_refused(pipeline, monkeypatch):
    schedule = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    monkeypatch.setattr(pipeline, "scheduler", diffusers.DPMSolverMultistepInverseScheduler.from_config(schedule))
    most = pipeline.scheduler.config.num_train_timesteps
    with pytest.raises(ValueError, match=f"cannot draw in {most} steps .it would take 1 instead.; choose another"): check_steps(pipeline.scheduler, most)
    assert check_steps(pipeline.scheduler, 10) == 10


def test_half_precision(folder):
    pipeline = load_pipeline(str(folder), dtype=torch.float16)
    assert {p.dtype for part in PARTS for p in getattr(pipeline, part).parameters()} == {torch.float16}
    assert not any(p.requires_grad for part in PARTS for p in getattr(pipeline, part).parameters())
    drawn, single = sample(pipeline, "lung", [1], steps=2), sample(load_pipeline(str(folder)), "lung", [1], steps=2)
    assert (drawn.float() - single.float()).abs().mean() < 8


def copy(folder, target): return shutil.copytree(folder, target / "copy")


def test_old_names_and_pickled_weights_are_read(folder, tmp_path):
    "Stable Diffusion v1.4's VAE calls the weights of its attention by names of 2022; some copies hold only .bin files."
    path = copy(folder, tmp_path) / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    def renamed(key):
        for new, name in old.items(): key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        return key
    assert any(renamed(key) != key for key in weights)
    path.unlink()
    torch.save({renamed(key): weight for key, weight in weights.items()}, path.with_suffix(".bin"))
    result, wanted = (load_component(str(f), "vae").state_dict() for f in (tmp_path / "copy", folder))
    assert result.keys() == wanted.keys() and all(torch.equal(result[k], wanted[k]) for k in wanted)
    assert list(components_record(str(tmp_path / "copy"), ["vae"])["sha256"]) == ["vae/diffusion_pytorch_model.bin"]


class Trap:
    def __reduce__(self): return open, ("trap", "w")


def test_pickled_code_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = copy(folder, tmp_path) / "unet/diffusion_pytorch_model.safetensors"
    path.unlink()
    with open(path.with_suffix(".bin"), "wb") as file: pickle.dump({"conv_in.weight": Trap()}, file)
    with pytest.raises(ValueError, match="unet cannot be read"): load_component(str(tmp_path / "copy"), "unet")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("part, file, key", [("unet", "diffusion_pytorch_model", "conv_in.weight"), ("text_encoder", "model", "final_layer_norm.weight")])
def test_lost_weights_are_an_error(folder, tmp_path, part, file, key):
    path = copy(folder, tmp_path) / part / f"{file}.safetensors"
    weights = load_file(path)
    lost = next(k for k in weights if k.endswith(key))
    save_file({k: w for k, w in weights.items() if k != lost}, tmp_path / "rest.safetensors", metadata={"format": "pt"})
    (tmp_path / "rest.safetensors").replace(path)
    with pytest.raises(ValueError, match=rf"{part} lacks 1 weights, the first is \S*{key}"): load_component(str(tmp_path / "copy"), part)


@pytest.mark.parametrize("change, message", [(lambda w: w[:1], r"conv_in.weight expected shape|weight is \[1, "), (lambda w: w * torch.nan, "has values that are not finite")])
@pytest.mark.parametrize("part, file", [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_weights_that_do_not_fit_are_named(folder, tmp_path, part, file, change, message):
    path = copy(folder, tmp_path) / part / f"{file}.safetensors"
    weights = load_file(path)
    key = next(k for k in weights if k.endswith(("conv_in.weight", "token_embedding.weight")))
    save_file(weights | {key: change(weights[key])}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    (tmp_path / "other.safetensors").replace(path)
    with pytest.raises(ValueError, match=message) as caught: load_component(str(tmp_path / "copy"), part)
    assert "\n" not in str(caught.value) and key.split(".")[-2] in str(caught.value)


def test_lost_files_are_named(folder, tmp_path):
    target = copy(folder, tmp_path)
    (target / "vae/config.json").unlink()
    with pytest.raises(FileNotFoundError) as error: load_pipeline(str(target))
    assert "lacks vae/config.json" in str(error.value) and str(target) in str(error.value)
    assert load_component(str(target), "scheduler").config.num_train_timesteps == 1000  # other parts are not asked for


def test_hub_id_without_network_says_what_to_do(monkeypatch):
    def offline(*args): raise ConnectionError("no route to host\nand so on")
    monkeypatch.setattr(checkpoints, "cached_snapshot", lambda *args: None)
    monkeypatch.setattr(checkpoints, "_announced", offline)
    with pytest.raises(FileNotFoundError) as error: components_folder(f"CompVis/stable-diffusion-v1-4@{PINNED}")
    assert f"hf download CompVis/stable-diffusion-v1-4 --revision {PINNED} --local-dir FOLDER" in str(error.value)
    assert "set stable_diffusion to that folder" in str(error.value) and "\n" not in str(error.value)


def test_hub_serves_the_parts_asked_for_and_the_cache_serves_them_again(folder, tmp_path, hub, run_in):
    address, asked = hub({"me/sd": folder}, PINNED)
    code = f"from cxr_nb.stable_diffusion import *; r = components_record('me/sd@{PINNED}', PARTS); print(r['revision'], sorted(r['sha256']))"
    environment = dict(HF_HOME=str(tmp_path / "cache"), HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", PYTHONPATH="")
    fetch = code.replace("PARTS", "['vae', 'tokenizer']")
    done = run_in(tmp_path, "python", "-c", fetch, **environment)
    assert done.stdout.strip() == f"{PINNED} ['vae/diffusion_pytorch_model.safetensors']", done.stderr
    fetched = {path.split("/resolve/")[1].split("/", 1)[1].split("?")[0] for path in asked if "/resolve/" in path}
    assert fetched >= {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert {name.split("/")[0] for name in fetched} == {"vae", "tokenizer"}
    asked.clear()
    again = run_in(tmp_path, "python", "-c", fetch, **(environment | {"HF_HUB_OFFLINE": "1"}))
    assert again.stdout == done.stdout and not asked, again.stderr


def test_a_scheduler_is_one_of_diffusers(folder, tmp_path):
    path = copy(folder, tmp_path) / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "os"}))
    with pytest.raises(ValueError, match="scheduler 'os' is none of diffusers'"): load_component(str(tmp_path / "copy"), "scheduler")


@pytest.mark.parametrize("content", ["[]", "3", '"me/other"', "{", ""])
@pytest.mark.parametrize("file", ["vae/config.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
def test_settings_of_another_kind_are_refused_in_one_line(folder, tmp_path, file, content):
    (copy(folder, tmp_path) / file).write_text(content)
    with pytest.raises(ValueError, match=r"^Stable Diffusion \S+copy: [^\n]+$"): load_component(str(tmp_path / "copy"), file.split("/")[0])


@pytest.mark.parametrize("content", ["[]", '"me/other"', "{"])
@pytest.mark.parametrize("part", PARTS)
def test_settings_of_a_network_are_read_before_a_library_sees_them(folder, tmp_path, part, content):
    (copy(folder, tmp_path) / part / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^Stable Diffusion \S+copy: {part}: config.json (holds settings by name|is not JSON)"):
        load_component(str(tmp_path / "copy"), part)


def test_a_folder_goes_before_a_hub_id(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "CompVis/stable-diffusion-v1-4")
    assert components_folder("CompVis/stable-diffusion-v1-4").resolve() == tmp_path / "CompVis/stable-diffusion-v1-4"


def test_a_folder_of_images_holds_one_set(tmp_path):
    for n in (5, 3): paths = write_images(tmp_path, torch.zeros(n, 3, 40, 40, dtype=torch.uint8))
    assert sorted(tmp_path.iterdir()) == paths and len(paths) == 3


@pytest.mark.parametrize("name", ["22_stable_diffusion", "25_textual_projection", "26_textual_inversion", "27_unet_finetuning", "E_ablations"])
def test_steps_are_checked_before_a_model_is_loaded_or_trained(name):
    cells = nbformat.read(places.repo_root() / f"nbs/{name}.ipynb", 4).cells
    lines = [line for cell in cells if cell.source.startswith("#| report") for line in cell.source.splitlines()]
    checked = next(i for i, line in enumerate(lines) if "check_steps(load_scheduler(" in line)
    takes_long = r"\b(load_pipeline|load_component|load_text_encoder|few_shot_latents|trained_projection|inverted|finetuned|sample|measure)\("
    assert checked < min(i for i, line in enumerate(lines) if re.search(takes_long, line))


def test_a_scheduler_is_checked_without_its_model(folder):
    assert check_steps(load_scheduler(folder, "ddim"), 10) == 10
    with pytest.raises(ValueError, match="DDIMScheduler cannot draw in 1001 steps"): check_steps(load_scheduler(folder, "ddim"), 1001)
    with pytest.raises(ValueError, match="unknown scheduler 'dpm'"): load_scheduler(folder, "dpm")
