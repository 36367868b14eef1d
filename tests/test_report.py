"""appendix/report.py: one page that holds everything it shows."""

import base64
import io
import json
import re

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from appendix import report
from latents import save_audio
from tests.conftest import Tags, save_model

SETS = {
    "reference": {"N": 3, "IS": 2.0, "missing": ["clip-9"]},
    "generated": {"N": 3, "IS": 1.5, "IS_std": 0.25, "FD": 12.345, "silent": ["clip-2"]}
    | {"KL_softmax": 0.5, "KL_softmax_95": [0.4, 0.75]},
    "noise": {"N": 3, "IS": 1.0, "FD": 99.0, "KL_softmax": 3.0},
}


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for kind, hertz in (("generated", 440), ("reference", 880)):
        (tmp_path / kind).mkdir()
        for i in range(3):
            t = np.arange(32_000) / 16_000
            wave = 0.3 * np.sin(2 * np.pi * hertz * t) + 0.01 * rng.standard_normal(len(t))
            soundfile.write(tmp_path / kind / f"clip-{i}.wav", wave, 16_000)
    metrics = {"sets": SETS, "command": "python evaluate.py a b"}
    metrics |= {"classifier": {"file": "c.pth", "sha256": "0" * 64, "sample_rate": 16_000}}
    (tmp_path / "generated" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "captions.csv").write_text(
        'name,caption\nclip-0,"<b>rain</b> & thunder"\nclip-1,clip-1\nclip-2,snow\n'
    )
    return tmp_path


def make(folders, *options):
    out = folders / "page.html"
    arguments = [folders / "generated", folders / "reference", "--out", out, *options]
    report.main([*map(str, arguments)])
    return out.read_text()


def test_page_is_complete_and_needs_no_network(folders):
    text = make(folders, "--table", folders / "captions.csv")
    tags = Tags(text)
    assert not tags.open  # every tag is closed
    sources = [a["src"] for _, a in tags.found if "src" in a]
    assert len(sources) == 3 * 2 * 2 and all(s.startswith("data:") for s in sources)
    assert not re.search(r"(https?:)?//", re.sub(r'src="[^"]*"', "", text))
    assert "&lt;b&gt;rain&lt;/b&gt; &amp; thunder" in text and "<b>" not in text
    for note in ("IS ± 0.25", "KL 0.4 to 0.75", "1 silent: clip-2", "1 missing: clip-9"):
        assert note in text
    assert "12.35" in text and "clip-1" in text and "python evaluate.py" in text

    sounds = [base64.b64decode(s.split(",")[1]) for s in sources if "audio" in s]
    for i, hertz in enumerate((440, 880)):
        wave, rate = soundfile.read(io.BytesIO(sounds[i]))
        spectrum = np.abs(np.fft.rfft(wave))
        assert abs(np.fft.rfftfreq(len(wave), 1 / rate)[spectrum.argmax()] - hertz) < 3
    pictures = [base64.b64decode(s.split(",")[1]) for s in sources if "image" in s]
    picture = imread(io.BytesIO(pictures[0]))[..., :3].sum(-1)  # 440 Hz is near the bottom
    assert picture.shape[0] == 128 and picture.mean(1).argmax() == 128 - 1 - round(440 / 62.5)


def test_pairs_are_those_of_evaluate(folders):
    """AudioCaps' ids with files called YID_START; and without a table the prompts in the WAVs."""
    for i in range(3):
        (folders / "reference" / f"clip-{i}.wav").rename(folders / "reference" / f"Yk{i}_30.wav")
        (folders / "generated" / f"clip-{i}.wav").rename(folders / "generated" / f"k{i}.wav")
    table = "youtube_id,start_time,caption\nk0,30,rain\nk2,30,snow\nk9,30,hail\n"
    (folders / "captions.csv").write_text(table)
    text = make(folders, "--table", folders / "captions.csv")
    assert "2 of 2" in text and "rain" in text and "snow" in text
    for kind in ("generated", "reference"):
        save_audio(folders / kind / "x.wav", torch.randn(32_000) / 9, '{"prompt": "a gong"}')
    assert "a gong" in make(folders)


def test_efficiency(tmp_path, quick_sounds, capsys):
    save_model(tmp_path / "model")
    about = json.loads((tmp_path / "model/model.json").read_text())
    (tmp_path / "model/model.json").write_text(json.dumps(about | {"steps": 3}))
    report.main(["--efficiency", "--model", str(tmp_path / "model"), "--device", "cpu"])
    found = {line[:24].strip(): line[24:] for line in capsys.readouterr().out.splitlines()}
    unet = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    assert found["U-Net parameters"] == f"{sum(x.numel() for x in unet.values()):,}"
    assert found["bytes a clip on disk"] == "64,512"  # 128 bands × 504 frames of uint8
    assert found["codec"] == "mel" and found["latent"] == "128 × 24 × 21"
    assert 0 < float(found["seconds a clip"]) < 60


def test_bad_input_is_one_line(folders):
    (folders / "bad.json").write_text("[]")
    for options, message in (
        (["--metrics", folders / "bad.json"], "bad.json"),
        (["--metrics", folders / "nowhere.json"], "nowhere"),
        (["--table", folders / "nowhere.csv"], "nowhere"),
        (["--efficiency"], 2),
    ):
        with pytest.raises(SystemExit) as e:
            make(folders, *options)
        text = e.value.code
        assert text == message or text.startswith("error: ") and message in text
