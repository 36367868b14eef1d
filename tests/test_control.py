"""appendix/control.py, on a small random model."""

import json
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import save_model
from diffusers import ControlNetModel, UNet2DConditionModel

import sample
import train
from appendix import control, edit
from appendix.control import Control, Controlled, ControlNet, loudness
from benchmarks.gpu import plain_graph
from latents import CLIP_SAMPLES, MelCodec, to_grid
from unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("quick_sounds")


@pytest.fixture(scope="module")
def root(small, tmp_path_factory):
    """A model folder, `model`, a stored data set, `data`, and a recording, `a.wav`."""
    root = tmp_path_factory.mktemp("control")
    save_model(root / "model")
    (root / "data").symlink_to(small[small.index("--data") + 1])
    soundfile.write(root / "a.wav", np.sin(np.arange(24_000) * 0.1) * 0.5, 16_000)
    return root


def training(root, out):
    """The arguments of a small run, of 4 steps."""
    options = f"--model {root}/model --data {root}/data --out {out} --steps 4 --batch-size 1 "
    options += "--val-clips 1 --lr 1e-2 --warmup-steps 0 --precision fp32 --device cpu "
    return (options + "--checkpoint-every 2").split()


def inputs(channels=128, size=(24, 21), width=32):
    """x_t, t and text for two samples."""
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, channels, *size, generator=generator)
    return x_t, torch.tensor([3, 600]), torch.randn(2, 7, width, generator=generator)


def test_training_begins_with_the_models_own_sounds(root, tmp_path):
    """Z = 0 changes nothing, to the bit; then the copy and Z learn, and nothing else does."""
    task = Control(control.parse_args(training(root, tmp_path)), torch.device("cpu"))
    unet, picture = UNet.from_pretrained(root / "model"), torch.randn(2, 1, 24, 21)
    batches = [task.batch(step, range(2), task.choose(step, 2)) for step in range(3)]
    with torch.no_grad():
        plain = unet(*inputs())
        assert torch.equal(Controlled(unet, task.network, picture)(*inputs()), plain)
        alone = train.Denoiser.loss(task, unet, *batches[0])
        assert torch.equal(task.loss(task.network, *batches[0]), alone)
    optimizer = torch.optim.AdamW(task.network.parameters(), 1e-2)
    for batch in batches:
        optimizer.zero_grad()
        task.loss(task.network, *batch).mean().backward()
        optimizer.step()
    for name, value in task.unet.state_dict().items():
        assert torch.equal(value, unet.state_dict()[name]), name
    assert all(p.grad.abs().max() > 0 for p in task.network.parameters())
    with torch.no_grad():
        outputs = [Controlled(unet, task.network, p)(*inputs()) for p in (picture, -picture)]
    assert not torch.allclose(outputs[0], plain) and not torch.equal(*outputs)


@pytest.fixture
def pair():
    """A U-Net and a ControlNet whose Z are not 0."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(8, 8, (32, 64, 64), (True, True, False), 2, 4, 48, None)).eval()
    net = ControlNet.copy_of(unet).eval()
    for name, p in net.named_parameters():
        if name.startswith("controlnet"):
            torch.nn.init.normal_(p, std=0.1)
    return unet, net


def test_controlnet_is_diffusers(pair, tmp_path):
    unet, net = pair
    unet.save_pretrained(tmp_path / "unet")
    net.save_pretrained(tmp_path / "net")
    their_unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    their_net, info = ControlNetModel.from_pretrained(tmp_path / "net", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    (x_t, t, text), picture = inputs(8, (13, 9), 48), torch.randn(2, 1, 13, 9)
    with torch.no_grad():
        more, middle = their_net.eval()(x_t, t, text, picture, return_dict=False)
        added = {"down_block_additional_residuals": more, "mid_block_additional_residual": middle}
        theirs = their_unet(x_t, t, text, **added).sample
        again = ControlNet.from_pretrained(tmp_path / "net")
        ours = Controlled(unet, again, picture)(x_t, t, text)
        for a, b in zip(again(picture, x_t, t, text), [*more, middle], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_in_bf16_alone(pair):
    """As on CUDA, without autocast; and as a graph."""
    model, (x_t, t, text) = Controlled(*pair, torch.randn(1, 1, 13, 9)), inputs(8, (13, 9), 48)
    with torch.no_grad():
        expected, got = model(x_t, t, text), model.bfloat16()(x_t, t, text)
        call = plain_graph(model, (torch.zeros_like(x_t), torch.zeros_like(t), text))
        assert torch.equal(call(x_t, t, text), got)
    assert got.dtype == torch.bfloat16 and (got - expected).norm() < 3e-2 * expected.norm()


def test_gradient_checkpointing_changes_nothing(pair):
    model, gradients = Controlled(*pair, torch.ones(1, 1, 13, 9)), []
    for checkpointing in (False, True):
        loss = model(*inputs(8, (13, 9), 48), None, checkpointing).square().mean()
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    torch.testing.assert_close(*gradients)


class Waves:
    """A codec that stores the wave itself."""

    name, dequantize, decode = "wave", staticmethod(lambda x: x), staticmethod(lambda x: x)
    to_grid = staticmethod(to_grid)


def test_the_picture_shifts_with_the_rows(root, tmp_path):
    """Frame by frame the ControlNet sees x_t beside the loudness of the recording at that time."""
    model = sample.load_model(root / "model")
    ControlNet.copy_of(model.unet.unet).save_pretrained(tmp_path)
    rows, seen = control.add_control(model, tmp_path, torch.randn(CLIP_SAMPLES)).unet, []
    rows.unet.net.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[:2]))
    ramp = torch.arange(24.0 * 21).view(1, 1, 24, 21)
    rows.unet.picture, text = ramp, inputs()[2]
    with torch.no_grad():
        rows(ramp.expand(2, 128, 24, 21), 500, text)
    picture, x_t = seen
    assert rows.shifts[500] > 0 and torch.equal(picture, x_t[:, :1])
    assert picture[0, 0, 0, 0] == rows.shifts[500]


def test_loudness():
    wave = torch.sin(torch.arange(CLIP_SAMPLES) * 0.5)[None] * 0.05
    wave[:, CLIP_SAMPLES // 2 :] *= 10
    for codec, stored in ((MelCodec(), MelCodec().encode(wave)), (Waves, wave)):
        rows = loudness(codec, stored)[0, 0].mean(1)  # [24]
        assert (rows[13:23] - rows[1:11]).mean() == pytest.approx(1, abs=0.03)  # 20 dB
        level = 20 * np.log10(0.05 / np.sqrt(2) if codec is Waves else 0.05)
        assert rows[5] == pytest.approx((level + 40) / 20, abs=0.3)


def test_commands(root, tmp_path, capsys):
    """Train; go on after an interruption, to the bit; sample."""
    control.main(training(root, tmp_path / "run"))
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/run/model"
    weights = tmp_path / "run/model/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    (tmp_path / "run/checkpoints/step-0000004.pt").unlink()
    shutil.rmtree(tmp_path / "run/model")
    control.main(training(root, tmp_path / "run"))
    assert "2 of 4 steps are done" in capsys.readouterr().out and weights.read_bytes() == whole

    common = ["a horn", "--model", str(root / "model"), "--device", "cpu", "--steps", "2", "--out"]
    new = ["--controlnet", f"{tmp_path}/run/model", "--control", str(root / "a.wav")]
    edit.main([*common, f"{tmp_path}/b.wav", *new])
    sample.main([*common, f"{tmp_path}/plain.wav"])
    sounds = [soundfile.read(tmp_path / name)[0] for name in ("b.wav", "plain.wav")]
    assert len(sounds[0]) == CLIP_SAMPLES and not np.array_equal(*sounds)
    with soundfile.SoundFile(tmp_path / "b.wav") as file:
        assert json.loads(file.comment)["controlnet"] == f"{tmp_path}/run/model"


def test_mistakes_get_one_line(root, tmp_path):
    other = UNet(UNetConfig(128, 128, (32, 64), (False, True), 1, 4, 48, 32))
    ControlNet.copy_of(other).save_pretrained(tmp_path / "net")
    sound = f"x --model {root}/model --out {tmp_path} --device cpu --control {root}/a.wav "
    for main, arguments, part in (
        (edit.main, f"{sound} --controlnet {tmp_path}/net", "the ControlNet of another U-Net"),
        (edit.main, f"{sound} --controlnet {root}/model", "don't fit the config"),
        (edit.main, f"{sound} --controlnet {tmp_path}/net --control no.wav", "no.wav"),
        (control.main, f"--model {tmp_path} --out {tmp_path}/run", "model.json"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{re.escape(part)}"):
            main(arguments.split())
