"""train.py: schedules, draws, a step by hand, resume to the bit, ranks, the model folder, mistakes.

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
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._pytree import tree_leaves

import diffusion
import train
from benchmarks.gpu import Operations
from latents import LatentStats, MelCodec, to_grid
from train import PRESETS, Config, clips_of_step, draw, ema_decay, learning_rate, parse_args
from unet import UNet, UNetConfig

ROOT = Path(train.__file__).parent
NEW_LAYERS = ("conv_in.", "conv_out.", "encoder_hid_proj.")
# 8 steps with checkpoints after 3, 6 and 8 (the last two are kept); all blocks train after 4.
EIGHT = "--steps 8 --checkpoint-every 3 --frozen-steps 4 --validate-every 4".split()
TWO = "--accumulate 2 --batch-size 1".split()  # for each of two ranks


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run that nothing interrupted: what the others are compared with."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    train.main([*small, *EIGHT, "--out", str(out)])
    return out


@pytest.fixture
def cut(whole, tmp_path):
    """The same run, and how it was before its last checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints/step-0000008.pt").unlink()
    return out


def make(arguments: list[str]) -> train.Denoiser:
    return train.Denoiser(parse_args(arguments), torch.device("cpu"))


def checkpoint(run: Path, step: int) -> dict:
    return torch.load(run / f"checkpoints/step-{step:07d}.pt", weights_only=True)


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[5:12]) for path in (run / "checkpoints").glob("*"))


def read_log(run: Path) -> list[dict]:
    """Without what depends on the time of day."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def files(folder: Path) -> dict:
    """What is in a folder, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def equal(a: dict, b: dict) -> bool:
    """To the bit, whatever is nested in what."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def assert_same_run(a: Path, b: Path) -> None:
    """Checkpoints (weights, their average, the optimizer), the model folder, and what the log says;
    and no other files."""
    one, other = files(a), files(b)
    assert one.keys() == other.keys() and read_log(a) == read_log(b)
    for name in one:
        if name.endswith(".pt"):
            states = (torch.load(run / name, weights_only=True) for run in (a, b))
            assert equal(*states), name
        elif name not in ("log.jsonl", "config.json"):
            assert one[name] == other[name], name


def distance(a: dict, b: dict) -> float:
    """‖a − b‖ / ‖b‖ over all tensors together."""
    apart = sum((a[name] - b[name]).double().square().sum() for name in b)
    return (apart / sum(x.double().square().sum() for x in b.values())).sqrt().item()


def gradients(run: Path) -> dict:
    """Of a run of one step: AdamW's exp_avg is 0.1 · (clipped) gradient then."""
    state = checkpoint(run, 1)["optimizer"]["state"]
    return {name: s["exp_avg"] / 0.1 for name, s in state.items()}


def fails(arguments: list[str], *parts: str) -> str:
    """The command ends with status 1 and one line, which has all of `parts`."""
    with pytest.raises(SystemExit, match="^error.*$") as e:  # a string: printed, with status 1
        train.main(arguments)
    assert all(part in e.value.code for part in parts)
    return e.value.code


# ---- pure functions of the step ------------------------------------------------------------------


def test_learning_rate_and_ema_decay():
    c = Config(steps=1000, warmup_steps=100, lr=1e-3)
    expected = {0: 1e-5, 49: 5e-4, 99: 1e-3, 100: 1e-3, 550: 5e-4, 1000: 0}  # step 0 learns already
    expected[999] = 1e-3 * math.sin(math.pi / 1800) ** 2
    for step, lr in expected.items():
        assert learning_rate(step, c) == pytest.approx(lr)
    assert learning_rate(0, replace(c, warmup_steps=0)) == pytest.approx(1e-3)
    for n in (0, 1, 90, 10_000, 10**6):
        assert ema_decay(n, c) == min(0.9999, (1 + n) / (10 + n))
    assert ema_decay(90, Config(ema_decay=0.5)) == 0.5


def test_every_clip_comes_once_an_epoch():
    n, batch = 10, 4
    drawn = np.concatenate([clips_of_step(step, batch, n, seed=3) for step in range(15)])
    epochs = drawn.reshape(-1, n)  # 15 steps of 4 are 6 epochs of 10
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each in an order of its own
    again = np.concatenate([clips_of_step(step, 30, n, seed=3) for step in range(2)])
    assert (drawn == again).all()  # the order is one sequence, however it is cut into steps
    assert (clips_of_step(0, n, n, seed=4) != drawn[:n]).any()


def test_draw_depends_on_seed_step_and_place_only():
    places = [(5, 10, 3), (6, 10, 3), (5, 11, 3), (5, 10, 4), (5, 3, 10), (10, 5, 3), (5, 10, 3)]
    noise = [draw(step, i, [""], (2, 3), Config(seed=seed))[2] for seed, step, i in places]
    assert (noise[0] == noise[-1]).all()
    assert all((a != b).all() for a, b in itertools.combinations(noise[:-1], 2))


def test_draw_on_a_gpu():
    """Where its generator stands makes no difference; caption and t are those of a CPU."""
    generator, c = torch.Generator(), Config(caption_dropout=0.5)
    places = [(5, 10), (6, 10), (5, 11), (5, 10)]
    drawn = [draw(*place, ["a", "b"], (2, 3), c, generator) for place in places]
    assert [x[:2] for x in drawn] == [draw(*place, ["a", "b"], (2, 3), c)[:2] for place in places]
    assert torch.equal(drawn[0][2], drawn[3][2])
    assert all((a[2] != b[2]).all() for a, b in itertools.combinations(drawn[:3], 2))


def test_draw_is_uniform_and_drops_captions():
    c, n = Config(caption_dropout=0.1), 12_000
    drawn = [draw(i // 50, i % 50, ["one", "two", "three"], (4,), c) for i in range(n)]
    captions, t, noise = zip(*drawn, strict=True)
    counts = Counter(captions)
    assert counts[""] / n == pytest.approx(0.1, abs=0.01)
    for caption in ("one", "two", "three"):
        assert counts[caption] / n == pytest.approx(0.3, abs=0.02)
    assert set(t) == set(range(1000))
    assert np.histogram(t, 10, (0, 1000))[0] == pytest.approx(n / 10, rel=0.1)
    assert abs(np.mean(noise)) < 0.02 and np.std(noise) == pytest.approx(1, abs=0.02)
    for rate, caption in ((0.0, "one"), (1.0, "")):
        c = Config(caption_dropout=rate)
        assert {draw(0, i, ["one"], (1,), c)[0] for i in range(50)} == {caption}


# ---- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction, schedule, shift",
    [("v", "cosine", 0.2), ("eps", "scaled-linear", 1.0), ("x0", "cosine", 0.5)],
)
def test_the_first_step_by_hand(prediction, schedule, shift, small, tmp_path):
    options = ["--prediction", prediction, "--schedule", schedule, "--caption-dropout", "0.5"]
    options += ["--schedule-shift", str(shift), "--steps", "1", "--clip", "0.1"]
    command = [*small, *options, "--out", str(tmp_path)]
    task = make(command)
    reference, before = task.network, {k: v.clone() for k, v in task.network.state_dict().items()}
    captions, stored, t, noise = task.batch(0, range(4), task.choose(0, 4))
    assert "" in captions and len(set(captions)) > 1
    train.main(command)

    z = MelCodec().dequantize(stored)
    stats = task.data.stats
    x_0 = to_grid((z - stats.mean.float()[:, None]) / stats.std.float()[:, None])
    alphas_cumprod = diffusion.SCHEDULES[schedule]()
    ratio = shift**2 * alphas_cumprod / (1 - alphas_cumprod)  # of signal to noise
    alphas_cumprod = ratio / (1 + ratio)
    a = alphas_cumprod[t].float()[:, None, None, None]
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    target = {"eps": noise, "v": a.sqrt() * noise - (1 - a).sqrt() * x_0, "x0": x_0}[prediction]
    losses = (reference(x_t, t, *task.encoder(captions)) - target).square().mean((1, 2, 3))
    if prediction == "x0":
        losses = losses / (1 - alphas_cumprod[t]).float().clamp(min=0.2)
    losses.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    assert norm > 0.2  # so that clipping matters
    lr = learning_rate(0, task.c)
    torch.optim.AdamW(reference.parameters(), lr, (0.9, 0.95), weight_decay=0.01).step()

    (logged,), after = read_log(tmp_path), checkpoint(tmp_path, 1)
    assert logged["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert logged["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert logged["lr"] == lr and logged["step"] == after["step"] == 1
    for (name, p), got in zip(
        reference.named_parameters(), gradients(tmp_path).values(), strict=True
    ):
        assert (got - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-8, name
        # Adam's first step is lr·sign(gradient), whatever the size of the gradient: where that is
        # all rounding, so is the step.
        certain, value = p.grad.abs() > 1e-6, after["network"][name]
        torch.testing.assert_close(value[certain], p[certain], rtol=0, atol=0.01 * lr)
        torch.testing.assert_close(after["ema"][name], 0.1 * before[name] + 0.9 * value)


def test_bf16_and_gradient_checkpointing_give_the_same_gradients(small):
    def gradients(*options: str) -> dict:
        task = make([*small, *options])
        task.loss(task.network, *task.batch(0, range(4), [3, 1, 4, 1])).mean().backward()
        return {name: p.grad for name, p in task.network.named_parameters()}

    other = gradients("--gradient-checkpointing", "--precision", "bf16")
    assert 0 < distance(other, gradients()) < 5e-2


def test_it_learns(small, tmp_path):
    """The average of the weights gets better at clips that it didn't see."""
    options = "--steps 30 --lr 3e-3 --batch-size 2 --block-out-channels 64,64 --attention 0,0 "
    command = [*small, *options.split(), "--schedule-shift", "1", "--out", str(tmp_path)]
    task = make(command)
    before = task.validate(task.network, 0, 1)["val_loss"]
    train.main(command)
    assert read_log(tmp_path)[-1]["val_loss"] < 0.8 * before


def test_validation_depends_neither_on_the_batch_nor_on_when(small):
    task = make(small)
    assert task.clips == 20 and list(task.val_indices) == [20, 21, 22, 23]
    expected = task.validate(task.network, 0, 1)
    assert expected["val_loss"] == pytest.approx(np.mean(expected["val_loss_bins"]))
    assert task.validate(task.network, 0, 1) == expected
    task.c, task.step = replace(task.c, batch_size=3), 7
    again = task.validate(task.network, 0, 1)["val_loss_bins"]
    assert again == pytest.approx(expected["val_loss_bins"], rel=1e-5)


# ---- resume --------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_as_if_nothing_had_happened(whole, small, tmp_path, monkeypatch):
    """Interrupted twice, before and after the blocks thaw, each time beyond a checkpoint."""
    out, original = tmp_path / "run", train.train_step
    command = [*small, *EIGHT, "--out", str(out)]
    for stop in (4, 7):

        def train_step(task, *rest, stop=stop):
            if task.step == stop:
                raise KeyboardInterrupt
            return original(task, *rest)

        monkeypatch.setattr(train, "train_step", train_step)
        with pytest.raises(SystemExit, match="goes on from"):
            train.main(command)
        assert len(read_log(out)) == stop
    monkeypatch.undo()
    (out / "log.jsonl").open("a").write('{"step": 8, "lo')  # as a full disk leaves it
    # What a kill while it was writing leaves behind, or between two renames:
    (out / "checkpoints/.step-0000009.pt.1.tmp").write_bytes(b"torn")
    (out / "model").rename(out / "model.tmp")
    train.main(command)
    assert_same_run(out, whole)
    assert checkpoints(out) == [6, 8]


@pytest.mark.parametrize("share, what", [(0, "File"), (0.5, "weights"), (1.5, "step-0000008.pt")])
def test_a_disk_that_fills_up(share, what, cut, whole, small):
    """Stood in for by a limit on the size of files: too small for anything, for the model, for the
    checkpoint. What was there is still there, and the run goes on when there is room."""
    before, limits = files(cut), resource.getrlimit(resource.RLIMIT_FSIZE)
    size = len(before["model/unet/diffusion_pytorch_model.safetensors"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
    try:
        fails([*small, *EIGHT, "--out", str(cut)], what, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = files(cut)
    assert {path for path in before if after[path] != before[path]} <= {"log.jsonl", "config.json"}
    assert checkpoints(cut) == [6]  # half a file would take room
    train.main([*small, *EIGHT, "--out", str(cut)])
    assert_same_run(cut, whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    newest = out / "checkpoints/step-0000008.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    train.main([*small, *EIGHT, "--out", str(out)])
    assert_same_run(out, whole)
    for path in (out / "checkpoints").iterdir():  # but nothing starts over
        os.truncate(path, 200)
    before = files(out)
    fails([*small, *EIGHT, "--out", str(out)], str(out), "--no-resume")
    assert files(out) == before


def test_a_finished_run_stays_as_it_is(whole, small, capsys):
    before = files(whole)
    train.main([*small, *EIGHT, "--out", str(whole)])
    assert "8 of 8 steps are done" in capsys.readouterr().out and files(whole) == before


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 9", "has steps = 8, this command 9"),
        ("--prediction eps", "has prediction = 'x0', this command 'eps'"),
        ("--block-out-channels 32,64", "has block_out_channels = [32, 32], this command [32, 64]"),
        ("--init {whole}/model/unet", "has init = '', this command '{whole}/model/unet'"),
        ("--accumulate 2", "has global_batch = 4, this command 8"),
        ("--val-data {data} --val-clips 3", "has val_clips = 4, this command 3"),
        ("--data {other}", "has data (its hash) = "),
    ],
)
def test_what_is_part_of_the_run_cant_change(options, message, whole, small, tmp_path):
    data = Path(small[small.index("--data") + 1])
    shutil.copytree(data, tmp_path / "other")  # the same sounds, other captions
    text = (data / "clips.jsonl").read_text()
    (tmp_path / "other/clips.jsonl").write_text(text.replace("a low tone", "a deep tone"))
    options = options.format(whole=whole, data=data, other=tmp_path / "other").split()
    before = files(whole)
    line = fails([*small, *EIGHT, "--out", str(whole), *options], message.format(whole=whole))
    assert str(whole) in line and "--init" in line
    assert files(whole) == before


def test_what_isnt_part_of_the_run_may_change(cut, whole, small, tmp_path):
    moved, data = cut.rename(tmp_path / "moved"), tmp_path / "data"
    shutil.copytree(small[small.index("--data") + 1], data)
    options = "--batch-size 2 --accumulate 2 --gradient-checkpointing --checkpoint-every 1".split()
    train.main([*small, *EIGHT, *options, "--data", str(data), "--out", str(moved)])
    assert checkpoints(moved) == [7, 8]
    assert distance(checkpoint(moved, 8)["network"], checkpoint(whole, 8)["network"]) < 1e-3


def test_no_resume_sets_the_old_run_aside(cut, small):
    before = files(cut)
    train.main([*small, "--steps", "1", "--out", str(cut), "--no-resume"])
    (aside,) = (path for path in cut.parent.iterdir() if path != cut)
    assert files(aside) == before and checkpoints(cut) == [1]


@pytest.mark.parametrize("more", [[], ["--no-resume"]])
def test_a_second_command_is_refused(more, cut, small):
    """And leaves the first one's run as it is."""
    before, (ready, say) = files(cut), os.pipe()
    if (pid := os.fork()) == 0:
        held = train.open_log(cut)
        os.write(say, b"ready")
        time.sleep(60 + held.tell())
    os.read(ready, 5)
    try:
        fails([*small, *EIGHT, *more, "--out", str(cut)], "log.jsonl: another command is writing")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert files(cut) == before and len(list(cut.parent.iterdir())) == 1


def test_resume_in_another_layout(cut, whole, small):
    """As from a GPU to a CPU: AdamW's moments are to lie in memory as the weights do."""
    state = checkpoint(cut, 6)
    for moments in state["optimizer"]["state"].values():
        for name, value in moments.items():
            if value.ndim == 4:
                moments[name] = value.to(memory_format=torch.channels_last)
    torch.save(state, cut / "checkpoints/step-0000006.pt")
    train.main([*small, *EIGHT, "--out", str(cut)])
    assert_same_run(cut, whole)


def test_a_gradient_that_is_not_finite_stops_the_run(whole, small, tmp_path, monkeypatch):
    command = [*small, *EIGHT, "--out", str(tmp_path / "run")]
    original = train.Denoiser.loss

    def loss(task, *args):
        losses = original(task, *args)
        if task.step == 4 and torch.is_grad_enabled():
            losses.register_hook(lambda gradient: gradient * math.inf)
        return losses

    monkeypatch.setattr(train.Denoiser, "loss", loss)
    message = fails(command, "step 5", "gradient norm nan")
    clips = clips_of_step(4, 4, 20, seed=0)
    assert message.endswith("this step: " + ", ".join(f"tone-{i}" for i in clips))
    assert checkpoints(tmp_path / "run") == [3]
    monkeypatch.undo()
    train.main(command)  # the checkpoint before is as it should be
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("options", ["", "--prediction v --frozen-steps 1 --precision bf16"])
def test_a_step_waits_for_no_number(options, small):
    """On a GPU that would mean to wait for all that it has to do."""
    task = make([*small, *options.split()])
    ema = copy.deepcopy(task.network).requires_grad_(False)
    optimizer = torch.optim.AdamW(task.network.parameters(), fused=True)
    batches = [task.batch(0, range(4), task.choose(0, 4))]
    task.encoder(batches[0][0])
    with Operations() as operations:  # an error, if there is one
        entry = train.train_step(task, task.network, ema, optimizer, batches)
    assert len(operations.done) > 500 and 0 < entry["loss"].item() < 10


def test_a_capture_that_fails_costs_only_time(small, monkeypatch):
    """It may leave gradients that nobody computed; steps go on as if it had not been tried."""
    weights = []

    def fails(update, inputs):
        for p in task.network.parameters():
            p.grad = torch.full_like(p, 1e3)
        return update

    for graphs in ({}, {"cpu": fails}):
        task = make(small)
        ema = copy.deepcopy(task.network).requires_grad_(False)
        optimizer = train.make_optimizer(task.network, task.c)
        monkeypatch.setattr(train, "GRAPHS", graphs)
        for step in range(train.WARM_STEPS + 2):
            batch = task.batch(step, range(4), task.choose(step, 4))
            train.train_step(task, task.network, ema, optimizer, [batch])
        assert (task.update is None) == (not graphs)
        weights.append(task.network.state_dict())
    assert equal(*weights)


def test_losses_are_looked_at_later(whole, small, tmp_path, monkeypatch):
    """As on a GPU: every few steps, and before anything is kept. It is the same run."""
    monkeypatch.setitem(train.FETCH_EVERY, "cpu", 3)
    command, original = [*small, *EIGHT, "--out"], train.Denoiser.loss
    train.main([*command, str(tmp_path / "same")])
    assert_same_run(tmp_path / "same", whole)

    def loss(task, *args):  # at the fifth step; the sixth is saved
        return original(task, *args) * (math.nan if task.step == 4 else 1)

    monkeypatch.setattr(train.Denoiser, "loss", loss)
    fails([*command, str(tmp_path / "run")], "step 5: loss nan")
    assert checkpoints(tmp_path / "run") == [3] and len(read_log(tmp_path / "run")) == 4


def test_out_of_memory(small, tmp_path, monkeypatch):
    def loss(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    monkeypatch.setattr(train.Denoiser, "loss", loss)
    fails([*small, "--out", str(tmp_path / "run")], "try --batch-size 2 --accumulate 2")


def test_frozen_blocks_thaw(whole, small, tmp_path):
    options = "--frozen-steps 2 --steps 2 --out".split()
    start = make(small).network.state_dict()
    train.main([*small, *options, str(tmp_path)])
    frozen, thawed = checkpoint(tmp_path, 2), checkpoint(whole, 8)
    assert len(frozen["optimizer"]["state"]) == 6  # weight and bias of three layers
    for name, value in start.items():
        for weights in ("network", "ema"):
            moves = name.startswith(NEW_LAYERS)
            assert torch.equal(frozen[weights][name], value) != moves, name
            assert not torch.equal(thawed[weights][name], value), name


# ---- ranks ---------------------------------------------------------------------------------------

# Imports all that ranks need once, then forks those of one run after the other. `victim`: what rank
# 1 kills three steps before the end, itself or its parent; or "seed", if that is to differ.
FORK = """
import json, os, sys, time
from datetime import timedelta
from signal import SIG_IGN, SIGINT, SIGKILL, signal
import torch
import torch.multiprocessing as mp
import train

original = train.train_step

def rank(r, ranks, port, victim, folder, arguments):
    os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def train_step(task, *rest):
        if victim == "hung" and r == 1 and task.step == task.c.steps - 3:
            time.sleep(8)
            os._exit(0)
        if victim in ("itself", "parent") and r == 1 and task.step == task.c.steps - 3:
            os.kill(os.getpid() if victim == "itself" else os.getppid(), SIGKILL)
        return original(task, *rest)

    train.train_step = train_step
    train.HUNG = timedelta(seconds=2) if victim == "hung" else train.HUNG
    signal(SIGINT, SIG_IGN)  # which torch would send to ranks without a parent; torchrun doesn't
    try:
        train.main([*arguments, "--seed", "1"] if victim == "seed" and r else arguments)
    except SystemExit as e:
        open(f"{folder}/{victim}-{r}", "w").write(e.code)

jobs = json.loads(sys.argv[1])
train.Denoiser(train.parse_args(jobs[0][-1]), torch.device("cpu"))
for job in jobs:
    if job[2] == "parent" and os.fork():
        os.wait()
        break
    try:
        mp.start_processes(rank, tuple(job), nprocs=job[0], start_method="fork")
    except mp.ProcessExitedException as e:
        if job[2] != "hung" and (job[2] != "itself" or e.signal_name != "SIGKILL"):
            raise
"""


def execute(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    more = {"capture_output": True, "text": True, "timeout": 600}  # waits for orphans, too
    return subprocess.run(command, cwd=ROOT, env=environment, **more)


@pytest.fixture(scope="module")
def ranks(small, tmp_path_factory):
    """A folder of runs on several ranks."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), []
    five = "--steps 5 --checkpoint-every 2 --batch-size 1".split()
    for name, n, victim in (
        ("two", 2, ""),
        ("three", 3, ""),
        ("resumed", 3, "itself"),
        ("resumed", 3, ""),
        ("differ", 2, "seed"),
        ("hung", 2, "hung"),
        ("killed", 2, "itself"),
        ("killed", 2, "parent"),
    ):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        options = five if n == 3 else [*EIGHT, *TWO]
        arguments = [*small, *options, "--out", f"{folder}/{name}"]
        jobs.append([n, port, victim, str(folder), arguments])
    done = execute([sys.executable, "-c", FORK, json.dumps(jobs)])
    assert done.returncode == 0, done.stderr
    return folder


def test_resume_on_three_ranks(ranks):
    """Where the last bits of a sum of gradients depend on the order in which it is taken."""
    assert_same_run(ranks / "resumed", ranks / "three")


def test_two_ranks_with_two_passes_each_are_one_with_one(ranks, whole, small):
    logs = read_log(ranks / "two"), read_log(whole)
    for step, (a, b) in enumerate(zip(*logs, strict=True)):
        for name in b:  # averaged over ranks; val_loss, too
            assert a[name] == pytest.approx(b[name], rel=1e-2 if step else 1e-5), (step, name)
    start, changes = make(small).network.state_dict(), []
    for run in (ranks / "two", whole):
        after = checkpoint(run, 8)["network"]
        changes.append({name: after[name] - start[name] for name in start})
    assert distance(*changes) < 1e-2


def test_ranks_that_disagree(ranks):
    """Left alone, ranks of two minds would train on nonsense."""
    for rank in (0, 1):
        line = (ranks / f"seed-{rank}").read_text()
        assert line.startswith(f"error on rank {rank}: ranks differ in settings, data")
    assert not (ranks / "differ").exists()


def test_a_rank_that_hangs(ranks):
    """The other one waits for it no longer than HUNG, here two seconds."""
    assert "error on rank 0: no word from another" in (ranks / "hung-0").read_text()
    assert not (ranks / "hung-1").exists() and checkpoints(ranks / "hung") == [3]


def test_killed_with_sigkill(ranks, small):
    """Two ranks: one of them is killed; then their parent alone, and they stop by themselves; then
    torchrun goes on."""
    stopped = [path.read_text() for path in ranks.glob("parent-*")]  # by then, both are gone
    assert any("torchrun is gone: stopped before step" in line for line in stopped), stopped
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "train.py"]
    done = execute([*torchrun, *small, *EIGHT, *TWO, "--out", str(ranks / "killed")])
    assert done.returncode == 0, done.stderr
    assert re.search("[36] of 8 steps", done.stdout), done.stdout
    assert_same_run(ranks / "killed", ranks / "two")


# ---- the model folder ----------------------------------------------------------------------------


def test_the_model_folder(whole, small):
    """Has all that it needs, its text encoder too, unless that is the hub's."""
    arguments = dict(zip(small[::2], small[1::2], strict=True))
    expected = {"text_encoder": "text_encoder", "max_length": 16, "mask": "both"}
    sampling = ("guidance", "guidance_above", "denoising_steps", "shifted_rows")
    for key in ("schedule", "schedule_shift", "prediction", *sampling):
        expected[key] = getattr(Config(), key)
    expected |= {"codec": MelCodec().settings(), "sample_rate": 16_000}
    expected["trained_on"] = {"data": "data", "clips": 20, "steps": 8, "init": None}
    assert json.loads((whole / "model/model.json").read_text()) == expected
    assert files(whole / "model/text_encoder") == files(Path(arguments["--text-encoder"]))
    ema = checkpoint(whole, 8)["ema"]
    for kind in (UNet2DConditionModel, UNet):
        weights = kind.from_pretrained(whole / "model/unet").state_dict()
        assert weights.keys() == ema.keys()
        assert all(torch.equal(weights[name], ema[name]) for name in ema)
    assert not equal(ema, checkpoint(whole, 8)["network"])


def test_fine_tuning_takes_the_settings_of_the_model_folder(whole, small, tmp_path, capsys):
    """Its sizes, text encoder, normalisation and what sample.py takes; and the folder may move."""
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    stats = LatentStats.load(model / "latent_stats.safetensors")
    LatentStats(stats.mean + 1, stats.std * 2, 7).save(model / "latent_stats.safetensors")
    about = json.loads((model / "model.json").read_text())
    about |= {"schedule_shift": 0.7, "guidance": 4.5, "denoising_steps": 30}
    (model / "model.json").write_text(json.dumps(about))
    command = f"--init {model} --out {tmp_path}/run --precision fp32 --device cpu --lr 1e-9 "
    command += "--steps 1 --batch-size 4 --val-clips 4 --data " + small[small.index("--data") + 1]
    train.main(command.split())
    assert "fresh" not in capsys.readouterr().out
    other = json.loads((tmp_path / "run/model/model.json").read_text())
    assert other.pop("trained_on")["init"] == str(model) and about.pop("trained_on")
    assert other == about
    name = "latent_stats.safetensors"
    assert files(tmp_path / "run/model")[name] == files(model)[name]
    trained, ema = checkpoint(tmp_path / "run", 1)["network"], checkpoint(whole, 8)["ema"]
    assert 0 < distance(trained, ema) < 1e-6

    for text in (json.dumps(about | {"codec": {"name": "encodec"}}), "{"):
        (model / "model.json").write_text(text)
        fails(command.split(), str(model))


def test_init_from_stable_diffusion(small, tmp_path, capsys):
    """A folder as Stable Diffusion's: 4 channels, and no projection of the text."""
    torch.manual_seed(1)
    sd = UNet(UNetConfig(4, 4, (32, 64), (True, False), 1, 4, 24, None))
    sd.save_pretrained(tmp_path / "sd/unet")
    command = [*small, "--init", str(tmp_path / "sd"), "--out", str(tmp_path / "run")]
    train.main([*command, "--steps", "1", "--lr", "1e-9", "--weight-decay", "0"])
    fresh = "freshly initialised: conv_in, conv_out, encoder_hid_proj"
    assert fresh in capsys.readouterr().out
    trained = checkpoint(tmp_path / "run", 1)["network"]
    for name, value in sd.state_dict().items():
        if not name.startswith(NEW_LAYERS):
            torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-9)


# ---- the command line ----------------------------------------------------------------------------


def test_presets_differ_in_values_only():
    assert parse_args([]) == PRESETS["tiny"] == Config()
    assert parse_args(["--preset", "paper"]) == PRESETS["paper"]
    c = parse_args("--preset paper --steps 7 --attention 1,0,0,1 --no-resume --lr 1".split())
    changed = {"steps": 7, "attention": (1, 0, 0, 1), "resume": False, "lr": 1.0}
    assert c == replace(PRESETS["paper"], **changed) and type(c.lr) is float


def test_the_papers_values():
    c, unet = PRESETS["paper"], UNetConfig()
    assert (c.lr, c.steps, c.warmup_steps, c.batch_size) == (2.56e-4, 60_000, 1000, 192)
    assert (c.prediction, c.schedule, c.schedule_shift) == ("eps", "cosine", 1.0)
    assert (c.text_encoder, c.max_length, c.mask, c.guidance) == ("t5-large", 50, "none", 6.5)
    sizes = ("block_out_channels", "attention", "layers_per_block", "num_heads")
    for name in (*sizes, "cross_attention_dim"):
        assert getattr(c, name) == getattr(unet, name)


@pytest.mark.parametrize(
    "options, parts",
    [
        ("--steps 0", ["argument --steps: 0: expected 1 to inf"]),
        ("--mask some", ["argument --mask: invalid choice: 'some' (choose from "]),
        ("--caption-dropout 2", ["argument --caption-dropout: 2: expected 0 to 1"]),
        ("--lr nan", ["argument --lr: nan: expected 0 to inf"]),
        ("--attention yes,no", ["--attention"]),
        ("--stpes 3", ["unrecognized arguments"]),
        ("--val-clips 100", ["error: ", "all clips are held out", "--val-clips"]),
        ("--data nowhere", ["error: ", "nowhere"]),
        ("--init nowhere", ["error: ", "nowhere", "no U-Net there"]),
        ("--init nobody/no-such-model", ["error: ", "nobody/no-such-model", "hub"]),
        ("--out {file}/run", ["error: ", "file/run"]),
    ],
)
def test_a_mistake_gets_one_line(options, parts, small, tmp_path, capsys):
    """With status 2 if it is in the command line itself, else 1."""
    (tmp_path / "file").touch()
    options = options.format(file=tmp_path / "file").split()
    with pytest.raises(SystemExit) as e:
        train.main([*small, "--out", str(tmp_path / "run"), *options])
    line = capsys.readouterr().err.splitlines()[-1] if e.value.code == 2 else e.value.code
    assert "\n" not in line and all(part in line for part in parts)
    assert not (tmp_path / "run").exists()
