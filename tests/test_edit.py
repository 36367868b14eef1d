"""appendix/edit.py: what is kept, what continues, what lies between, on a small random model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import save_model
from matplotlib.image import imread

import sample
from appendix import edit
from benchmarks.gpu import plain_graph
from latents import CLIP_SAMPLES, MelCodec
from sample import load_model

pytestmark = pytest.mark.usefixtures("quick_sounds")
KEEP = [(0, 3), (6, 10)]
FAST = {"steps": 4, "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """It decodes to the normalised latents themselves, [B, 128, frames]."""
    model = load_model(folder)
    for name, p in model.unet.named_parameters():
        if "attn2.to_out" in name:
            p.data *= 20  # what a random network makes of its text is next to nothing
    model.codec.decode = model.stats.normalize
    return model


@pytest.fixture
def main(folder, tmp_path, monkeypatch):
    """The command, in this process and an empty folder, three steps."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("in.wav", recording().numpy(), 16_000)
    return lambda *arguments: edit.main(["--model", str(folder), "--steps", "3", *arguments])


def recording():
    t = torch.arange(CLIP_SAMPLES) / 16_000
    return 0.3 * torch.sin(2 * torch.pi * 440 * t) * (t % 1 < 0.5)


def comment(path):
    with soundfile.SoundFile(path) as file:
        return json.loads(file.comment)


@pytest.mark.parametrize("prediction, sampler", [("v", "pndm"), ("eps", "ddim"), ("x0", "ddpm")])
def test_what_is_kept_of_a_recording(model, prediction, sampler):
    model, kept = replace(model, prediction=prediction), torch.zeros(504, dtype=torch.bool)
    kept[:150], kept[300:500] = True, True  # 50 frames a second
    z = model.codec.to_sequence(model.latent(recording()))[0]
    settings = FAST | {"sampler": sampler, "init_audio": recording()}
    dog = edit.generate(model, ["dog"], keep=KEEP, strength=1.0, **settings)[0]
    partly = edit.generate(model, ["dog"], keep=KEEP, strength=0.5, **settings)[0]
    free = edit.generate(model, ["dog"], strength=1.0, **settings)[0]
    for sound in (dog, partly):
        torch.testing.assert_close(sound[:, kept], z[:, kept], atol=1e-4, rtol=0)
    for other in (z, partly, free):
        assert (dog - other)[:, ~kept].abs().mean() > 1e-3


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_the_network_sees_what_is_kept_in_noise(model, prediction):
    """At every step, as noisy as the rest: else nothing it adds would go with what is there."""
    seen, known = {}, model.latent(recording())[..., :11, :]  # of 24 rows
    settings = {"sampler": "ddim", "init_audio": recording(), "keep": [(0, 5)], "strength": 1.0}
    watch = lambda t, x_t: seen.update({t: x_t[..., :11, :]})  # noqa: E731
    model = replace(model, prediction=prediction, guidance_above=500)
    edit.generate(model, ["dog"], watch=watch, **FAST | {"steps": 12}, **settings)
    a = model.alphas_cumprod[max(seen)].item()
    noise = (seen[max(seen)] - a**0.5 * known) / (1 - a) ** 0.5
    for t, x_t in seen.items():
        a = model.alphas_cumprod[t].item()
        expected = a**0.5 * known + (1 - a) ** 0.5 * noise
        torch.testing.assert_close(x_t, expected, atol=2e-3, rtol=0, msg=f"t = {t}")


def test_windows_continue_each_other(model):
    """The second half of each is known in the next, as noisy as that is on the way."""
    ends = []
    settings = FAST | {"seed": 2, "watch": lambda t, x_t: ends.append(x_t) if t == 1 else None}
    one = edit.generate(model, ["dog"], **settings)
    long = edit.generate(model, ["dog"], seconds=20.0, **settings)
    assert long.shape == (1, 128, 504 + 2 * 252)  # this codec doesn't decode, so nothing is cut
    assert torch.equal(long[..., :504], one) and len(ends) == 1 + 3
    for window, x_t in enumerate(ends[2:], 1):
        before, x_t = long[..., 252 * window : 252 * (window + 1)], x_t.flatten(2)
        assert (x_t[..., :252] - before).std() < 0.1 < 0.3 < (x_t[..., 252:] - before).std()


@pytest.mark.parametrize("above", [0, 500])
def test_between_two_prompts(model, above):
    """From one to the other with one noise; the ends are the prompts' own sounds."""
    model = replace(model, guidance_above=above)
    settings = FAST | {"decode": False}
    ends = sample.generate(model, ["dog", "rain"], indices=[3, 3], **settings)
    ends = model.codec.to_sequence(ends)
    shared = edit.generate(model, ["dog"] * 3, to="rain", n=3, indices=[9, 10, 11], **FAST)
    torch.testing.assert_close(shared[[0, 2]], ends, atol=1e-3, rtol=0)
    for end in ends:
        assert 0.2 < (shared[1] - end).norm() / (ends[1] - ends[0]).norm() < 0.8


def test_graphs_change_nothing(model, monkeypatch):
    """A graph of a network with its wrapper, for each of two windows; none where it is watched."""
    made = []
    settings = FAST | {"to": "rain", "n": 2, "seconds": 12, "keep": KEEP, "init_audio": recording()}
    expected = edit.generate(model, ["dog"] * 2, **settings)
    graph = lambda network, inputs: made.append(1) or plain_graph(network, inputs)  # noqa: E731
    monkeypatch.setitem(sample.GRAPHS, "cpu", graph)
    assert torch.equal(edit.generate(model, ["dog"] * 2, **settings), expected) and len(made) == 2
    edit.generate(model, ["dog"] * 2, watch=lambda t, x_t: f"{t:d}", **settings)
    assert len(made) == 2 and not model.graphs


def test_commands(main, folder, tmp_path):
    """Keep; a sound from its comment again; pictures, which overwrite nothing."""
    main("cat", "--init-audio", "in.wav", "--keep", "0-3,6-10")
    about = comment("cat.wav")
    assert about["keep"] == [[0, 3], [6, 10]] and about["strength"] == 1
    kept = MelCodec().encode(torch.from_numpy(soundfile.read("cat.wav")[0]).float()[None])
    error = (kept.float() - MelCodec().encode(recording()[None]).float()).abs()[0]
    assert error[:, 5:145].mean() < error[:, 155:295].mean() / 2

    Path("dog-steps.png").write_bytes(b"mine")
    options = ("--seconds", "12.5", "--precision", "fp32", "--steps-image", "1,3")
    main("dog", "--to", "rain", "-n", "2", *options)
    assert soundfile.info("dog.wav").frames == 200_000
    about = comment("dog-2.wav")
    assert about.pop("model") and about.pop("init_audio") is None
    assert about.pop("control") is about.pop("controlnet") is None
    prompt, number = about.pop("prompt"), about.pop("sample")
    again = edit.generate(load_model(folder), [prompt] * 2, indices=[0, number], **about)[1]
    wave = torch.from_numpy(soundfile.read("dog-2.wav", dtype="float32")[0])
    torch.testing.assert_close(wave, again * min(1, 0.99 / again.abs().max()), atol=5e-5, rtol=0)
    assert Path("dog-steps.png").read_bytes() == b"mine"
    assert imread("dog-steps-2.png").std() > 0.05 and imread("dog-2-steps.png").std() > 0.05


def test_bad_command_lines(main, tmp_path):
    for options, status in (
        ("--seconds 301", 2),
        ("--seconds nan", 2),
        ("--keep 0-3", 2),
        ("--keep 0:3 --init-audio in.wav", 2),
        ("--to rain", 2),
        ("--control in.wav", 2),
        ("--steps-image x", 2),
        ("--keep 3-1 --init-audio in.wav", "keep 3-1: expected seconds of 0 to 10.08"),
        ("--steps-image 4", "steps of 1 to 3"),
    ):
        with pytest.raises(SystemExit) as failure:
            main("dog", *options.split())
        assert failure.value.code == status or str(status) in str(failure.value.code)
        assert not list(tmp_path.glob("dog*"))
