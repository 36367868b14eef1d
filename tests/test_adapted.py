"""tiny/adapted.py: end to end with a random model and a random tagger, and its parts by hand."""

import json

import pytest

from evaluate import Cnn14
from tests.conftest import save_model
from tiny import adapted, judge
from tiny.compose import HERE, Recordings

pytestmark = pytest.mark.usefixtures("quick_sounds")


def test_end_to_end(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adapted, "LEARN", 2)
    learn, few = adapted.learn, {"dreambooth": ["--prior-clips", 2], "controlnet": []}
    monkeypatch.setattr(adapted, "learn", lambda m, x, args: learn(m, [*x, *few[m]], args))
    save_model(tmp_path / "model")
    names = Recordings(HERE / "recordings.csv", "test").names
    Cnn14(len(names), (4, 4, 4, 4, 4, 8), names).save(tmp_path / "tagger.safetensors")
    out, data = tmp_path / "out", small[small.index("--data") + 1]
    arguments = f"--model {tmp_path}/model --classifier {tmp_path}/tagger.safetensors --out {out} "
    arguments += f"--data {data} --clips 3 --steps 2 --train-steps 2 --device cpu "
    arguments = (arguments + "--methods dreambooth controlnet").split()
    adapted.main(arguments)
    result = json.loads((out / "adapted.json").read_text())
    assert [*result["sound"]] == ["floor", "ceiling", "before", "dreambooth", "dreambooth-class"]
    assert result["sound"]["dreambooth"]["prompt"] == "The sound of sks stream"
    for row in result["sound"].values():
        assert 0 <= row["top-1"] <= row["top-5"] <= 1 and -1 <= row["cosine"] < 1.001
    assert len({row["FD"] for row in result["sound"].values()}) == 5  # all are different sounds
    for row in result["control"].values():
        assert -1 <= row["correlation"] <= 1 and row["off by, dB"] > 0
    assert (out / "adapted.png").is_file() and (out / "control.png").is_file()
    assert '| dreambooth-class ("The sound of stream") |' in capsys.readouterr().out

    # Nothing is trained or made twice, and other settings want another folder.
    for module, name in ((adapted, "learn"), (judge, "write_generated")):
        monkeypatch.setattr(module, name, None)
    adapted.main(arguments)
    assert json.loads((out / "adapted.json").read_text()) == result
    with pytest.raises(SystemExit, match="begun with clips = 3, this command 4: choose another"):
        adapted.main([*arguments, "--clips", "4"])


def test_a_mistake_gets_one_line(tmp_path):
    with pytest.raises(SystemExit, match="--label Kazoo: expected one of Applause, "):
        adapted.main(["--label", "Kazoo", "--out", str(tmp_path)])
