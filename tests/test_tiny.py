"""The tiny model that is shipped: it loads, and what it makes is sound of the right size."""

import csv
import json
import shutil

import pytest
import torch

from evaluate import CLASSIFIER, Cnn14, file_sha256
from sample import generate, load_model
from tiny.compose import HERE as TINY
from tiny.compose import Recordings, compose_scene
from tiny.judge import ranks, real_scene


def test_every_recording_has_its_row_and_its_licence():
    rows = list(csv.DictReader((TINY / "recordings.csv").open(newline="", encoding="utf-8")))
    files = {f"recordings/{path.name}" for path in (TINY / "recordings").iterdir()}
    assert {row["file"] for row in rows} == files
    licences = (TINY / "LICENSES.md").read_text(encoding="utf-8")
    split_of = {row["source_group"]: row["split"] for row in rows}
    for row in rows:
        assert row["licence"] in licences and "GPL" not in row["licence"], row["file"]
        assert row["split"] in ("train", "test") and row["split"] == split_of[row["source_group"]]


def test_the_folder_describes_itself():
    about = json.loads((TINY / "model" / "model.json").read_text())
    assert about["prediction"] == "x0" and about["codec"]["name"] == "mel"
    weights = TINY / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert file_sha256(weights).startswith("f4513aa8c80654ca")


def test_a_folder_of_another_codec_is_refused(tmp_path):
    """Such as those of the time when the mel codec had 64 bands and didn't say so."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    about = json.loads(path.read_text())
    del about["codec"]["channels"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="made with another mel codec"):
        load_model(tmp_path / "model")


def test_the_model_makes_sounds_of_its_prompts(quick_sounds):
    """Normalised, the latents of real clips have std 1; a model that fails to denoise makes 5. Rain
    goes on all the time; a dog barks now and then."""
    model = load_model(TINY / "model")
    x_0 = generate(model, ["dog barking", "rain falling"], seed=0, steps=12, decode=False)
    assert 0.4 < x_0.std() < 1.5
    waves = model.wave(x_0)
    assert waves.shape == (2, 161_280) and waves.isfinite().all()
    assert (waves.abs().amax(dim=1) > 0.01).all()  # none is silent
    frames = waves.unfold(1, 1600, 1600).square().mean(dim=2)  # power of each tenth of a second
    dog, rain = frames.clamp(min=1e-8).log().std(dim=1)
    assert rain < dog


def test_the_tagger_hears_held_out_recordings():
    recordings, tagger = Recordings(TINY / "recordings.csv", "test"), Cnn14.load(CLASSIFIER)
    assert sorted(tagger.labels) == recordings.names
    scenes = [real_scene([label], recordings, 0) for label in recordings.names]
    waves = torch.stack([compose_scene(scene, recordings) for scene in scenes])
    logits = torch.cat([tagger(part)[1] for part in waves.split(6)])
    assert (ranks(logits, tagger.labels, recordings.names) < 5).mean() > 0.5  # by chance 0.14
