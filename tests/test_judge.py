"""tiny/judge.py: end to end with a random model and a random tagger, and its parts by hand."""

import json

import pytest
import torch

from evaluate import Cnn14
from latents import MelCodec, read_table, save_audio
from tests.conftest import save_model
from tiny import judge
from tiny.compose import HERE, Recordings, draw_scenes


@pytest.fixture(scope="module")
def recordings():
    return Recordings(HERE / "recordings.csv", "test")


def test_other_scenes_have_the_same_labels_by_other_recordings(recordings):
    for i, scene in enumerate(draw_scenes(recordings, "test", 40, judge.SEED)):
        other, used = judge.other_scene(scene, recordings, i), judge.recordings_of(scene)
        assert {k: other[k] for k in ("captions", "order", "labels")}.items() <= scene.items()
        for layer, first in zip(other["layers"], scene["layers"], strict=True):
            assert layer["label"] == first["label"] and layer["events"] != first["events"]
            takes = {t["file"] for x in recordings.classes[layer["label"]].values() for t in x}
            new = {event["file"] for event in layer["events"]}
            assert not new & used or takes <= used  # unless that leaves a class none


def test_pairs_by_hand():
    """Of the first two clips, which ask for a and b, one has both, one only a."""
    named = [{"a", "b"}, {"a", "b"}] + [{"c"}] * 10
    logits = torch.zeros(12, 3)
    logits[2:, :2] = torch.arange(10.0)[:, None]  # nine of ten are below 8.1
    logits[0, :2], logits[1, 0], logits[1, 1] = 8.5, 8.5, 8.0
    assert judge.judge_pairs(logits, named, 2, ["a", "b", "c"]) == [True, False]


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


def test_end_to_end(tmp_path, monkeypatch):
    recordings = Few(HERE / "recordings.csv", "test")
    monkeypatch.setattr(judge, "Recordings", Few)
    monkeypatch.setattr(MelCodec, "iterations", 1)
    save_model(tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    about = json.loads(path.read_text()) | {"denoising_steps": 2, "guidance": 1.0}
    path.write_text(json.dumps(about))
    tagger = Cnn14(len(recordings.names), (4, 4, 4, 4, 4, 8), recordings.names)
    tagger.save(tmp_path / "tagger.safetensors")

    there = tmp_path / "out" / "classes" / "generated" / "00-0.wav"  # it is not made again
    there.parent.mkdir(parents=True)
    save_audio(there, torch.rand(161_280))
    before = there.read_bytes()
    command = f"--model {tmp_path}/model --classifier {tmp_path}/tagger.safetensors --device cpu "
    command += f"--out {tmp_path}/out --scenes 4 --clips"
    judge.main([*command.split(), "1"])
    with pytest.raises(SystemExit, match="begun with clips = 1, this command 2: choose another"):
        judge.main([*command.split(), "2"])
    assert there.read_bytes() == before
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert result["steps"] == 2 and result["guidance"] == 1  # the model's own
    assert set(result["classes"]) == {"all", *recordings.names}
    assert set(result["sets"]) >= {"generated", "floor", "ceiling", "noise", "shuffled"}
    unseen = read_table(HERE / "unseen_prompts.csv")
    unseen = [row for row in unseen if row["label"] in recordings.names]
    assert len(result["pairs"]) == 4 and len(result["nearest"]) == 4 + 4 + len(unseen) + 4
    for kind in judge.KINDS:
        row = result["classes"]["all"]
        assert 0 <= row[f"{kind} top-1"] <= row[f"{kind} top-5"] <= 1
    assert all((HERE / row["recording"]).is_file() for row in result["nearest"].values())
    assert 0.8 < result["seams and loudness"]["reference"]["seams"] < 1.2
    assert set(result["pairs heard"]) == {"generated", "real", "training"}
