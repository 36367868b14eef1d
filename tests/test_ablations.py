"""appendix/ablations.py on small random models: what each arm changes, and what it leaves alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from appendix import ablations
from appendix.ablations import ABLATIONS, ARMS, Codes, configure, parse_args
from evaluate import Cnn14
from latents import MelCodec, to_grid, to_sequence
from sample import generate, load_model
from train import Denoiser
from unet import TransformerBlock, UNet, UNetConfig

CPU = torch.device("cpu")
PAIRS = ("mask", "schedule", "layout", "freezing", "text", "codes")
EVERY_PAIR = [(name, ABLATIONS[name]) for name in PAIRS]
pytestmark = pytest.mark.usefixtures("quick_sounds")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, tmp_path):
    """A small picture; and no embedded classifier, if there is one."""
    monkeypatch.setattr(ablations, "PICTURE_WIDTHS", (32, 32, 32, 32))
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
        shared += ["--out", tmp_path / "out", "--batch-size", 2, "--precision", "fp32"]
        shared += ["--val-clips", 2, "--denoising-steps", 2, "--steps", 2, "--device", "cpu"]
        shared += ["--checkpoint-every", 1]
        return [*map(str, [name, *shared, *more])]

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
    ours, theirs = (task.batch(3, range(2), task.choose(3, 2)) for task in (one, other))
    assert theirs[0] == ours[0] and all(map(torch.equal, theirs[1:], ours[1:]))
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


# ---- layout and text -----------------------------------------------------------------------------


def test_the_picture_network_sees_one_channel(begin):
    task = begin("picture")
    x_t, t, text = torch.randn(1, 128, 24, 21), torch.tensor([500]), torch.randn(1, 16, 32)
    plain = UNet(task.network.config)
    plain.load_state_dict(task.network.state_dict())
    with torch.no_grad():  # bands down, frames across
        out, expected = task.network(x_t, t, text), plain(to_sequence(x_t)[:, None], t, text)[:, 0]
    torch.testing.assert_close(out, to_grid(expected))
    # One mean and one std for all bands, and normalised with them the data have 0 and 1.
    x_0 = task.stats.normalize(task.codec.dequantize(task.data.stored(range(24))))
    assert x_0.mean().abs() < 1e-3 and x_0.std() == pytest.approx(1, abs=1e-3)


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


def test_codes_are_the_stored_levels_in_no_order():
    codec, plain = Codes(CPU), MelCodec(CPU)
    stored = torch.randint(256, (1, 128, 504), generator=torch.Generator().manual_seed(0))
    stored = stored.to(torch.uint8)
    numbers = codec.dequantize(stored)
    assert torch.equal(codec.decode(numbers + 0.4), plain.decode(plain.dequantize(stored)))
    pairs = torch.stack([stored.flatten().float(), numbers.flatten()])
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.1 and numbers.unique().tolist() == [*range(256)]


@pytest.mark.parametrize("name", ["picture", "concatenated", "codes"])
def test_other_networks_can_be_heard(name, begin):
    """What scoring such an arm does once it has been trained."""
    task, folder = begin(name), Path(begin(name).c.out, "model")
    learn(task)
    folder.mkdir(parents=True)
    task.write(task.network, folder)
    model = ablations.trained(task.c, ARMS[name].kind)
    assert all(map(torch.equal, model.unet.parameters(), task.network.parameters()))
    wave = generate(model, ["a hum"], steps=2)
    assert wave.shape == (1, 161_280) and wave.isfinite().all() and wave.std() > 0
    if name == "codes":
        with pytest.raises(ValueError, match="unknown codec 'mel-codes'"):
            load_model(folder, "cpu")


# ---- captions ------------------------------------------------------------------------------------


def test_captions_by_labels(tmp_path, command):
    file, row = tmp_path / "llm.jsonl", {"made": {"captions": "audio_caption"}}
    records = [row | {"id": "1", "labels": ["B", "A"], "captions": ["a and b"]},
               row | {"id": "2", "labels": ["A", "B"], "captions": ["b, then a"]}]  # fmt: skip
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    choose = ablations.captions_by_labels(file)
    assert choose({"labels": ["A", "B"]}) == ["a and b", "b, then a"]
    assert choose({"labels": ["high", "A"]}) == ["The sound of high, A"]
    assert ablations.captions_by_labels()({"labels": ["low"]}) == ["The sound of low"]
    file.write_text('{"id": "4", "labels": ["A"]}\n')
    with pytest.raises(ValueError, match="llm.jsonl: 4 hasn't been through captions.py"):
        ablations.captions_by_labels(file)

    arms = ablations.caption_arms(parse_args(command("captions")))
    seen = [ablations.Denoiser(configure(name, arms[name], 0, parse_args(command("mask"))), CPU)
            for name in ("labels", "wording")]  # fmt: skip
    label, wording = (task.batch(0, range(2), [0, 3]) for task in seen)
    assert label[0] == ["The sound of low"] * 2 and wording[0] != label[0]
    assert all(map(torch.equal, label[1:], wording[1:]))


def test_reference_captions_are_of_the_scenes_that_are_composed():
    recordings = ablations.Recordings(ablations.HERE / "recordings.csv", "test")
    scenes = ablations.draw_scenes(recordings, "test", ablations.CLIPS["test"], 0)
    assert ablations.in_other_words().keys() <= {scene["id"] for scene in scenes}


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def scoring(tmp_path):
    torch.manual_seed(0)
    Cnn14(5, (4, 4, 4, 4, 4, 8)).save(tmp_path / "tagger.safetensors")
    return ["--classifier", tmp_path / "tagger.safetensors", "--clips", 2]


def test_train_score_and_table(command, scoring, tmp_path, monkeypatch, capsys):
    """Scores may come later, and nothing is done twice."""
    result, trained, original = tmp_path / "out" / "masked-seed0.json", [], train.train_step

    def counted(task, *rest):
        trained.append((Path(task.c.out).name, task.step))
        return original(task, *rest)

    monkeypatch.setattr(train, "train_step", counted)
    ablations.main(command("mask"))
    assert trained == [(f"{arm}-seed0", step) for arm in ABLATIONS["mask"] for step in range(2)]
    done = json.loads(result.read_text())
    assert not (tmp_path / "out" / "masked-seed0" / "checkpoints").exists()
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("| mask: masked"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["0", "2"] and cells[5:] == ["–"] * 4 and "not scored yet" in shown
    assert cells[4] == f"{done['val_loss']:.4f}"

    ablations.main(command("mask", *scoring))
    scores = json.loads(result.read_text())["scores"]
    assert scores["N"] == 2 and {"FD", "KL_softmax", "KL_softmax_95"} <= scores.keys()
    monkeypatch.setattr(ablations.judge, "write_generated", None)
    ablations.main(command("mask", *scoring))
    capsys.readouterr()
    ablations.main(["table", "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert f"| {scores['FD']:.4g} |" in shown and "2 clips" in shown and len(trained) == 4
    with pytest.raises(SystemExit, match="masked-seed0 has steps = 2, this command 3: give"):
        ablations.main(command("mask", "--steps", 3))  # is another experiment


def test_the_model_as_it_is(command, scoring, monkeypatch, capsys):
    made, original = [], ablations.judge.write_generated

    def write_generated(folder, prompts, model, options):
        made.append((options.sampler, options.steps, options.guidance))
        original(folder, prompts, model, options)

    monkeypatch.setattr(ablations.judge, "write_generated", write_generated)
    two = {"samplers": ("pndm-5", "ddpm-5"), "guidance": ("guidance-3.5",)}
    monkeypatch.setattr(ablations, "ABLATIONS", two)
    for name in ("samplers", "all"):
        ablations.main(command(name, *scoring))
    assert made == [("pndm", 5, None), ("ddpm", 5, None), ("pndm", 2, 3.5)]
    assert "| samplers: ddpm-5 | 0 | – | – | – | 2 |" in capsys.readouterr().out


def test_mistakes_get_one_line(command, tmp_path):
    for arguments, words in (
        (["table", "--out", tmp_path], "no results yet"),
        (command("mask", "--model", tmp_path), "no U-Net there"),
        (command("text", "--classifier", tmp_path / "no.pth"), "no.pth"),
        (command("captions", "--captions", tmp_path / "no.jsonl"), "no.jsonl"),
        (command("samplers"), "no loss: --classifier FILE"),
        (["mask", "--steps", 0], 2),
    ):
        with pytest.raises(SystemExit) as e:
            ablations.main([*map(str, arguments)])
        code = e.value.code
        assert code == words or (code.startswith("error: ") and words in code and "\n" not in code)
