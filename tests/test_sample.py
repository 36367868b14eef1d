"""sample.py: the sounds and the names they get, on small random model folders, and bad input.

The network of a model is replaced by an oracle where the answer has to be known. Griffin-Lim runs
two rounds instead of 32: how well a codec decodes is for test_latents.py to say.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import save_bert
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from torch import nn

import diffusion
import sample
from captions import TextEncoder
from latents import CLIP_SAMPLES, LatentStats, MelCodec, to_grid, to_sequence
from sample import free_path, generate, load_model, noise_generators, read_prompts, safe_name
from unet import UNet, UNetConfig

CHANNELS = MelCodec.channels
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("quick_sounds")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random model folders that predict v and ε, with a random text encoder that knows letters."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    save_bert(root / "bert")
    for prediction in ("v", "eps", "x0"):
        unet = UNet(UNetConfig(128, 128, (32, 32), (False, True), 1, 4, 48, 32))
        for name, p in unet.named_parameters():
            if "attn2.to_out" in name:
                p.data *= 20  # what a random network makes of its text is next to nothing
        unet.save_pretrained(root / prediction / "unet")
        mean, std = torch.linspace(-30, -60, CHANNELS).double(), torch.linspace(8, 4, CHANNELS)
        LatentStats(mean, std.double(), 1).save(root / prediction / "latent_stats.safetensors")
        about = {"text_encoder": str(root / "bert"), "max_length": 24, "mask": "none"}
        about |= {"codec": MelCodec().settings(), "sample_rate": 16_000, "schedule": "cosine"}
        about |= {"prediction": prediction, "trained_on": None}
        (root / prediction / "model.json").write_text(json.dumps(about))
    return root


@pytest.fixture(scope="module")
def model(folders):
    return load_model(folders / "v")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def main(folders, monkeypatch, here):
    """The command, in this process; the model of v is the default, three steps."""
    monkeypatch.setattr(sample, "TINY", folders / "v")

    def run(*arguments):
        steps = [] if "--steps" in arguments else ["--steps", "3"]
        sample.main([str(a) for a in arguments] + steps)

    return run


@pytest.fixture
def fails(main, here, capsys):
    """The one line on stderr of a command that must fail with this status, and write no sound."""

    def run(*arguments, status=1):
        before = sorted(here.rglob("*"))
        with pytest.raises(SystemExit) as failure:
            main(*arguments)
        assert [p for p in sorted(here.rglob("*")) if p not in before and p.is_file()] == []
        if status == 2:  # argparse's: usage, then one line
            assert failure.value.code == 2
            return capsys.readouterr().err.splitlines()[-1]
        message = failure.value.code  # Python prints a text to stderr, and the status is 1
        assert isinstance(message, str) and message.startswith("error: ")
        assert len(message.splitlines()) == 1 and capsys.readouterr().out == ""
        return message

    return run


def names(folder, pattern="*"):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(pattern) if p.is_file())


def comment(path):
    with soundfile.SoundFile(path) as file:
        return json.loads(file.comment)


def as_latents(model):
    """The model with a codec that decodes to the latents themselves, [N, C, 504]."""
    codec = SimpleNamespace(channels=CHANNELS, decode=lambda z: z)
    codec.encode, codec.dequantize = model.codec.encode, model.codec.dequantize
    return replace(model, codec=codec)


class Recorder(nn.Module):
    """A network that keeps what it is called with, and predicts nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, text, mask):
        self.calls.append((x_t.clone(), t, text, mask))
        return torch.zeros_like(x_t)


class Oracle(nn.Module):
    """A network that knows x_0 [B, C, 24, 21], and so the ε (or v) in any x_t. It is wrong by ±1
    without and by ±1·(s − 1)/s with the prompt, which guidance of scale s cancels, if it is right.
    """

    def __init__(self, x_0, model, scale):
        super().__init__()
        self.x_0, self.model, self.scale = x_0, model, scale

    def forward(self, x_t, t, text, mask):
        alphas_cumprod, x_0 = self.model.alphas_cumprod, torch.cat([self.x_0, self.x_0])
        a = alphas_cumprod[t].item()
        eps = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5
        wrong = torch.linspace(-1, 1, CHANNELS).view(-1, 1, 1).expand_as(self.x_0)
        eps = eps + torch.cat([wrong, wrong * (self.scale - 1) / self.scale])
        if self.model.prediction == "eps":
            return eps
        x_0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
        return x_0 if self.model.prediction == "x0" else a**0.5 * eps - (1 - a) ** 0.5 * x_0


# ---- what is heard -------------------------------------------------------------------------------


def test_three_lines_of_python(folders):
    model = load_model(folders / "v")
    waves = generate(model, ["dog barking", "rain"], steps=3)
    assert waves.shape == (2, CLIP_SAMPLES) and waves.dtype == torch.float32
    assert waves.isfinite().all() and (waves.std(dim=1) > 1e-4).all()
    assert not torch.equal(waves[0], waves[1])


@pytest.mark.parametrize("schedule, shift", [("cosine", None), ("scaled-linear", 0.2)])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", ["pndm", "ddim", "ddpm"])
def test_a_perfect_network_is_heard_exactly(
    folders, tmp_path, sampler, prediction, schedule, shift
):
    """Prediction, schedule and statistics are the folder's; guidance uses both halves, rightly."""
    shutil.copytree(folders / prediction, tmp_path / "model")
    edit(tmp_path / "model", schedule=schedule, schedule_shift=shift)
    model = as_latents(load_model(tmp_path / "model"))
    assert model.prediction == prediction
    if schedule == "cosine":
        expected = diffusion.cosine_alphas_cumprod()
    else:
        expected = diffusion.shifted(diffusion.scaled_linear_alphas_cumprod(), 0.2)
    torch.testing.assert_close(model.alphas_cumprod, expected, atol=0, rtol=1e-12)

    x_0 = torch.randn(2, CHANNELS, 24, 21, generator=torch.Generator().manual_seed(3))
    model.unet = Oracle(x_0, model, scale=4.0)
    settings = {"steps": 20, "sampler": sampler, "guidance": 4.0, "precision": "fp32"}
    z = generate(model, ["dog", "rain"], seed=7, **settings)
    if sampler != "ddpm":  # these end at √ᾱ_0·x_0 + √(1−ᾱ_0)·ε
        noise = diffusion.randn_like(x_0, noise_generators(7, [0, 1]))
        t = diffusion.timestep_sequence(1000, 20)[0]
        eps = (noise - expected[t].sqrt() * x_0) / (1 - expected[t]).sqrt()
        x_0 = expected[0].sqrt() * x_0 + (1 - expected[0]).sqrt() * eps
    x = to_grid(z.double() - torch.linspace(-30, -60, CHANNELS)[:, None])  # by hand, not by stats
    x = x / torch.linspace(8, 4, CHANNELS)[:, None, None]
    torch.testing.assert_close(x, x_0.double(), atol=1e-3, rtol=0)


def test_what_the_network_is_called_with(model):
    """PNDM's 46 calls; first half without, second with the prompt, in order."""
    network = Recorder()
    prompts = ["dog", "rain", "a bell"]
    generate(replace(as_latents(model), unet=network), prompts, negative="loud", seed=1)
    t = [int(t) for _, t, _, _ in network.calls]
    assert len(t) == 46 and t[:4] == [969, 947, 947, 925] and t[-1] == 1
    x_t, _, text, _ = network.calls[0]
    assert x_t.shape == (6, CHANNELS, 24, 21) and torch.equal(x_t[:3], x_t[3:])
    assert torch.equal(text, model.encoder(["loud"] * 3 + prompts)[0])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_are_cast_to_bf16_once(model, precision):
    """At every step anew it would take twice as long at full width. The model's own stay as they
    are."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(3, 3), []

        def forward(self, x_t, t, text, mask):
            self.seen.append(self.linear.weight)
            assert self.linear.bias.dtype == torch.float32  # as are those of the norms
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            return torch.zeros_like(x_t)

    network = Network()
    generate(replace(as_latents(model), unet=network), ["dog"], steps=3, precision=precision)
    assert len(network.seen) == 4 and len(set(map(id, network.seen))) == 1
    assert network.seen[0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert network.linear.weight.dtype == torch.float32


def test_noise_depends_on_seed_and_number_alone(model):
    def noise(prompts, **settings):
        network = Recorder()
        generate(replace(as_latents(model), unet=network), prompts, steps=1, **settings)
        return torch.cat([x[: len(x) // 2] for x, *_ in network.calls[::2]])

    first = noise(["dog", "rain", "a bell", "wind", "cat"], seed=5)
    for batch_size in (1, 2, 5):
        others = noise(["a", "b", "c", "d", "e"], seed=5, batch_size=batch_size)
        assert torch.equal(others, first)
    assert torch.equal(noise(["x"], seed=5, indices=[3])[0], first[3])
    assert abs(first.std() - 1) < 0.01 and abs(first.mean()) < 0.01
    flat = torch.cat([first, noise(["dog"], seed=6)]).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.03  # independent of one another


@pytest.mark.parametrize("sampler", ["pndm", "ddpm"])
def test_same_wave_in_any_batch(model, sampler, monkeypatch):
    """Up to rounding, since matrix kernels depend on the shape. Griffin-Lim is chaotic: its rounds
    enlarge 2e-4 dB in these random latents to 0.01 in a wave, so it is left out here."""
    monkeypatch.setattr(MelCodec, "iterations", 1)
    prompts = ["dog", "rain", "a bell"]
    settings = {"seed": 1, "steps": 4, "sampler": sampler, "precision": "fp32"}
    together = generate(model, prompts, **settings)
    assert torch.equal(together, generate(model, prompts, **settings))
    company = generate(model, ["wind", "rain", "a very loud noise"], **settings)
    assert torch.equal(company[1], together[1])  # the same bits in an equal batch
    assert not torch.allclose(company[2], together[2], atol=1e-3)
    for batch_size in (1, 2):
        apart = generate(model, prompts, batch_size=batch_size, **settings)
        torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
    alone = generate(model, ["a bell"], indices=[2], **settings)[0]
    torch.testing.assert_close(alone, together[2], atol=1e-4, rtol=0)


def test_every_setting_changes_the_sound(model):
    def latents(prompt="dog", **settings):
        settings = {"steps": 4, "precision": "fp32"} | settings
        return generate(as_latents(model), [prompt], **settings)

    sounds = [latents(), latents("rain"), latents(seed=1), latents(indices=[1])]
    sounds += [latents(guidance=3.0), latents(steps=5), latents(negative="rain")]
    sounds += [latents(sampler="ddim"), latents(sampler="ddpm"), latents(precision="bf16")]
    for i, a in enumerate(sounds):
        for b in sounds[:i]:
            assert (a - b).abs().max() > 1e-3  # dB


def test_guidance_where_the_answer_is_known(model):
    def latents(prompt, **settings):
        return generate(as_latents(model), [prompt], steps=4, precision="fp32", **settings)

    plain = latents("dog", guidance=1)
    same = {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(latents("dog", guidance=9, negative="dog"), plain, **same)
    torch.testing.assert_close(latents("rain", guidance=0, negative="dog"), plain, **same)
    torch.testing.assert_close(latents("dog", guidance=1, negative="rain"), plain, **same)


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_both_predictions_sample(folders, prediction, sampler):
    model = load_model(folders / prediction)
    wave = generate(model, ["dog"], steps=3, sampler=sampler)
    assert wave.shape == (1, CLIP_SAMPLES) and wave.isfinite().all() and wave.std() > 1e-4


def test_guidance_is_what_the_folder_says(folders, tmp_path, main):
    assert load_model(folders / "v").guidance == 6.5
    shutil.copytree(folders / "v", tmp_path / "model")
    edit(tmp_path / "model", guidance=3.0)
    model = load_model(tmp_path / "model")
    default, said = generate(model, ["dog"], steps=3), generate(model, ["dog"], steps=3, guidance=3)
    assert torch.equal(default, said)
    main("dog", "--model", "model")
    main("dog", "--model", "model", "--guidance", 2)
    assert comment(tmp_path / "dog.wav")["guidance"] == 3
    assert comment(tmp_path / "dog-2.wav")["guidance"] == 2


def test_a_text_encoder_in_bf16(folders, model):
    """As on CUDA, where --precision fp32 must work as well."""
    encoder = TextEncoder(str(folders / "bert"), 24, dtype=torch.bfloat16)
    for precision in ("fp32", "bf16"):
        half = replace(model, encoder=encoder)
        a, b = (
            generate(as_latents(m), ["dog"], steps=2, precision=precision) for m in (half, model)
        )
        assert 0 < (a - b).abs().max() < 5  # dB


def test_half_precision_weights_on_the_disk(folders, tmp_path, model):
    shutil.copytree(folders / "v", tmp_path / "model")
    state = load_file(tmp_path / "model" / WEIGHTS)
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "model" / WEIGHTS)
    half = load_model(tmp_path / "model")
    assert half.unet.conv_in.weight.dtype == torch.float32
    settings = {"steps": 3, "precision": "fp32"}
    a, b = (generate(as_latents(m), ["dog"], **settings) for m in (half, model))
    torch.testing.assert_close(a, b, atol=1.0, rtol=0)


# ---- image-to-image ------------------------------------------------------------------------------


def recording():
    t = torch.arange(CLIP_SAMPLES) / 16_000
    return 0.3 * torch.sin(2 * torch.pi * 440 * t) * (t % 1 < 0.5)


def test_strength_leads_away_from_the_recording(model):
    model = as_latents(model)
    z = model.codec.dequantize(model.codec.encode(recording()[None]))[0]
    settings = {"steps": 45, "sampler": "ddim", "guidance": 1.0, "precision": "fp32"}

    def distance(strength):
        """RMS distance to the recording's latent, in standard deviations of each channel."""
        x = generate(model, ["dog"], init_audio=recording(), strength=strength, **settings)[0]
        return model.stats.normalize(x - z + model.stats.mean[:, None].float()[None])[0].std()

    near, middle, far = (distance(s) for s in (0.02, 0.4, 0.95))
    assert near < 0.15 and near < middle < far and far > 1


def test_strength_1_is_pure_noise(model):
    settings = {"steps": 3, "seed": 4}
    without = generate(model, ["dog"], **settings)
    for wave in (recording(), torch.zeros(5)):
        given = generate(model, ["dog"], init_audio=wave, strength=1.0, **settings)
        assert torch.equal(given, without)
    given = generate(model, ["dog"], init_audio=recording(), strength=0.99, **settings)
    assert not torch.equal(given, without)


def test_steps_that_are_left(model):
    for strength, expected in ((0.2, [177, 155, 155, 133]), (1e-6, [1, 0])):
        network = Recorder()
        generate(
            replace(as_latents(model), unet=network),
            ["dog", "rain"],
            init_audio=recording()[:8000],
            strength=strength,
        )
        assert [int(t) for _, t, *_ in network.calls[:4]] == expected
        assert not torch.equal(network.calls[0][0][0], network.calls[0][0][1])  # own noise each


def test_init_audio_of_another_kind(main, here):
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (44_100, 2))
    soundfile.write(here / "in.flac", stereo, 44_100)
    main("dog", "--init-audio", "in.flac", "--strength", 0.5)
    about = comment(here / "dog.wav")
    assert about["init_audio"] == "in.flac" and about["strength"] == 0.5
    assert soundfile.info(here / "dog.wav").frames == CLIP_SAMPLES


KEEP = [(0, 3), (6, 10)]


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "ddpm"])
def test_what_is_kept_of_a_recording(model, sampler):
    model = as_latents(model)
    z = model.codec.dequantize(model.codec.encode(recording()[None]))[0]
    settings = {"steps": 4, "sampler": sampler, "precision": "fp32", "init_audio": recording()}
    kept = torch.zeros(504, dtype=torch.bool)
    kept[:150], kept[300:500] = True, True  # 50 frames a second
    dog = generate(model, ["dog"], keep=KEEP, strength=1.0, **settings)[0]
    rain = generate(model, ["rain"], keep=KEEP, strength=1.0, **settings)[0]
    partly = generate(model, ["dog"], keep=KEEP, strength=0.5, **settings)[0]
    free = generate(model, ["dog"], strength=1.0, **settings)[0]
    for sound in (dog, rain, partly):
        torch.testing.assert_close(sound[:, kept], z[:, kept], atol=1e-4, rtol=0)
    for a, b in ((dog, z), (dog, rain), (dog, partly), (dog, free)):
        assert (a - b)[:, ~kept].abs().mean() > 0.1  # dB
    with pytest.raises(ValueError, match="keep 9-11: expected seconds of 0 to 10.08"):
        generate(model, ["dog"], keep=[(9, 11)], **settings)
    with pytest.raises(ValueError, match="no recording"):
        generate(model, ["dog"], keep=KEEP)


def test_the_network_sees_what_is_kept_in_noise(model):
    """At every step, as noisy as the rest: else nothing it adds would go with what is there."""
    x_0 = to_grid(torch.linspace(-1, 1, 504).expand(1, CHANNELS, 504))
    seen = {}

    class Codec:
        channels, decode = CHANNELS, staticmethod(lambda z: z)
        encode = dequantize = staticmethod(lambda z: model.stats.denormalize(to_sequence(x_0)))

    blind = replace(model, codec=Codec, unet=Recorder())
    generate(
        blind, ["dog"], sampler="ddim", init_audio=torch.zeros(9), keep=[(0, 5)], strength=1.0,
        watch=lambda t, x_t: seen.update({t: x_t}),
    )  # fmt: skip
    known, noise = to_sequence(x_0)[..., :250], seen[969][..., :250]
    for t, x_t in seen.items():
        a = model.alphas_cumprod[t].item()
        expected = a**0.5 * known + (1 - a) ** 0.5 * noise
        assert (x_t[..., :250] - expected).abs().max() < 0.2, (
            t
        )  # x_969 is noise and next to nothing


def test_windows_continue_each_other(model):
    model = as_latents(model)
    settings = {"steps": 4, "precision": "fp32", "seed": 2}
    seen = []
    one = generate(model, ["dog", "rain"], **settings)
    long = generate(
        model, ["dog", "rain"], seconds=20.0, watch=lambda t, x_t: seen.append((t, x_t)), **settings
    )
    assert long.shape == (2, CHANNELS, 504 + 2 * 252)  # this codec doesn't decode, so nothing's cut
    assert torch.equal(long[..., :504], one)
    ends = [x_t for t, x_t in seen if t == 1]  # of three windows
    assert len(ends) == 3
    for window, x_t in enumerate(ends[1:]):
        before = model.stats.normalize(long)[..., 252 * (window + 1) : 252 * (window + 2)]
        assert (x_t[..., :252] - before).std() < 0.1 and (x_t[..., 252:] - before).std() > 0.3
    assert generate(load_fast(model), ["dog"], seconds=12.5, **settings).shape == (1, 200_000)


def load_fast(model):
    """The model with the mel codec again."""
    return replace(model, codec=MelCodec())


def test_between_two_prompts(model):
    settings = {"steps": 4, "precision": "fp32", "indices": [3, 3, 3]}
    model = as_latents(model)
    ends = generate(model, ["dog", "dog", "rain"], **settings)
    shared = generate(model, ["dog"] * 3, to="rain", shares=[0.0, 0.5, 1.0], **settings)
    torch.testing.assert_close(shared[0], ends[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(shared[2], ends[2], atol=1e-3, rtol=0)
    length = (ends[2] - ends[0]).norm()
    for end in (shared[0], shared[2]):
        assert 0.2 < (shared[1] - end).norm() / length < 0.8
    for shares in (None, [0.5], [0, 0.5, 1.5], [0, 0.5, float("nan")]):
        with pytest.raises(ValueError, match="shares"):
            generate(model, ["dog"] * 3, to="rain", shares=shares, **settings)


# ---- files ---------------------------------------------------------------------------------------


def test_the_plain_command(main, here, capsys):
    main("dog barking")
    info = soundfile.info(here / "dog_barking.wav")
    assert (info.frames, info.samplerate, info.channels) == (161_280, 16_000, 1)
    assert (info.format, info.subtype) == ("WAV", "PCM_16")
    wave, _ = soundfile.read(here / "dog_barking.wav")
    assert wave.std() > 1e-4 and abs(wave).max() <= 0.99
    assert capsys.readouterr().out == "dog_barking.wav\n"

    first = (here / "dog_barking.wav").read_bytes()
    main("dog barking")
    main("Dog, barking!", "--seed", 1)
    assert names(here) == ["dog_barking-2.wav", "dog_barking-3.wav", "dog_barking.wav"]
    assert (here / "dog_barking.wav").read_bytes() == first  # never overwritten,
    assert (here / "dog_barking-2.wav").read_bytes() == first  # and made again bit for bit
    assert (here / "dog_barking-3.wav").read_bytes() != first


def test_the_same_command_gives_the_same_bytes(main, here):
    for folder in ("one", "other"):
        main("dog", "rain", "--seed", 3, "--out", folder)
    for name in ("dog.wav", "rain.wav"):
        assert (here / "one" / name).read_bytes() == (here / "other" / name).read_bytes()


def test_comment_is_enough_to_make_a_sound_again(main, here, folders):
    options = {"--seed": 3, "--guidance": 2.5, "--sampler": "ddim", "--negative": "wind: ü🐶"}
    flat = [x for pair in options.items() for x in pair]
    main(
        "Rain, on a “tin” roof 🐱", "dog", "-n", 2, "--precision", "fp32", "--batch-size", 1, *flat
    )
    assert names(here) == ["dog-2.wav", "dog.wav", "rain_on_a_tin_roof-2.wav"] + [
        "rain_on_a_tin_roof.wav"
    ]
    about = comment(here / "rain_on_a_tin_roof-2.wav")
    assert about.pop("prompt") == "Rain, on a “tin” roof 🐱" and about.pop("sample") == 1
    assert about.pop("model").endswith("/v") and about.pop("init_audio") is None
    assert about == {"seed": 3, "steps": 3, "guidance": 2.5, "sampler": "ddim"} | {
        "negative": "wind: ü🐶",
        "to": "",
        "seconds": 10.08,
        "strength": 0.8,
        "keep": [],
        "precision": "fp32",
    }
    again = generate(load_model(folders / "v"), ["Rain, on a “tin” roof 🐱"], indices=[1], **about)
    again = again[0] * min(1, 0.99 / again.abs().max())
    wave = torch.from_numpy(soundfile.read(here / "rain_on_a_tin_roof-2.wav", dtype="float32")[0])
    torch.testing.assert_close(wave, again, atol=5e-5, rtol=0)  # 16 bits
    waves = [(here / name).read_bytes() for name in names(here)]
    assert len(set(waves)) == 4  # -n and other prompts: other sounds


def test_seconds(main, here):
    main("dog", "--out", "long")
    main("dog", "--out", "short", "--seconds", 1.5)
    long, short = (soundfile.read(here / f / "dog.wav")[0] for f in ("long", "short"))
    assert len(long) == CLIP_SAMPLES and len(short) == 24_000
    assert abs(long).max() < 0.9  # or its peak would have been scaled
    assert np.array_equal(long[:24_000], short)


def test_more_than_one_window(main, here, monkeypatch):
    shown, save_steps = [], sample.save_steps
    monkeypatch.setattr(sample, "save_steps", lambda path, seen, title: (
        shown.append(seen), save_steps(path, seen, title)))  # fmt: skip
    main("dog", "--seconds", 12.5, "--steps-image", "1,2")
    assert [len(seen) for seen in shown] == [2]
    assert min(shown[0]) > 200  # of three steps the first two: where there is much noise
    assert soundfile.info(here / "dog.wav").frames == 200_000
    assert names(here) == ["dog-steps.png", "dog.wav"]
    main("dog", "--steps-image", "2")
    assert names(here, "*.png") == ["dog-2-steps.png", "dog-steps.png"]
    image = imread(here / "dog-steps.png")
    assert image.shape[0] > imread(here / "dog-2-steps.png").shape[0] and image.std() > 0.05


def test_from_one_prompt_to_another(main, here, folders):
    main("dog", "--to", "rain", "-n", 3, "--precision", "fp32", "--batch-size", 2)
    abouts = [comment(here / name) for name in ("dog.wav", "dog-2.wav", "dog-3.wav")]
    assert [about["share"] for about in abouts] == [0, 0.5, 1]
    assert [about["sample"] for about in abouts] == [0, 0, 0]
    about = abouts[1]
    for key in ("model", "init_audio"):
        about.pop(key)
    prompt, number, share = (about.pop(key) for key in ("prompt", "sample", "share"))
    again = generate(load_model(folders / "v"), [prompt], indices=[number], shares=[share], **about)
    again = again[0] * min(1, 0.99 / again.abs().max())
    wave = torch.from_numpy(soundfile.read(here / "dog-2.wav", dtype="float32")[0])
    spectra = [MelCodec().encode(w[None]).float() for w in (wave, again)]
    assert (spectra[0] - spectra[1]).abs().mean() < 3  # of 255; in another batch: rounding


def test_keep_on_the_command_line(main, here):
    soundfile.write(here / "in.wav", recording().numpy(), 16_000)
    main("dog", "--init-audio", "in.wav", "--keep", "0-3,6-10")
    about = comment(here / "dog.wav")
    assert about["keep"] == [[0, 3], [6, 10]] and about["strength"] == 1
    kept = MelCodec().encode(torch.from_numpy(soundfile.read(here / "dog.wav")[0]).float()[None])
    real = MelCodec().encode(recording()[None])
    error = (kept.float() - real.float()).abs()[0]
    assert error[:, 5:145].mean() < error[:, 155:295].mean() / 2


def test_spectrogram(main, here, capsys):
    (here / "dog.png").write_bytes(b"mine")
    main("dog", "$\\frac$ coins", "--spectrogram", "--seconds", 0.01)  # no formula
    assert names(here) == ["dog-2.png", "dog-2.wav", "dog.png", "frac_coins.png", "frac_coins.wav"]
    assert (here / "dog.png").read_bytes() == b"mine"
    image = imread(here / "dog-2.png")
    assert image.shape[0] > 200 and image.shape[1] > 500 and image.std() > 0.05
    assert "Traceback" not in capsys.readouterr().err


def test_out(main, fails, here, capsys):
    main("dog", "--out", "a/b/c")
    main("dog", "--out", "d/Woof 1.wav")
    main("dog", "--out", "d/Woof 1.wav")
    assert names(here) == ["a/b/c/dog.wav", "d/Woof 1-2.wav", "d/Woof 1.wav"]
    assert capsys.readouterr().out == "a/b/c/dog.wav\nd/Woof 1.wav\nd/Woof 1-2.wav\n"
    assert "one file for 2 sounds" in fails("dog", "rain", "--out", "x.wav")
    assert "one file for 2 sounds" in fails("dog", "-n", 2, "--out", "x.wav")


LONG = "dog " * 5000
SAFE = {
    "Dog barking": "dog_barking",
    "../../etc/passwd": "etc_passwd",
    "/dev/null": "dev_null",
    'a/b\\c:d*e?f"g<h>i|j': "a_b_c_d_e_f_g_h_i_j",
    "...": "sound",
    "": "sound",
    " \n\t": "sound",
    "🐶🎵": "sound",
    "-rf *": "rf",
    "Ein Hund – bellt über Köln": "ein_hund_bellt_über_köln",
    "犬が吠える": "犬が吠える",
    "nul\0byte": "nul_byte",
    "half of an emoji \ud83d": "half_of_an_emoji",
    LONG: "_".join(["dog"] * 15),
    "犬" * 100: "犬" * 20,
}


def test_names_of_prompts():
    assert {prompt: safe_name(prompt) for prompt in SAFE} == SAFE
    assert all(len(safe_name(p).encode()) <= 60 for p in SAFE)


@pytest.mark.parametrize(
    "given, name",
    [("-0xzrMun0Rs", "-0xzrMun0Rs"), ("_a-B_", "_a-B_"), ("sub/a b.OGG", "a_b"), ("../x", "x"),
     ("..", "sound"), (".hidden", "hidden"), ("take 1.5", "take_1.5"), ("c:\\x", "x"),
     ("n" * 300, "n" * 200), ("a/", "sound")],
)  # fmt: skip
def test_names_that_were_given(given, name):
    assert safe_name(given, given=True) == name


def test_any_prompt_is_written(main, here, capsys):
    (here / "out").mkdir()
    main(*SAFE, "--out", "out", "--steps", 1)
    assert names(here, "*.wav") == names(here) and len(names(here)) == len(SAFE)
    assert {p.removesuffix(".wav") for p in names(here / "out") if "-" not in p} == set(
        SAFE.values()
    )
    expected = [p.replace("\ud83d", "?") for p in SAFE]  # no Unicode: not to be written
    found = {c["sample"]: c["prompt"] for c in map(comment, (here / "out").iterdir())}
    assert [found[i] for i in range(len(SAFE))] == [p[:600] for p in expected]
    errors = capsys.readouterr().err.splitlines()
    assert any(line.startswith("warning: an empty prompt") for line in errors)
    cut = [line for line in errors if "more than 24 tokens are cut" in line]
    assert len(cut) == 1 and cut[0].startswith("warning: ") and len(cut[0]) < 200


def test_an_empty_prompt_is_unconditional(main, here, model):
    main("")
    assert names(here) == ["sound.wav"]
    settings = {"steps": 3, "precision": "fp32"}
    a, b = (generate(as_latents(model), [""], guidance=g, **settings) for g in (0, 9))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_names_are_free(tmp_path):
    for name in ("a.wav", "a-2.png", "b.c.wav"):
        (tmp_path / name).touch()
    paths = {}
    for name in ("a", "a", "b.c", "d", "d"):
        paths[free_path(tmp_path / f"{name}.wav", paths)] = name
    assert [p.name for p in paths] == ["a-3.wav", "a-4.wav", "b.c-2.wav", "d.wav", "d-2.wav"]


def test_another_command_takes_the_name_meanwhile(main, here, monkeypatch):
    def slow(*arguments, **settings):
        (here / "dog.wav").write_text("theirs")
        return generate(*arguments, **settings)

    monkeypatch.setattr(sample, "generate", slow)
    main("dog")
    assert names(here) == ["dog-2.wav", "dog.wav"]
    assert (here / "dog.wav").read_text() == "theirs"


# ---- files of prompts ----------------------------------------------------------------------------

PROMPT_FILES = {
    "a.txt": (
        "\ufeffA dog barks\r\n\r\n  rain  \n",
        [("a_dog_barks", "A dog barks"), ("rain",) * 2],
    ),
    "no_suffix": ('"quoted, as it is"\n', [("quoted_as_it_is", '"quoted, as it is"')]),
    "a.csv": (
        'name,caption\nDog-1,"a dog, barking"\n,"two\nlines"\n',
        [("Dog-1", "a dog, barking"), ("two_lines", "two\nlines")],
    ),
    "recordings.csv": (
        "file,labels,caption\ndogs/01.ogg,Dog,a dog\n",
        [("01", "a dog")],
    ),
    "a.jsonl": (
        '{"prompt": "rain", "name": 0}\n\n{"caption": "a\u2028dog", "name": "../x.wav"}\n'
        '{"captions": ["cat", "a cat"], "id": "7", "file": "sub/7.ogg"}\n{"prompt": ""}\n'
        '{"prompt": "\\u72ac"}\n',
        [("0", "rain"), ("x", "a\u2028dog"), ("7", "cat"), ("sound", ""), ("犬", "犬")],
    ),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files(tmp_path, name):
    text, pairs = PROMPT_FILES[name]
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == pairs


def test_audiocaps_gives_one_sound_a_clip(main, here, capsys):
    """Five captions a clip: the first is taken, and a line says so. Ids keep case and hyphens."""
    rows = ["audiocap_id,youtube_id,start_time,caption"]
    clips = {"-0xzrMun0Rs": "Birds, singing", "rqfQRErjfk8": "rain falls"}
    for i in range(5):
        rows += [f'{i},{y},30,"{c} {i}"' for y, c in clips.items()]
    (here / "test.csv").write_text("\n".join(rows))
    main("--prompts", "test.csv", "--out", "out", "--steps", 1)
    assert names(here / "out") == ["-0xzrMun0Rs.wav", "rqfQRErjfk8.wav"]
    assert comment(here / "out" / "-0xzrMun0Rs.wav")["prompt"] == "Birds, singing 0"
    expected = "warning: test.csv: 10 prompts for 2 names, the first of each is taken\n"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", b"", "no prompts in it"),
        ("a.txt", b"\n \n", "no prompts in it"),
        ("a.csv", b"caption\n", "no prompts in it"),
        ("a.txt", b"\xff\xfe\x00d", "can't be read as a list of prompts"),
        ("a.jsonl", b'{"prompt": "rain"}\n{"prompt": "do\n', "record 2"),
        ("a.jsonl", b'"rain"\n', "record 1"),
        ("a.jsonl", b'{"prompt": 3}\n', "record 1: no prompt"),
        ("a.jsonl", b'{"captions": []}\n', "record 1"),
        ("a.csv", b"text\nrain\n", "record 1: no prompt; expected one of prompt, caption"),
        ("a.csv", b"name,caption\na,rain\nb\n", "record 2: no prompt"),
        ("a.csv", b"caption,name\na dog, barking,x\n", "record 1: more fields than columns"),
        ("a.csv", b"caption\n" + b"x" * 200_000, "can't be read as a list of prompts"),
    ],
)
def test_bad_prompt_files(fails, here, name, content, expected):
    (here / name).write_bytes(content)
    message = fails("--prompts", name)
    assert name in message and expected in message


# ---- several ranks, and the script itself --------------------------------------------------------


def run_script(folder, *arguments, launcher=()):
    script = Path(sample.__file__)
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_two_ranks_write_what_one_writes(main, here, folders, monkeypatch):
    """Equal names would be a race, but for rank 0 naming all of them."""
    monkeypatch.setattr(MelCodec, "iterations", 16)  # as in the other processes
    for folder in ("one", "two"):
        (here / folder).mkdir()
        (here / folder / "dog.wav").write_text("here before")
    prompts = ["dog", "dog", "rain", "dog", "rain"]
    options = ["--steps", 2, "--batch-size", 1, "--precision", "fp32", "--model", folders / "v"]
    main(*prompts, "--out", "one", *options)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run_script(here, *prompts, "--out", "two", *options, launcher=launcher)
    assert done.returncode == 0, done.stderr
    expected = ["dog-2.wav", "dog-3.wav", "dog-4.wav", "dog.wav", "rain-2.wav", "rain.wav"]
    assert names(here / "one") == names(here / "two") == expected
    assert sorted(done.stdout.split()) == [f"two/{n}" for n in expected if n != "dog.wav"]
    for name in expected:
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes(), name


def test_paths_of_several_ranks_do_not_mix(main, here, monkeypatch):
    """Unbuffered, each write is one of its own, and another rank's may come between."""
    pieces = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=pieces.append))
    main("dog", "rain")
    assert list(filter(None, pieces)) == ["dog.wav\n", "rain.wav\n"]


def test_a_rank_takes_the_names_that_rank_0_gives(main, here, monkeypatch):
    """It may have seen rank 0's first sounds already, and would have named its own otherwise."""
    (here / "rain.wav").touch()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sample.dist, "init_process_group", lambda backend: None)

    def from_rank_0(paths):
        paths[:] = [Path("dog.wav"), Path("as rank 0 says.wav")]

    monkeypatch.setattr(sample.dist, "broadcast_object_list", from_rank_0)
    main("dog", "rain")
    assert names(here) == ["as rank 0 says.wav", "rain.wav"]


def test_the_script_fails_in_one_line(here):
    failed = run_script(here, "dog", "--model", "nowhere")
    assert failed.returncode == 1 and failed.stdout == ""
    expected = f"error: {here}/nowhere: not a model folder (no model.json); train.py makes one\n"
    assert failed.stderr == expected


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as done:
        sample.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert 'python sample.py "dog barking"' in text and "x_T ~ N(0, I)" in text
    for option in ("--prompts", "--negative", "--init-audio", "--strength", "--spectrogram"):
        assert option in text


# ---- what users get wrong ------------------------------------------------------------------------


def edit(folder, **values):
    """Change fields of model.json; None removes one."""
    about = json.loads((folder / "model.json").read_text()) | values
    about = {key: value for key, value in about.items() if value is not None}
    (folder / "model.json").write_text(json.dumps(about))


def cut(path):
    path.write_bytes(path.read_bytes()[:500])


def spoil_stats(folder, channels):
    ones = torch.ones(channels).double()
    LatentStats(ones, 2 * ones, 1).save(folder / "latent_stats.safetensors")


SPOILED = {
    "shift": (lambda f: edit(f, schedule_shift="a lot"), "model.json: damaged"),
    "no folder": (shutil.rmtree, "not a model folder"),
    "no model.json": (lambda f: (f / "model.json").unlink(), "not a model folder"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "no U-Net there"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "no U-Net there"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no diffusion_pytorch_model.safetensors"),
    "no stats": (lambda f: (f / "latent_stats.safetensors").unlink(), "latent_stats.safetensors"),
    "model.json cut": (lambda f: cut(f / "model.json"), None),
    "model.json empty": (lambda f: (f / "model.json").write_text(""), "model.json: damaged"),
    "model.json binary": (lambda f: (f / "model.json").write_bytes(b"\xff\0"), "model.json"),
    "model.json a list": (lambda f: (f / "model.json").write_text("[1]"), "model.json: damaged"),
    "config cut": (lambda f: cut(f / "unet/config.json"), "config.json"),
    "weights cut": (lambda f: cut(f / WEIGHTS), "the weights can't be read"),
    "stats cut": (lambda f: (f / "latent_stats.safetensors").write_bytes(b"x"), "latent_stats"),
    "no prediction": (lambda f: edit(f, prediction=None), "KeyError('prediction')"),
    "prediction": (lambda f: edit(f, prediction="w"), "prediction 'w'"),
    "schedule": (lambda f: edit(f, schedule="linear"), "KeyError('linear')"),
    "guidance": (lambda f: edit(f, guidance="much"), "could not convert string to float"),
    "mask": (lambda f: edit(f, mask="all"), "text mask 'all'"),
    "max_length": (lambda f: edit(f, max_length=9999), "max_length 9999"),
    "text encoder": (lambda f: edit(f, text_encoder="/nowhere/bert"), "/nowhere/bert"),
    "codec": (lambda f: edit(f, codec={"name": "mp3"}), "unknown codec 'mp3'"),
    "codec a number": (lambda f: edit(f, codec=7), "model.json: damaged"),
    "stats of others": (lambda f: spoil_stats(f, 8), "don't fit together"),
    "stats of one": (lambda f: spoil_stats(f, ()), "don't fit together"),
    "other channels": (
        lambda f: UNet(UNetConfig(8, 8, (32, 32), (False, True), 1, 4, 48, 32)).save_pretrained(
            f / "unet"
        ),
        "don't fit together",
    ),
    "other text": (
        lambda f: UNet(UNetConfig(128, 128, (32, 32), (False, True), 1, 4, 48, 40)).save_pretrained(
            f / "unet"
        ),
        "not for text states 32 wide",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_model_folders(fails, folders, here, how):
    spoil, expected = SPOILED[how]
    shutil.copytree(folders / "v", here / "model")
    if expected is None:
        (here / "model" / "model.json").write_text('{"text_encoder": "be')
    else:
        spoil(here / "model")
    message = fails("dog", "--model", "model")  # a relative name like a hub id's once "/unet" is on
    assert (expected or "model.json: damaged") in message


def test_wrong_shape_in_the_weights(fails, folders, here):
    shutil.copytree(folders / "v", here / "model")
    state = load_file(here / "model" / WEIGHTS)
    state["conv_in.weight"] = state["conv_in.weight"][:, :3].contiguous()
    save_file(state, here / "model" / WEIGHTS)
    message = fails("dog", "--model", "model")
    assert "conv_in.weight is [32, 3, 3, 3], not [32, 128, 3, 3]" in message


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--steps", 0], "0 denoising steps: expected 1 to 1000"),
        (["--steps", -3], "-3 denoising steps"),
        (["--steps", 334], "334 denoising steps would start at t = 667"),
        (["--steps", 5000], "5000 denoising steps: expected 1 to 1000"),
        (["--guidance", "nan"], "guidance nan"),
        (["--guidance", "inf"], "guidance inf"),
        (["--guidance", "-1"], "guidance -1"),
        (["--strength", 0], "strength 0"),
        (["--init-audio", "in.wav", "--keep", "3-1"], "keep 3-1: expected seconds of 0 to 10.08"),
        (["--init-audio", "in.wav", "--keep", "0-nan"], "keep 0-nan"),
        (["--strength", 1.5], "strength 1.5"),
        (["--strength", "nan"], "strength nan"),
        (["--device", "cuda"], "device cuda:0: PyTorch finds only cpu here"),
        (["--device", "toaster"], "device toaster: PyTorch finds only cpu here"),
        (["--init-audio", "nowhere.wav"], "nowhere.wav: no such file"),
        (["--init-audio", "."], "no such file"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_impossible_settings(fails, here, options, expected):
    soundfile.write(here / "in.wav", np.zeros(16_000), 16_000)
    prompt = [] if "--prompts" in options else ["dog"]
    assert expected in fails(*prompt, *options)


def test_1000_steps_are_possible(model):
    network = Recorder()
    generate(replace(as_latents(model), unet=network), ["dog"], steps=1000, sampler="ddim")
    assert [int(t) for _, t, *_ in network.calls] == list(range(1000))[::-1]


@pytest.mark.parametrize(
    "arguments",
    [[], ["dog", "--prompts", "a.txt"], ["dog", "--seconds", 0], ["dog", "--seconds", 301],
     ["dog", "--seconds", -1], ["dog", "--seconds", "nan"], ["dog", "--seconds", "1e-9"],
     ["dog", "-n", 0], ["dog", "--batch-size", 0], ["dog", "--seed", -1], ["dog", "--steps", "x"],
     ["dog", "--sampler", "euler"], ["dog", "--loudness", 3], ["dog", "--keep", "0-3"],
     ["dog", "--init-audio", "in.wav", "--keep", "0:3"], ["dog", "--to", "rain"],
     ["dog", "--steps-image", "0"], ["dog", "--steps-image", "46"], ["dog", "--steps-image", "x"],
     ["dog", "--init-audio", "in.wav", "--strength", 0.2, "--steps-image", "36"]],
)  # fmt: skip
def test_bad_command_lines(fails, arguments):
    assert ": error: " in fails(*arguments, status=2)


@pytest.mark.parametrize("content", [b"", b"no audio at all", b"RIFF\x24\0\0\0WAVEfmt "])
def test_corrupt_init_audio(fails, here, content):
    (here / "in.wav").write_bytes(content)
    assert "in.wav" in fails("dog", "--init-audio", "in.wav")


def test_few_steps_are_warned_of(main, here, capsys):
    main("dog", "--steps", 9)
    assert "9 steps begin at t = 889" in capsys.readouterr().err
    main("dog", "--steps", 10)
    assert "warning" not in capsys.readouterr().err


def test_python_users_mistakes(model):
    with pytest.raises(ValueError, match="a list of prompts"):
        generate(model, "dog")
    with pytest.raises(ValueError, match="a list of prompts"):
        generate(model, [])
    with pytest.raises(ValueError, match="as long as indices"):
        generate(model, ["dog", "rain"], indices=[3])
    with pytest.raises(ValueError, match="one of pndm, ddim, ddpm"):
        generate(model, ["dog"], sampler="euler")


def test_no_folder_to_write_to(fails, here):
    (here / "file").write_text("")
    assert "--out file: not a folder to write to" in fails("dog", "--out", "file")
    assert "--out file/sub: not a folder to write to" in fails("dog", "--out", "file/sub")
    assert "--out file: not a folder to write to" in fails("dog", "--out", "file/x.wav")


def test_read_only_folder(fails, here):
    (here / "locked").mkdir(mode=0o500)
    # Nothing is locked to root, except for what the kernel makes up.
    locked = "/proc/self" if os.geteuid() == 0 else "locked"
    assert f"--out {locked}: not a folder to write to" in fails("dog", "--out", locked)


def test_full_disk_keeps_what_is_written(main, here, capsys):
    """Stood in for by a limit on the size of files, which the second sound is above."""
    main("dog", "--seconds", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as failure:
            main("rain", "--seconds", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.code == "error: rain.wav: not written (File too large)"
    assert names(here) == ["dog.wav"]
    main("rain", "--seconds", 8)
    assert names(here) == ["dog.wav", "rain.wav"]
    assert soundfile.info(here / "rain.wav").frames == 8 * 16_000


@pytest.mark.parametrize("reason", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_keeps_what_is_written(main, here, monkeypatch, reason):
    save, saved = sample.latents.save_audio, []

    def failing(path, wave, comment):
        if len(saved) == 3:
            raise reason
        saved.append(path)
        save(path, wave, comment)

    monkeypatch.setattr(sample.latents, "save_audio", failing)
    with pytest.raises(SystemExit) as failure:
        main("a", "b", "c", "d", "e", "f", "--batch-size", 2, "--steps", 1)
    assert isinstance(failure.value.code, str)
    assert names(here) == ["a.wav", "b.wav", "c.wav"]
    assert all(soundfile.info(here / name).frames == CLIP_SAMPLES for name in names(here))


def test_a_network_that_gives_nan(fails, folders, here):
    shutil.copytree(folders / "v", here / "model")
    state = load_file(here / "model" / WEIGHTS)
    state["conv_out.bias"][:] = float("nan")
    save_file(state, here / "model" / WEIGHTS)
    assert "not written, the wave has NaN" in fails("dog", "--model", "model")
