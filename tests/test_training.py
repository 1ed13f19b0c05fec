"Killed processes end as if they had never stopped, two processes as one, cached as uncached; damage is said."
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from groups import join_group, run_two
from torch import nn
from torch.nn import functional as F

from cxr_nb.caches import cached, records, run_frozen
from cxr_nb.checkpointing import checkpoints, content_hash, tensors_hash
from cxr_nb.diffusion import denoising_losses, diffusion_loss, noise_record, training_noise_scheduler
from cxr_nb.training import LOG, TrainingSettings, train

torch.set_num_threads(1)  # sums depend on it
SETTINGS = {"batch_size": 4, "learning_rate": 0.02, "schedule": "cosine", "warmup": 5, "accumulation": 2, "ema": 0.95, "seed": 3, "device": "cpu"}


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))


def small_run(folder, steps=60, pause=0.0, spoil=None, **settings):
    "A run with all that has a state: AdamW, average, buffers, dropout; 13 samples in batches of 4, in two parts."
    net, x = small_net(), torch.randn(13, 3)
    def loss(batch):
        time.sleep(pause)
        if spoil: spoil(len(batch["x"]))
        return F.mse_loss(net(batch["x"]), batch["y"])
    data = records({"x": x, "y": x.prod(1, keepdim=True)})
    log = train(net, loss, data, TrainingSettings(steps, **(SETTINGS | settings)), Path(folder))
    return net.state_dict(), log


def in_process(folder, settings):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress bar
    small_run(folder, pause=0.005, **settings)


def everything(folder):
    "The newest checkpoint but for the seconds of its log, flat."
    def flat(value, name=""):
        if isinstance(value, dict): return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
        if isinstance(value, list | tuple): return flat(dict(enumerate(value)), name)
        return {name: value}
    saved = torch.load(checkpoints(folder)[-1], weights_only=True)
    saved["log"] = saved["log"][:, : LOG.index("seconds")]
    return flat({key: part for key, part in saved.items() if key != "sha256"})  # which holds the seconds too


def step_of(folder): return int(result[-1].stem.split("_")[1]) if (result := checkpoints(folder)) else 0


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items(): assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


@pytest.fixture(scope="module")
def server():
    "Processes that begin with everything imported."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cxr_nb.training", "pytest", "torch._dynamo"])  # the last comes with the first step
    return context


@pytest.mark.parametrize("every", [1, 3])
def test_killed_at_any_moment_it_ends_bit_for_bit_the_same(server, tmp_path, every):
    steps, dice, kills = 180, random.Random(every), []
    settings = {"steps": steps, "checkpoint_every": every, "keep": 2}
    whole, log = small_run(tmp_path / "whole", **settings)
    for _ in range(4):
        process = server.Process(target=in_process, args=(tmp_path / "killed", settings))
        process.start()
        goal, limit = step_of(tmp_path / "killed") + dice.randint(1, 15), time.time() + 60
        while step_of(tmp_path / "killed") < goal and process.is_alive() and time.time() < limit: time.sleep(0.001)
        time.sleep(0.01 * dice.random())  # within a step or within the writing of a checkpoint
        os.kill(process.pid, signal.SIGKILL); process.join()
        kills.append(step_of(tmp_path / "killed"))
        assert process.exitcode == -signal.SIGKILL
    assert 0 < kills[0] < kills[-1] < steps
    resumed, again = small_run(tmp_path / "killed", **settings)
    same(whole, resumed)
    same(everything(tmp_path / "whole"), everything(tmp_path / "killed"))
    assert again.drop(columns="seconds").equals(log.drop(columns="seconds"))
    kept = steps - every, steps
    assert [p.name for p in sorted((tmp_path / "killed").iterdir())] == [f"step_{step:08}.pt" for step in kept]


def test_a_kill_before_the_first_checkpoint_costs_nothing_but_time(server, tmp_path):
    process = server.Process(target=in_process, args=(tmp_path / "killed", {}))
    process.start()
    time.sleep(0.05); os.kill(process.pid, signal.SIGKILL); process.join()
    assert step_of(tmp_path / "killed") == 0
    same(small_run(tmp_path / "killed")[0], small_run(tmp_path / "whole")[0])


def noisy_run(folder, accumulation=1, spoiled=-1):
    "A run whose noise comes from the seeds of its samples; `spoiled`: the step in which the last sample's loss is NaN."
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(13, 3)
    def loss(batch):
        noise = [np.random.default_rng(row).standard_normal(3, dtype=np.float32) for row in batch["seeds"].tolist()]
        inputs = torch.cat([batch["x"], torch.from_numpy(np.stack(noise))], 1)
        bad = (batch["seeds"][:, 1] == spoiled) & (batch["seeds"][:, 2] == 7)
        return ((net(inputs) - batch["x"].prod(1, keepdim=True)) ** 2).mean(1).masked_fill(bad, float("nan"))
    def compute():
        with open(f"{folder}.computed", "a") as file: file.write("once\n")
        return {"x": x}
    options = {"batch_size": 8, "learning_rate": 0.02, "accumulation": accumulation, "ema": 0.9, "seed": 5, "device": "cpu"}
    data = records(cached(folder.with_suffix(".safetensors"), {}, compute))
    log = train(net, loss, data, TrainingSettings(30, checkpoint_every=10, **options), folder)
    return net.state_dict(), log


def in_group(rank, port, folder):
    "What one of two processes does that a launcher started on CPUs."
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    join_group(rank, port)
    weights, log = noisy_run(folder / "two", accumulation=2)
    try: noisy_run(folder / "bad", spoiled=12)
    except FloatingPointError as error: (folder / f"error_{rank}").write_text(str(error))
    torch.save((weights, log.loss.tolist()), folder / f"rank_{rank}.pt")


def test_two_processes_give_what_one_gives(server, tmp_path):
    run_two(server, in_group, tmp_path)
    (first, losses), (second, others) = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1))
    assert losses == others
    same(first, second)
    weights, log = noisy_run(tmp_path / "one")
    assert losses == pytest.approx(log.loss.tolist(), rel=1e-5)
    assert losses != log.loss.tolist(), "rounding differs, or it was no group of two"
    for name, value in weights.items(): torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "two.computed").read_text() == "once\n", "the second process reads what the first has made"
    for rank in (0, 1):
        message = (tmp_path / f"error_{rank}").read_text()
        assert "the loss is nan at step 13" in message and str(tmp_path / "bad/step_00000010.pt") in message
    with pytest.raises(ValueError, match="processes is 2 there and 1 here"): noisy_run(tmp_path / "two", accumulation=2)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_serves(tmp_path):
    options = {"steps": 12, "checkpoint_every": 3, "keep": 3}
    whole, _ = small_run(tmp_path, **options)
    message, (oldest, middle, last) = "{}: is no whole checkpoint .*; delete {}, and training {}$", checkpoints(tmp_path)
    def damage(path): path.write_bytes(path.read_bytes()[:1000])
    damage(last)
    with pytest.raises(ValueError, match=message.format(last, "it", f"goes on from {middle.name}")): small_run(tmp_path, **options)
    damage(middle)
    with pytest.raises(ValueError, match=message.format(last, f"it and {middle.name}", f"goes on from {oldest.name}")): small_run(tmp_path, **options)
    for path in (middle, last): path.unlink()
    same(small_run(tmp_path, **options)[0], whole)
    for path in (oldest, middle): path.unlink(missing_ok=True)
    damage(last)
    for path in checkpoints(tmp_path)[:-1]: path.unlink()
    with pytest.raises(ValueError, match=message.format(last, "it", "begins anew: there is no other that is whole")): small_run(tmp_path, **options)
    last.unlink()
    same(small_run(tmp_path, **options)[0], whole)


def places_of(saved):
    "A leaf of every kind that a checkpoint holds: (container, key)."
    optimizer, mine = saved["optimizer"], saved["random"][0]
    return {
        "weight": (saved["weights"], "0.weight"), "buffer": (saved["buffers"], "1.running_mean"), "average": (saved["average"], 2),
        "counter": (saved["buffers"], "1.num_batches_tracked"), "first moment": (optimizer["state"][0], "exp_avg"),
        "second moment": (optimizer["state"][3], "exp_avg_sq"), "optimizer's step": (optimizer["state"][1], "step"),
        "rate": (optimizer["param_groups"][0], "lr"), "torch": (mine, "torch"), "numpy": (mine["numpy"][1], 5), "numpy place": (mine["numpy"], 2),
        "log": (saved, "log"), "step": (saved, "step"), "seed": (saved["configuration"], "seed"),
    }


KINDS = ["weight", "buffer", "average", "counter", "first moment", "second moment", "optimizer's step", "rate", "torch", "numpy", "numpy place", "log", "step", "seed"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    small_run(folder, steps=6)
    return checkpoints(folder)[-1].read_bytes()


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error: small_run(folder, steps=6)
    assert "\n" not in str(error.value) and "step_00000006.pt" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_holds_another_value_is_refused(tmp_path, finished, kind):
    "One bit of a tensor, or the least change of a number."
    path = tmp_path / "step_00000006.pt"
    path.write_bytes(finished)
    saved = torch.load(path, weights_only=True)
    assert set(KINDS) == set(places_of(saved))
    held, key = places_of(saved)[kind]
    if isinstance(held[key], torch.Tensor): held[key].view(-1).view(torch.uint8)[0] ^= 1
    else: held[key] += 1
    torch.save(saved, path)
    refused(tmp_path, "its content is not what was written")


def test_keys_and_shapes_are_those_of_the_model(tmp_path, finished):
    path = tmp_path / "step_00000006.pt"
    def change(alter, sign=False):
        path.write_bytes(finished)
        saved = torch.load(path, weights_only=True)
        alter(saved)
        if sign: saved["sha256"] = content_hash({key: saved[key] for key in saved if key != "sha256"})
        torch.save(saved, path)
    for key in ("optimizer", "sha256", "scaler", "random"):
        change(lambda saved: saved.pop(key))
        refused(tmp_path, "it lacks parts, or has others")
    change(lambda saved: saved.update(more=1)); refused(tmp_path, "it lacks parts")
    torch.save([1], path); refused(tmp_path, "it lacks parts")
    def narrow(part, name): return lambda saved: saved[part].__setitem__(name, torch.ones(1))
    change(narrow("weights", "0.weight")); refused(tmp_path, "its content is not what was written")
    # as if another program had written it
    for part, name in (("weights", "0.weight"), ("buffers", "1.running_var"), ("average", 0)):
        change(narrow(part, name), sign=True)
        refused(tmp_path, f"its {part} are not this model's, the first is {name}; take another folder")
    change(lambda saved: saved["weights"].pop("4.bias"), sign=True); refused(tmp_path, "its weights are not this model's, the first is 4.bias")
    change(lambda saved: saved["optimizer"]["state"][0].update(exp_avg=torch.ones(1)), sign=True); refused(tmp_path, "its moments are not")


def test_no_flipped_bit_of_the_file_changes_the_weights(tmp_path, finished):
    "Bits all over the file: refused, or in what the content does not depend on."
    whole, path, dice = small_run(tmp_path / "whole", steps=6)[0], tmp_path / "step_00000006.pt", random.Random(0)
    stopped = 0
    for _ in range(24):
        bent = bytearray(finished)
        bent[dice.randrange(len(bent))] ^= 1 << dice.randrange(8)
        path.write_bytes(bent)
        try: same(small_run(tmp_path, steps=6)[0], whole)
        except ValueError as error:
            assert "is no whole checkpoint" in str(error) and "begins anew" in str(error)
            stopped += 1
    assert stopped > 8


@pytest.mark.parametrize("change", [
    {"steps": 13}, {"batch_size": 8}, {"ema": 0.0}, {"accumulation": 1}, {"seed": 4}, {"schedule": "linear"}, {"mixed_precision": "bf16"},
])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, change):
    small_run(tmp_path, steps=6)
    name, value = next(iter(change.items()))
    there = 6 if name == "steps" else SETTINGS.get(name, "no")
    with pytest.raises(ValueError, match=f"is of another configuration: {name} is {there!r} there and {value!r} here; take another"):
        small_run(tmp_path, **({"steps": 6} | change))
    small_run(tmp_path, steps=6, checkpoint_every=2, keep=3)  # these change nothing in the result


def test_other_data_weights_or_models_are_refused(tmp_path):
    net, settings = small_net(), TrainingSettings(2, device="cpu", batch_size=2)
    def run(n=4, **given): return train(net, lambda batch: net(batch["x"]).square(), [{"x": torch.ones(3)}] * n, settings, tmp_path, given)
    run(unet="ab")
    with pytest.raises(ValueError, match="samples is 4 there and 5 here"): run(5, unet="ab")
    with pytest.raises(ValueError, match=r"configuration\[unet\] is 'ab' there and 'cd' here"): run(unet="cd")
    net[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trained weights is '57 numbers \(\w+\)' there and '49 numbers"): run(unet="ab")


def test_only_trained_weights_change_and_are_kept(tmp_path):
    model = nn.ModuleDict({"frozen": nn.Linear(3, 400).requires_grad_(False), "trained": nn.Linear(400, 1)})
    before = tensors_hash(model["frozen"].state_dict())
    def loss(batch): return model["trained"](model["frozen"](batch["x"])).square()
    train(model, loss, [{"x": torch.ones(3)}] * 4, TrainingSettings(3, batch_size=2, device="cpu"), tmp_path)
    assert tensors_hash(model["frozen"].state_dict()) == before
    assert set(torch.load(checkpoints(tmp_path)[0])["weights"]) == {"trained.weight", "trained.bias"}


def test_samples_show_the_average_and_disturb_nothing(tmp_path):
    net, x = small_net(), torch.randn(13, 3)
    seen, data = {}, records({"x": x})
    options = {"batch_size": 4, "learning_rate": 0.1, "ema": 0.9, "device": "cpu", "checkpoint_every": 2, "keep": 9}
    def sample(step):
        seen[step] = net[0].weight.clone(); random.random(); torch.rand(5)
    log = train(net, lambda b: net(b["x"]).square(), data, TrainingSettings(6, sample_every=2, **options), tmp_path / "seen", sample=sample)
    for path in checkpoints(tmp_path / "seen"):
        saved = torch.load(path)
        assert torch.equal(seen[saved["step"]], saved["average"][0]) and not torch.equal(saved["average"][0], saved["weights"]["0.weight"])
    assert torch.equal(net[0].weight, seen[6])
    net = small_net()
    again = train(net, lambda b: net(b["x"]).square(), data, TrainingSettings(6, **options), tmp_path / "unseen")
    assert again.loss.tolist() == log.loss.tolist()


def test_what_would_fit_is_found_with_room_for_the_optimizer(tmp_path, monkeypatch):
    held, tried = [], []
    empty_like = torch.empty_like
    monkeypatch.setattr("cxr_nb.training.torch.empty_like", lambda p: held.append(p.numel()) or empty_like(p))
    def short(n):
        tried.append(n)
        if n > 2: raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    with pytest.raises(torch.OutOfMemoryError, match="at step 1 with 8 samples at a time; 2 would fit: set accumulation to 8 for the same batch of 16, or take batches of 4"):
        small_run(tmp_path, batch_size=16, spoil=short)
    assert tried == [8, 4, 2] and sum(held) == 2 * 2 * sum(p.numel() for p in small_net().parameters())
    def never(n): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with pytest.raises(torch.OutOfMemoryError, match="with 2 samples at a time, and one alone does not fit; take smaller"): small_run(tmp_path, spoil=never)
    def other(n): raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="^shapes do not fit$"): small_run(tmp_path, spoil=other)


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    with pytest.raises(FloatingPointError, match="the weights are not finite at step 1; there is no checkpoint yet"):
        small_run(tmp_path, steps=1, learning_rate=1e38, weight_decay=1e3)
    assert list(tmp_path.iterdir()) == []


def test_parts_change_rounding_alone(tmp_path):
    whole, log = noisy_run(tmp_path / "whole")
    parts, again = noisy_run(tmp_path / "parts", accumulation=4)
    assert again.loss.tolist() == pytest.approx(log.loss.tolist(), rel=1e-5)
    for name, value in whole.items(): torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


def test_mixed_precision_trains_and_one_training_follows_another(tmp_path):
    from accelerate import notebook_launcher
    results = []
    def run(): results.append(small_run(tmp_path / "half", steps=40, mixed_precision="bf16"))
    plain = small_run(tmp_path / "before", steps=40)
    notebook_launcher(run, num_processes=1)
    (weights, log), = results
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    assert log.loss[0] != plain[1].loss[0] and log.loss[0] == pytest.approx(plain[1].loss[0], rel=2**-6)
    assert log.loss.mean() == pytest.approx(plain[1].loss.mean(), rel=0.1)
    same(small_run(tmp_path / "after", steps=40)[0], plain[0])


class SmallUNet(nn.Module):
    "Predicts noise from latents, the timestep and the mean hidden state."

    def __init__(self):
        super().__init__()
        self.mix, self.from_text = nn.Conv2d(3, 2, 3, padding=1), nn.Linear(5, 2)

    def forward(self, noisy, timesteps, states):
        time = (timesteps / 1000)[:, None, None, None].expand(-1, 1, *noisy.shape[2:])
        return SimpleNamespace(sample=self.mix(torch.cat([noisy, time], 1)) + self.from_text(states.mean(1))[..., None, None])


class Schedule:
    config = SimpleNamespace(num_train_timesteps=1000, prediction_type="epsilon")

    alphas_cumprod = 1 - torch.arange(1000) / 1000


def test_with_the_cache_and_without_it_the_loss_is_the_same(tmp_path):
    torch.manual_seed(1)
    encoder, words, images = nn.Conv2d(1, 4, 2, 2), nn.Embedding(7, 5), torch.rand(11, 1, 8, 8)
    raw, ran = records({"image": images, "prompt": torch.arange(11) % 7}), []
    def frozen(batch):
        ran.append(len(batch["image"]))
        mean, log_std = encoder(batch["image"]).chunk(2, 1)
        return {"mean": mean, "std": log_std.exp(), "encoder_hidden_states": words(batch["prompt"])[:, None]}
    made_of = {"weights": [tensors_hash(m.state_dict()) for m in (encoder, words)], "images": tensors_hash({"images": images})}
    def run(name, cache):
        torch.manual_seed(2)
        unet = SmallUNet()
        data, loss = run_frozen(raw, lambda batch: diffusion_loss(unet, Schedule(), batch), frozen, cache, made_of, 4)
        settings = TrainingSettings(12, batch_size=4, learning_rate=0.01, device="cpu")
        return train(unet, loss, data, settings, tmp_path / name).loss.tolist()
    first = run("cached", tmp_path / "latents.safetensors")
    assert ran == [4, 4, 3]
    assert run("again", tmp_path / "latents.safetensors") == first and len(ran) == 3
    assert run("uncached", None) == pytest.approx(first, rel=1e-5) and len(ran) == 3 + 12
    assert len(set(first)) == 12 and encoder.weight.grad is None


V14 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def from_model(sampler, **stated):
    "A sampler of a model whose own scheduler states V14 and more, as `load_pipeline` makes it; None where its class refuses."
    try: return getattr(diffusers, sampler).from_config(V14 | stated)
    except (TypeError, ValueError): return None


def samplers():
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    kinds = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)}
    return [name for name in kinds if from_model(name) is not None]


def steps_taken(sampler):
    "The sampler after it was set to ten steps, where its class can: some then know those timesteps alone."
    try: sampler.set_timesteps(10)
    except Exception: pass
    return sampler


def kept_by_numpy(betas): return np.cumprod(1 - np.asarray(betas, dtype=np.float64))


def shown_by(scheduler):
    "What a U-Net is shown of latents 1 and noise 10 at each timestep that the seeds draw."
    class Shown(nn.Module):
        def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.ones(1))
        def forward(self, noisy, timesteps, states):
            self.noisy, self.timesteps = noisy, timesteps
            return SimpleNamespace(sample=torch.zeros_like(noisy))
    unet, n = Shown(), 400
    seeds, ones = torch.tensor([[0, s, 0, 1] for s in range(n)]), torch.ones(n, 1, 1, 1)
    losses = denoising_losses(unet, scheduler, ones, 0 * ones, torch.zeros(n, 1, 1), seeds)
    noise = []
    for row in seeds.tolist():
        generator = np.random.default_rng(row)
        generator.standard_normal((1, 1, 1), dtype=np.float32)
        noise.append(generator.standard_normal((1, 1, 1), dtype=np.float32).item())
    return unet.noisy.flatten().numpy(), np.array(noise), unet.timesteps.numpy(), losses.numpy()


LINEAR_ROOTS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def test_there_are_samplers_to_try():
    names = "PNDM DDIM DDPM DPMSolverMultistep DPMSolverSinglestep EulerDiscrete EulerAncestralDiscrete UniPCMultistep DEISMultistep HeunDiscrete"
    names += " LMSDiscrete KDPM2Discrete KDPM2AncestralDiscrete EDMEuler EDMDPMSolverMultistep LCM TCD SASolver IPNDM"
    assert {f"{name}Scheduler" for name in names.split()} <= set(samplers())


@pytest.mark.parametrize("sampler", samplers())
def test_the_noise_of_training_is_the_models_whatever_the_sampler(sampler):
    "sqrt(abar) x + sqrt(1 - abar) eps, with betas made in numpy."
    noise_scheduler, kept = training_noise_scheduler(steps_taken(from_model(sampler))), kept_by_numpy(LINEAR_ROOTS)
    t, one = np.array([0, 10, 300, 700, 990, 999]), torch.ones(6, 1, 1, 1)
    noisy = noise_scheduler.add_noise(one, 10 * one, torch.tensor(t)).flatten().numpy()
    assert noisy == pytest.approx(kept[t] ** 0.5 + (1 - kept[t]) ** 0.5 * 10, rel=1e-4)
    assert noisy[1:5] == pytest.approx([1.97, 7.17, 9.87, 10.05], abs=0.01)
    noisy, noise, timesteps, losses = shown_by(noise_scheduler)
    assert noisy == pytest.approx(kept[timesteps] ** 0.5 + (1 - kept[timesteps]) ** 0.5 * noise, abs=1e-4)
    assert losses == pytest.approx(noise**2, rel=1e-5), "the target is the noise"
    assert noise_record(noise_scheduler) == V14 | {"prediction_type": "epsilon"}


@pytest.mark.parametrize("sampler", samplers())
def test_a_models_own_schedule_reaches_every_sampler(sampler):
    zero = training_noise_scheduler(from_model(sampler, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    roots = np.sqrt(kept_by_numpy(LINEAR_ROOTS))
    kept = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2  # Lin et al. 2024, algorithm 1
    assert zero.alphas_cumprod.numpy() == pytest.approx(kept, abs=1e-5) and zero.alphas_cumprod[999] == 0
    noisy, noise, t, losses = shown_by(zero)
    assert losses == pytest.approx((kept[t] ** 0.5 * noise - (1 - kept[t]) ** 0.5) ** 2, abs=1e-4), "the target is the velocity"
    flat = from_model(sampler, trained_betas=[0.01] * 1000)
    if flat is not None: assert training_noise_scheduler(flat).alphas_cumprod[500].item() == pytest.approx(0.99**501, rel=1e-4)
    with pytest.raises(ValueError, match="at timestep 999 the betas leave nothing of an image"):
        training_noise_scheduler(from_model(sampler, rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="prediction_type is 'sample'; the loss knows"):
        training_noise_scheduler(from_model(sampler, prediction_type="sample"))
    assert noise_record(training_noise_scheduler(from_model(sampler, timestep_spacing="trailing"))) == V14 | {"prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory): return small_run(tmp_path_factory.mktemp("plain"), steps=6, accumulation=1)


# what the installed accelerate reads, and what `accelerate launch` and default_config.yaml put into the environment
@pytest.mark.parametrize("setting", [
    "GRADIENT_ACCUMULATION_STEPS=4", "MIXED_PRECISION=bf16", "MIXED_PRECISION=fp8", "GRADIENT_CLIPPING=0.001", "DYNAMO_BACKEND=EAGER",
    "DYNAMO_BACKEND=none such", "DYNAMO_MODE=reduce-overhead", "DYNAMO_USE_FULLGRAPH=true", "FP8_BACKEND=MSAMP", "FP8_BACKEND=none such",
    "TORCH_DEVICE=meta", "DOWNCAST_BF16=true", "DEBUG_MODE=true", "CPU_AFFINITY=0", "BYPASS_DEVICE_MAP=true", "ALLOW_TF32=true",
    "DEEPSPEED_ZERO_STAGE=3", "USE_CPU=true", "USE_CPU=false", "USE_CPU=", "USE_FSDP=false", "USE_DEEPSPEED=0", "USE_MEGATRON_LM=",
])
def test_the_settings_hold_whatever_the_environment_says(undisturbed, tmp_path, monkeypatch, setting):
    name, _, value = f"ACCELERATE_{setting}".partition("=")
    monkeypatch.setenv(name, value)
    weights, log = small_run(tmp_path, steps=6, accumulation=1)
    same(weights, undisturbed[0])
    assert log.loss.tolist() == undisturbed[1].loss.tolist() and os.environ[name] == value, "what is the caller's stays"


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"])
def test_what_training_does_not_know_is_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"^training: ACCELERATE_USE_{name} is set in the environment.*unset it$"): small_run(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "perhaps")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name} is 'perhaps' in the environment; it takes true or false"): small_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_variables_at_once(undisturbed, tmp_path, monkeypatch):
    for name in ("GRADIENT_ACCUMULATION_STEPS", "MIXED_PRECISION", "DYNAMO_BACKEND", "TORCH_DEVICE"): monkeypatch.setenv(f"ACCELERATE_{name}", "2")
    same(small_run(tmp_path, steps=6, accumulation=1)[0], undisturbed[0])
