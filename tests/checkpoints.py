"Small checkpoints in the exact file layout of the seven real text encoders, with random weights."
import json

import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, CLIPTextConfig, CLIPTextModel

from cxr_nb.text_encoder import projection_head

WORDS = "no acute small large left right pleural effusion edema is there a . ##s , Effusion Small pneumothorax".split()
WIDTH = 16
SMALL = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=512)


def bert_vocabulary(size):
    "Special tokens where BERT has them (0, 100 to 103), the words above, and fillers up to the real size."
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return tokens + [f"[filler{i}]" for i in range(size - len(tokens))]


def save_bert(folder, model, vocabulary, config=None, tokenizer_config=None, extra=None, rename=lambda key: key):
    "Write config.json, vocab.txt, tokenizer_config.json where there is one, and pytorch_model.bin alone."
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for weight in model.parameters(): torch.nn.init.normal_(weight, std=0.4)
    weights = {rename(k): v for k, v in model.state_dict().items()} | (extra or {})
    torch.save(weights, folder / "pytorch_model.bin")
    settings = model.config.to_diff_dict() | {"model_type": "bert", "architectures": [type(model).__name__]} | (config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    if tokenizer_config is not None: (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return model.eval()


def old_names(key): return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def pubmedbert(folder):  # old names of the layer norms, a pooler, position ids as a buffer
    model = BertForPreTraining(BertConfig(vocab_size=30522, **SMALL))
    extra = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    return save_bert(folder, model, bert_vocabulary(30522), tokenizer_config={"do_lower_case": True}, extra=extra, rename=old_names).bert


def clinicalbert(folder):  # cased vocabulary, no tokenizer_config.json
    model = BertForPreTraining(BertConfig(vocab_size=28996, **SMALL))
    return save_bert(folder, model, bert_vocabulary(28996)).bert


def sapbert(folder):  # a bare BertModel, keys without prefix
    model = BertModel(BertConfig(vocab_size=30522, **SMALL))
    return save_bert(folder, model, bert_vocabulary(30522), tokenizer_config={"do_lower_case": True, "model_max_length": 512})


def radbert(folder):  # cased-size vocabulary, a tokenizer_config.json that does not say do_lower_case
    model = BertForPreTraining(BertConfig(vocab_size=28996, **SMALL))
    return save_bert(folder, model, bert_vocabulary(28996), tokenizer_config={"model_max_length": 512}).bert


def cxr_bert_general(folder):  # trained by masked language modelling alone: no pooler; no model_max_length
    model = BertForMaskedLM(BertConfig(vocab_size=30522, **SMALL))
    return save_bert(folder, model, bert_vocabulary(30522), tokenizer_config={"do_lower_case": True}).bert


def cxr_bert_specialized(folder):  # asks for remote code, which must not run; a projection head of its own keys
    model = BertForMaskedLM(BertConfig(vocab_size=30522, **SMALL))
    torch.manual_seed(1)
    head = projection_head(WIDTH, 8)
    extra = {f"cls_projection_head.{k}": v for k, v in head.state_dict().items()}
    config = {"model_type": "cxr-bert", "projection_size": 8, "architectures": ["CXRBertModel"],
              "auto_map": {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}}
    bert = save_bert(folder, model, bert_vocabulary(30522), config, {"do_lower_case": True, "tokenizer_class": "CXRBertTokenizer"}, extra).bert
    for name in ("configuration_cxrbert.py", "modeling_cxrbert.py"):
        (folder / name).write_text("raise SystemExit('remote code was run')\n")
    return bert, head


def clip(folder):  # a whole pipeline's folders; keys with the prefix text_model
    for part in ("text_encoder", "tokenizer", "unet", "vae"): (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"not read")
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    merges = [("e", "f"), ("ef", "f"), ("eff", "usion</w>"), ("u", "s"), ("us", "i"), ("usi", "o"), ("usio", "n</w>"), ("n", "o</w>")]
    tokens = letters + [x + "</w>" for x in letters]
    tokens += [t for t in dict.fromkeys("".join(pair) for pair in merges) if t not in tokens]
    tokens += [f"filler{i}" for i in range(49406 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer/special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}))
    torch.manual_seed(2)
    small = SMALL | {"max_position_embeddings": 77}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=49408, bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_act="quick_gelu", **small))
    weights = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in model.state_dict().items()}
    torch.save(weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, folder / "text_encoder/pytorch_model.bin")
    (folder / "text_encoder/config.json").write_text(json.dumps(model.config.to_diff_dict() | {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}))
    return model.eval()


MAKERS = {"PubMedBERT": pubmedbert, "ClinicalBERT": clinicalbert, "SapBERT": sapbert, "RadBERT": radbert,
          "CXR-BERT-general": cxr_bert_general, "CXR-BERT-specialized": cxr_bert_specialized, "CLIP": clip}
