"""tiny/judge.py: end to end with a random model and a random tagger, and its parts by hand."""

import argparse
import json

import numpy as np
import pytest
import torch

import evaluate
from evaluate import Cnn14
from latents import LatentStats, MelCodec, load_audio
from tiny import judge
from tiny.compose import HERE, Recordings, draw_scenes
from unet import UNet, UNetConfig


@pytest.fixture(scope="module")
def recordings():
    return Recordings(HERE / "recordings.csv", "test")


def test_other_scenes_have_the_same_labels(recordings):
    different = 0
    takes = {x: [t["file"] for ts in recordings.classes[x].values() for t in ts]
             for x in recordings.names}  # fmt: skip
    for i, scene in enumerate(draw_scenes(recordings, "test", 40, judge.SEED)):
        other = judge.other_scene(scene, recordings, i)
        labels = [[layer["label"] for layer in s["layers"]] for s in (scene, other)]
        assert labels[0] == labels[1] and other["captions"] == scene["captions"]
        assert other["order"] == scene["order"]
        events = [
            [e["start"] for layer in s["layers"] for e in layer["events"]] for s in (scene, other)
        ]
        different += events[0] != events[1]
        used = judge.recordings_of(scene)  # other recordings, unless that leaves a class none
        for layer in other["layers"]:
            assert (
                not {e["file"] for e in layer["events"]} & used
                or set(takes[layer["label"]]) <= used
            )
    assert different >= 39


def test_without():
    recordings = argparse.Namespace(classes={
        "a": {"s": [{"file": "1"}, {"file": "2"}], "t": [{"file": "3"}]},
        "b": {"u": [{"file": "4"}, {"file": "5"}]},
        "c": {"v": [{"file": "6"}]},
    })  # fmt: skip
    left = judge.without(recordings, {"1", "4", "6"}).classes
    assert left["a"] == {"t": [{"file": "3"}]}  # 2 is of the same source as 1
    assert left["b"] == {"u": [{"file": "5"}]} and left["c"] == {"v": [{"file": "6"}]}
    assert len(recordings.classes["a"]) == 2


def test_real_scenes_are_of_one_class(recordings):
    for number in range(3):
        scene = judge.real_scene(["Cat"], recordings, number)
        assert [layer["label"] for layer in scene["layers"]] == ["Cat"]
        assert scene["order"] == "together" and scene["noise_db"] is None
    a, b = (judge.real_scene(["Dog"], recordings, n)["layers"] for n in (0, 1))
    assert a != b


def test_ranks():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    assert judge.ranks(logits, ["a", "b", "c"], ["a", "c", "c"]).tolist() == [0, 2, 0]


def test_pairs_by_hand():
    """Of the first two clips, which ask for a and b, one has both, one only a."""
    named = [{"a", "b"}, {"a", "b"}] + [{"c"}] * 10
    logits = torch.zeros(12, 3)
    logits[2:, :2] = torch.arange(10.0)[:, None]  # nine of ten are below 8.1
    logits[0, :2], logits[1, 0], logits[1, 1] = 8.5, 8.5, 8.0
    assert judge.judge_pairs(logits, named, 2, ["a", "b", "c"]) == [True, False]


def test_end_to_end(recordings, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(MelCodec, "iterations", 1)
    monkeypatch.setattr(evaluate, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(evaluate.embed.__wrapped__.__kwdefaults__, "cache", tmp_path / "cache")
    torch.manual_seed(0)
    codec = MelCodec()
    UNet(UNetConfig(128, 128, (32, 32), (False, True), 1, 4, 32, 384)).save_pretrained(
        tmp_path / "model" / "unet"
    )
    stats = LatentStats(torch.full((128,), -60.0).double(), torch.ones(128).double(), 1)
    stats.save(tmp_path / "model" / "latent_stats.safetensors")
    about = {"text_encoder": "sentence-transformers/all-MiniLM-L6-v2", "max_length": 8}
    about |= {"mask": "both", "codec": codec.settings(), "sample_rate": 16_000, "guidance": 2.0}
    about |= {"schedule": "cosine", "prediction": "v", "trained_on": {}}
    (tmp_path / "model" / "model.json").write_text(json.dumps(about))
    tagger = Cnn14(len(recordings.names), (4, 4, 4, 4, 4, 8), recordings.names)
    tagger.save(tmp_path / "tagger.safetensors")

    arguments = ["--model", tmp_path / "model", "--classifier", tmp_path / "tagger.safetensors"]
    arguments += ["--out", tmp_path / "out", "--scenes", 20, "--clips", 1, "--steps", 3]
    judge.main([*map(str, arguments)])
    with pytest.raises(SystemExit, match="begun with clips = 1, this command 2: choose another"):
        judge.main([*map(str, arguments), "--clips", "2"])
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert set(result["classes"]) == set(recordings.names)
    assert set(result["sets"]) >= {"generated", "floor", "ceiling", "noise", "shuffled"}
    assert len(result["pairs"]) == 36 and len(result["nearest"]) == 20 + 36 + 36
    assert 0 <= result["totals"]["generated top-1"] <= result["totals"]["generated top-5"] <= 1
    for row in result["nearest"].values():
        assert (HERE / row["recording"]).is_file()
    assert 0 < result["floor shares a recording"] < 1
    assert set(result["pairs heard"]) == set(judge.KINDS)
    assert "both heard" in capsys.readouterr().out

    # What is there is not made again: what was written by hand survives, what was lost comes back.
    folder = tmp_path / "out" / "classes" / "generated"
    kept, lost = sorted(folder.iterdir())[:2]
    before = load_audio(lost)
    kept.write_bytes(lost.read_bytes())
    lost.unlink()
    judge.main([*map(str, arguments)])
    assert kept.read_bytes() == lost.read_bytes()
    np.testing.assert_allclose(load_audio(lost), before, atol=1e-3)
    torch.set_num_threads(threads)
