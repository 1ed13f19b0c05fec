"Textual projection on small encoders: what is trained, what is aligned with what, resume, files, inference, bad input."
from dataclasses import replace

import checkpoints as small
import numpy as np
import pandas as pd
import pipelines
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import r2_score
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from cxr_nb.stable_diffusion import encoder_hidden_states, load_pipeline, sample
from cxr_nb.text_encoder import load_text_encoder
from cxr_nb.textual_projection import (
    PROJECTION_FILE, TEMPLATES, VARIANTS, Variant, check_widths, clip_states, held_out_errors, hidden_states, in_domain_states,
    load_projection, projection, projection_loss, projection_scores, prompt_states, read_captions, split_captions,
    steps_kept, texts_of, token_ids, train_projection, trained_projection)
from cxr_nb.checkpointing import checkpoints, tensors_hash
from cxr_nb.training import TrainingSettings, global_batch

TEXTS = ["a lung", "small effusion, no edema", "There is a left pneumothorax", "Small pleural effusion", "lung . lung", "acute large right"]
TOKEN, DOCUMENT, NONE = Variant("token"), Variant("document"), Variant("none")
SETTINGS = TrainingSettings(6, batch_size=4, learning_rate=0.01, seed=3, checkpoint_every=3, sample_every=2, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    pipelines.small_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder): return load_text_encoder("CLIP", str(folder))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "cxr_bert"
    small.cxr_bert_specialized(folder)
    return load_text_encoder("CXR-BERT-specialized", str(folder))


@pytest.fixture(scope="module")
def wide(bert):
    torch.manual_seed(0)
    return replace(bert, model=BertModel(BertConfig(vocab_size=30522, **small.SMALL | {"hidden_size": 32}), add_pooling_layer=False).eval())


@pytest.fixture(scope="module")
def trained(bert, clip, tmp_path_factory):
    "A finished token-level training: folder, log, projection, and the encoders' hashes before it."
    at = tmp_path_factory.mktemp("training")
    before = [tensors_hash(side.model.state_dict()) for side in (bert, clip)]
    return at, *train_projection(bert, clip, TOKEN, TEXTS, SETTINGS, at), before


def test_the_gradient_reaches_the_projection_alone(bert, clip, trained):
    at, _, model, before = trained
    assert [tensors_hash(side.model.state_dict()) for side in (bert, clip)] == before
    assert not any(p.requires_grad or p.grad is not None for side in (bert, clip) for p in side.model.parameters())
    saved = torch.load(checkpoints(at)[-1], weights_only=True)
    assert list(saved["weights"]) == [f"projection.{name}" for name in model.state_dict()]
    assert len(saved["optimizer"]["state"]) == len(saved["weights"])
    begun = load_file(at / "projection_00000000.safetensors")
    assert all(not torch.equal(weight, begun[name]) for name, weight in model.state_dict().items()), "all of it is trained"


def test_the_first_loss_is_the_formula_written_out(bert, clip, trained):
    at, log, *_ = trained
    w = {name: x.numpy().astype(float) for name, x in load_file(at / "projection_00000000.safetensors").items()}
    some = [TEXTS[i] for i in global_batch(len(TEXTS), 4, 0, SETTINGS.seed)]
    hidden = in_domain_states(bert, clip, TOKEN, some).numpy() @ w["0.weight"].T + w["0.bias"]
    centred = hidden - hidden.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["1.weight"] + w["1.bias"]
    result = np.maximum(normed, 0) @ w["3.weight"].T + w["3.bias"]
    assert log.loss[0] == pytest.approx(((result - clip_states(clip, "token", some).numpy()) ** 2).mean(), rel=1e-4)


def test_what_can_be_learnt_is_learnt(tmp_path):
    "CLIP projected onto itself, but for what a layer norm and a ReLU of 128 numbers lose; and six sentences by heart."
    settings = TrainingSettings(400, batch_size=2, learning_rate=0.01, schedule="cosine", device="cpu")
    clip = load_text_encoder("CLIP", "cxr_nb/miniature/stable_diffusion")
    reports = load_text_encoder("Reports", "cxr_nb/miniature/text_encoders/reports")
    left = {}
    for side, variant, texts in ((clip, TOKEN, TEXTS[:2]), (reports, DOCUMENT, TEXTS)):
        at = tmp_path / variant.level
        _, model = train_projection(side, clip, variant, texts, replace(settings, batch_size=len(texts)), at, at / "states.safetensors")
        wanted = clip_states(clip, variant.level, texts)
        errors = held_out_errors(side, clip, variant, model, texts)
        left[variant.level] = errors.mse.mean() / (wanted - wanted.mean((0, 1))).square().mean().item()
    assert left["token"] < 0.1 and left["document"] < 0.01, left


def test_targets_are_what_the_pipeline_tells_its_unet(folder, clip):
    pipeline = load_pipeline(str(folder))
    for text in (*TEXTS, ""):
        torch.testing.assert_close(clip_states(clip, "token", [text]), encoder_hidden_states(pipeline, text))
    ids = pipeline.tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    ends = (ids == pipeline.tokenizer.eos_token_id).int().argmax(1)
    wanted = clip_states(clip, "token", TEXTS)[torch.arange(len(TEXTS)), ends]
    torch.testing.assert_close(clip_states(clip, "document", TEXTS)[:, 0], wanted)


@pytest.mark.parametrize("text", [*TEXTS, "", "effusion" * 3 + "  , lung."])
def test_a_word_has_the_state_of_the_token_with_its_last_character(bert, clip, text):
    "Against a search over all pairs of tokens, and hidden states of a text padded by hand."
    padded = bert.tokenizer(text, padding="max_length", max_length=200, return_offsets_mapping=True, return_tensors="pt")
    spans = padded.pop("offset_mapping")[0].tolist()
    n, states = int(padded["attention_mask"].sum()), bert.model(**padded).last_hidden_state[0]
    theirs = clip.tokenizer(text, return_offsets_mapping=True)["offset_mapping"][1:-1]
    holds = [max(j for j in range(n - 1) if j == 0 or spans[j][0] <= end - 1) for _, end in theirs]
    for (_, end), j in zip(theirs, holds): assert spans[j][0] <= end - 1 < spans[j][1]
    places = [0, *holds, *range(n - 1, n - 1 + 77 - 1 - len(holds))]
    torch.testing.assert_close(in_domain_states(bert, clip, TOKEN, [text])[0], states[places], atol=1e-4, rtol=1e-4)
    by_position = in_domain_states(bert, clip, Variant("token", alignment="positions"), [text])[0]
    torch.testing.assert_close(by_position, states[:77], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_domain_states(bert, clip, NONE, [text])[0], by_position)
    torch.testing.assert_close(in_domain_states(bert, clip, DOCUMENT, [text])[0], states[:1], atol=1e-4, rtol=1e-4)


def test_paddings_differ_by_text_and_position(bert, clip):
    states = in_domain_states(bert, clip, TOKEN, ["a lung", "small edema"])
    assert (states[0, -1] - states[1, -1]).abs().max() > 1e-3 and (states[0, -1] - states[0, -2]).abs().max() > 1e-3


def test_a_killed_run_ends_with_the_same_bits(bert, clip, trained, tmp_path, monkeypatch):
    calls = []

    def killed(model, batch):
        if batch["seeds"][0, 1] == 4: raise KeyboardInterrupt
        calls.append(batch)
        return projection_loss(model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cxr_nb.textual_projection.projection_loss", killed)
        train_projection(bert, clip, TOKEN, TEXTS, SETTINGS, tmp_path)
    assert len(calls) == 4
    log, again = train_projection(bert, clip, TOKEN, TEXTS, SETTINGS, tmp_path)
    assert tensors_hash(again.state_dict()) == tensors_hash(trained[2].state_dict())
    assert log.loss.tolist() == trained[1].loss.tolist()


def test_a_checkpoint_of_another_configuration_is_refused(bert, clip, trained):
    for variant, texts, message in [(TOKEN, TEXTS[::-1], r"configuration\[texts\]"), (DOCUMENT, TEXTS, r"configuration\[level\]"),
                                 (replace(TOKEN, alignment="positions"), TEXTS, r"configuration\[alignment\]")]:
        with pytest.raises(ValueError, match=f"is of another configuration: .*{message}"):
            train_projection(bert, clip, variant, texts, SETTINGS, trained[0])


def test_saved_and_loaded(bert, clip, tmp_path):
    place, work = tmp_path / "models/token", tmp_path / "work"
    for cache in (True, False):  # the same with and without, so it is not trained again
        record = trained_projection(bert, clip, TOKEN, TEXTS, SETTINGS, place, work, cache)
        assert record["results"]["encoders_cached"] and not [p for p in work.iterdir() if p.is_dir()]
    assert sorted(p.name for p in place.iterdir()) == ["along", "config.json", "log.csv", PROJECTION_FILE]
    assert steps_kept(place) == [0, 2, 4, 6] and len(pd.read_csv(place / "log.csv")) == 6
    opened, states = load_projection(place, bert), torch.randn(2, 77, pipelines.WIDTH)
    assert not any(p.requires_grad for p in opened.parameters())
    assert torch.equal(opened(states), load_projection(place, bert, 6)(states))
    assert not torch.equal(opened(states), load_projection(place, bert, 2)(states))
    trained_projection(bert, clip, replace(TOKEN, hidden_layers=3), TEXTS, SETTINGS, place, work)
    assert len(load_projection(place, bert)) == 10, "another configuration takes its place"
    with pytest.raises(ValueError, match="translates the states of .*cxr_bert, not those of CLIP"): load_projection(place, clip)
    with pytest.raises(FileNotFoundError, match="no projection was kept at step 5"): load_projection(place, bert, 5)
    (place / PROJECTION_FILE).write_bytes(b"broken")
    with pytest.raises(ValueError, match="is missing or not what was trained; train it again"): load_projection(place, bert)


def test_a_damaged_variant_is_reported_and_trained_again_alone(bert, clip, tmp_path, monkeypatch):
    done, settings = [], replace(SETTINGS, steps=2)
    def counted(*given):
        log, model = train_projection(*given)
        done.append(len(log))
        return log, model
    monkeypatch.setattr("cxr_nb.textual_projection.train_projection", counted)
    def run(name): return trained_projection(bert, clip, TOKEN, TEXTS, settings, tmp_path / name, tmp_path / "work")
    record, other = run("a"), run("b")
    def flip(path): path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    for name, spoil in [(PROJECTION_FILE, type(tmp_path).unlink), (PROJECTION_FILE, flip), ("config.json", type(tmp_path).unlink),
                        ("log.csv", flip), ("along/projection_00000002.safetensors", flip)]:
        spoil(tmp_path / "a" / name)
        done.clear()
        with pytest.warns(UserWarning, match="a: is not a whole training .*; it is trained again"): again = run("a")
        assert again["sha256"] == record["sha256"] and done == [2], name
        assert run("b") == other and run("a") == again and done == [2]


def test_widths_may_differ(clip, wide, tmp_path):
    for variant in (TOKEN, DOCUMENT):
        _, model = train_projection(wide, clip, variant, TEXTS, SETTINGS, tmp_path / variant.level)
        assert prompt_states(wide, clip, variant, model, "a lung").shape == (1, 1 if variant is DOCUMENT else 77, pipelines.WIDTH)
        trained_projection(wide, clip, variant, TEXTS, SETTINGS, tmp_path / "saved", tmp_path / "work")
        assert load_projection(tmp_path / "saved", wide)[0].weight.shape == (16, 32)


def test_one_vector_is_the_same_cross_attention_as_many_times_it(folder, bert, clip):
    unet, one = load_pipeline(str(folder)).unet, prompt_states(bert, clip, DOCUMENT, projection(16, 16), "a lung")
    noisy = torch.randn(2, pipelines.CHANNELS, pipelines.SIDE, pipelines.SIDE)
    with torch.no_grad(): alone, repeated = (unet(noisy, 500, one.expand(2, n, -1)).sample for n in (1, 77))
    torch.testing.assert_close(alone, repeated, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [TOKEN, DOCUMENT, NONE])
def test_the_unchanged_pipeline_draws_from_it(folder, bert, clip, variant):
    torch.manual_seed(0)
    pipeline, model = load_pipeline(str(folder)), None if variant is NONE else projection(16, 16)
    prompt_embeds, negative_prompt_embeds = (prompt_states(bert, clip, variant, model, text) for text in ("Small effusion", ""))
    noise = torch.randn(1, pipelines.CHANNELS, pipelines.SIDE, pipelines.SIDE, generator=torch.Generator().manual_seed(5))
    wanted = pipeline(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, num_inference_steps=3, latents=noise, output_type="np").images
    drawn = sample(pipeline, prompt_embeds, [5, 6], steps=3, negative_prompt=negative_prompt_embeds)
    assert (drawn[:1].permute(0, 2, 3, 1) - torch.from_numpy(wanted * 255).round()).abs().max() <= 1
    alone = sample(pipeline, prompt_embeds, [6], steps=3, negative_prompt=negative_prompt_embeds)
    assert (drawn[1:].int() - alone.int()).abs().max() <= 1 and not torch.equal(drawn[0], drawn[1])


def test_scores_against_scikit_learn(bert, clip):
    torch.manual_seed(0)
    model = projection(16, 16)
    errors = held_out_errors(bert, clip, DOCUMENT, model, TEXTS * 2, batch_size=5)  # here no target is constant
    scores, result = projection_scores(errors).set_index("measure"), model(in_domain_states(bert, clip, DOCUMENT, TEXTS * 2)).detach()
    wanted = clip_states(clip, "document", TEXTS * 2)
    r2 = r2_score(wanted[:, 0].double(), result[:, 0].double(), multioutput="variance_weighted")
    assert scores.value["R²"] == pytest.approx(r2, rel=1e-3) and scores.n.tolist() == [12] * 3
    assert scores.value["MSE"] == pytest.approx(F.mse_loss(result, wanted).item(), rel=1e-4)
    assert (scores.ci_low < scores.value).all() and (scores.value < scores.ci_high).all()


def test_intervals_cover_as_often_as_they_say():
    "Errors of many sets of 60 texts: the true mean lies within about 95 % of the intervals."
    rng, within = np.random.default_rng(0), 0
    for _ in range(100):
        mse = rng.gamma(4, 1, 60)
        row = projection_scores(pd.DataFrame({"mse": mse, "variance": 8.0, "cosine": 0.0}), 200).iloc[0]
        within += row.ci_low < 4 < row.ci_high
    assert 0.86 < within / 100


def test_cut_texts_are_their_beginning(bert, clip):
    long, cut = "small " * 100, "small " * 75  # two special tokens are beside them
    by_position = Variant("token", alignment="positions")
    torch.testing.assert_close(in_domain_states(bert, clip, by_position, [long], cut=True), in_domain_states(bert, clip, by_position, [cut]))
    ids, _ = token_ids(clip, ["lung " * 100], 77, cut=True)
    assert len(ids[0]) == 77 and ids[0][-1] == clip.tokenizer.eos_token_id


def test_texts_of_a_kind():
    captions = [f"A painting of a {i}" for i in range(240)]
    for kind, templates in TEMPLATES.items():
        result = texts_of(captions, kind, seed=1)
        assert [text.rsplit(" ", 1)[1] for text in result] == [str(i) for i in range(240)] and "painting" not in " ".join(result)
        assert {text.rsplit(" ", 1)[0] + " {}" for text in result} == set(templates), "every variant is used"
        assert result == texts_of(captions, kind, seed=1) != texts_of(captions, kind, seed=2)


def test_bad_input_is_one_clear_line(bert, clip, wide, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "other.parquet")
    long = ["lung " * 80]
    few = replace(bert, max_length=40)
    cases = {
        "no projection: CXR-BERT-specialized is 32 wide, the U-Net expects 16": lambda: prompt_states(wide, clip, NONE, None, "a lung"),
        "the U-Net expects 768; take an encoder of that width": lambda: check_widths(wide, 768, NONE),
        "the projection gives 64 numbers a token, the U-Net expects 16": lambda: prompt_states(bert, clip, TOKEN, projection(16, 64), "a"),
        "tokens; CLIP reads 77: shorten it": lambda: train_projection(bert, clip, DOCUMENT, long, SETTINGS, tmp_path / "a"),
        "tokens; CXR-BERT-specialized reads 77: shorten it": lambda: prompt_states(bert, clip, NONE, None, "small " * 80),
        "tokens; CXR-BERT-specialized reads 512: shorten it": lambda: prompt_states(bert, clip, DOCUMENT, projection(16, 16), "small " * 520),
        "CXR-BERT-specialized reads 40 tokens, the U-Net takes 77": lambda: in_domain_states(few, clip, TOKEN, ["a"]),
        "no projection: there is nothing to train": lambda: train_projection(bert, clip, NONE, TEXTS, SETTINGS, tmp_path / "a"),
        "caption_source: no file": lambda: read_captions(tmp_path / "none.txt"),
        "bytes.txt is neither UTF-8 text nor parquet": lambda: read_captions(tmp_path / "bytes.txt"),
        "other.parquet is neither UTF-8 text nor parquet": lambda: read_captions(tmp_path / "other.parquet"),
        "there are 1 different ones; lower training_captions": lambda: split_captions(["a", "A"], 1, 1),
        "take at least one each": lambda: split_captions(["a", "b"], 2, 0),
        "'report' is none of captions, object, style": lambda: texts_of(TEXTS, "report"),
        "alignment is 'words'; it takes one of characters, positions": lambda: Variant("token", alignment="words"),
        "holds no projection": lambda: load_projection(tmp_path, bert),
    }
    for message, bad in cases.items():
        with pytest.raises((ValueError, FileNotFoundError)) as error: bad()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_names_are_those_of_table_4():
    from cxr_nb.tables import published
    table = published("table_4").query("method == 'textual_projection'")
    assert {name.partition(", ")[2] for name in table.variant} <= set(VARIANTS)


def test_states_do_not_depend_on_the_batch(bert, clip):
    for variant in (TOKEN, DOCUMENT, NONE):
        together = in_domain_states(bert, clip, variant, TEXTS)
        apart = torch.cat([in_domain_states(bert, clip, variant, [text]) for text in TEXTS])
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    assert hidden_states(clip, token_ids(clip, TEXTS, 77)[0], 77, masked=False).dtype == torch.float32
