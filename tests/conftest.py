"""All tests run on the CPU, on one thread, and must not reach a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import string
from html.parser import HTMLParser

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from latents import CLIP_SAMPLES, LatentStats, MelCodec, encode_dataset
from unet import UNet, UNetConfig

torch.set_num_threads(1)  # two would wait for each other on a busy machine


@pytest.fixture(scope="module")
def quick_sounds():
    """Two rounds of Griffin-Lim instead of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MelCodec, "iterations", 2)
        yield


class Bomb:
    """A pickle of it calls a function, such as os.mkdir, as soon as it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save_bert(folder, letters=string.ascii_lowercase, positions=64):
    """A random text encoder, 32 wide, that knows letters."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": positions}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}).save_pretrained(folder)


def save_model(folder):
    """A random model folder: mel codec, v, and the text encoder of `save_bert` beside it."""
    torch.manual_seed(0)
    save_bert(folder.parent / "bert")
    config = UNetConfig(128, 128, (32, 32), (False, True), 1, 4, 48, 32)
    UNet(config).save_pretrained(folder / "unet")
    stats = LatentStats(torch.full((128,), -40.0).double(), torch.full((128,), 9.0).double(), 1)
    stats.save(folder / "latent_stats.safetensors")
    about = {"text_encoder": str(folder.parent / "bert"), "max_length": 32}
    about |= {"mask": "cross-attention", "codec": MelCodec().settings(), "sample_rate": 16_000}
    about |= {"schedule": "cosine", "schedule_shift": 1.0, "prediction": "v", "guidance": 6.5}
    about |= {"guidance_above": 0, "denoising_steps": 45, "shifted_rows": True, "trained_on": None}
    (folder / "model.json").write_text(json.dumps(about))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The arguments of a small run of train.py (without --out): data, text encoder and sizes."""
    folder = tmp_path_factory.mktemp("small")

    # 24 clips: sawtooths of 8 pitches at 3 levels; 18 are "low", 6 are "high".
    rows = []
    for i in range(24):
        label = "low" if i % 8 < 6 else "high"
        captions = [f"a {label} tone", f"tone number {i % 8}"]
        rows.append(
            {"id": f"tone-{i}", "file": f"{i}.wav", "captions": captions, "labels": [label]}
        )

    def load_clips(row):
        i = int(row["id"].removeprefix("tone-"))
        phase = 110 * 2 ** (i % 8 * 0.7) / 16_000 * torch.arange(CLIP_SAMPLES)
        return (phase % 1 - 0.5)[None] * 0.8 / (1 + i // 8)

    encode_dataset(folder / "data", MelCodec(), rows, load_clips, batch_size=8)
    torch.manual_seed(0)
    save_bert(folder / "bert", string.digits + string.ascii_lowercase)
    options = f"--data {folder}/data --text-encoder {folder}/bert --max-length 16 "
    options += "--block-out-channels 32,32 --attention 0,1 --num-heads 2 --cross-attention-dim 24 "
    options += "--batch-size 4 --warmup-steps 2 --lr 1e-3 --precision fp32 --device cpu "
    return (options + "--val-clips 4").split()


class Tags(HTMLParser):
    """The tags of a page, in order, with their attributes; each that is opened has to be closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
