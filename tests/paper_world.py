"""The world of the profile `paper`, made small: a hub's cache and data sets under their real names and in their real layouts, of random content.

Inception is not in it: its loader takes the published file alone, by its hash, and that check is not to be got round.
"""
import hashlib

import checkpoints
import pipelines
import torch
import trees

from cxr_nb.places import split_place
from cxr_nb.profiles import resolve_parameters
from cxr_nb.text_encoder import ENCODERS

V14, PINNED = split_place(resolve_parameters("22_stable_diffusion", "paper")["stable_diffusion"])
JUDGE = "densenet121-res224-all"
NEWEST = "5" * 40  # the commit of a repository of which no revision is pinned


def cache(home, repository, commit, folder):
    "Keep a folder as huggingface_hub keeps a snapshot: contents by their hash, names as links to them, the branch main at this commit."
    place = home / f"hf/hub/models--{repository.replace('/', '--')}"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(folder)
        large = path.suffix in (".bin", ".safetensors")
        digest = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob, link = place / "blobs" / digest, place / "snapshots" / commit / name
        for one in (blob, link): one.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to("../" * len(name.parts) + f"../blobs/{digest}")
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)


def judge(home):
    "torchxrayvision's DenseNet-121 as its author saved it, a whole model, where the library looks for it."
    from torchxrayvision import models
    torch.manual_seed(0)
    network = models.DenseNet(weights=None)
    # flat and rough, dark and light: the layers' norms learn their range, and the last outputs get a spread of one, so that none is as good as 0 or 1
    level, rough = torch.linspace(-600, 600, 24)[torch.randperm(24)].view(-1, 1, 1, 1), torch.linspace(0, 400, 24).view(-1, 1, 1, 1)
    pictures = torch.nn.functional.interpolate(level + rough * (2 * torch.rand(24, 1, 64, 64) - 1), size=(224, 224))
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d): layer.momentum = 1.0
        network.train()(pictures)
        outputs = network.eval()(pictures)
        network.classifier.weight /= outputs.std(0)[:, None]
        network.classifier.bias.copy_((network.classifier.bias - outputs.mean(0)) / outputs.std(0))
    path = home / ".torchxrayvision/models_data" / models.model_urls[JUDGE]["weights_url"].rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save(network, path)


def models(home, work):
    "All that `paper` fetches but Inception, below the folder that stands for a user's home."
    cache(home, V14, PINNED, pipelines.published_pipeline(work / "v14", **pipelines.V1))
    for name, source in ENCODERS.items():
        if source.location == V14: continue
        checkpoints.MAKERS[name](work / name)
        cache(home, source.location, source.revision or NEWEST, work / name)
    judge(home)


def data(folder):
    "The data sets at the places that `paper` names."
    trees.chexpert(folder / "chexpert", patients=30)
    trees.mimic(folder / "mimic-cxr-jpg", patients=56, alone=70)
    trees.mimic_reports(folder, folder / "mimic-cxr-jpg", as_zip=True)
    trees.laion(folder / "laion400m-meta", parts=2, rows=60)


def environment(home):
    "Variables of a process that finds these models and no network."
    return {"HOME": str(home), "HF_HOME": str(home / "hf"), "TORCH_HOME": str(home / "torch"), "HF_HUB_OFFLINE": "1"}


# fewer images, captions and steps; left out are Inception, whose file is not made up, and what is about the bundled models, as the smoke report runs it
CUT = f"""base: paper
without: [J_report_prompts, C_miniature]
shared:
  size: 64
  steps: 2
  images_per_prompt: 2
  batch_size: 8
  draws: 50
  blocks: 3
  splits: 2
  device: cpu
  extractors: [{JUDGE}]
  extractor: {JUDGE}
03_phantoms: {{patients: 2, reports_per_label: 1}}
21_datasets: {{sample_size: 22, captions: 80, few_shot: 2, reports_per_class: 5, min_reports: 3}}
23_autoencoder: {{sizes: [64]}}
25_textual_projection: {{training_captions: 40, held_out: 10, training_steps: 2, training_batch_size: 4, kept_every: 1}}
26_textual_inversion: {{training_steps: 2, training_batch_size: 2, kept_every: 1}}
27_unet_finetuning: {{class_images: 2, training_steps: 2, sample_every: 2, trainings: 1}}
28_classification: {{most_real: 12}}
32_autoencoder_results: {{frechet_batch: 4, kid_subset: 6}}
33_text_encoder_results: {{k: 2}}
34_generation_results: {{neighbours: 1, examples: 2}}
10_introduction: {{examples: 2}}
B_text_clusters: {{perplexity: 3.0}}
"""
