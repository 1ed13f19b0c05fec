"A small Stable Diffusion with random weights: every component of the real one, in its file layout."
import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, CHANNELS, FACTOR, SIDE = 16, 4, 8, 4  # hidden states; latents: channels, pixels per latent, latents a side
MERGES = [("l", "u"), ("lu", "n"), ("lun", "g</w>")]


SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def write_vocabulary(folder, merges):
    "The bytes, each with and without the end of a word, what the merges make of them, and two special tokens: vocab.json and merges.txt."
    folder.mkdir(parents=True)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return len(words)


def write_tokenizer(folder):
    "A byte-level vocabulary and the merges that make `lung` one token."
    size = write_vocabulary(folder, MERGES)
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return size


def clip_merges():
    "Those of CLIP's own 49,408 tokens, from the package that ships them."
    path = Path(find_spec("open_clip").submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    return [line.split() for line in gzip.decompress(path.read_bytes()).decode().split("\n")[1:48895]]


def small_vae(attention=True):
    return AutoencoderKL(
        latent_channels=CHANNELS, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, sample_size=SIDE * FACTOR,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, mid_block_add_attention=attention,
        scaling_factor=0.5)


def small_pipeline(folder, seed=0):
    "Written to a folder as StableDiffusionPipeline.save_pretrained does, and returned."
    folder = Path(folder)
    vocabulary = write_tokenizer(folder / "words")
    torch.manual_seed(seed)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1))
    for weight in text.parameters(): torch.nn.init.normal_(weight, std=0.3)
    unet = UNet2DConditionModel(
        sample_size=SIDE, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=4)
    schedule = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    words = CLIPTokenizer.from_pretrained(folder / "words")
    made = StableDiffusionPipeline(small_vae(), text.eval(), words, unet.eval(), schedule, None, None, requires_safety_checker=False)
    made.vae.eval()
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def write_clip_tokenizer(folder, pad):
    "CLIP's tokenizer in the files of the Stable Diffusion family; `pad` is what fills a prompt up to 77 tokens."
    size = write_vocabulary(folder, clip_merges())
    added = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {key: {**added, "content": token} for key, token in SPECIAL.items() if key != "pad_token"}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77, "name_or_path": "openai/clip-vit-large-patch14",
                "special_tokens_map_file": "./special_tokens_map.json", "tokenizer_class": "CLIPTokenizer", **special, "pad_token": "<|endoftext|>"}
    plain = {key: {k: v for k, v in token.items() if k != "__type"} for key, token in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(plain | {"pad_token": pad}, indent=2))
    return size


def old_attention(key):
    "A weight of the VAE's attention by its name of 2022."
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items(): key = key.replace(f".{new}.", f".{old}.")
    return key


def write_component(folder, name, weights, config, forms):
    "Weights in each of the file formats, and config.json; a half-precision copy lies beside them that nothing should read."
    folder.mkdir()
    weights = {key: value.contiguous() for key, value in weights.items()}
    for form in forms:
        if form == "safetensors": save_file(weights, folder / f"{name[form]}.safetensors", {"format": "pt"})
        else: torch.save(weights, folder / f"{name[form]}.bin")
        (folder / f"{name[form]}.fp16.{form}").write_bytes(b"not read")
    (folder / "config.json").write_text(json.dumps(config, indent=2))


NETWORK = dict.fromkeys(("bin", "safetensors"), "diffusion_pytorch_model")
# what a release of the family has of its own; its scheduler says what the U-Net estimates, or leaves it to the class
V1 = dict(width=16, act="quick_gelu", pad="<|endoftext|>", linear=False, heads=4, scheduler={"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0"})
V2 = dict(width=32, act="gelu", pad="!", linear=True, heads=[2, 4], scheduler={"_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0", "prediction_type": "epsilon"})
V2_VELOCITY = V2 | {"scheduler": {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}}


def published_pipeline(folder, width, act, pad, linear, heads, scheduler, forms=("bin", "safetensors"), seed=0):
    "A release of the Stable Diffusion family as its repository holds it: names of files and weights, and keys of settings, are those of 2022."
    folder = Path(folder)
    size = write_clip_tokenizer(folder / "tokenizer", pad)
    torch.manual_seed(seed)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2, hidden_act=act,
        bos_token_id=0, eos_token_id=2, pad_token_id=1))
    for weight in text.parameters(): torch.nn.init.normal_(weight, std=0.3)
    unet = UNet2DConditionModel(
        sample_size=SIDE * 2, layers_per_block=1, block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=width, attention_head_dim=heads, norm_num_groups=4, use_linear_projection=linear)
    vae = small_vae()
    words = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.state_dict().items()}
    words["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    settings = text.config.to_diff_dict() | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32", "transformers_version": "4.22.0.dev0"}
    write_component(folder / "text_encoder", {"bin": "pytorch_model", "safetensors": "model"}, words, settings, forms)
    write_component(folder / "unet", NETWORK, unet.state_dict(), published_config(unet), forms)
    write_component(folder / "vae", NETWORK, {old_attention(k): v for k, v in vae.state_dict().items()}, published_config(vae), forms)
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, num_train_timesteps=1000, set_alpha_to_one=False,
                 skip_prk_steps=True, steps_offset=1, trained_betas=None)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | noise, indent=2))
    parts = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", scheduler["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.2.2", **parts}, indent=2))
    return folder


# settings that the repositories of 2022 have; of the others, the VAE's scaling factor among them, they say nothing
KEYS_2022 = {
    "UNet2DConditionModel": (
        "act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim down_block_types downsample_padding flip_sin_to_cos freq_shift "
        "in_channels layers_per_block mid_block_scale_factor norm_eps norm_num_groups out_channels sample_size up_block_types use_linear_projection").split(),
    "AutoencoderKL": "act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block norm_num_groups out_channels sample_size up_block_types".split(),
}


def published_config(network):
    kind = type(network).__name__
    given = {key: network.config[key] for key in KEYS_2022[kind] if key != "use_linear_projection" or network.config[key]}
    # 0.9 and not 0.2: diffusers reads a U-Net of fewer than 64 latents a side and an older version as a mistake, and draws at full size
    return {"_class_name": kind, "_diffusers_version": "0.9.0", **given}
