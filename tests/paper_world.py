"The world of the profile `paper`, made small: a hub's cache and data sets under their real names and in their real layouts, of random content."
import gzip
import hashlib
import json
import shutil
from pathlib import Path

import checkpoints
import pipelines
import torch
import trees

from cxr_nb.text_encoder import ENCODERS

V14 = "CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"
PUBLISHED = "densenet121-res224-all"


def clip_vocabulary(folder):
    "CLIP's own 49,408 tokens and merges, as transformers' files, from the package that ships them."
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode
    listed = gzip.open(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8").read().split("\n")
    merges = listed[1 : 49152 - 256 - 2 + 1]
    letters = [*bytes_to_unicode().values()]
    words = [*letters, *(x + "</w>" for x in letters), *("".join(merge.split()) for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return words


def stable_diffusion(folder, width=16, prediction="epsilon", binary=True):
    "Components of the Stable Diffusion family in the layout of 2022, with CLIP's vocabulary; `binary`: .bin files and no safetensors."
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    words = clip_vocabulary(folder / "words")
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu",
        bos_token_id=0, eos_token_id=2, pad_token_id=1))
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=width)
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, sample_size=512, scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    schedule = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
                             prediction_type=prediction)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    made = StableDiffusionPipeline(vae.eval(), text.eval(), tokenizer, unet.eval(), schedule, None, None, requires_safety_checker=False)
    made.save_pretrained(folder, safe_serialization=not binary)
    shutil.rmtree(folder / "words")
    return folder


def cached(cache, repository, commit, folder):
    "A folder as a snapshot in a hub's cache: contents by their hash, names as links to them, the branch main at this commit."
    home = cache / f"models--{repository.replace('/', '--')}"
    for path in folder.rglob("*"):
        if not path.is_file(): continue
        content, name = path.read_bytes(), path.relative_to(folder)
        large = path.suffix in (".bin", ".safetensors")
        digest = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob, link = home / "blobs" / digest, home / "snapshots" / commit / name
        for place in (blob, link): place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs/main").write_text(commit)


def models(home, work):
    "A home folder with everything that `paper` fetches but Inception, whose file is known by its hash."
    from torchxrayvision import models
    cache = home / "hf/hub"
    cached(cache, *V14, stable_diffusion(work / "v14"))
    for name, make in checkpoints.MAKERS.items():
        source = ENCODERS[name]
        if source.location == V14[0]: continue
        make(work / name)
        cached(cache, source.location, source.revision or "5" * 40, work / name)
    torch.manual_seed(0)
    judge = models.DenseNet(weights=None).eval()
    file = home / ".torchxrayvision/models_data" / models.model_urls[PUBLISHED]["weights_url"].rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(judge, file)


def data(root):
    "The data sets at the places that `paper` names."
    trees.chexpert(root / "chexpert", patients=30)
    trees.mimic(root / "mimic-cxr-jpg", patients=24)
    trees.mimic_reports(root, root / "mimic-cxr-jpg", as_zip=True)
    trees.laion(root / "laion400m-meta", parts=2, rows=60)


# fewer images, captions and steps, and the one model that cannot be made up left out: nothing else
CUT = """base: paper
shared:
  size: 64
  steps: 2
  images_per_prompt: 3
  batch_size: 4
  draws: 50
  blocks: 3
  splits: 2
  device: cpu
  extractors: [densenet121-res224-all]
  extractor: densenet121-res224-all
03_phantoms: {patients: 2, reports_per_label: 1}
21_datasets: {sample_size: 12, captions: 80, few_shot: 2, reports_per_class: 8, min_reports: 4}
23_autoencoder: {sizes: [64]}
32_autoencoder_results: {frechet_batch: 4, kid_subset: 6}
25_textual_projection: {training_captions: 40, held_out: 10, training_steps: 2, training_batch_size: 4, kept_every: 1}
26_textual_inversion: {training_steps: 2, training_batch_size: 2, kept_every: 1}
B_text_clusters: {perplexity: 3.0}
C_miniature: {pictures_drawn: 24, patients: 15, colours: 1, drawing_steps: 2}
27_unet_finetuning: {class_images: 3, training_steps: 2, sample_every: 1, trainings: 1}
"""
