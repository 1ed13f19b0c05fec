"A small Stable Diffusion with random weights: every component of the real one, in its file layout."
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, CHANNELS, FACTOR, SIDE = 16, 4, 8, 4  # hidden states; latents: channels, pixels per latent, latents a side
MERGES = [("l", "u"), ("lu", "n"), ("lun", "g</w>")]


def write_tokenizer(folder):
    "A byte-level vocabulary and the merges that make `lung` one token."
    folder.mkdir(parents=True)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in MERGES), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return len(words)


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
