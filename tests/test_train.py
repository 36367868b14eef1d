"""train.py: schedules, draws, resume to the bit, ranks, frozen blocks, the model folder, mistakes.

A run here takes a second: a U-Net of two levels, 32 wide, a random BERT, 24 synthetic clips.
"""

import copy
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from diffusers import UNet2DConditionModel

import diffusion
import sample
import train
from latents import CLIP_SAMPLES, LatentStats, MelCodec, encode_dataset, to_grid
from train import PRESETS, Config, Run, clips_of_step, draw, ema_decay, learning_rate, parse_args
from unet import UNet, UNetConfig

ROOT = Path(train.__file__).parent
NEW_LAYERS = ("conv_in.", "conv_out.", "encoder_hid_proj.")
TIMINGS = ("samples_per_second", "memory_gib")
# 8 steps with checkpoints after 3, 6 and 8 (the last two are kept); all blocks train after 4.
EIGHT = "--steps 8 --checkpoint-every 3 --frozen-steps 4 --validate-every 4".split()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """A run that nothing interrupted: what the others are compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    train.main([*small, *EIGHT, "--out", str(out)])
    return out


def checkpoint(run: Path, step: int) -> dict:
    return torch.load(run / f"checkpoints/step-{step:07d}.pt", weights_only=True)


def read_log(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def same(a, b) -> bool:
    """Equal to the bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a: Path, b: Path, step: int) -> None:
    """Weights, EMA, optimizer and step, the model folder, and all that the log says."""
    one, other = checkpoint(a, step), checkpoint(b, step)
    for name in ("unet", "ema", "optimizer", "step"):
        assert same(one[name], other[name]), name
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()
    assert read_log(a) == read_log(b)


def files(folder: Path) -> dict:
    """What is in a folder, byte for byte."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stop_before(step: int, monkeypatch, error: type) -> None:
    """Make the run fail once, before the step after `step`."""
    original = Run.train_step

    def train_step(self, batches):
        if self.step == step:
            monkeypatch.setattr(Run, "train_step", original)
            raise error
        return original(self, batches)

    monkeypatch.setattr(Run, "train_step", train_step)


def fails(arguments: list[str], *parts: str) -> str:
    """The command ends with status 1 and one line, which has all of `parts`."""
    with pytest.raises(SystemExit) as e:
        train.main(arguments)
    # A string as exit code is what Python prints to stderr, with status 1.
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    assert "\n" not in e.value.code
    for part in parts:
        assert part in e.value.code
    return e.value.code


# ---- pure functions of the step ------------------------------------------------------------------


def test_learning_rate():
    c = Config(steps=1000, warmup_steps=100, lr=1e-3)
    assert learning_rate(0, c) == pytest.approx(1e-5)  # the first step already learns
    assert learning_rate(49, c) == pytest.approx(5e-4)
    assert learning_rate(99, c) == learning_rate(100, c) == pytest.approx(1e-3)
    assert learning_rate(550, c) == pytest.approx(5e-4)
    assert learning_rate(999, c) == pytest.approx(1e-3 * math.sin(math.pi / 1800) ** 2)
    assert learning_rate(1000, c) == 0
    falling = [learning_rate(step, c) for step in range(100, 1001)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate(0, replace(c, warmup_steps=0)) == pytest.approx(1e-3)
    assert learning_rate(999, replace(c, warmup_steps=1000)) == pytest.approx(1e-3)


def test_ema_decay():
    for n in (0, 1, 90, 10_000, 10**6):
        assert ema_decay(n, Config()) == min(0.9999, (1 + n) / (10 + n))
    assert ema_decay(0, Config()) == 0.1 and ema_decay(10**6, Config()) == 0.9999
    assert ema_decay(90, Config(ema_decay=0.5)) == 0.5


def test_without_weights_every_clip_comes_once_an_epoch():
    n, batch = 10, 4
    drawn = np.concatenate([clips_of_step(step, batch, None, n, seed=3) for step in range(15)])
    epochs = drawn.reshape(-1, n)  # 15 steps of 4 are 6 epochs of 10
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each in an order of its own
    again = np.concatenate([clips_of_step(step, 5, None, n, seed=3) for step in range(12)])
    assert (drawn == again).all()  # the order is one sequence, however it is cut into steps
    other = clips_of_step(0, n, None, n, seed=4)
    assert (other != drawn[:n]).any()
    assert (np.sort(clips_of_step(0, 25, None, n, 0)[:20].reshape(2, n)) == np.arange(n)).all()


def test_balanced_draws(small, tmp_path):
    """16 of the 20 clips to train on are low and 4 are high; a high one comes up 3 times as often,
    as 18 of all 24 clips are low and 6 are high."""
    run = Run(parse_args([*small, "--out", str(tmp_path)]))
    assert run.clips == 20 and run.val_indices == [20, 21, 22, 23]
    drawn = np.concatenate(
        [clips_of_step(step, 20, run.weights, run.clips, 0) for step in range(500)]
    )
    assert drawn.min() == 0 and drawn.max() == 19  # nothing that is held out
    labels = Counter(run.data.labels[run.data.label_ids(i)[0]] for i in drawn)
    low, high = 16 / 18, 4 / 6
    assert labels["high"] / len(drawn) == pytest.approx(high / (low + high), abs=0.02)
    counts = np.bincount(drawn, minlength=20)
    of_high = [i for i in range(20) if i % 8 >= 6]
    assert counts[of_high].mean() == pytest.approx(3 * np.delete(counts, of_high).mean(), rel=0.1)
    assert counts[of_high].min() > 2 * np.delete(counts, of_high).max()
    again = clips_of_step(7, 20, run.weights, run.clips, 0)
    assert (again == drawn[140:160]).all()
    assert (clips_of_step(7, 20, run.weights, run.clips, 1) != again).any()


def test_draw_depends_on_seed_step_and_place_only():
    c, captions = Config(seed=5), ["one", "two", "three"]

    def noise(seed, step, place):
        return draw(step, place, captions, (2, 3), replace(c, seed=seed))[2]

    first = draw(10, 3, captions, (2, 3), c)
    np.random.seed(9)
    torch.manual_seed(9)
    again = draw(10, 3, captions, (2, 3), c)
    assert first[:2] == again[:2] and (first[2] == again[2]).all()
    assert first[2].dtype == np.float32
    places = [(5, 10, 3), (6, 10, 3), (5, 11, 3), (5, 10, 4), (5, 3, 10), (10, 5, 3)]
    for a, b in itertools.combinations(places, 2):
        assert (noise(*a) != noise(*b)).all(), (a, b)


def test_draw_is_uniform_and_drops_captions():
    c = Config(caption_dropout=0.1)
    drawn = [draw(i // 50, i % 50, ["one", "two", "three"], (4,), c) for i in range(12_000)]
    captions = Counter(caption for caption, _, _ in drawn)
    assert captions[""] / 12_000 == pytest.approx(0.1, abs=0.01)
    for caption in ("one", "two", "three"):
        assert captions[caption] / 12_000 == pytest.approx(0.3, abs=0.02)
    t = np.array([t for _, t, _ in drawn])
    assert set(t) == set(range(1000))
    assert np.histogram(t, 10, (0, 1000))[0] == pytest.approx(1200, rel=0.1)
    noise = np.stack([noise for *_, noise in drawn])
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    for rate, empty in ((0.0, 0), (1.0, 50)):
        c = Config(caption_dropout=rate)
        assert sum(draw(0, i, ["one"], (1,), c)[0] == "" for i in range(50)) == empty


def test_ranks_and_parts_share_one_global_batch(small, tmp_path):
    run = Run(parse_args([*small, "--out", str(tmp_path)]))
    expected = run.batch(step=3, part=0)
    run.c, run.ranks = replace(run.c, batch_size=1, accumulate=2), 2
    shares = []
    for part, run.rank in itertools.product((0, 1), (0, 1)):
        shares.append(run.batch(step=3, part=part))
    indices, captions, stored, t, noise = zip(*shares, strict=True)
    assert sum(indices, []) == expected[0] and sum(captions, []) == expected[1]
    for got, whole in zip((stored, t, noise), expected[2:], strict=True):
        assert torch.equal(torch.cat(got), whole)


# ---- one step, by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction, schedule, shift",
    [("v", "cosine", 0.2), ("eps", "scaled-linear", 1.0), ("x0", "cosine", 0.5)],
)
def test_the_first_step_by_hand(prediction, schedule, shift, small, tmp_path):
    options = ["--prediction", prediction, "--schedule", schedule, "--caption-dropout", "0.5"]
    options += ["--schedule-shift", str(shift)]
    c = parse_args([*small, *options, "--out", str(tmp_path), "--steps", "1", "--clip", "0.1"])
    run = Run(c)
    reference = UNet(run.unet.config)  # in the ordinary memory format
    reference.load_state_dict(run.unet.state_dict())
    indices, captions, stored, t, noise = run.batch(0, 0)
    assert "" in captions and len(set(captions)) > 1

    # MelCodec: −80 … 6 dB; the k-th cosine over the bands is taken times √(1 + k).
    k, band = torch.arange(128).double(), torch.arange(128).double()[:, None]
    cosines = torch.cos(torch.pi * k * (band + 0.5) / 128) * (2 / 128) ** 0.5
    cosines[:, 0] *= 0.5**0.5
    z = stored.double() * (86 / 255) - 80
    z = (cosines @ ((1 + k[:, None]).sqrt() * (cosines.T @ z))).float()
    stats = run.data.stats
    x_0 = to_grid((z - stats.mean.float()[:, None]) / stats.std.float()[:, None])
    alphas_cumprod = {
        "cosine": diffusion.cosine_alphas_cumprod,
        "scaled-linear": diffusion.scaled_linear_alphas_cumprod,
    }[schedule]()
    ratio = shift**2 * alphas_cumprod / (1 - alphas_cumprod)  # of signal to noise
    alphas_cumprod = ratio / (1 + ratio)
    a = alphas_cumprod[t].float()[:, None, None, None]
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    target = {"eps": noise, "v": a.sqrt() * noise - (1 - a).sqrt() * x_0, "x0": x_0}[prediction]
    predicted = reference(x_t, t, *run.encoder(captions))
    losses = (predicted - target).square().mean((1, 2, 3))
    if prediction == "x0":
        losses = losses / (1 - alphas_cumprod[t]).float().clamp(min=0.2)
    loss = losses.mean()
    loss.backward()
    before = copy.deepcopy(reference.state_dict())
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    assert norm > 0.2  # so that clipping matters
    lr = learning_rate(0, c)
    torch.optim.AdamW(reference.parameters(), lr, (0.9, 0.95), weight_decay=0.01).step()

    logged = run.train_step([run.batch(0, 0)])
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert logged["lr"] == lr and logged["step"] == run.step == 1
    for name, p in run.unet.named_parameters():
        gradient = reference.get_parameter(name).grad
        got = run.optimizer.state[p]["exp_avg"] / 0.1
        assert (got - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name
        # Adam's first step is lr·sign(gradient), whatever the size of the gradient: where that is
        # all rounding, so is the step.
        certain = gradient.abs() > 1e-6
        after = reference.get_parameter(name)
        torch.testing.assert_close(p[certain], after[certain], rtol=0, atol=0.01 * lr)
        average = 0.1 * before[name] + 0.9 * p
        torch.testing.assert_close(run.ema.get_parameter(name), average)


def test_bf16_and_gradient_checkpointing_and_accumulation(small, tmp_path):
    """Other ways to compute the same step."""

    def first_step(*options):
        run = Run(parse_args([*small, "--out", str(tmp_path), *options]))
        logged = run.train_step([run.batch(0, part) for part in range(run.c.accumulate)])
        return logged["loss"], [run.optimizer.state[p]["exp_avg"] for p in run.unet.parameters()]

    loss, gradients = first_step()
    for options, tolerance in (
        (["--gradient-checkpointing"], 1e-6),
        (["--batch-size", "2", "--accumulate", "2"], 1e-5),
        (["--precision", "bf16"], 5e-2),
    ):
        other, others = first_step(*options)
        assert other == pytest.approx(loss, rel=tolerance), options
        assert distance(others, gradients) < tolerance, options
    assert other != loss  # bf16 is another


def distance(a: list, b: list) -> float:
    """‖a − b‖ / ‖b‖ over all tensors together."""
    apart = sum((x - y).double().square().sum() for x, y in zip(a, b, strict=True))
    return (apart / sum(y.double().square().sum() for y in b)).sqrt().item()


def test_it_learns(small, tmp_path):
    """A network that ignores its input doesn't get below 1, the variance of v."""
    options = "--steps 80 --batch-size 2 --block-out-channels 64,64 --attention 0,0 ".split()
    options += "--sample-every 80 --validate-every 80 --checkpoint-every 80".split()
    command = [*small, *options, "--out", str(tmp_path / "run")]
    before = Run(parse_args(command)).validate()["val_loss"]
    train.main(command)
    log = read_log(tmp_path / "run")
    losses = [line["loss"] for line in log]
    assert len(losses) == 80 and before > 1 and np.mean(losses[:5]) > 0.95
    assert np.mean(losses[-20:]) < 0.95
    # So has the average of the weights, on clips that it didn't see and the same noise as before.
    assert log[-1]["val_loss"] < before - 0.2 and len(log[-1]["val_loss_bins"]) == 4
    wave, rate = soundfile.read(tmp_path / "run/samples/step-0000080.wav")
    assert rate == 16_000 and len(wave) == CLIP_SAMPLES and np.std(wave) > 1e-4


def test_validation_depends_neither_on_the_batch_nor_on_when(small, tmp_path):
    run = Run(parse_args([*small, "--out", str(tmp_path)]))
    expected = run.validate()
    assert expected["val_loss"] == pytest.approx(np.mean(expected["val_loss_bins"]))
    assert run.validate() == expected
    run.c, run.step = replace(run.c, batch_size=3), 7
    assert run.validate()["val_loss_bins"] == pytest.approx(expected["val_loss_bins"], rel=1e-5)


# ---- resume --------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_as_if_nothing_had_happened(whole, small, tmp_path, monkeypatch):
    """Interrupted twice, before and after the blocks thaw, each time beyond a checkpoint."""
    out = tmp_path / "run"
    command = [*small, *EIGHT, "--out", str(out)]
    for step, error in ((4, KeyboardInterrupt), (7, RuntimeError)):
        stop_before(step, monkeypatch, error)
        with pytest.raises((SystemExit, RuntimeError)) as e:
            train.main(command)
        if error is KeyboardInterrupt:
            assert "goes on from" in e.value.code
        assert len(read_log(out)) == step
    (out / "log.jsonl").open("a").write('{"step": 8, "lo')  # as a full disk leaves it
    # What a kill while it was writing leaves behind:
    (out / "checkpoints/step-0000009.tmp").write_bytes(b"torn")
    (out / "model.tmp").mkdir()
    (out / "model").rename(out / "model.old")
    train.main(command)
    assert_same_run(out, whole, 8)
    assert not list(out.rglob("*.tmp")) and not (out / "model.old").exists()
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step-0000006.pt",
        "step-0000008.pt",
    ]


@pytest.mark.parametrize("kept", ["model", "model.old"])
def test_killed_while_the_model_folder_was_replaced(kept, whole, small, tmp_path):
    """Between any two of its renames."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints/step-0000008.pt").unlink()
    shutil.copytree(out / "model", out / "model.old")
    if kept == "model.old":
        shutil.rmtree(out / "model")
    train.main([*small, *EIGHT, "--out", str(out)])
    assert_same_run(out, whole, 8)
    assert not (out / "model.old").exists()


@pytest.mark.parametrize("what", ["Run.save_model", "torch.save"])
def test_a_full_disk_at_the_end(what, whole, small, tmp_path, monkeypatch):
    """A run counts as finished once both its model folder and its last checkpoint are written."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints/step-0000008.pt").unlink()

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"train.{what}", no_space)
    fails([*small, *EIGHT, "--out", str(out)], "No space left on device")
    monkeypatch.undo()
    shutil.rmtree(out / "model")
    train.main([*small, *EIGHT, "--out", str(out)])
    assert_same_run(out, whole, 8)


@pytest.mark.parametrize("share, what", [(0.5, "weights"), (1.5, "step-0000008.pt")])
def test_a_disk_that_fills_up(share, what, whole, small, tmp_path):
    """Stood in for by a limit on the size of files: too small for the model, or the checkpoint."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.copytree(whole, out)
    (out / "checkpoints/step-0000008.pt").unlink()
    before = files(out)
    size = (out / "model/unet/diffusion_pytorch_model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
    try:
        line = fails([*small, *EIGHT, "--out", str(out)], what, "not written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line
    after = files(out)
    differ = [str(path) for path in before if after[path] != before[path]]
    assert set(differ) <= {"log.jsonl", "config.json"}
    assert not list((out / "checkpoints").glob("*.tmp"))  # it would take the room of the next one
    train.main([*small, *EIGHT, "--out", str(out)])
    assert_same_run(out, whole, 8)


@pytest.mark.parametrize("damage", ["half", "other bytes"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, whole, small, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    newest = out / "checkpoints/step-0000008.pt"
    if damage == "half":
        os.truncate(newest, newest.stat().st_size // 2)
    else:
        newest.write_bytes(b"torn")
    train.main([*small, *EIGHT, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "step-0000008.pt can't be read" in printed and "from step 6" in printed
    assert_same_run(out, whole, 8)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\3\4" + bytes(200)])
def test_without_a_readable_checkpoint_nothing_starts_over(content, whole, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(content)
    before = files(out)
    fails([*small, *EIGHT, "--out", str(out)], str(out), "--no-resume")
    assert files(out) == before


def test_a_finished_run_says_so(whole, small, capsys):
    before = files(whole)
    train.main([*small, *EIGHT, "--out", str(whole)])  # and doesn't exit with an error
    assert f"finished at step 8; its model is {whole}/model" in capsys.readouterr().out
    assert files(whole) == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "9"], "has steps = 8, this command 9"),
        (["--lr", "2e-3"], "has lr = 0.001, this command 0.002"),
        (["--seed", "1"], "has seed = 0, this command 1"),
        (["--prediction", "eps"], "has prediction = 'x0', this command 'eps'"),
        (["--no-balanced"], "has balanced = True, this command False"),
        (["--num-heads", "4"], "has num_heads = 2, this command 4"),
        (["--accumulate", "2"], "has global_batch = 4, this command 8"),
    ],
)
def test_what_is_part_of_the_run_cant_change(options, message, whole, small):
    before = files(whole)
    line = fails([*small, *EIGHT, "--out", str(whole), *options], str(whole), message)
    assert "--init" in line
    assert files(whole) == before


def test_what_isnt_part_of_the_run_may_change(whole, small, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stop_before(5, monkeypatch, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        train.main([*small, *EIGHT, "--out", str(out)])
    options = "--batch-size 2 --accumulate 2 --gradient-checkpointing --checkpoint-every 1".split()
    moved = out.rename(tmp_path / "moved")
    train.main([*small, *EIGHT, *options, "--out", str(moved)])
    assert [p.name for p in sorted((moved / "checkpoints").iterdir())] == [
        "step-0000007.pt",
        "step-0000008.pt",
    ]
    a, b = checkpoint(moved, 8)["unet"], checkpoint(whole, 8)["unet"]
    assert distance(list(a.values()), list(b.values())) < 1e-3


def test_no_resume_sets_the_old_run_aside(whole, small, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = files(out)
    for n in (1, 2):
        train.main([*small, "--steps", "1", "--out", str(out), "--no-resume"])
        assert f"the old run is now {out}.{n}" in capsys.readouterr().out
        assert [line["step"] for line in read_log(out)] == [1]
    assert files(tmp_path / "run.1") == before
    assert len(read_log(tmp_path / "run.2")) == 1


def test_resume_in_another_layout(whole, small, tmp_path, monkeypatch, capsys):
    """As from a GPU to a CPU: AdamW's moments are to lie in memory as the weights do."""
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(train, "layout", lambda device: torch.channels_last)
    saved = checkpoint(tmp_path / "run", 8)["optimizer"]["state"]
    run = Run(parse_args([*small, *EIGHT, "--out", str(tmp_path / "run")]))
    run.source = "another"
    train.load_newest(run)
    assert "its source files were others" in capsys.readouterr().out
    for i, p in enumerate(run.unet.parameters()):
        state = run.optimizer.state[p]
        assert torch.equal(state["exp_avg_sq"], saved[i]["exp_avg_sq"])
        assert state["exp_avg_sq"].stride() == state["exp_avg"].stride() == p.stride()
    assert run.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("what", ["loss nan", "loss inf", "gradient norm"])
def test_numbers_that_arent_finite_stop_the_run(what, whole, small, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = [*small, *EIGHT, "--out", str(out)]
    original = Run.loss

    def loss(self, *args):
        losses = original(self, *args)
        if self.step == 4 and torch.is_grad_enabled():
            losses = losses * {"loss nan": math.nan, "loss inf": math.inf}.get(what, 1)
            losses.register_hook(lambda gradient: gradient * math.inf)
        return losses

    monkeypatch.setattr(Run, "loss", loss)
    says = {"loss nan": "loss nan", "loss inf": "loss inf", "gradient norm": "gradient norm nan"}
    message = fails(command, "step 5", says[what], "tone-")
    assert what != "gradient norm" or "loss nan" not in message and "loss inf" not in message
    monkeypatch.undo()
    run = Run(parse_args(command))
    clips = clips_of_step(4, 4, run.weights, run.clips, seed=0)
    for i in clips:
        assert run.data.record(int(i))["id"] in message
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-0000003.pt"]
    assert len(read_log(out)) == 4
    train.main(command)  # the checkpoint before is as it should be
    assert_same_run(out, whole, 8)


def test_one_silent_clip_with_a_long_caption(small, tmp_path, monkeypatch):
    """No channel ever changes, so every std is 0; the caption is longer than the encoder takes."""
    monkeypatch.setattr(MelCodec, "iterations", 1)
    row = {"id": "silence", "file": "0.wav", "captions": ["very " * 99 + "silent"], "labels": []}
    encode_dataset(tmp_path / "one", MelCodec(), [row], lambda row: torch.zeros(1, CLIP_SAMPLES))
    assert LatentStats.load(tmp_path / "one/latent_stats.safetensors").std.abs().max() < 1e-6
    options = f"--data {tmp_path}/one --val-data {tmp_path}/one --batch-size 1 --steps 2".split()
    options += ["--sample-every", "2", "--caption-dropout", "0", "--out", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match="captions of more than 16 tokens are cut"):
        train.main([*small, *options])
    log = read_log(tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in log) and math.isfinite(log[-1]["val_loss"])
    assert (tmp_path / "run/samples/step-0000002.wav").exists()
    model = sample.load_model(tmp_path / "run/model")
    assert sample.generate(model, ["silence"], steps=2).isfinite().all()


def test_the_same_command_gives_the_same_bytes(small, tmp_path, monkeypatch):
    monkeypatch.setattr(MelCodec, "iterations", 1)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        train.main([*small, "--steps", "2", "--sample-every", "2", "--out", "run"])
    one, other = (files(tmp_path / name / "run") for name in ("one", "other"))
    assert len(one) == 8 and one.keys() == other.keys()
    assert [str(path) for path in one if one[path] != other[path]] == ["log.jsonl"]
    assert read_log(tmp_path / "one/run") == read_log(tmp_path / "other/run")  # but for timings


# ---- frozen blocks -------------------------------------------------------------------------------


def test_frozen_blocks_thaw(whole, small, tmp_path, monkeypatch):
    command = [*small, *EIGHT, "--out", str(tmp_path / "run")]
    start = copy.deepcopy(Run(parse_args(command)).unet.state_dict())
    stop_before(4, monkeypatch, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        train.main([*command, "--checkpoint-every", "1"])
    frozen = checkpoint(tmp_path / "run", 4)
    for name, value in start.items():
        moves = name.startswith(NEW_LAYERS)
        for weights in ("unet", "ema"):
            assert torch.equal(frozen[weights][name], value) != moves, name
    assert len(frozen["optimizer"]["state"]) == 6  # weight and bias of three layers
    thawed = checkpoint(whole, 8)
    for name, value in start.items():
        assert not torch.equal(thawed["unet"][name], value), name
        assert not torch.equal(thawed["ema"][name], value), name


# ---- ranks ---------------------------------------------------------------------------------------

# Imports train.py once, then forks the ranks of one run after the other. (torchrun, which takes
# longer, is for the test below.)
FORK = """
import json, os, shutil, sys
import torch.multiprocessing as mp
import train

def rank(r, ranks, port, arguments):
    os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train.main(arguments)

for ranks, port, arguments, whole, without in json.loads(sys.argv[1]):
    if whole:  # go on from a copy of this run, without its newest checkpoint
        out = arguments[arguments.index("--out") + 1]
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns(without))
    mp.start_processes(rank, (ranks, port, arguments), nprocs=ranks, start_method="fork")
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


TEN = "--steps 10 --checkpoint-every 10 --validate-every 10".split()
# For the run that is killed: enough steps after the first checkpoints to be caught in the act.
THIRTY = "--steps 30 --checkpoint-every 3 --frozen-steps 14 --validate-every 50".split()
FOUR = "--steps 4 --checkpoint-every 2".split()


@pytest.fixture(scope="session")
def ranks(small, tmp_path_factory):
    """A folder of runs on several ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = []
    for name, n, batch, options, whole in (
        ("one", 2, 2, ["--steps", "1"], ""),
        ("ten", 2, 2, TEN, ""),
        ("thirty", 2, 2, THIRTY, ""),
        ("three", 3, 1, FOUR, ""),
        ("three-resumed", 3, 1, FOUR, f"{folder}/three"),
    ):
        arguments = [*small, *options, "--batch-size", str(batch), "--out", f"{folder}/{name}"]
        jobs.append([n, free_port(), arguments, whole, "step-0000004.pt"])
    command = [sys.executable, "-c", FORK, json.dumps(jobs)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "3 a step, from step 2" in done.stdout
    return folder


def test_resume_on_three_ranks(ranks):
    """Where the last bits of a sum of gradients depend on the order in which it is taken."""
    assert_same_run(ranks / "three-resumed", ranks / "three", 4)


@pytest.mark.parametrize("options", [[], ["--batch-size", "2", "--accumulate", "2"]])
def test_two_ranks_are_one(options, ranks, small, tmp_path):
    """And two forward passes a step are one, at the same global batch."""
    other = ranks if not options else tmp_path / "other"
    for name, steps in (("one", ["--steps", "1"]), ("ten", TEN)):
        train.main([*small, *steps, "--out", str(tmp_path / name)])
        if options:
            train.main([*small, *steps, *options, "--out", str(other / name)])

    def gradients(run):  # AdamW's exp_avg after one step is 0.1 · clipped gradient
        state = checkpoint(run, 1)["optimizer"]["state"]
        return [s["exp_avg"] for s in state.values()]

    assert distance(gradients(other / "one"), gradients(tmp_path / "one")) < 1e-5

    start = Run(parse_args([*small, "--out", str(tmp_path)])).unet.state_dict()

    def changes(run):
        after = checkpoint(run, 10)["unet"]
        return [after[name] - start[name] for name in start]

    assert distance(changes(other / "ten"), changes(tmp_path / "ten")) < 1e-2
    for a, b in zip(read_log(other / "ten"), read_log(tmp_path / "ten"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # averaged over ranks
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)  # of the last step


def processes_of(torchrun: int) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    ]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")  # a zombie waits for whoever adopted it, and does nothing
    return status.exists() and "zombie" not in status.read_text()


# Two ranks that differ: in the working directory, an option, the source.
DIFFER = """
import json, os, sys
import torch.multiprocessing as mp
import train

def rank(r, port, name, folders, options, sources, arguments):
    os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folders[r])
    train.__file__ = sources[r]
    try:
        train.main([*arguments, *options[r]])
    except SystemExit as e:
        open(f"{folders[0]}/{name}.{r}", "w").write(e.code)

for job in json.loads(sys.argv[1]):
    mp.start_processes(rank, tuple(job), nprocs=2, start_method="fork")
"""


def test_ranks_that_disagree(whole, small, tmp_path):
    """Each says, before anything is computed, which rank has something else than rank 0."""
    a, b = tmp_path / "a", tmp_path / "b"
    data = small[small.index("--data") + 1]
    for folder in (a, b):
        shutil.copytree(data, folder / "data")
        (folder / "code").mkdir()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder / "code")
    plan = json.loads((b / "data/plan.json").read_text())  # the same sounds, other captions
    (b / "data/plan.json").write_text(json.dumps(plan | {"table": "another"}))
    (b / "code/unet.py").write_text("another version")
    shutil.copytree(whole, a / "run")  # rank 1 doesn't see rank 0's checkpoints
    here, code = [str(a), str(a)], [f"{a}/code/train.py"] * 2
    cases = {
        "option": (here, [["--seed", "1"], ["--seed", "2"]], code, "seed = 2, rank 0 1"),
        "data": ([str(a), str(b)], [["--data", "data"]] * 2, code, "data (its hash) = '"),
        "code": (here, [[], []], [code[0], f"{b}/code/train.py"], "source files (their hash) = '"),
        "run": ([str(a), str(b)], [EIGHT] * 2, code, "checkpoint of step = 0, rank 0 8"),
    }
    arguments = [*small, "--batch-size", "2", "--out", "run"]
    jobs = [[free_port(), name, *case[:3], arguments] for name, case in cases.items()]
    command = [sys.executable, "-c", DIFFER, json.dumps(jobs)]
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 60 * len(jobs)
    for name, (*_, message) in cases.items():
        for rank, start in enumerate(("error: ", "error on rank 1: ")):
            line = (a / f"{name}.{rank}").read_text()
            assert line.startswith(f"{start}rank 1 has {message}") and "\n" not in line, line


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_torchrun_killed_with_sigkill(ranks, small, tmp_path):
    """Two ranks, killed three times: all processes, while blocks are frozen; one rank, which ends
    all, and is named; and torchrun alone."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "train.py", *small, *THIRTY, "--batch-size", "2"]
    command += ["--out", str(out)]
    log = out / "log.jsonl"
    for steps, victims in ((6, "all"), (13, "rank 1"), (20, "torchrun")):
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
            )
        pids = []
        try:
            while not (log.exists() and log.read_bytes().count(b"\n") >= steps):
                assert process.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.005)
            pids = processes_of(process.pid)
            assert len(pids) == 2
        finally:
            torchrun = [process.pid]
            doomed = {"all": torchrun + pids, "rank 1": pids[1:], "torchrun": torchrun}[victims]
            for pid in doomed or torchrun:
                os.kill(pid, signal.SIGKILL)
            process.wait(timeout=60)
        if victims == "rank 1":
            printed = (tmp_path / "output").read_text()
            assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", printed), printed
        for _ in range(1000):  # orphans stop by themselves
            if not any(map(alive, pids)):
                break
            time.sleep(0.1)
        assert not any(map(alive, pids))
        done = os.listdir(out / "checkpoints")
        assert "step-0000030.pt" not in done, "it was faster than the kill"

    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.search("from step (15|18|21|24|27)", done.stdout), done.stdout
    assert_same_run(out, ranks / "thirty", 30)


# ---- the model folder ----------------------------------------------------------------------------


def test_the_model_folder(whole, small):
    model = json.loads((whole / "model/model.json").read_text())
    arguments = dict(zip(small[::2], small[1::2], strict=True))
    assert model == {
        "text_encoder": arguments["--text-encoder"],
        "max_length": 16,
        "mask": "both",
        "codec": MelCodec().settings(),
        "sample_rate": 16_000,
        "schedule": "cosine",
        "schedule_shift": Config().schedule_shift,
        "prediction": Config().prediction,
        "guidance": Config().guidance,
        "trained_on": {"data": "data", "clips": 20, "steps": 8, "global_batch": 4, "init": None},
    }
    stats = LatentStats.load(whole / "model/latent_stats.safetensors")
    expected = LatentStats.load(Path(arguments["--data"]) / "latent_stats.safetensors")
    assert torch.equal(stats.mean, expected.mean) and torch.equal(stats.std, expected.std)

    ema = checkpoint(whole, 8)["ema"]
    theirs = UNet2DConditionModel.from_pretrained(whole / "model/unet").state_dict()
    ours = UNet.from_pretrained(whole / "model").state_dict()
    assert same(dict(theirs), ema) and same(dict(ours), ema)
    assert {value.dtype for value in ema.values()} == {torch.float32}
    assert not same(ema, checkpoint(whole, 8)["unet"])


def test_fine_tuning_starts_from_the_model_folder(whole, small, tmp_path, capsys):
    """With its architecture, whatever the preset says, and its statistics."""
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    stats = LatentStats.load(model / "latent_stats.safetensors")
    LatentStats(stats.mean + 1, stats.std * 2, 7).save(model / "latent_stats.safetensors")
    command = [*small, "--init", str(model), "--out", str(tmp_path / "run"), "--steps", "1"]
    run = Run(parse_args([*command, "--block-out-channels", "64,64"]))
    ema = checkpoint(whole, 8)["ema"]
    assert same(dict(run.unet.state_dict()), ema) and same(dict(run.ema.state_dict()), ema)
    train.main(command)
    assert "fresh" not in capsys.readouterr().out
    about = json.loads((tmp_path / "run/model/model.json").read_text())
    assert about["trained_on"]["init"] == str(model)
    kept = LatentStats.load(tmp_path / "run/model/latent_stats.safetensors")
    assert torch.equal(kept.mean, stats.mean + 1) and torch.equal(kept.std, stats.std * 2)


def test_resume_without_the_folder_it_started_from(whole, small, tmp_path, monkeypatch):
    """The run's own model folder has what isn't in the checkpoint. And ./x is x."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    stats = LatentStats.load(model / "latent_stats.safetensors")
    LatentStats(stats.mean + 1, stats.std * 2, 7).save(model / "latent_stats.safetensors")
    command = [*small, *FOUR, "--init"]
    train.main([*command, "model", "--out", "one"])
    stop_before(3, monkeypatch, KeyboardInterrupt)
    with pytest.raises(SystemExit):
        train.main([*command, "model", "--out", "other"])
    shutil.rmtree(model)
    train.main([*command, "./model", "--out", f"{tmp_path}/other"])
    assert_same_run(tmp_path / "other", tmp_path / "one", 4)
    stats = Path("model/latent_stats.safetensors")
    assert ("other" / stats).read_bytes() == ("one" / stats).read_bytes()
    fails([*command, "elsewhere", "--out", "other"], "init = './model', this command 'elsewhere'")


def test_init_from_stable_diffusion(small, tmp_path, capsys):
    """A folder as Stable Diffusion's: 4 channels, and no projection of the text."""
    torch.manual_seed(1)
    sd = UNet(UNetConfig(4, 4, (32, 64), (True, False), 1, 4, 24, None))
    sd.save_pretrained(tmp_path / "sd/unet")
    command = [*small, "--init", str(tmp_path / "sd"), "--out", str(tmp_path / "run")]
    train.main([*command, "--steps", "1", "--lr", "1e-9", "--weight-decay", "0"])
    line = "freshly initialised: conv_in, conv_out, encoder_hid_proj"
    assert line in capsys.readouterr().out
    trained = checkpoint(tmp_path / "run", 1)["unet"]
    assert trained["conv_in.weight"].shape == (32, 128, 3, 3)  # 128 mel bands
    assert trained["encoder_hid_proj.weight"].shape == (24, 32)
    for name, value in sd.state_dict().items():
        if not name.startswith(NEW_LAYERS):
            torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-9)


# ---- the command line ----------------------------------------------------------------------------


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as e:
        parse_args(["--help"])
    assert e.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    source = (ROOT / "train.py").read_text()
    body = source[source.index("class Config") : source.index("PRESETS = ")]
    for field in fields(Config):
        line = next(x for x in body.splitlines() if x.startswith(f"    {field.name}: "))
        comment = line.partition("  # ")[2]
        assert comment and f"--{field.name.replace('_', '-')}" in shown
        assert " ".join(comment.split()) in shown, field.name


def test_presets_differ_in_values_only():
    assert parse_args([]) == PRESETS["tiny"] == Config()
    assert parse_args(["--preset", "paper"]) == PRESETS["paper"]
    assert all(type(preset) is Config for preset in PRESETS.values())
    c = parse_args("--preset paper --steps 7 --attention 1,0,0,1 --no-resume --lr 1".split())
    changed = {"steps": 7, "attention": (True, False, False, True), "resume": False, "lr": 1.0}
    assert c == replace(PRESETS["paper"], **changed)
    assert type(c.lr) is float and type(c.attention[0]) is bool


def test_the_papers_values():
    c = PRESETS["paper"]
    assert (c.lr, c.steps, c.warmup_steps, c.batch_size) == (2.56e-4, 60_000, 1000, 192)
    assert (c.schedule, c.schedule_shift) == ("cosine", 1.0)  # without a shift
    assert (c.prediction, c.clip, c.guidance) == ("eps", 1.0, 6.5)
    assert (c.text_encoder, c.max_length, c.mask) == ("t5-large", 50, "none")
    unet = UNetConfig()
    for name in ("block_out_channels", "attention", "layers_per_block", "num_heads"):
        assert getattr(c, name) == getattr(unet, name)
    assert c.cross_attention_dim == 768 and c.gradient_checkpointing
    # This project's, in neither paper
    assert (c.caption_dropout, c.ema_decay, c.precision) == (0.1, 0.9999, "bf16")
    tiny = PRESETS["tiny"]
    assert tiny.prediction == "x0"  # with ε, its first level would be too narrow


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--steps 0", "--steps must be 1 or more"),
        ("--steps many", "invalid int value: 'many'"),
        ("--batch-size -1", "--batch-size must be 1 or more"),
        ("--accumulate 0", "--accumulate must be 1 or more"),
        ("--val-clips 0", "--val-clips must be 1 or more"),
        ("--num-heads 0", "--num-heads must be 1 or more"),
        ("--layers-per-block 0", "--layers-per-block must be 1 or more"),
        ("--sample-every -1", "--sample-every must be 0 or more"),
        ("--seed -1", "--seed must be 0 or more"),
        ("--mask some", "argument --mask: invalid choice: 'some' (choose from "),
        ("--prediction x", "argument --prediction: invalid choice: 'x'"),
        ("--schedule linear", "argument --schedule: invalid choice: 'linear'"),
        ("--precision fp16", "argument --precision: invalid choice: 'fp16'"),
        ("--caption-dropout 2", "--caption-dropout must be 0 to 1"),
        ("--ema-decay 1.5", "--ema-decay must be 0 to 1"),
        ("--lr 0", "--lr must be above 0"),
        ("--lr nan", "--lr must be above 0"),
        ("--schedule-shift 0", "--schedule-shift must be above 0"),
        ("--preset huge", "invalid choice: 'huge'"),
        ("--attention yes,no", "--attention"),
        ("--stpes 3", "unrecognized arguments"),
    ],
)
def test_a_bad_command_line_has_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(arguments.split())
    assert e.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--batch-size", "64"], ["20 clips to train on", "the 64 of one step", "--batch-size"]),
        (["--val-clips", "100"], ["0 clips to train on", "24 are held out", "--val-clips"]),
        (["--data", "nowhere"], ["nowhere", "not a stored data set"]),
        (["--val-data", "nowhere"], ["nowhere", "not a stored data set"]),
        (["--init", "nowhere"], ["nowhere", "no U-Net there"]),
        (["--init", "nobody/no-such-model"], ["nobody/no-such-model", "hub"]),
        (["--text-encoder", "./nowhere"], ["nowhere", "no such folder"]),
        (["--max-length", "99"], ["max_length 99", "from 3 to 32"]),
        (["--device", "cuda"], ["device cuda", "PyTorch finds only cpu here"]),
        (["--device", "tpu"], ["device tpu", "PyTorch finds only cpu here"]),
        (["--block-out-channels", "32,48"], ["48 channels", "multiple of both"]),
        (["--attention", "1"], ["attention has 1 levels", "one value for each level"]),
        (["--out", "{file}/run"], ["file/run"]),
    ],
)
def test_a_mistake_gets_one_line(options, parts, small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "file").touch()
    options = [option.format(file=tmp_path / "file") for option in options]
    fails([*small, "--out", str(tmp_path / "run"), *options], *parts)
    assert not (tmp_path / "run").exists()


def test_eight_ranks_without_data_for_each(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    # As if all eight had met, and agreed
    stub = SimpleNamespace(is_initialized=lambda: True)
    stub.all_gather_object = lambda every, mine: every.__setitem__(slice(None), [mine] * 8)
    monkeypatch.setattr(train, "dist", stub)
    with pytest.raises(ValueError, match=r"20 clips to train on .* 32 of one step \(8 ranks × 1"):
        Run(parse_args([*small, "--out", str(tmp_path)]))


def test_init_that_doesnt_fit(whole, small, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    command = [*small, "--init", str(model), "--out", str(tmp_path / "run")]
    fails([*command, "--prediction", "eps"], str(model), "prediction = 'x0'")
    run = ["--init", str(whole), "--out", str(tmp_path / "run")]
    fails([*small, *run], f"{whole} is a run, not a model: give --init {whole}/model")
    about = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(about | {"codec": {"name": "encodec"}}))
    fails(command, str(model), "encodec")
    del about["mask"]
    for damaged in (json.dumps(about), "{", "[]"):
        (model / "model.json").write_text(damaged)
        fails(command, "model.json")


def test_a_narrow_first_level_is_warned_of(small, tmp_path, capsys):
    small = [*small, "--prediction", "eps", "--out", str(tmp_path)]
    Run(parse_args(small))
    assert "can't predict well what has 128 channels: use 256 or more" in capsys.readouterr().out
    Run(parse_args([*small, "--block-out-channels", "256,32"]))
    assert "warning" not in capsys.readouterr().out
