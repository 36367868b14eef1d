"""All that a GPU is asked for, in one command of at most four minutes, with random weights.

    product     bf16 FLOP/s of one large matrix product: the peak that the rest is a share of
    sampling    one and eight clips at full width, PNDM, 45 steps: `sample.generate`, with graphs
                and without, beside diffusers' pipeline loop; the latents have to agree
    training    train.py's step on batches of its own thread, at full width and the small model's;
                share of the peak: 6 · multiply-adds of a clip's forward pass, recomputation not
                counted; with a graph and without, a step leaves the same weights
    modules     U-Net, codecs, tagger, text encoder in float32: what they say there and on the CPU
    resume      a run that is killed and goes on ends with the same bytes as one that isn't

It prints one table, with the goals where there are any, and writes it as JSON. A part that fails
is a line of the table, and the others are run all the same.

    python -m benchmarks.gpu                          one card; runs/gpu.json
    python -m benchmarks.gpu --compile                and training by torch.compile, minutes more
    python -m benchmarks.gpu --device cpu --small     the same code, rehearsed in a minute
"""

import argparse
import copy
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import latents
import train
from benchmarks.arithmetic import TOKENS, forward_flops
from benchmarks.sampling import as_diffusers, as_model, ours, peak_flops, seconds_now, theirs
from benchmarks.training import Ours, prepare
from captions import TextEncoder
from evaluate import Cnn14
from latents import CLIP_SAMPLES, GRID, EncodecCodec, MelCodec
from sample import GRAPHS
from unet import UNet, UNetConfig

ROOT = Path(train.__file__).parent
SIZES = {"block_out_channels": (32, 32), "attention": (0, 1), "layers_per_block": 1}
SMALL = UNetConfig(**SIZES)


@dataclass
class Bench:
    """Where and how large, and the table so far."""

    device: torch.device
    small: bool
    compile: bool
    folder: Path  # for what has to lie somewhere
    configs: dict[str, train.Config]  # of a run on a few made-up clips, by preset; without `out`
    peak: float = 0.0  # FLOP/s
    rows: list[dict] = field(default_factory=list)

    def row(self, what: str, value: float, unit: str = "", goal: str = "", good: bool = True):
        """`good` is about agreement, which holds anywhere; a goal is for a card at full size."""
        self.rows.append({"what": what, "value": value, "unit": unit, "goal": goal, "good": good})
        print(f"{what}: {value:.4g} {unit}{'' if good else '   WRONG'}", flush=True)


class Operations(TorchDispatchMode):
    """Those that PyTorch does meanwhile, on which tensors; what they write to, as it was."""

    def __init__(self):
        super().__init__()
        self.done, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # .item(), .tolist(), if x:
            raise RuntimeError("a number is wanted from the device: that can't be captured")
        for argument, value in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tree_leaves(value):
                    self.before.setdefault(id(x), (x, x.detach().clone()))
        self.done.append((function, args, kwargs or {}, function(*args, **(kwargs or {}))))
        return self.done[-1][-1]


def plain_graph(call: Callable, inputs: Sequence[Tensor]) -> Callable:
    """What a CUDA graph is to sample.py and train.py, on a CPU: the operations of one call, which
    are done again, on the memory that they had; Python has no more part in it."""
    held = [x.clone() for x in inputs]
    with Operations() as operations:
        output = call(*held)
    with torch.no_grad():  # a capture computes nothing
        for x, before in operations.before.values():
            x.copy_(before)

    @torch.no_grad()
    def replay(*inputs: Tensor):
        for place, x in zip(held, inputs, strict=True):
            place.copy_(x)
        for function, args, kwargs, before in operations.done:
            again = function(*args, **kwargs)
            for place, x in zip(tree_leaves(before), tree_leaves(again), strict=True):
                if isinstance(x, Tensor) and x is not place:
                    place.copy_(x)
        return output

    return replay


def forget(device: torch.device) -> None:
    """All memory that nothing holds any more, and the highest mark of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reserved(device: torch.device) -> float:
    """GiB at the highest since `forget`, a graph's own memory with it; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0


def apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


# ---- the parts -----------------------------------------------------------------------------------


def product(bench: Bench) -> None:
    bench.peak = peak_flops(torch.bfloat16, 256 if bench.small else 8192, bench.device)
    bench.row("bf16 matrix product", bench.peak / 1e12, "TFLOP/s")


def sampling(bench: Bench) -> None:
    device, rounds = bench.device, 1 if bench.small else 3
    steps, few = (4, 3) if bench.small else (45, 10)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet(SMALL if bench.small else UNetConfig()).eval()
        states = torch.randn(2, TOKENS, 1024)
    unet.to(memory_format=torch.channels_last)

    exact = ours(as_model(unet, states), steps=few, precision="fp32")
    error = apart(exact, theirs(as_diffusers(unet), states, steps=few, bf16=False))
    bench.row(f"float32, {few} steps, differs from diffusers by", error, "", "1e-4", error < 1e-4)
    if device.type == "cuda":
        unet.bfloat16()  # as load_model does

    def timed(run: Callable[..., Tensor]) -> tuple[float, float, Tensor]:
        """Seconds, GiB, latents; the first call aside."""
        times = []
        run(steps=2)
        for _ in range(rounds):
            started = seconds_now(device)
            latent = run(steps=steps)
            times.append(seconds_now(device) - started)
        return min(times), reserved(device), latent

    for n in (1, 2 if bench.small else 8):
        size, found = f"{n} clip{'s' * (n > 1)}", {}
        for name in ("diffusers", "eager", "graph"):
            forget(device)
            if name == "diffusers":
                run = partial(theirs, as_diffusers(unet), states, n, bf16=True)
            else:
                run = partial(ours, as_model(unet, states), n, precision="bf16")
            with mock.patch.dict(GRAPHS, clear=name == "eager"):
                found[name] = seconds, memory, latent = timed(run)
            bench.row(f"{size}, bf16, {name}", seconds, "s")
            bench.row(f"{size}, bf16, {name}", memory, "GiB")
            if name != "diffusers" and n == 1:
                error = apart(run(steps=few), exact)
                about = f"bf16, {name}, {few} steps, differs from float32 by"
                bench.row(about, error, "", "2e-2", error < 2e-2)
            del run
        ratio = found["diffusers"][0] / found["graph"][0]
        bench.row(f"{size}, times as fast as diffusers", ratio, "", "5" if n == 1 else "3")
        same = torch.equal(found["graph"][2], found["eager"][2])
        bench.row(f"{size}, graph and eager have the same bits", same, "", "1", same)
        more = found["graph"][1] / max(1e-9, found["diffusers"][1])
        bench.row(f"{size}, memory, diffusers' is 1", more, "", "at most 1")


def training(bench: Bench) -> None:
    device, (warm, steps) = bench.device, (5, 2) if bench.small else (6, 20)
    checkpointing, compiled = {"gradient_checkpointing": True}, {"compile": True}
    runs = [
        ("paper", 32, {}, {}),
        ("paper", 96, checkpointing, {"% of the product": "35"}),
        ("tiny", 128, {}, {"clips/s": "3000"}),
    ]
    if bench.compile:
        runs += [
            ("tiny", 128, compiled, {"clips/s": "3000"}),
            ("paper", 96, checkpointing | compiled, {"% of the product": "35"}),
        ]
    for preset, batch, more, goal in runs:
        forget(device)
        batch = 2 if bench.small else batch
        run = Ours(replace(bench.configs[preset], batch_size=batch, **more))

        def fetch(step: int, run=run, batch=batch) -> tuple:
            return run.task.batch(step, range(batch), run.task.choose(step, batch))

        where = {"initializer": latents.pick_device, "initargs": (device.type,)}
        with ThreadPoolExecutor(1, **where) as pool:
            upcoming = pool.submit(fetch, 0)
            for step in range(warm + steps):
                if step == warm:
                    started = seconds_now(device)
                now, upcoming = upcoming.result(), pool.submit(fetch, step + 1)
                loss = run.step(now)["loss"]
            seconds = (seconds_now(device) - started) / steps
        flops = 3 * batch * flops_of(run.task.network)
        name = ", ".join(["training", preset, f"batch {batch}", *more])
        bench.row(f"{name}, loss", float(loss), "", "", bool(torch.isfinite(loss)))
        for unit, value in (
            ("s a step", seconds),
            ("clips/s", batch / seconds),
            ("% of the product", 100 * flops / seconds / max(1, bench.peak)),
            ("GiB", reserved(device)),
        ):
            bench.row(name, value, unit, goal.get(unit, ""))
        del run, fetch, upcoming, now, loss

    weights, losses = [], []
    for clear in (False, True):
        run = Ours(replace(bench.configs["tiny"], batch_size=2))
        batches = [run.task.batch(i, range(2), run.task.choose(i, 2)) for i in range(warm + steps)]
        with mock.patch.dict(GRAPHS, clear=clear):
            losses.append(torch.stack([run.step(batch)["loss"] for batch in batches]))
        weights.append(torch.cat([p.detach().flatten() for p in run.ema.parameters()]))
    bench.row("training, graph and eager, weights differ by", apart(*weights), "", "0")
    bench.row("training, graph and eager, losses differ by", apart(*losses), "", "0")


def flops_of(network: UNet) -> int:
    with torch.device("meta"):
        return forward_flops(UNet(network.config))


@torch.no_grad()
def modules(bench: Bench) -> None:
    device, c = bench.device, bench.configs["paper"]
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(1 if bench.small else 2, CLIP_SAMPLES, generator=generator)
    x, text = torch.randn(2, 128, *GRID, generator=generator), torch.randn(2, TOKENS, 1024)
    pairs = {}  # name: (the device's answer, the CPU's, the largest difference)

    torch.manual_seed(0)
    unet = UNet(SMALL if bench.small else UNetConfig()).eval()
    mask = torch.arange(TOKENS).expand(2, -1) < 20
    inputs, t = (text, mask), torch.tensor([500, 20])
    expected = unet(x, t, *inputs)
    there = [y.to(device) for y in (x, t, *inputs)]
    pairs["U-Net"] = copy.deepcopy(unet).to(device)(*there), expected, 1e-4
    del unet

    net = Cnn14(widths=(8, 16, 16, 32, 32, 64)) if bench.small else Cnn14()
    expected = torch.cat(net.eval()(wave), 1)
    pairs["tagger (Cnn14)"] = torch.cat(net.to(device)(wave.to(device)), 1), expected, 1e-4

    encodec = partial(EncodecCodec, c.encodec_weights)
    for name, make in (("EnCodec", encodec), ("mel codec", MelCodec)):
        here, there = make(device="cpu"), make(device=device)
        codes = here.encode(wave)
        others = (there.encode(wave.to(device)).cpu() != codes).float()
        pairs[f"{name}, what is stored"] = 1 + others.mean(), torch.tensor(1.0), 1e-2
        z = here.dequantize(codes)
        pairs[f"{name}, latents"] = there.dequantize(codes.to(device)), z, 1e-5
        sound = there.decode(z.to(device))
        expected = here.decode(z)
        if name == "mel codec":  # phases may differ; what is heard must not
            sound, expected = (here.encode(y.cpu()).float() for y in (sound, expected))
        pairs[f"{name}, sound"] = sound, expected, 1e-3 if name == "EnCodec" else 2e-2

    make = partial(TextEncoder, c.text_encoder, TOKENS, "encoder", dtype=torch.float32)
    expected, found = (make(device=d)(["a dog 1", ""])[0] for d in ("cpu", device))
    pairs["text encoder"] = found, expected, 1e-4
    for name, (found, expected, limit) in pairs.items():
        error = apart(found, expected)
        bench.row(f"{name}, differs from the CPU by", error, "", f"{limit:g}", error < limit)


def options(c: train.Config) -> list[str]:
    """The command line of train.py that means c."""
    words = []
    for name, value in asdict(c).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"--{option}={value}")
    return words


def resume(bench: Bench) -> None:
    """If it isn't to the bit, once more with --deterministic, whose errors name the kernel."""
    every, steps = (5, 30) if bench.small else (20, 160)
    c = replace(bench.configs["tiny"], batch_size=2 if bench.small else 8, steps=steps)
    c = replace(c, precision="auto", checkpoint_every=every, validate_every=steps)
    for deterministic in (False, True):
        weights, more = [], ", --deterministic" if deterministic else ""
        for name, kill in (("whole", False), ("killed", True), ("killed", False)):
            out = bench.folder / f"{name}-{deterministic}"
            words = options(replace(c, out=str(out), deterministic=deterministic))
            with open(f"{out}.txt", "w+") as said:
                command = [sys.executable, "train.py", *words]
                process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
                log = out / "log.jsonl"
                while kill and process.poll() is None:
                    if log.exists() and len(log.read_bytes().splitlines()) > steps // 2:
                        process.kill()
                    time.sleep(0.005)
                status = process.wait()
                said.seek(0)
                text = said.read()
            if status != (-9 if kill else 0):
                raise RuntimeError(f"status {status}: {text[-800:]}")
            weights.append(None if kill else sha256(out))
        done = int(re.search(r"(\d+) of \d+ steps", text)[1])
        bench.row(f"killed; goes on{more} after step", done, "", "", done >= steps // 2 - every)
        same = weights[0] == weights[2]
        bench.row(f"and ends with the same bits{more}", same, "", "1", same or not more)
        if same:
            break


def sha256(run: Path) -> str:
    return train.sha256([run / "model/unet/diffusion_pytorch_model.safetensors"])


# ---- the command ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--device", help="cpu or cuda [cuda where there is one]")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--compile", action="store_true", help="train compiled, too: minutes more")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="[runs/gpu.json]")
    args = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)  # EnCodec's, of its weight norm
    started, failed = time.perf_counter(), []
    device = latents.pick_device(args.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    graphs = mock.patch.dict(GRAPHS, cpu=plain_graph)
    with tempfile.TemporaryDirectory() as folder, graphs:
        bench = Bench(device, args.small, args.compile, Path(folder), {})
        sizes = SIZES if args.small else {}
        for preset in train.PRESETS:
            c = prepare(Path(folder, preset), preset, clips=9)
            bench.configs[preset] = replace(c, device=device.type, out=folder, **sizes)
        for part in (product, sampling, training, modules, resume):
            try:
                part(bench)
            except Exception:  # the card is borrowed: the other parts are worth having
                traceback.print_exc()
                failed.append(part.__name__)
            print(f"{part.__name__}: {time.perf_counter() - started:.0f} s so far", flush=True)
            forget(device)
    about = {"card": card, "torch": torch.__version__, "small": args.small, "failed": failed}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(about | {"rows": bench.rows}, indent=1) + "\n")
    print(f"\n{card}, PyTorch {torch.__version__}{', small sizes' * args.small}\n")
    print("| what | | goal |\n| --- | ---: | ---: |")
    for row in bench.rows:
        mark = "" if row["good"] else " **wrong**"
        print(f"| {row['what']} | {row['value']:.4g} {row['unit']}{mark} | {row['goal']} |")
    wrong = [row["what"] for row in bench.rows if not row["good"]]
    if failed or wrong:
        sys.exit(f"error: {', '.join(failed + wrong)}")


if __name__ == "__main__":
    main()
