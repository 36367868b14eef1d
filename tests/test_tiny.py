"""The tiny model that is shipped: it loads, and what it makes is sound of the right size."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from evaluate import CLASSIFIER, Cnn14, file_sha256
from latents import to_grid
from sample import generate, load_model
from tiny.compose import Recordings, compose_scene
from tiny.judge import ranks, real_scene

TINY = Path(__file__).resolve().parent.parent / "tiny"


@pytest.fixture(scope="module")
def model():
    return load_model(TINY / "model")


@pytest.fixture(scope="module")
def waves(model):
    prompts = ["dog barking", "rain falling", "siren wailing", "cat meowing", "owl hooting"]
    prompts += ["door closing", "wind blowing", "piano playing"]
    return generate(model, prompts, seed=0, steps=20)


def test_every_recording_has_its_row_and_its_licence():
    rows = list(csv.DictReader((TINY / "recordings.csv").open(newline="", encoding="utf-8")))
    files = {f"recordings/{path.name}" for path in (TINY / "recordings").iterdir()}
    assert {row["file"] for row in rows} == files
    licences = (TINY / "LICENSES.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["licence"] in licences and "GPL" not in row["licence"], row["file"]
        assert row["split"] in ("train", "test") and row["source_group"]
    sides = {}
    for row in rows:
        sides.setdefault(row["source_group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in sides.values())


def test_the_folder_describes_itself():
    about = json.loads((TINY / "model" / "model.json").read_text())
    assert about["prediction"] == "x0" and about["codec"]["name"] == "mel"
    weights = TINY / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert file_sha256(weights).startswith("bd013a2ee702d0e5")


@pytest.mark.parametrize("change", [{"channels": 64}, {"channels": None}, {"tilt": 0.0}])
def test_folders_of_another_codec_are_refused(change, tmp_path):
    """Such as those of the time when the mel codec had 64 bands and didn't say so."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    about = json.loads(path.read_text())
    about["codec"] = {k: v for k, v in (about["codec"] | change).items() if v is not None}
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="made with another mel codec"):
        load_model(tmp_path / "model")


def test_latents_have_the_size_of_real_ones(model, waves):
    """Normalised, the latents of real clips have std 1. A model that fails to denoise has 5."""
    stored = model.codec.encode(waves)
    x_0 = to_grid(model.stats.normalize(model.codec.dequantize(stored)))
    assert waves.shape == (8, 161_280) and torch.isfinite(waves).all()
    assert 0.7 < x_0.std() < 1.4
    assert (waves.abs().amax(dim=1) > 0.01).all()  # none is silent


def test_prompts_make_a_difference(model, waves):
    """Rain goes on all the time; a dog barks now and then."""
    frames = waves.unfold(1, 1600, 1600).square().mean(dim=2)  # power of each tenth of a second
    evenness = frames.clamp(min=1e-8).log().std(dim=1)
    assert evenness[1] < evenness[0]


def test_the_tagger_hears_held_out_recordings():
    recordings, tagger = Recordings(TINY / "recordings.csv", "test"), Cnn14.load(CLASSIFIER)
    assert sorted(tagger.labels) == recordings.names
    scenes = [real_scene([label], recordings, 0) for label in recordings.names]
    waves = torch.stack([compose_scene(scene, recordings) for scene in scenes])
    logits = torch.cat([tagger(part)[1] for part in waves.split(6)])
    assert (ranks(logits, tagger.labels, recordings.names) < 5).mean() > 0.5  # by chance 0.14
