"""tiny/adapted.py: end to end with a random model and a random tagger, and its parts by hand."""

import json
import math

import pytest
import torch

import evaluate
from evaluate import Cnn14
from latents import MelCodec
from tests.conftest import save_model
from tiny import adapted, judge
from tiny.compose import HERE, Recordings

pytestmark = pytest.mark.usefixtures("quick_sounds")


def test_correlation():
    a = torch.tensor([1.0, 2.0, 4.0, 3.0])
    assert adapted.correlation(a, 3 * a - 7) == pytest.approx(1)
    assert adapted.correlation(a, -a) == pytest.approx(-1)
    assert adapted.correlation(a, torch.tensor([0.0, 1.0, 0.0, 0.0])) == pytest.approx(
        -0.5 / math.sqrt(5 * 0.75)
    )
    assert adapted.correlation(a, torch.ones(4)) == 0


def test_loudness_follows_a_wave():
    """A tone twice, the second time 20 dB louder: 1 more, from frame to frame."""
    tone = torch.sin(torch.arange(161_280) * 0.3) * 0.02
    tone[80_640:] *= 10
    found = adapted.loudness_of(MelCodec(), tone)
    assert found.shape == (504,)
    assert found[260:500].mean() - found[5:245].mean() == pytest.approx(1, abs=0.05)


def test_end_to_end(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(evaluate.embed.__wrapped__.__kwdefaults__, "cache", tmp_path / "cache")
    save_model(tmp_path / "model")
    names = Recordings(HERE / "recordings.csv", "test").names
    torch.manual_seed(0)
    Cnn14(len(names), (4, 4, 4, 4, 4, 8), names).save(tmp_path / "tagger.safetensors")
    out, data = tmp_path / "out", small[small.index("--data") + 1]
    arguments = ["--model", tmp_path / "model", "--classifier", tmp_path / "tagger.safetensors"]
    arguments += ["--out", out, "--data", data, "--clips", 3, "--steps", 2, "--train-steps", 2]
    arguments = [*map(str, [*arguments, "--device", "cpu"])]
    adapted.main(arguments)
    result = json.loads((out / "adapted.json").read_text())
    sets = ["before", "textual-inversion", "lora", "dreambooth", "dreambooth-class"]
    assert [*result["sound"]] == ["floor", "ceiling", *sets]
    assert result["sound"]["dreambooth"]["prompt"] == "The sound of sks stream"
    for row in result["sound"].values():
        assert 0 <= row["top-1"] <= row["top-5"] <= 1 and -1 <= row["cosine"] < 1.001
        assert row["FD"] >= 0 and math.isfinite(row["KL_softmax"])
    assert len({row["FD"] for row in result["sound"].values()}) == 7
    sounds = {name: (out / name / "sounds" / "00.wav").read_bytes() for name in sets}
    assert len(set(sounds.values())) == 5  # each comes of another prompt, or another model
    made = [[x.read_bytes() for x in sorted((out / "controlnet" / name).glob("*.wav"))]
            for name in ("before", "after")]  # fmt: skip
    assert len(made[0]) == 3 and all(a != b for a, b in zip(*made, strict=True))
    for row in result["control"].values():
        assert -1 <= row["correlation"] <= 1 and row["off by, dB"] > 0
    assert (out / "adapted.png").is_file() and (out / "control.png").is_file()
    assert '| dreambooth-class ("The sound of stream") |' in capsys.readouterr().out

    # Nothing is trained or made twice, and other settings want another folder.
    for module, name in ((adapted.adapt, "main"), (judge, "write_generated")):
        monkeypatch.setattr(module, name, None)
    adapted.main(arguments)
    assert json.loads((out / "adapted.json").read_text()) == result
    with pytest.raises(SystemExit, match="begun with clips = 3, this command 4: choose another"):
        adapted.main([*arguments, "--clips", "4"])


def test_mistakes_get_one_line(tmp_path):
    with pytest.raises(SystemExit, match="--label Kazoo: expected one of Applause, "):
        adapted.main(["--label", "Kazoo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no/such"):
        adapted.main(["--classifier", "no/such", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        adapted.main(["--clips", "1"])
