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
from latents import LatentStats, to_grid
from sample import generate, load_model
from train import Run
from unet import TransformerBlock, UNet, UNetConfig

ROOT = Path(ablations.__file__).parent.parent
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
    out = tmp_path_factory.mktemp("ablations") / "run"
    run = Run(train.parse_args([*small, "--out", str(out)]))
    run.save_model()
    return SimpleNamespace(model=out / "model", data=run.c.data)


@pytest.fixture
def command(begun, tmp_path):
    """The arguments of an ablation of two steps, in tmp_path / "out"."""

    def command(name, *more):
        shared = ["--model", begun.model, "--data", begun.data, "--val-data", begun.data]
        shared += [
            "--out",
            tmp_path / "out",
            *([] if name in ablations.UNTRAINED else ["--steps", 2]),
        ]
        shared += ["--batch-size", 8 if "--seeds" in more else 2]  # few steps of validation
        shared += ["--precision", "fp32", "--device", "cpu", *more]
        return [name, *map(str, shared)]

    return command


@pytest.fixture
def begin(command):
    """The run of an arm, as it begins."""

    def begin(name, steps=2, seed=0):
        arm = ARMS[name]
        return arm.kind(configure(name, arm, seed, steps, parse_args(command("mask"))))

    return begin


def error_of(arguments) -> str:
    with pytest.raises(SystemExit) as e:
        ablations.main([str(x) for x in arguments])
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert "\n" not in e.value.code
    return e.value.code


# ---- what the arms share -------------------------------------------------------------------------


@pytest.mark.parametrize("ablation, names", EVERY_PAIR)
def test_arms_see_the_same_clips_and_noise_and_learn(ablation, names, begin):
    runs = [begin(name) for name in names]
    (indices, captions, stored, t, noise), *others = [run.batch(3, 0) for run in runs]
    for name, other in zip(names[1:], others, strict=True):
        assert other[0] == indices and torch.equal(other[2], stored) and torch.equal(other[3], t)
        assert (other[1] == captions) == (ablation != "captions")
        if name == "codes":
            assert noise.shape[1:] == (128, 24, 21) and other[4].shape[1:] == (8, 24, 21)
        else:
            assert torch.equal(other[4], noise)
    for run in runs:
        before = [p.clone() for p in run.unet.parameters()]
        run.train_step([run.batch(0, 0)])
        changed = [not torch.equal(p, q) for p, q in zip(run.unet.parameters(), before)]
        assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("name", [n for n, arm in ARMS.items() if arm.warm])
def test_warm_arms_start_from_the_model(name, begin, begun):
    start, run = UNet.from_pretrained(begun.model).state_dict(), begin(name)
    for key, value in run.unet.state_dict().items():
        new = name in ABLATIONS["freezing"] and key.startswith(("conv_in.", "conv_out."))
        assert torch.equal(value, start[key]) != new, key


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


# ---- schedule and freezing -----------------------------------------------------------------------


def test_schedules_are_validated_at_the_same_noise(begin, monkeypatch):
    cosine, linear = cosine_alphas_cumprod(), scaled_linear_alphas_cumprod()
    t = torch.arange(1000)
    assert torch.equal(ablations.nearest_noise(t, cosine, cosine), t)
    found = ablations.nearest_noise(t, cosine, linear)
    within = (cosine < linear[0]) & (cosine > linear[-1])
    assert 0.9 < within.double().mean() < 0.97
    ratio = (linear[found].logit() - cosine.logit()).abs()
    assert ratio[within].max() < 0.4 and ratio[within].median() < 0.01
    assert (found[cosine <= linear[-1]] == 999).all()

    seen = []
    monkeypatch.setattr(Run, "loss", lambda self, model, s, c, t, n: seen.append(t.tolist()))
    runs = [begin(name) for name in ABLATIONS["schedule"]]
    t = torch.tensor([10, 500, 900])
    for run in runs:
        for model in (run.unet, run.ema):
            run.loss(model, None, None, t, None)
    assert seen[:3] == [[10, 500, 900]] * 3  # in training t is t
    assert seen[3] == found[t].tolist() != [10, 500, 900]


def test_both_arms_of_freezing_have_the_same_new_ends(begin):
    one, other = (begin(name, steps=12) for name in ABLATIONS["freezing"])
    assert all(map(torch.equal, one.unet.state_dict().values(), other.unet.state_dict().values()))
    assert (one.c.frozen_steps, other.c.frozen_steps) == (0, 1)
    for run, moves in ((one, (True, True)), (other, (False, True))):
        middle, end = run.unet.mid_block.resnets[0].conv1.weight, run.unet.conv_in.weight
        for step in range(2):
            before = middle.clone(), end.clone()
            run.train_step([run.batch(step, 0)])
            assert torch.equal(middle, before[0]) != moves[step]
            assert not torch.equal(end, before[1])


# ---- layout --------------------------------------------------------------------------------------


def test_the_picture_round_trips():
    x = torch.randn(2, 128, 24, 21)
    picture = ablations.to_picture(x)
    assert picture.shape == (2, 1, 128, 504)
    assert picture[1, 0, 5, 21 * 3 + 4] == x[1, 5, 3, 4]  # band 5, frame 67
    assert torch.equal(ablations.from_picture(picture), x)


def test_the_picture_network_sees_one_channel(begin, monkeypatch):
    run = begin("picture")
    config = run.unet.config
    assert (config.in_channels, config.out_channels) == (1, 1)
    x_t, t, text = torch.randn(1, 128, 24, 21), torch.tensor([500]), torch.randn(1, 16, 32)
    plain = UNet(config)
    plain.load_state_dict(run.unet.state_dict())
    with torch.no_grad():
        out = run.unet(x_t, t, text)
        expected = plain(ablations.to_picture(x_t), t, text)  # [1, 1, 128, 504]
    assert out.shape == (1, 128, 24, 21)
    torch.testing.assert_close(out, to_grid(expected[:, 0]))
    # One mean and one std for all bands, and normalised with them the data have 0 and 1.
    z = run.codec.dequantize(run.data.stored(range(24)))
    x_0 = run.stats.normalize(z)
    assert x_0.mean().abs() < 1e-3 and x_0.std() == pytest.approx(1, abs=1e-3)
    assert run.stats.mean.unique().numel() == run.stats.std.unique().numel() == 1
    torch.testing.assert_close(run.stats.denormalize(x_0), z, atol=1e-3, rtol=1e-4)


# ---- text ----------------------------------------------------------------------------------------


def test_the_concatenated_network_uses_its_text_without_cross_attention():
    torch.manual_seed(0)
    unet = ablations.ConcatenatedUNet(UNetConfig(8, 8, (32, 64), (False, True), 1, 4, 24, 32), 32)
    blocks = [m for m in unet.modules() if isinstance(m, TransformerBlock)]
    assert len(blocks) == 4 and not any("attn2" in name for name, _ in unet.named_parameters())
    assert any("attn1" in name for name, _ in unet.named_parameters())
    x_t, t = torch.randn(2, 8, 12, 11), torch.tensor([5, 800])
    text, mask = torch.randn(2, 7, 32), (torch.arange(7) < 4).expand(2, 7)
    with torch.no_grad():
        out = unet(x_t, t, text, mask)
        assert out.shape == x_t.shape
        pads = text.clone()
        pads[:, 4:] += 1
        torch.testing.assert_close(unet(x_t, t, pads, mask), out)  # pads are masked out
        others = unet(x_t, t, text + 1, mask), unet(x_t, t, pads), unet(x_t, t, text)
        assert all((other - out).abs().max() > 1e-3 for other in others)
        # A mean: the order of the tokens is lost.
        torch.testing.assert_close(unet(x_t, t, text.flip(1)), unet(x_t, t, text))


# ---- codes ---------------------------------------------------------------------------------------


def test_each_codebook_lowers_the_error():
    torch.manual_seed(0)
    x = torch.randn(2000, 6) * torch.tensor([8.0, 4, 2, 1, 1, 1])
    codebooks = ablations.residual_kmeans(x, books=4, entries=16)
    assert codebooks.shape == (4, 16, 6)
    codes = ablations.quantize(x, codebooks)
    assert codes.shape == (2000, 4) and codes.min() == 0 and codes.max() == 15
    errors = [x.square().mean()]
    for k in range(1, 5):
        error = (x - ablations.lookup(codes[:, :k], codebooks[:k])).square().mean()
        errors.append(error)
    assert all(b < 0.9 * a for a, b in zip(errors, errors[1:])), errors
    brief = ablations.residual_kmeans(x, 1, 16, iterations=1)
    assert (x - brief[0, ablations.nearest(x, brief[0])]).square().mean() > errors[1]
    assert torch.equal(ablations.residual_kmeans(x, 4, 16), codebooks)
    with pytest.raises(ValueError, match="10 frames are too few for 16"):
        ablations.residual_kmeans(x[:10], 4, 16)


def test_codes_round_trip():
    """As numbers, through normalisation and back; and, where no codebook reaches into the one
    before, from codes to frames and back."""
    torch.manual_seed(0)
    grid = torch.cartesian_prod(*[torch.arange(2.0)] * 6)[:, torch.randperm(6)]
    codebooks = torch.stack([grid * 10.0**-k for k in range(3)])  # digits, so to speak
    codes = torch.randint(64, (2, 504, 3))
    frames = ablations.lookup(codes, codebooks)
    assert torch.equal(frames[0, 0], sum(codebooks[k, codes[0, 0, k]] for k in range(3)))
    assert torch.equal(ablations.quantize(frames.flatten(0, 1), codebooks), codes.flatten(0, 1))

    class Frames:
        """A codec that stores frames as they are."""

        device = torch.device("cpu")
        dequantize = decode = staticmethod(lambda z: z)

    stats = LatentStats(torch.full((6,), 3.0), torch.full((6,), 2.0))
    codec = Codes(Frames, stats, codebooks)
    stored = stats.denormalize(frames.transpose(1, 2))  # [2, 6, 504]
    numbers = codec.dequantize(stored)
    assert codec.channels == 3 and torch.equal(numbers, codes.transpose(1, 2).float())
    of_numbers = LatentStats.of(numbers)
    x_0 = of_numbers.normalize(numbers)
    assert x_0.std() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(codec.decode(of_numbers.denormalize(x_0)), stored)
    wild = torch.tensor([-7.0, 3.4, 1e6])[None, :, None].expand(2, 3, 504)  # a network's answer
    nearest = ablations.lookup(torch.tensor([0, 3, 63]), codebooks)
    torch.testing.assert_close(codec.decode(wild)[0, :, 0], nearest * 2 + 3)


def test_the_codes_arm(begin, tmp_path, capsys):
    run = begin("codes")
    assert "the codes leave" in capsys.readouterr().out
    numbers = run.codec.dequantize(run.data.stored(range(4)))
    assert numbers.shape == (4, 8, 504) and numbers.max() <= 15 and numbers.min() >= 0
    assert torch.equal(numbers, numbers.round()) and run.unet.config.in_channels == 8
    assert run.codec.decode(numbers[:1]).shape == (1, 161_280)
    again = begin("codes")  # from the file
    assert "the codes leave" not in capsys.readouterr().out
    assert again.codec.settings() == run.codec.settings()
    assert run.codec.encode(torch.zeros(1, 161_280)).shape == (1, 128, 504)
    assert torch.equal(again.stats.std, run.stats.std)
    run.save_model()
    with pytest.raises(ValueError, match="unknown codec 'mel-codes'"):
        load_model(tmp_path / "out" / "codes-seed0" / "model", "cpu")


# ---- captions ------------------------------------------------------------------------------------


def test_captions_by_labels(tmp_path, begin, begun, monkeypatch):
    file = tmp_path / "llm.jsonl"
    records = [{"id": "1", "labels": ["B", "A"], "captions": ["a and b"], "gate": "passed"},
               {"id": "2", "labels": ["A", "B"], "captions": ["b, then a"], "gate": "passed"},
               {"id": "3", "labels": ["low"], "audio_caption": "something low",
                "captions": ["a hum"]}]  # fmt: skip
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    choose = ablations.captions_by_labels(file)
    assert choose({"labels": ["A", "B"]}) == ["a and b", "b, then a"]
    assert choose({"labels": ["low"]}) == ["something low"]
    assert choose({"labels": ["high", "A"]}) == ["The sound of high, A"]
    assert ablations.captions_by_labels(None)({"labels": ["low"]}) == ["The sound of low"]

    monkeypatch.setattr(ablations, "in_other_words", lambda: {"tone-3": "a hum", "x": "y"})
    label, wording = begin("labels"), begin("wording")
    assert set(label.data.record(0)["captions"]) == {"The sound of low"}
    assert set(wording.data.record(0)["captions"]) == {"a low tone", "tone number 0"}
    for run in (label, wording):  # validated alike
        assert run.val_indices == [3] and run.val.record(3)["captions"][0] == "a hum"
    file.write_text('{"labels": ["A"]}\n')
    with pytest.raises(ValueError, match="llm.jsonl, line 1: no record of captions.py"):
        ablations.captions_by_labels(file)


@pytest.mark.parametrize("name", ["picture", "concatenated", "codes"])
def test_other_networks_can_be_heard(name, begin):
    """What scoring such an arm does once it has been trained."""
    run = begin(name)
    run.train_step([run.batch(0, 0)])
    run.save_model()
    model = ablations.trained(run.c, ARMS[name].kind)
    for ours, theirs in zip(model.unet.parameters(), run.ema.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    wave = generate(model, ["a hum", "a tone"], steps=2)
    assert wave.shape == (2, 161_280) and wave.isfinite().all() and wave.std() > 0


def test_reference_captions_are_of_the_scenes_that_are_composed():
    words = ablations.in_other_words()
    assert len(words) == 100
    recordings = ablations.Recordings(ablations.HERE / "recordings.csv", "test")
    scenes = ablations.draw_scenes(recordings, "test", ablations.CLIPS["test"], 0)
    assert words.keys() <= {scene["id"] for scene in scenes}


# ---- the command ---------------------------------------------------------------------------------


def test_train_resume_score_and_table(command, begun, tmp_path, monkeypatch, capsys):
    """A kill in the second arm; the same command; scores later; nothing is done twice."""
    out, original, trained = tmp_path / "out", Run.train_step, []

    def counted(self, batches):
        if len(trained) == 3:  # in the second arm, after its first step
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append((self.out.name, self.step))
        return original(self, batches)

    monkeypatch.setattr(Run, "train_step", counted)
    arguments = command("mask", "--seeds", 0)
    with pytest.raises(SystemExit, match="goes on from the last checkpoint"):
        ablations.main(arguments)
    done = json.loads((out / "masked-seed0.json").read_text())
    assert not (out / "unmasked-seed0.json").exists()
    assert not (out / "masked-seed0" / "checkpoints").exists()
    assert done["steps"] == 2 and set(done["val_losses"]) == {"1", "2"}
    weights = UNet.from_pretrained(out / "masked-seed0" / "model").parameters()
    assert done["parameters"] == sum(p.numel() for p in weights)

    ablations.main(arguments)
    names = ["masked-seed0", "masked-seed0", "unmasked-seed0", "unmasked-seed0"]
    steps = [0, 1, 0, 1]
    trained.remove("killed")
    assert trained == list(zip(names, steps))
    assert json.loads((out / "masked-seed0.json").read_text()) == done
    shown = capsys.readouterr().out
    assert "| mask | unmasked | 0 | 2 |" in shown and "not scored yet" in shown

    # The other seed beside it, the arms of the first untouched.
    trained[:] = ["more than three"] * 9
    ablations.main(command("mask", "--seeds", 0, 1))
    assert len(trained) == 9 + 4 and all(name.endswith("seed1") for name, _ in trained[9:])
    ablations.main(["table", "--out", str(out)])
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| mask | masked"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    other = json.loads((out / "masked-seed1.json").read_text())
    assert cells[2] == "0, 1" and cells[6] == f"{done['val_loss']:.4f}, {other['val_loss']:.4f}"
    assert cells[7:] == ["–, –"] * 4

    # With a classifier, what is there is scored; and then not again.
    torch.manual_seed(0)
    tagger = tmp_path / "tagger.safetensors"
    Cnn14(5, (4, 4, 4, 4, 4, 8)).save(tagger)
    scoring = ["--classifier", tagger, "--clips", 10, "--denoising-steps", 2]
    ablations.main(command("mask", "--seeds", 0, *scoring))
    assert len(trained) == 9 + 4
    scores = json.loads((out / "masked-seed0.json").read_text())["scores"]
    assert scores["N"] == 10 and {"FD", "IS", "KL_softmax", "KL_softmax_95"} <= scores.keys()
    assert len(list((out / "masked-seed0" / "sounds-2").glob("*.wav"))) == 10
    monkeypatch.setattr(ablations.judge, "write_generated", None)
    ablations.main(command("mask", "--seeds", 0, *scoring))
    shown = capsys.readouterr().out
    assert f"FD {scores['FD']:.4g}, IS" in shown and "tagger.safetensors (" in shown
    assert "10 clips" in shown

    # Other settings are another experiment.
    message = error_of(command("mask", "--seeds", 0, "--steps", 3))
    assert "masked-seed0.json has steps = 2, this command 3: give the old value" in message


@pytest.mark.parametrize(
    ("name", "arms", "expected"),
    [
        ("samplers", ("pndm-2", "ddpm-3"), [("pndm", 2, None, 2), ("ddpm", 3, None, 2)]),
        ("guidance", ("guidance-1", "guidance-3.5"), [("pndm", 2, 1.0, 2), ("pndm", 2, 3.5, 2)]),
    ],
)
def test_the_model_as_it_is(name, arms, expected, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ABLATIONS, name, arms)
    tagger = tmp_path / "tagger.safetensors"
    Cnn14(5, (4, 4, 4, 4, 4, 8)).save(tagger)
    arguments = command(name, "--classifier", tagger, "--clips", 2, "--denoising-steps", 2)
    made, original = [], ablations.judge.write_generated

    def write_generated(folder, prompts, model, options):
        made.append((options.sampler, options.steps, options.guidance, len(prompts)))
        original(folder, prompts, model, options)

    monkeypatch.setattr(ablations.judge, "write_generated", write_generated)
    for _ in range(2):
        ablations.main(arguments)
        assert made == expected
    ablations.main(["table", "--out", str(tmp_path / "out")])
    assert f"| {name} | {arms[1]} | 0 | – | – | – | – | 2 |" in capsys.readouterr().out
    assert "no loss: --classifier FILE" in error_of(command(name))


def test_minutes_are_measured_once(command, tmp_path, monkeypatch):
    arguments = command("mask")
    del arguments[arguments.index("--steps") : arguments.index("--steps") + 2]
    args = parse_args([*arguments, "--minutes", "0.5"])
    args.out.mkdir()
    seconds = iter(range(0, 100, 3))
    monkeypatch.setattr(ablations.time, "perf_counter", lambda: next(seconds))
    assert ablations.planned_steps(args) == 100  # 30 s, 0.3 s a step
    monkeypatch.setattr(ablations, "Run", None)
    assert ablations.planned_steps(args) == 100
    assert "begun with --minutes 0.5: give the same" in error_of([*arguments, "--minutes", "2"])


def test_mistakes_get_one_line(command, tmp_path, monkeypatch, capsys):
    assert "no results yet" in error_of(["table", "--out", tmp_path])
    assert "not a model folder" in error_of(command("mask", "--model", tmp_path))
    assert "no.pth: no such file" in error_of(command("text", "--classifier", tmp_path / "no.pth"))
    assert "no.jsonl" in error_of(command("captions", "--captions", tmp_path / "no.jsonl"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in error_of(command("mask"))
    for arguments in (["mask", "--steps", "0"], ["mask", "--minutes", "0"], ["dropout"],
                      ["mask", "--captions", "x"], ["mask", "--seeds", "-1"],
                      ["samplers", "--steps", "5"]):  # fmt: skip
        with pytest.raises(SystemExit) as e:
            ablations.main(arguments)
        assert e.value.code == 2
    capsys.readouterr()


def test_help_teaches():
    done = subprocess.run(
        [sys.executable, "-m", "appendix.ablations", "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and all(name in done.stdout for name in (*ABLATIONS, "table"))
