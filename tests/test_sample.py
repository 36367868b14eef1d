"""sample.py: the sounds and the names they get, on small random model folders, and bad input.

The network of a model is replaced by an oracle where the answer has to be known. Griffin-Lim runs
two rounds instead of 16: how well a codec decodes is for test_latents.py to say.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from torch import nn

import diffusion
import sample
from benchmarks.gpu import plain_graph
from latents import CLIP_SAMPLES, LatentStats, MelCodec, load_audio, to_grid
from sample import generate, load_model, noise_generators
from tests.conftest import save_model
from unet import UNet

CHANNELS = MelCodec.channels
MEAN, STD = torch.linspace(-30, -60, CHANNELS).double(), torch.linspace(8, 4, CHANNELS).double()
QUICK = {"steps": 3, "precision": "fp32", "decode": False}
pytestmark = pytest.mark.usefixtures("quick_sounds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model folder that predicts v, with a text encoder that knows letters beside it."""
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model(folder)
    LatentStats(MEAN, STD, 1).save(folder / "latent_stats.safetensors")
    unet = UNet.from_pretrained(folder / "unet")
    for name, p in unet.named_parameters():
        if "attn2.to_out" in name:
            p.data *= 20  # what a random network makes of its text is next to nothing
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def main(folder, here):
    """The command, in this process, with three steps unless told otherwise."""

    def run(*arguments):
        sample.main(["--model", str(folder), "--steps", "3", *map(str, arguments)])

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

    calls = ()

    def forward(self, x_t, t, text, mask):
        self.calls += ((x_t.clone(), int(t), text),)
        return torch.zeros_like(x_t)


class Oracle(nn.Module):
    """A network that knows x_0 [B, C, 24, 21], and so the ε (or v) in any x_t. It is wrong by ±1
    without and by ±3/4 with the prompt, which guidance of scale 4 cancels, if it is right."""

    def __init__(self, x_0, model):
        super().__init__()
        self.x_0, self.model = x_0, model

    def forward(self, x_t, t, text, mask):
        a, x_0 = self.model.alphas_cumprod[t].item(), torch.cat([self.x_0, self.x_0])
        wrong = torch.linspace(-1, 1, CHANNELS).view(-1, 1, 1).expand_as(self.x_0)
        eps = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5 + torch.cat([wrong, 0.75 * wrong])
        x_0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
        return {"eps": eps, "x0": x_0, "v": a**0.5 * eps - (1 - a) ** 0.5 * x_0}[
            self.model.prediction
        ]


@pytest.mark.parametrize(
    "sampler, prediction, schedule",
    [("pndm", "eps", "cosine"), ("ddim", "v", "cosine"), ("ddpm", "x0", "scaled-linear")],
)
def test_a_perfect_network_is_heard_exactly(folder, tmp_path, sampler, prediction, schedule):
    """Prediction, schedule and statistics are the folder's; guidance uses both halves, rightly."""
    shutil.copytree(folder, tmp_path / "model")
    edit(tmp_path / "model", prediction=prediction)
    expected = diffusion.cosine_alphas_cumprod()
    if schedule == "scaled-linear":
        edit(tmp_path / "model", schedule=schedule, schedule_shift=0.2)
        expected = diffusion.shifted(diffusion.scaled_linear_alphas_cumprod(), 0.2)
    model = load_model(tmp_path / "model")
    torch.testing.assert_close(model.alphas_cumprod, expected, atol=0, rtol=1e-12)

    x_0 = torch.randn(2, CHANNELS, 24, 21, generator=torch.Generator().manual_seed(3))
    model.unet, model.codec.decode = Oracle(x_0, model), lambda z: z
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
    t = [t for _, t, _ in network.calls]
    assert len(t) == 46 and t[:4] == [969, 947, 947, 925] and t[-1] == 1
    x_t, _, text = network.calls[0]
    assert x_t.shape == (6, CHANNELS, 24, 21) and torch.equal(x_t[:3], x_t[3:])
    assert torch.equal(text, model.encoder(["loud"] * 3 + prompts)[0])


def test_guidance_at_high_noise_only(model):
    """Below, each call is for half as many latents, with the prompts."""
    network, prompts = Recorder(), ["dog", "rain", "a bell"]
    generate(replace(model, unet=network, guidance_above=500), prompts, steps=20)
    sizes = {t: len(x_t) for x_t, t, _ in network.calls}
    assert sizes == {t: 6 if t > 500 else 3 for t in range(951, 0, -50)}
    assert torch.equal(network.calls[-1][2], model.encoder(prompts)[0])
    half = replace(model, guidance_above=500)  # without guidance, no prompt is heard at any t
    one, other = (generate(half, [x], **QUICK, guidance=0.0) for x in ("dog", "rain"))
    assert torch.equal(one, other)


def test_rows_that_shift_leave_no_seams(folder, tmp_path):
    """A network that marks the first frame of each row marks every frame alike, on average over t;
    what it does frame by frame stays in its place. model.json decides."""

    class Marks(nn.Module):
        def forward(self, x_t, t, *text):
            return x_t + (torch.arange(21) == 0)

    model = load_model(folder)
    rows, x = sample.ShiftedRows(Marks(), model.codec), torch.randn(2, CHANNELS, 24, 21)
    marks = torch.stack([rows(x, t) - x for t in range(1000)]).mean(0)
    assert marks.mean().sub(1 / 21).abs() < 1e-6 and marks.std() < 0.01
    assert torch.equal(rows(x, torch.tensor([7])), rows(x, 7))  # as CUDA graphs give t

    shutil.copytree(folder, tmp_path / "model")
    edit(tmp_path / "model", shifted_rows=False)
    plain = load_model(tmp_path / "model")
    assert isinstance(model.unet, sample.ShiftedRows) and isinstance(plain.unet, UNet)
    assert not torch.equal(*(generate(m, ["dog"], **QUICK) for m in (model, plain)))


def test_bf16_is_close_to_fp32(model):
    a, b = (generate(model, ["dog"], **QUICK | {"precision": x}) for x in ("bf16", "fp32"))
    assert 0 < (a - b).norm() < 0.1 * b.norm()
    assert all(p.dtype == torch.float32 for p in model.unet.parameters())  # the model's own stay


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
@pytest.mark.parametrize("masked, precision", [(True, "fp32"), (False, "bf16")])
def test_a_graph_changes_nothing(folder, monkeypatch, sampler, masked, precision):
    """A batch of two and one of one are two graphs, which later calls find again. Each is made of
    one call's operations: nothing that Python does in a call may matter, nor a number be read."""
    model, made = load_model(folder), []
    model.encoder.mask = "cross-attention" if masked else "none"

    def graph(network, inputs):
        made.append([x.shape[0] for x in inputs])
        return plain_graph(network, inputs)

    settings = {"sampler": sampler, "precision": precision, "steps": 10, "decode": False}
    settings |= {"batch_size": 2}
    expected = generate(model, ["dog", "cat", "owl"], **settings)
    monkeypatch.setitem(sample.GRAPHS, "cpu", graph)
    for _ in range(2):
        assert torch.equal(generate(model, ["dog", "cat", "owl"], **settings), expected)
    assert made == ([[4, 1, 4, 4], [2, 1, 2, 2]] if masked else [[4, 1, 4], [2, 1, 2]])
    assert replace(model, steps=3).graphs == {}  # of another network, perhaps


def test_without_a_graph(model, monkeypatch):
    """A driver that can't make one costs a line and time."""

    def fails(*_):
        raise RuntimeError("CUDA error: operation not permitted")

    expected, streams = generate(model, ["dog"], **QUICK), []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fails)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setitem(sample.GRAPHS, "cpu", sample.capture)
    with pytest.warns(UserWarning, match="no CUDA graph, so it takes longer: CUDA error"):
        sounds = generate(replace(model), ["dog"], **QUICK)
    assert torch.equal(sounds, expected) and streams == ["the stream before"]


def test_weights_in_bf16_alone(folder):
    """As on CUDA: the network takes float32 and t as a tensor, without autocast. And what was
    loaded in bf16 can't be had in float32 again."""
    model = load_model(folder)
    x, text = torch.randn(2, CHANNELS, 24, 21), torch.randn(2, 5, 32)
    t, mask = torch.tensor([500]), torch.arange(5).expand(2, 5) < 3
    with torch.no_grad():
        expected = model.unet(x, 500, text, mask)
        got = model.unet.bfloat16()(x, t, text, mask)
    assert got.dtype == torch.bfloat16 and (got - expected).norm() < 2e-2 * expected.norm()
    with pytest.raises(ValueError, match="load the model with precision"):
        generate(model, ["dog"], precision="fp32")


def test_noise_depends_on_seed_and_number_alone(model):
    def noise(prompts, **settings):
        network = Recorder()
        generate(replace(model, unet=network), prompts, **QUICK, **settings)
        return torch.cat([x[: len(x) // 2] for x, t, _ in network.calls if t == 667])

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
    settings = QUICK | {"seed": 1, "sampler": "ddpm"}
    together = generate(model, ["dog", "rain", "a bell"], **settings)
    company = generate(model, ["wind", "rain", "a very loud noise"], **settings)
    assert torch.equal(company[1], together[1]) and not torch.equal(company[2], together[2])
    apart = generate(model, ["dog", "rain", "a bell"], batch_size=1, **settings)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)


def test_every_setting_changes_the_sound(model):
    changes = [{}, {"seed": 1}, {"indices": [1]}, {"guidance": 3.0}, {"steps": 4}]
    changes += [{"negative": "rain"}, {"sampler": "ddim"}, {"sampler": "ddpm"}]
    changes += [{"init_audio": recording()}, {"init_audio": recording(), "strength": 0.4}]
    sounds = [generate(model, ["dog"], **QUICK | change) for change in changes]
    sounds.append(generate(model, ["rain"], **QUICK))
    for i, a in enumerate(sounds):
        assert all((a - b).abs().max() > 1e-4 for b in sounds[:i]), i


def test_a_folder_brings_its_text_encoder_and_its_words(folder, here, model):
    """And works where it was moved to."""
    shutil.copytree(folder, here / "moved/model")
    shutil.copytree(folder.parent / "bert", here / "moved/model/text_encoder")
    edit(here / "moved/model", text_encoder="text_encoder")
    plain = generate(model, ["a <dog>"], **QUICK)
    assert torch.equal(generate(load_model("moved/model"), ["a <dog>"], **QUICK), plain)
    save_file({"<dog>": torch.ones(32)}, here / "moved/model/words.safetensors")
    moved = load_model("moved/model")
    assert not torch.equal(generate(moved, ["a <dog>"], **QUICK), plain)
    assert torch.equal(*(generate(m, ["a cat"], **QUICK) for m in (moved, model)))


def test_strength_leads_away_from_the_recording(model):
    settings = QUICK | {"guidance": 1.0, "steps": 20, "init_audio": recording()}

    def distance(strength):
        given = generate(model, ["dog"], strength=strength, **settings)
        return (given - model.latent(recording())).std()

    assert distance(0.05) < 0.15 and distance(0.05) < distance(0.4) < distance(0.95) > 1
    pure = generate(model, ["dog"], strength=1.0, **settings | {"steps": 3})
    assert torch.equal(pure, generate(model, ["dog"], **QUICK, guidance=1.0))


def test_the_plain_command(main, here, capsys):
    main("dog barking")
    info = soundfile.info(here / "dog_barking.wav")
    assert (info.frames, info.samplerate, info.channels) == (161_280, 16_000, 1)
    assert (info.format, info.subtype) == ("WAV", "PCM_16")
    first = (here / "dog_barking.wav").read_bytes()
    main("dog barking")
    main("Dog, barking!", "--seed", 1)
    main("dog", "--out", "d/Woof 1.wav", "-n", 2)
    paths = ["dog_barking.wav", "dog_barking-2.wav", "dog_barking-3.wav"]
    paths += ["d/Woof 1.wav", "d/Woof 1-2.wav"]
    assert names(here) == sorted(paths) and capsys.readouterr().out.splitlines() == paths
    assert (here / paths[0]).read_bytes() == first  # never overwritten,
    assert (here / paths[1]).read_bytes() == first  # and made again bit for bit
    assert (here / paths[2]).read_bytes() != first


def test_comment_is_enough_to_make_a_sound_again(main, here, model):
    soundfile.write(here / "in.flac", np.random.default_rng(0).uniform(-0.5, 0.5, (9000, 2)), 8000)
    prompt, options = "Rain, on a “tin” roof 🐱", ["--seed", 3, "--guidance", 2.5]
    options += ["--sampler", "ddim", "--negative", "wind: ü🐶", "--precision", "fp32"]
    options += ["--init-audio", "in.flac", "--strength", 0.6, "--out", "out"]
    main(prompt, "-n", 2, "--batch-size", 1, *options)
    path = here / "out/rain_on_a_tin_roof-2.wav"
    about = comment(path)
    assert about.pop("model").endswith("/model") and about.pop("init_audio") == "in.flac"
    assert (about.pop("prompt"), about.pop("sample")) == (prompt, 1)
    assert about == {"seed": 3, "steps": 3, "guidance": 2.5, "sampler": "ddim", "strength": 0.6,
                     "negative": "wind: ü🐶", "precision": "fp32"}  # fmt: skip
    about["init_audio"] = load_audio(here / "in.flac")
    again = generate(model, [prompt], indices=[1], **about)[0]
    again = again * min(1, 0.99 / again.abs().max())
    wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    torch.testing.assert_close(wave, again, atol=5e-5, rtol=0)  # 16 bits


def test_files_of_prompts(main, here):
    for name, text, expected in (
        ("a.txt", "\ufeffA dog\r\n\r\n  rain  \n", {"a_dog": "A dog", "rain": "rain"}),
        ("a.csv", 'youtube_id,caption\n-0xY,"A, b"\n-0xY,c\nb,d\n', {"-0xY": "A, b", "b": "d"}),
        ("a.jsonl", '{"id": "7", "captions": ["cat", "a cat"]}\n', {"7": "cat"}),
    ):  # of several captions the first
        (here / name).write_bytes(text.encode())
        main("--prompts", name, "--out", f"out/{name}", "--steps", 1)
        paths = (here / "out" / name).iterdir()
        assert {path.stem: comment(path)["prompt"] for path in paths} == expected


def test_two_ranks_write_what_one_writes(main, here, folder, monkeypatch):
    """Equal names would be a race, but for rank 0 naming all of them."""
    monkeypatch.setattr(MelCodec, "iterations", 16)  # as in the other processes
    for out in ("one", "two"):
        (here / out).mkdir()
        (here / out / "dog.wav").write_text("here before")
    options = ["dog", "dog", "rain", "--model", folder, "--steps", 2, "--precision", "fp32"]
    options += ["--batch-size", 1]
    main(*options, "--out", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [sample.__file__, *options, "--out", "two"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = ["dog-2.wav", "dog-3.wav", "dog.wav", "rain.wav"]
    assert names(here / "one") == names(here / "two") == expected
    for name in expected:
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes(), name


@pytest.mark.parametrize(
    "options, expected",
    [("dog --steps 170", "170 denoising steps would start at"), ("dog --steps 0", None),
     ("dog --out empty.txt", "empty.txt"),
     ("dog --init-audio nowhere.wav", "nowhere.wav: no such file"),
     ("dog --model nowhere", "nowhere/model.json"), ("dog --model damaged", "model.json: damaged"),
     ("--prompts empty.txt", "has no rows"), ("dog --prompts a.txt", None),
     ("dog --sampler euler", None)],
)  # fmt: skip
def test_mistakes_get_one_line(main, here, options, expected):
    (here / "empty.txt").touch()
    (here / "damaged").mkdir()
    (here / "damaged/model.json").write_text('{"text_encoder": "be')
    with pytest.raises(SystemExit) as failure:
        main(*options.split())
    line = failure.value.code  # Python prints a text to stderr, and the status is 1
    if expected is None:
        assert line == 2  # argparse's
    else:
        assert line.startswith("error: ") and len(line.splitlines()) == 1 and expected in line
