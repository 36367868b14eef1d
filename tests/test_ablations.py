"""appendix/ablations.py on small random models: what each arm changes, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from appendix import ablations
from appendix.ablations import ABLATIONS, ARMS, Codes, configure, parse_args
from diffusion import cosine_alphas_cumprod, scaled_linear_alphas_cumprod
from evaluate import Cnn14
from latents import LatentStats, MelCodec, to_grid, to_sequence
from sample import generate, load_model
from train import Denoiser
from unet import TransformerBlock, UNet, UNetConfig

ROOT = Path(ablations.__file__).parent.parent
CPU = torch.device("cpu")
EVERY_PAIR = [(name, ABLATIONS[name]) for name in ABLATIONS if name not in ablations.UNTRAINED]
pytestmark = pytest.mark.usefixtures("quick_sounds")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, tmp_path):
    """A picture and codebooks of sizes for tests; and no embedded classifier, if there is one."""
    monkeypatch.setattr(ablations, "PICTURE_WIDTHS", (32, 32, 32, 32))
    monkeypatch.setattr(ablations, "ENTRIES", 16)
    monkeypatch.setattr(ablations.evaluate, "CLASSIFIER", tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def begun(small, tmp_path_factory):
    """A model folder, and the data set that it is for."""
    folder = tmp_path_factory.mktemp("ablations") / "model"
    folder.mkdir()
    task = Denoiser(train.parse_args(small), CPU)
    task.write(task.network, folder)
    return SimpleNamespace(model=folder, data=task.c.data)


@pytest.fixture
def command(begun, tmp_path):
    """The arguments of an ablation of two steps, in tmp_path / "out"."""

    def command(name, *more):
        shared = ["--model", begun.model, "--data", begun.data, "--val-data", begun.data]
        shared += ["--out", tmp_path / "out", "--batch-size", 8, "--precision", "fp32"]
        shared += [] if name in ablations.UNTRAINED else ["--steps", 2]
        return [*map(str, [name, *shared, "--device", "cpu", *more])]

    return command


@pytest.fixture
def begin(command):
    """What an arm trains, as it begins."""

    def begin(name, steps=2):
        c = configure(name, ARMS[name], 0, parse_args(command("mask", "--steps", steps)))
        return ARMS[name].kind(c, CPU)

    return begin


def learn(task):
    """A step, on two clips."""
    optimizer = torch.optim.AdamW(task.network.parameters(), 1e-3)
    batch = task.batch(0, range(2), task.choose(0, 2))
    train.train_step(task, task.network, task.network, optimizer, [batch])


# ---- what the arms share -------------------------------------------------------------------------


@pytest.mark.parametrize("ablation, names", EVERY_PAIR)
def test_arms_share_clips_noise_and_start(ablation, names, begin, begun):
    one, other = map(begin, names)
    clips = one.choose(3, 2)
    assert (other.choose(3, 2) == clips).all()
    (captions, stored, t, noise), theirs = (x.batch(3, range(2), clips) for x in (one, other))
    assert torch.equal(theirs[1], stored) and torch.equal(theirs[2], t)
    assert (theirs[0] == captions) == (ablation != "captions")
    if ablation == "codes":
        assert noise.shape[1:] == (128, 24, 21) and theirs[3].shape[1:] == (8, 24, 21)
    else:
        assert torch.equal(theirs[3], noise)
    starts = [task.network.state_dict() for task in (one, other)]
    if ablation not in ("layout", "text", "codes"):
        assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
        for key, value in UNet.from_pretrained(begun.model).state_dict().items():
            new = ablation == "freezing" and key.startswith(("conv_in.", "conv_out."))
            assert torch.equal(starts[0][key], value) != new, key
    for task in (one, other):
        before = [p.clone() for p in task.network.parameters()]
        learn(task)
        changed = [not torch.equal(p, q) for p, q in zip(task.network.parameters(), before)]
        assert sum(changed) > 0.9 * len(changed)


def test_what_each_arm_changes(begin):
    """In the settings; the networks and codecs of the others have their own tests."""
    plain = begin("masked").c
    for name, expected in (
        ("unmasked", {"mask": "none"}),
        ("cosine", {"schedule": "cosine", "schedule_shift": 1.0}),
        ("scaled-linear", {"schedule": "scaled-linear", "schedule_shift": 1.0}),
        ("all-layers", {"frozen_steps": 0}),
        ("frozen-first", {"frozen_steps": 100}),
        ("scratch", {"init": "", "mask": "both"}),
    ):
        c = begin(name, steps=1200).c
        assert {key: getattr(c, key) for key in expected} == expected
        same = set(vars(plain)) - set(expected) - {"out", "steps", "warmup_steps"}
        same -= {"validate_every", "checkpoint_every"}
        assert all(getattr(c, key) == getattr(plain, key) for key in same)
    assert begin("masked").encoder(["a dog"])[1] is not None
    assert begin("unmasked").encoder(["a dog"])[1] is None


# ---- schedule ------------------------------------------------------------------------------------


def test_schedules_are_validated_at_the_same_noise(begin, monkeypatch):
    cosine, linear = cosine_alphas_cumprod(), scaled_linear_alphas_cumprod()
    t = torch.arange(1000)
    assert torch.equal(ablations.nearest_noise(t, cosine, cosine), t)
    found = ablations.nearest_noise(t, cosine, linear)
    within = (cosine < linear[0]) & (cosine > linear[-1])
    ratio = (linear[found].logit() - cosine.logit()).abs()
    assert ratio[within].max() < 0.4 and ratio[within].median() < 0.01
    assert within.sum() > 900 and (found[cosine <= linear[-1]] == 999).all()

    seen, task, t = [], begin("scaled-linear"), torch.tensor([10, 500, 900])
    monkeypatch.setattr(Denoiser, "loss", lambda self, network, c, s, t, n: seen.append(t.tolist()))
    task.loss(task.network, None, None, t, None)
    with torch.no_grad():
        task.loss(task.network, None, None, t, None)
    assert seen == [t.tolist(), found[t].tolist()] and seen[0] != seen[1]


# ---- layout and text -----------------------------------------------------------------------------


def test_the_picture_network_sees_one_channel(begin):
    task = begin("picture")
    config = task.network.config
    assert (config.in_channels, config.out_channels) == (1, 1)
    x_t, t, text = torch.randn(1, 128, 24, 21), torch.tensor([500]), torch.randn(1, 16, 32)
    plain = UNet(config)
    plain.load_state_dict(task.network.state_dict())
    picture = to_sequence(x_t)[:, None]  # bands down, frames across
    assert picture[0, 0, 5, 21 * 3 + 4] == x_t[0, 5, 3, 4]
    with torch.no_grad():
        out, expected = task.network(x_t, t, text), plain(picture, t, text)[:, 0]
    torch.testing.assert_close(out, to_grid(expected))
    # One mean and one std for all bands, and normalised with them the data have 0 and 1.
    x_0 = task.stats.normalize(task.codec.dequantize(task.data.stored(range(24))))
    assert x_0.mean().abs() < 1e-3 and x_0.std() == pytest.approx(1, abs=1e-3)
    assert task.stats.mean.unique().numel() == task.stats.std.unique().numel() == 1


def test_the_concatenated_network_uses_its_text_without_cross_attention():
    torch.manual_seed(0)
    unet = ablations.ConcatenatedUNet(UNetConfig(8, 8, (32, 64), (False, True), 1, 4, 24, 32), 32)
    names = [name for name, _ in unet.named_parameters()]
    assert sum(isinstance(m, TransformerBlock) for m in unet.modules()) == 4
    assert any("attn1" in name for name in names) and not any("attn2" in name for name in names)
    x_t, t = torch.randn(2, 8, 12, 11), torch.tensor([5, 800])
    text, mask = torch.randn(2, 7, 32), (torch.arange(7) < 4).expand(2, 7)
    pads = text + (torch.arange(7) >= 4)[:, None]
    with torch.no_grad():
        out = unet(x_t, t, text, mask)
        torch.testing.assert_close(unet(x_t, t, pads, mask), out)  # pads are masked out
        others = unet(x_t, t, text + 1, mask), unet(x_t, t, pads), unet(x_t, t, text)
        assert all((other - out).abs().max() > 1e-3 for other in others)


# ---- codes ---------------------------------------------------------------------------------------


def test_each_codebook_lowers_the_error():
    torch.manual_seed(0)
    x = torch.randn(2000, 6) * torch.tensor([8.0, 4, 2, 1, 1, 1])
    codebooks = ablations.residual_kmeans(x, books=4, entries=16)
    codes = ablations.quantize(x, codebooks)
    assert codebooks.shape == (4, 16, 6) and codes.shape == (2000, 4)
    left = [x - ablations.lookup(codes[:, :k], codebooks[:k]) for k in range(1, 5)]
    errors = [part.square().mean() for part in (x, *left)]
    assert all(b < 0.9 * a for a, b in zip(errors, errors[1:])), errors
    with pytest.raises(ValueError, match="10 frames are too few for 16"):
        ablations.residual_kmeans(x[:10], 4, 16)


def test_codes_round_trip(monkeypatch):
    """As numbers, through normalisation and back; and, where no codebook reaches into the one
    before, from codes to frames and back."""
    monkeypatch.setattr(MelCodec, "dequantize", lambda self, z: z)  # stores frames as they are
    monkeypatch.setattr(MelCodec, "decode", lambda self, z: z)
    torch.manual_seed(0)
    grid = torch.cartesian_prod(*[torch.arange(2.0)] * 6)[:, torch.randperm(6)]
    codebooks = torch.stack([grid * 10.0**-k for k in range(3)])  # digits, so to speak
    codes = torch.randint(64, (2, 504, 3))
    frames = ablations.lookup(codes, codebooks)
    assert torch.equal(frames[0, 0], sum(codebooks[k, codes[0, 0, k]] for k in range(3)))
    stats = LatentStats(torch.full((6,), 3.0), torch.full((6,), 2.0))
    codec, stored = Codes(stats, codebooks, CPU), stats.denormalize(frames.transpose(1, 2))
    numbers = codec.dequantize(stored)
    assert codec.channels == 3 and torch.equal(numbers, codes.transpose(1, 2).float())
    torch.testing.assert_close(codec.decode(numbers), stored)
    wild = torch.tensor([-7.0, 3.4, 1e6])[None, :, None].expand(2, 3, 504)  # a network's answer
    nearest = ablations.lookup(torch.tensor([0, 3, 63]), codebooks)
    torch.testing.assert_close(codec.decode(wild)[0, :, 0], nearest * 2 + 3)


@pytest.mark.parametrize("name", ["picture", "concatenated", "codes"])
def test_other_networks_can_be_heard(name, begin, capsys):
    """What scoring such an arm does once it has been trained."""
    task, folder = begin(name), Path(begin(name).c.out, "model")
    assert capsys.readouterr().out.count("the codes leave") == (name == "codes")  # made once
    learn(task)
    folder.mkdir(parents=True)
    task.write(task.network, folder)
    model = ablations.trained(task.c, ARMS[name].kind)
    assert all(map(torch.equal, model.unet.parameters(), task.network.parameters()))
    wave = generate(model, ["a hum"], steps=2)
    assert wave.shape == (1, 161_280) and wave.isfinite().all() and wave.std() > 0
    if name == "codes":
        numbers = model.codec.dequantize(task.data.stored(range(4)))
        assert numbers.shape == (4, 8, 504) and set(numbers.unique().tolist()) <= set(range(16))
        with pytest.raises(ValueError, match="unknown codec 'mel-codes'"):
            load_model(folder, "cpu")


# ---- captions ------------------------------------------------------------------------------------


def test_captions_by_labels(tmp_path, begin, monkeypatch):
    file, made = tmp_path / "llm.jsonl", {"captions": "audio_caption"}
    records = [{"id": "1", "labels": ["B", "A"], "captions": ["a and b"], "made": made},
               {"id": "2", "labels": ["A", "B"], "captions": ["b, then a"], "made": made},
               {"id": "3", "labels": ["low"], "audio_caption": "something low",
                "captions": ["a hum"]}]  # fmt: skip
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    choose = ablations.captions_by_labels(file)
    assert choose({"labels": ["A", "B"]}) == ["a and b", "b, then a"]
    assert choose({"labels": ["low"]}) == ["something low"]
    assert choose({"labels": ["high", "A"]}) == ["The sound of high, A"]
    assert ablations.captions_by_labels(None)({"labels": ["low"]}) == ["The sound of low"]
    file.write_text('{"id": "4", "labels": ["A"]}\n')
    with pytest.raises(ValueError, match="llm.jsonl: 4 is no record of captions.py"):
        ablations.captions_by_labels(file)

    monkeypatch.setattr(ablations, "in_other_words", lambda: {"tone-3": "a hum", "x": "y"})
    label, wording = begin("labels"), begin("wording")
    assert set(label.data.record(0)["captions"]) == {"The sound of low"}
    assert set(wording.data.record(0)["captions"]) == {"a low tone", "tone number 0"}
    for task in (label, wording):  # validated alike
        assert task.val_indices == [3] and task.val.record(3)["captions"][0] == "a hum"


def test_reference_captions_are_of_the_scenes_that_are_composed():
    words = ablations.in_other_words()
    recordings = ablations.Recordings(ablations.HERE / "recordings.csv", "test")
    scenes = ablations.draw_scenes(recordings, "test", ablations.CLIPS["test"], 0)
    assert len(words) == 100 and words.keys() <= {scene["id"] for scene in scenes}


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def scoring(tmp_path):
    torch.manual_seed(0)
    Cnn14(5, (4, 4, 4, 4, 4, 8)).save(tmp_path / "tagger.safetensors")
    return ["--classifier", tmp_path / "tagger.safetensors", "--clips", 2, "--denoising-steps", 2]


def test_train_resume_score_and_table(command, scoring, tmp_path, monkeypatch, capsys):
    """A kill in the second arm; the same command; scores later; nothing is done twice."""
    out, original, trained = tmp_path / "out", train.train_step, []

    def counted(task, *rest):
        if len(trained) == 3:  # in the second arm, after its first step
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append((Path(task.c.out).name, task.step))
        return original(task, *rest)

    monkeypatch.setattr(train, "train_step", counted)
    arguments = command("mask", "--seeds", 0)
    with pytest.raises(SystemExit, match="goes on from the last checkpoint"):
        ablations.main(arguments)
    done = json.loads((out / "masked-seed0.json").read_text())
    assert not (out / "unmasked-seed0.json").exists()
    assert done["steps"] == 2 and set(done["val_losses"]) == {"1", "2"}
    ablations.main(arguments)
    trained.remove("killed")
    assert trained == [(f"{arm}-seed0", step) for arm in ABLATIONS["mask"] for step in range(2)]
    assert json.loads((out / "masked-seed0.json").read_text()) == done
    assert not (out / "masked-seed0" / "checkpoints").exists()

    trained[:] = ["more than three"] * 9  # the other seed beside it
    ablations.main(command("mask", "--seeds", 0, 1))
    assert [name for name, _ in trained[9:]] == ["masked-seed1"] * 2 + ["unmasked-seed1"] * 2
    capsys.readouterr()
    ablations.main(["table", "--out", str(out)])
    shown, other = capsys.readouterr().out, json.loads((out / "masked-seed1.json").read_text())
    row = next(line for line in shown.splitlines() if line.startswith("| mask: masked"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["0, 1", "2"] and cells[6:] == ["–, –"] * 4
    assert cells[5] == f"{done['val_loss']:.4f}, {other['val_loss']:.4f}"
    assert cells[4] == f"{done['parameters']:,}" and "not scored yet" in shown

    # With a classifier, what is there is scored; and then not again.
    ablations.main(command("mask", "--seeds", 0, *scoring))
    scores = json.loads((out / "masked-seed0.json").read_text())["scores"]
    assert scores["N"] == 2 and {"FD", "KL_softmax", "KL_softmax_95"} <= scores.keys()
    assert len(list((out / "masked-seed0" / "sounds-2").glob("*.wav"))) == 2
    monkeypatch.setattr(ablations.judge, "write_generated", None)
    ablations.main(command("mask", "--seeds", 0, *scoring))
    shown = capsys.readouterr().out
    assert f"| {scores['FD']:.4g}, – |" in shown and "2 clips" in shown and len(trained) == 9 + 4

    with pytest.raises(SystemExit, match="masked-seed0.json has steps = 2, this command 3: give"):
        ablations.main(command("mask", "--seeds", 0, "--steps", 3))  # is another experiment


@pytest.mark.parametrize(
    ("name", "arms", "expected"),
    [
        ("samplers", ("pndm-5", "ddpm-5"), [("pndm", 5, None), ("ddpm", 5, None)]),
        ("guidance", ("guidance-1", "guidance-3.5"), [("pndm", 2, 1.0), ("pndm", 2, 3.5)]),
    ],
)
def test_the_model_as_it_is(name, arms, expected, command, scoring, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(ABLATIONS, name, arms)
    made, original = [], ablations.judge.write_generated

    def write_generated(folder, prompts, model, options):
        made.append((options.sampler, options.steps, options.guidance))
        original(folder, prompts, model, options)

    monkeypatch.setattr(ablations.judge, "write_generated", write_generated)
    for _ in range(2):
        ablations.main(command(name, *scoring))
        assert made == expected
    assert f"| {name}: {arms[1]} | 0 | – | – | – | – | 2 |" in capsys.readouterr().out


def test_mistakes_get_one_line(command, tmp_path, monkeypatch):
    for arguments, words in (
        (["table", "--out", tmp_path], "no results yet"),
        (command("mask", "--model", tmp_path), "model.json"),
        (command("text", "--classifier", tmp_path / "no.pth"), "no.pth"),
        (command("captions", "--captions", tmp_path / "no.jsonl"), "no.jsonl"),
        (command("samplers"), "no loss: --classifier FILE"),
        (["mask", "--steps", 0], 2),
        (["mask", "--captions", "x"], 2),
        (["samplers", "--steps", 5], 2),
    ):
        with pytest.raises(SystemExit) as e:
            ablations.main([*map(str, arguments)])
        code = e.value.code
        assert code == words or (code.startswith("error: ") and words in code and "\n" not in code)


def test_help_teaches():
    command = [sys.executable, "-m", "appendix.ablations", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in (*ABLATIONS, "table"))
