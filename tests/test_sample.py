"""sample.py: the sounds and the names they get, on small random model folders, and bad input.

The network of a model is replaced by an oracle where the answer has to be known. Griffin-Lim runs
two rounds instead of 16: how well a codec decodes is for test_latents.py to say.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import save_model
from safetensors.torch import save_file
from torch import nn

import diffusion
import sample
from latents import CLIP_SAMPLES, LatentStats, MelCodec, load_audio, to_grid
from sample import generate, load_model, noise_generators
from unet import UNet

CHANNELS = MelCodec.channels
MEAN, STD = torch.linspace(-30, -60, CHANNELS).double(), torch.linspace(8, 4, CHANNELS).double()
pytestmark = pytest.mark.usefixtures("quick_sounds")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random model folders that predict v, ε and x_0, with a text encoder that knows letters."""
    root = tmp_path_factory.mktemp("folders")
    save_model(root / "v")
    LatentStats(MEAN, STD, 1).save(root / "v/latent_stats.safetensors")
    unet = UNet.from_pretrained(root / "v/unet")
    for name, p in unet.named_parameters():
        if "attn2.to_out" in name:
            p.data *= 20  # what a random network makes of its text is next to nothing
    unet.save_pretrained(root / "v/unet")
    for prediction in ("eps", "x0"):
        shutil.copytree(root / "v", root / prediction)
        edit(root / prediction, prediction=prediction)
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
def main(folders, here):
    """The command, in this process, with the model of v and three steps unless told otherwise."""

    def run(*arguments):
        sample.main(["--model", str(folders / "v"), "--steps", "3", *map(str, arguments)])

    return run


@pytest.fixture
def fails(main):
    """The one line of a command that must fail."""

    def run(*arguments):
        with pytest.raises(SystemExit) as failure:
            main(*arguments)
        message = failure.value.code  # Python prints a text to stderr, and the status is 1
        assert message.startswith("error: ") and len(message.splitlines()) == 1
        return message

    return run


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def comment(path):
    with soundfile.SoundFile(path) as file:
        return json.loads(file.comment)


def edit(folder, **values):
    """Change fields of model.json."""
    about = json.loads((folder / "model.json").read_text()) | values
    (folder / "model.json").write_text(json.dumps(about))


def recording():
    t = torch.arange(CLIP_SAMPLES) / 16_000
    return 0.3 * torch.sin(2 * torch.pi * 440 * t) * (t % 1 < 0.5)


class Recorder(nn.Module):
    """A network that keeps what it is called with, and predicts nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, text, mask):
        self.calls.append((x_t.clone(), t, text))
        return torch.zeros_like(x_t)


class Oracle(nn.Module):
    """A network that knows x_0 [B, C, 24, 21], and so the ε (or v) in any x_t. It is wrong by ±1
    without and by ±1·(s − 1)/s with the prompt, which guidance of scale s cancels, if it is right.
    """

    def __init__(self, x_0, model, scale):
        super().__init__()
        self.x_0, self.model, self.scale = x_0, model, scale

    def forward(self, x_t, t, text, mask):
        a, x_0 = self.model.alphas_cumprod[t].item(), torch.cat([self.x_0, self.x_0])
        eps = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5
        wrong = torch.linspace(-1, 1, CHANNELS).view(-1, 1, 1).expand_as(self.x_0)
        eps = eps + torch.cat([wrong, wrong * (self.scale - 1) / self.scale])
        if self.model.prediction == "eps":
            return eps
        x_0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
        return x_0 if self.model.prediction == "x0" else a**0.5 * eps - (1 - a) ** 0.5 * x_0


# ---- what is heard -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, prediction, schedule",
    [("pndm", "eps", "cosine"), ("pndm", "x0", "scaled-linear"), ("ddim", "v", "cosine"),
     ("ddim", "x0", "cosine"), ("ddpm", "eps", "scaled-linear"), ("ddpm", "v", "cosine")],
)  # fmt: skip
def test_a_perfect_network_is_heard_exactly(folders, tmp_path, sampler, prediction, schedule):
    """Prediction, schedule and statistics are the folder's; guidance uses both halves, rightly."""
    shutil.copytree(folders / prediction, tmp_path / "model")
    expected = diffusion.cosine_alphas_cumprod()
    if schedule == "scaled-linear":
        edit(tmp_path / "model", schedule=schedule, schedule_shift=0.2)
        expected = diffusion.shifted(diffusion.scaled_linear_alphas_cumprod(), 0.2)
    model = load_model(tmp_path / "model")
    torch.testing.assert_close(model.alphas_cumprod, expected, atol=0, rtol=1e-12)

    x_0 = torch.randn(2, CHANNELS, 24, 21, generator=torch.Generator().manual_seed(3))
    model.unet, model.codec.decode = Oracle(x_0, model, scale=4.0), lambda z: z
    settings = {"steps": 20, "sampler": sampler, "guidance": 4.0, "precision": "fp32"}
    z = generate(model, ["dog", "rain"], seed=7, **settings)
    if sampler != "ddpm":  # these end at √ᾱ_0·x_0 + √(1−ᾱ_0)·ε
        noise = diffusion.randn_like(x_0, noise_generators(7, [0, 1]))
        t = diffusion.timestep_sequence(1000, 20)[0]
        eps = (noise - expected[t].sqrt() * x_0) / (1 - expected[t]).sqrt()
        x_0 = expected[0].sqrt() * x_0 + (1 - expected[0]).sqrt() * eps
    x = (to_grid(z.double()) - MEAN[:, None, None]) / STD[:, None, None]  # by hand, not by stats
    torch.testing.assert_close(x, x_0.double(), atol=1e-3, rtol=0)


def test_what_the_network_is_called_with(model):
    """PNDM's 46 calls; first half without, second with the prompt, in order."""
    network, prompts = Recorder(), ["dog", "rain", "a bell"]
    generate(replace(model, unet=network), prompts, negative="loud", seed=1)
    t = [int(t) for _, t, _ in network.calls]
    assert len(t) == 46 and t[:4] == [969, 947, 947, 925] and t[-1] == 1
    x_t, _, text = network.calls[0]
    assert x_t.shape == (6, CHANNELS, 24, 21) and torch.equal(x_t[:3], x_t[3:])
    assert torch.equal(text, model.encoder(["loud"] * 3 + prompts)[0])


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_weights_are_cast_to_bf16_once(model, monkeypatch, precision, dtype):
    """At every step anew it would take twice as long at full width. The model's own stay."""
    monkeypatch.setattr(sample.latents, "pick_precision", lambda name, device: name)

    class Network(nn.Linear):
        def forward(self, x_t, t, text, mask):
            seen.append(self.weight)
            assert self.bias.dtype == torch.float32  # as are those of the norms
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            return torch.zeros_like(x_t)

    seen, network = [], Network(3, 3)
    settings = {"steps": 3, "precision": precision, "batch_size": 1}
    generate(replace(model, unet=network), ["dog", "rain"], **settings)
    assert len(seen) == 8 and len(set(map(id, seen))) == 1 and seen[0].dtype == dtype
    assert network.weight.dtype == torch.float32


def test_noise_depends_on_seed_and_number_alone(model):
    def noise(prompts, **settings):
        network = Recorder()
        generate(replace(model, unet=network), prompts, steps=1, decode=False, **settings)
        return torch.cat([x[: len(x) // 2] for x, *_ in network.calls[::2]])

    first = noise(["dog", "rain", "a bell", "wind", "cat"], seed=5)
    for batch_size in (1, 2, 5):
        others = noise(["a", "b", "c", "d", "e"], seed=5, batch_size=batch_size)
        assert torch.equal(others, first)
    assert torch.equal(noise(["x"], seed=5, indices=[3])[0], first[3])
    assert abs(first.std() - 1) < 0.01 and abs(first.mean()) < 0.01
    flat = torch.cat([first, noise(["dog"], seed=6)]).flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(6)).abs().max() < 0.03  # independent of one another


def test_same_sound_in_any_batch(model):
    """Up to rounding, since matrix kernels depend on the shape; in an equal batch to the bit."""
    prompts = ["dog", "rain", "a bell"]
    settings = {"seed": 1, "steps": 4, "sampler": "ddpm", "precision": "fp32", "decode": False}
    together = generate(model, prompts, **settings)
    assert torch.equal(together, generate(model, prompts, **settings))
    company = generate(model, ["wind", "rain", "a very loud noise"], **settings)
    assert torch.equal(company[1], together[1]) and not torch.equal(company[2], together[2])
    for batch_size in (1, 2):
        apart = generate(model, prompts, batch_size=batch_size, **settings)
        torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)


def test_every_setting_changes_the_sound(model):
    def latent(prompt="dog", **settings):
        settings = {"steps": 4, "precision": "fp32", "decode": False} | settings
        return generate(model, [prompt], **settings)

    sounds = [latent(), latent("rain"), latent(seed=1), latent(indices=[1]), latent(guidance=3.0)]
    sounds += [latent(steps=5), latent(negative="rain"), latent(sampler="ddim")]
    sounds += [latent(sampler="ddpm"), latent(init_audio=recording())]
    for i, a in enumerate(sounds):
        for b in sounds[:i]:
            assert (a - b).abs().max() > 1e-4


def test_a_folder_says_its_guidance_and_steps(folders, here):
    old = load_model(folders / "v")
    assert (old.guidance, old.steps) == (6.5, 45)
    shutil.copytree(folders / "v", here / "model")
    edit(here / "model", guidance=3.0, denoising_steps=4)
    sample.main(["dog", "--model", "model"])
    sample.main(["dog", "--model", "model", "--guidance", "2", "--steps", "5"])
    found = [comment(here / name) for name in ("dog.wav", "dog-2.wav")]
    assert [(about["guidance"], about["steps"]) for about in found] == [(3, 4), (2, 5)]


def test_a_folder_brings_its_text_encoder_and_its_words(folders, here, model):
    """And works where it was moved to."""
    shutil.copytree(folders / "v", here / "moved/model")
    shutil.copytree(folders / "bert", here / "moved/model/text_encoder")
    edit(here / "moved/model", text_encoder="text_encoder")
    settings = {"steps": 2, "precision": "fp32", "decode": False}
    plain = generate(model, ["a <dog>"], **settings)
    assert torch.equal(generate(load_model("moved/model"), ["a <dog>"], **settings), plain)
    save_file({"<dog>": torch.ones(32)}, here / "moved/model/words.safetensors")
    moved = load_model("moved/model")
    assert not torch.equal(generate(moved, ["a <dog>"], **settings), plain)
    assert torch.equal(*(generate(m, ["a cat"], **settings) for m in (moved, model)))


# ---- image-to-image ------------------------------------------------------------------------------


def test_strength_leads_away_from_the_recording(model):
    settings = {"guidance": 1.0, "precision": "fp32", "steps": 20, "decode": False}

    def distance(strength):
        given = generate(model, ["dog"], init_audio=recording(), strength=strength, **settings)
        return (given - model.latent(recording())).std()

    assert distance(0.05) < 0.15 and distance(0.05) < distance(0.4) < distance(0.95) > 1
    pure = generate(model, ["dog"], init_audio=recording(), strength=1.0, **settings)
    assert torch.equal(pure, generate(model, ["dog"], **settings))


@pytest.mark.parametrize("strength, first", [(0.2, [177, 155, 155, 133]), (1e-6, [1, 0])])
def test_steps_that_are_left(model, strength, first):
    network = Recorder()
    settings = {"init_audio": recording()[:8000], "strength": strength, "steps": 45}
    generate(replace(model, unet=network), ["dog", "rain"], **settings)
    assert [int(t) for _, t, _ in network.calls[:4]] == first
    assert not torch.equal(network.calls[0][0][0], network.calls[0][0][1])  # own noise each


# ---- files ---------------------------------------------------------------------------------------


def test_the_plain_command(main, here, capsys):
    main("dog barking")
    info = soundfile.info(here / "dog_barking.wav")
    assert (info.frames, info.samplerate, info.channels) == (161_280, 16_000, 1)
    assert (info.format, info.subtype) == ("WAV", "PCM_16")
    first = (here / "dog_barking.wav").read_bytes()
    main("dog barking")
    main("Dog, barking!", "--seed", 1)
    main("dog", "--out", "a/b/c")
    main("dog", "--out", "d/Woof 1.wav", "-n", 2)
    paths = ["dog_barking.wav", "dog_barking-2.wav", "dog_barking-3.wav", "a/b/c/dog.wav"]
    paths += ["d/Woof 1.wav", "d/Woof 1-2.wav"]
    assert names(here) == sorted(paths) and capsys.readouterr().out.splitlines() == paths
    assert (here / paths[0]).read_bytes() == first  # never overwritten,
    assert (here / paths[1]).read_bytes() == first  # and made again bit for bit
    assert (here / paths[2]).read_bytes() != first


def test_comment_is_enough_to_make_a_sound_again(main, here, folders):
    soundfile.write(here / "in.flac", np.random.default_rng(0).uniform(-0.5, 0.5, (9000, 2)), 8000)
    prompt, options = "Rain, on a “tin” roof 🐱", ["--seed", 3, "--guidance", 2.5]
    options += ["--sampler", "ddim", "--negative", "wind: ü🐶", "--precision", "fp32"]
    options += ["--init-audio", "in.flac", "--strength", 0.6, "--out", "out"]
    main(prompt, "dog", "-n", 2, "--batch-size", 1, *options)
    expected = ["dog-2.wav", "dog.wav", "rain_on_a_tin_roof-2.wav", "rain_on_a_tin_roof.wav"]
    assert names(here / "out") == expected
    assert len({(here / "out" / name).read_bytes() for name in expected}) == 4
    about = comment(here / "out" / expected[2])
    assert about.pop("model").endswith("/v") and about.pop("init_audio") == "in.flac"
    assert (about.pop("prompt"), about.pop("sample")) == (prompt, 1)
    assert about == {"seed": 3, "steps": 3, "guidance": 2.5, "sampler": "ddim", "strength": 0.6,
                     "negative": "wind: ü🐶", "precision": "fp32"}  # fmt: skip
    about["init_audio"] = load_audio(here / "in.flac")
    again = generate(load_model(folders / "v"), [prompt], indices=[1], **about)[0]
    again = again * min(1, 0.99 / again.abs().max())
    wave = torch.from_numpy(soundfile.read(here / "out" / expected[2], dtype="float32")[0])
    torch.testing.assert_close(wave, again, atol=5e-5, rtol=0)  # 16 bits


def test_any_prompt_is_written(main, here):
    prompts = ["../../etc/passwd", "/dev/null", "", " \n", "犬が吠える", "nul\0byte", "dog " * 5000]
    prompts += ["half of an emoji \ud83d"]
    main(*prompts, "--out", "out", "--steps", 1)
    assert len(names(here)) == len(prompts) == len(names(here / "out"))
    assert {"etc_passwd.wav", "sound.wav", "sound-2.wav", "犬が吠える.wav"} < {*names(here / "out")}
    assert comment(here / "out/half_of_an_emoji.wav")["prompt"] == "half of an emoji ?"


def test_another_command_takes_the_name_meanwhile(here, folders):
    def slow(*arguments, **settings):
        (here / "dog.wav").write_text("theirs")
        return generate(*arguments, **settings)

    args = ["dog", "--model", str(folders / "v"), "--steps", "1"]
    list(sample.run(sample.make_parser("").parse_args(args), slow))
    assert names(here) == ["dog-2.wav", "dog.wav"]
    assert (here / "dog.wav").read_text() == "theirs"


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.txt", "\ufeffA dog barks\r\n\r\n  rain  \n",
         {"a_dog_barks": "A dog barks", "rain": "rain"}),
        ("a.csv", 'youtube_id,caption\n-0xY,"A, b"\n-0xY,c\nb,rain\n',
         {"-0xY": "A, b", "b": "rain"}),  # as AudioCaps: of several the first
        ("a.jsonl", '{"id": "7", "captions": ["cat", "a cat"]}\n', {"7": "cat"}),
    ],
)  # fmt: skip
def test_files_of_prompts(main, here, name, text, expected):
    (here / name).write_bytes(text.encode())
    main("--prompts", name, "--out", "out", "--steps", 1)
    found = {Path(p).stem: comment(here / "out" / p)["prompt"] for p in names(here / "out")}
    assert found == expected


# ---- several ranks, and the script itself --------------------------------------------------------


def run_script(folder, *arguments, launcher=()):
    command = [sys.executable, *launcher, sample.__file__, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_two_ranks_write_what_one_writes(main, here, folders, monkeypatch):
    """Equal names would be a race, but for rank 0 naming all of them."""
    monkeypatch.setattr(MelCodec, "iterations", 16)  # as in the other processes
    for folder in ("one", "two"):
        (here / folder).mkdir()
        (here / folder / "dog.wav").write_text("here before")
    options = ["dog", "dog", "rain", "dog", "--model", folders / "v", "--steps", 2]
    options += ["--batch-size", 1, "--precision", "fp32"]
    main(*options, "--out", "one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run_script(here, *options, "--out", "two", launcher=launcher)
    assert done.returncode == 0, done.stderr
    expected = ["dog-2.wav", "dog-3.wav", "dog-4.wav", "dog.wav", "rain.wav"]
    assert names(here / "one") == names(here / "two") == expected
    for name in expected:
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes(), name


def test_the_script_fails_in_one_line(here):
    failed = run_script(here, "dog", "--model", "nowhere")
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert f"{here}/nowhere/model.json" in failed.stderr


# ---- what users get wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        (["dog", "--steps", 0], "0 denoising steps: expected 1 to 1000"),
        (["dog", "--steps", 334], "334 denoising steps would start at t = 667"),
        (["dog", "--guidance", "nan"], "not written, no wave"),
        (["dog", "--init-audio", "nowhere.wav"], "nowhere.wav: no such file"),
        (["dog", "--out", "empty.txt"], "empty.txt"),  # a file, no folder
        (["dog", "--model", "damaged"], "model.json: damaged"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "empty.txt"], "no prompts in it"),
    ],
)
def test_impossible_settings(fails, here, options, expected):
    (here / "empty.txt").touch()
    (here / "damaged").mkdir()
    (here / "damaged/model.json").write_text('{"text_encoder": "be')
    assert expected in fails(*options)


@pytest.mark.parametrize(
    "arguments",
    [[], ["dog", "--prompts", "a.txt"], ["dog", "--steps", "x"], ["dog", "--sampler", "euler"]],
)
def test_bad_command_lines(main, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(*arguments)


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
    assert "No space left" in failure.value.code or "interrupted" in failure.value.code
    assert names(here) == ["a.wav", "b.wav", "c.wav"]
