"The bundled models are what made.json says, open with the libraries' own classes, and training goes on where it was killed."
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
import torchxrayvision as xrv
from torch import nn

from cxr_nb.judges import load_classifier, probabilities
from cxr_nb.miniature import PARTS, changed_files, fit, made, make_miniature
from cxr_nb.small_models import JUDGES, TARGETS
from cxr_nb.text_encoder import embed, load_text_encoder

MINIATURE = Path(str(resources.files("cxr_nb"))) / "miniature"

TRAIN = """
import sys, time, torch
from torch import nn
from cxr_nb.miniature import fit
torch.set_num_threads(1)  # sums depend on it
def run(work, steps=300, pause=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    def loss(step):
        time.sleep(pause)
        x = torch.randn(32, 4)
        return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean()
    return net, fit("net", net, loss, steps, 0.01, work, seed=3, every=0.02)
if __name__ == "__main__": run(sys.argv[1], pause=0.01)
"""


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "trial_training.py").write_text(TRAIN)
    sys.path.insert(0, str(folder))
    yield folder / "trial_training.py"
    sys.path.remove(str(folder))


def test_a_killed_training_ends_with_the_same_weights(training, tmp_path):
    from trial_training import run
    whole, log = run(tmp_path / "whole")
    for _ in range(2):
        process = subprocess.Popen([sys.executable, training, tmp_path / "killed"], stderr=subprocess.DEVNULL)
        before = step_of(tmp_path / "killed/net.pt")
        while process.poll() is None and step_of(tmp_path / "killed/net.pt") < before + 40: time.sleep(0.05)
        process.send_signal(signal.SIGKILL); process.wait()
    assert 40 <= step_of(tmp_path / "killed/net.pt") < 300
    resumed, again = run(tmp_path / "killed")
    assert again["losses"] == log["losses"] and log["losses"][-1] < log["losses"][0]
    for name, value in whole.state_dict().items(): assert torch.equal(value, resumed.state_dict()[name]), name


def step_of(path): return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    net = nn.Linear(1, 1)
    def loss(step): return (net(torch.ones(1, 1)) * (float("nan") if step == 3 else 1.0)).mean()
    with pytest.raises(ValueError, match="net: loss nan at step 3; last checkpoint"): fit("net", net, loss, 9, 0.1, tmp_path)


def test_the_bundle_is_whole_and_small():
    assert made(MINIATURE) and set(made(MINIATURE)) <= set(PARTS)
    assert changed_files(MINIATURE) == []
    recorded = {name for part in made(MINIATURE).values() for name in part["files"]}
    result = {p.relative_to(MINIATURE).as_posix() for p in MINIATURE.rglob("*") if p.is_file()}
    assert result - recorded <= {"made.json", "reality.json", "tuning.csv"}
    assert sum((MINIATURE / name).stat().st_size for name in result) < 30 * 2**20
    assert not [name for name in result if Path(name).suffix in (".bin", ".pt", ".pkl", ".ckpt")]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    "All parts, made from nothing with a thousandth of the data and steps."
    folder = tmp_path_factory.mktemp("miniature")
    return folder / "models", make_miniature(folder / "models", folder / "work", scale=0.001, device="cpu")


def test_every_part_is_made_from_nothing(trial):
    folder, parts = trial
    assert tuple(parts) == PARTS and changed_files(folder) == []
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert make_miniature(folder, folder.parent / "work", scale=0.001) == parts
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}, "what is made is not made again"


def test_the_pipeline_opens_like_any_other(trial):
    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained(trial[0] / "stable_diffusion")
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.vae_scale_factor == 8 and pipeline.tokenizer.model_max_length == 77
    kept = pipeline.scheduler.config
    assert (kept.beta_start, kept.beta_end, kept.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    image = pipeline("A photo of a lung xray", num_inference_steps=2, height=128, width=128).images[0]
    assert image.size == (128, 128)


@pytest.mark.parametrize("name", ["stable_diffusion", "text_encoders/general", "text_encoders/reports"])
def test_text_encoders_open_in_the_study(trial, name):
    encoder = load_text_encoder(name, str(trial[0] / name))
    assert (encoder.head is not None) == (name == "text_encoders/reports")
    embeddings, _ = embed(encoder, ["No effusion.", "Large left pleural effusion."], progress=False)
    for e in embeddings.values(): assert e.shape == (2, 128) and e.isfinite().all() and e.dtype == torch.float32


def test_judges_open_and_give_probabilities(trial):
    images = (torch.rand(3, 64, 64) * 255).byte()
    for name in JUDGES:
        judge = load_classifier(trial[0] / "classifiers" / name)
        assert judge.targets == TARGETS == [t if t in judge.targets else "" for t in xrv.datasets.default_pathologies]
        scores = probabilities(judge, images)
        named = scores[:, [bool(target) for target in TARGETS]]
        assert named.shape == (3, 12) and (named >= 0).all() and (named <= 1).all()


def test_no_word_is_without_tokens():
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "stable_diffusion/tokenizer")
    odd = "Kerley-B lines; 3.5 cm (œdème) & \"pleural\" effusion ☢"
    ids = tokenizer(odd)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == odd.lower().replace(" ", "")
