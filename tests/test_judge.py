"""tiny/judge.py: end to end with a random model and a random tagger, and its parts by hand."""

import argparse
import json

import pytest
import torch
from conftest import save_model

from evaluate import Cnn14
from latents import MelCodec, save_audio
from tiny import judge
from tiny.compose import HERE, Recordings, draw_scenes


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


def test_seams_are_what_rows_of_the_picture_leave():
    """Steps of 1 dB everywhere, and of 3 dB where a row of 21 frames begins."""
    change = 1.0 + 2 * (torch.arange(504) % 21 == 0)
    decibel = (change * (-1) ** torch.arange(504)).cumsum(0).expand(2, 4, 504)
    assert judge.seams(decibel) == pytest.approx(3)


def test_loudness_is_that_before_the_file(tmp_path):
    """A peak of 2 becomes one of 0.99 in the file, and the number is still that of 2."""
    for name, peak in (("a", 0.5), ("b", 2.0), ("c", 4.0)):
        wave = peak * torch.sin(torch.arange(161_280) * 0.3)
        save_audio(tmp_path / f"{name}.wav", wave, json.dumps({"peak": peak}))
    found = judge.seams_and_loudness(tmp_path)
    assert found["dB"] == pytest.approx(3.01, abs=0.02)  # 2/√2
    assert found["peak above 1"] == pytest.approx(2 / 3)


class Few(Recordings):
    """Four classes of the 36."""

    def __init__(self, table, split):
        super().__init__(table, split)
        self.names = self.names[:4]
        self.classes = {name: self.classes[name] for name in self.names}


def test_end_to_end(tmp_path, monkeypatch, capsys, one_thread):
    recordings = Few(HERE / "recordings.csv", "test")
    monkeypatch.setattr(judge, "Recordings", Few)
    monkeypatch.setattr(MelCodec, "iterations", 1)
    save_model(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "model.json").read_text())
    about = json.dumps(about | {"denoising_steps": 2, "guidance": 1.0})
    (tmp_path / "model" / "model.json").write_text(about)
    tagger = Cnn14(len(recordings.names), (4, 4, 4, 4, 4, 8), recordings.names)
    tagger.save(tmp_path / "tagger.safetensors")

    arguments = ["--model", tmp_path / "model", "--classifier", tmp_path / "tagger.safetensors"]
    there = tmp_path / "out" / "classes" / "generated" / "00-0.wav"  # it is not made again
    there.parent.mkdir(parents=True)
    save_audio(there, torch.rand(161_280))
    before = there.read_bytes()
    arguments += ["--out", tmp_path / "out", "--scenes", 4, "--clips", 1, "--device", "cpu"]
    judge.main([*map(str, arguments)])
    with pytest.raises(SystemExit, match="begun with clips = 1, this command 2: choose another"):
        judge.main([*map(str, arguments), "--clips", "2"])
    assert there.read_bytes() == before
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert result["steps"] == 2 and result["guidance"] == 1  # the model's own
    assert set(result["classes"]) == {"all", *recordings.names}
    assert set(result["sets"]) >= {"generated", "floor", "ceiling", "noise", "shuffled"}
    assert len(result["pairs"]) == 4 and len(result["nearest"]) == 4 + 4 + 16 + 4
    for kind in judge.KINDS:
        row = result["classes"]["all"]
        assert 0 <= row[f"{kind} top-1"] <= row[f"{kind} top-5"] <= 1
    for row in result["nearest"].values():
        assert (HERE / row["recording"]).is_file()
    assert result["nearest"]["unseen-000"]["prompt"] == "standing ovation"
    assert 0 <= result["floor shares a recording"] <= 1
    assert 0.8 < result["seams and loudness"]["reference"]["seams"] < 1.2
    assert set(result["pairs heard"]) == {"generated", "real", "training"}
    assert "pairs heard" in capsys.readouterr().out
