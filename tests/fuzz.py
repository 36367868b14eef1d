"""Damaged and hostile input for what reads files: the core, adapters, data sets and captions.

A *target* is a folder of good files and a function that reads it. An *input* is that folder with
one file mutated: bits flipped, pieces lost, doubled or inserted, numbers huge, JSON values of the
wrong type, deep nesting, NUL, invalid UTF-8, pickles that would run code. Reading it must end in
success, or in ValueError, OSError or SystemExit with one line. All else is a *finding*: another
exception, more lines, more than SECONDS or MEMORY, code that was run, a file written anywhere but
in the output folder.

    python -m tests.fuzz --inputs 2000
    python -m tests.fuzz --only 731            that input again, with the traceback of its finding

An input is a function of its number (and --seed), so that a finding can be looked at by itself. In
front of them each file is once replaced by nothing, by 100,000 brackets, and by such a pickle.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import safetensors.torch
import soundfile
import torch

import captions
import evaluate
import latents
import sample
import train
from appendix import adapt, caption_scores
from appendix.control import ControlNet, add_control
from appendix.more_metrics import caption_of
from latents import CLIP_SAMPLES, LatentDataset, LatentStats, MelCodec, to_grid
from tests.conftest import save_bert
from unet import UNet, UNetConfig

SECONDS = 20  # for one input
MEMORY = 3 * 2**30  # bytes that one input may ask for, beside what the process has
WEIGHTS = "diffusion_pytorch_model"


# ---- mutations -----------------------------------------------------------------------------------

DEEP = "deep" * 5  # stands for 100,000 brackets, which json.dumps could not write
HOSTILE = [None, True, 0, -1, 0.5, 2**31, 2**63, 10**30, 10**400, 1e308, -1e308, float("nan")]
HOSTILE += [float("inf"), "", "x" * 10_000, "a\0b", "two\nlines", "\ud83d", "../../up", "/", "."]
HOSTILE += ["~", "1e999", "🐕", [], {}, [[]], [None], {"a": 1}, [1, "a"], DEEP]
PIECES = [b"\0", b"\xff\xfe", b"\xc3\x28", b"\xf0\x9f\x90", b"\n", b"\r", b'"', b"'", b",", b"{"]
PIECES += [b"]", b"\xff" * 8, b"\0" * 64, b"9" * 400, b"-1", b"1e999", b"NaN", b"../", b"[" * 10**5]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes, half of them among the first 200, where headers are."""
    for _ in range(rng.randint(1, 3)):
        size = min(len(data), 200) if rng.random() < 0.5 else len(data)
        at = rng.randrange(size + 1)
        end = at + rng.choice((1, 2, 8, rng.randrange(len(data) + 1)))
        match rng.randrange(7):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[end:]
            case 2:
                data = data[:end] + data[at:]
            case 3:
                data = data[:at] + rng.choice(PIECES) + data[at:]
            case 4:
                data = data[:at] + rng.randbytes(min(end - at, 16)) + data[end:]
            case 5:  # a number becomes a huge one
                numbers = list(re.finditer(rb"\d+", data[:10_000])) or [re.match(b"", data)]
                first, last = rng.choice(numbers).span()
                data = data[:first] + str(rng.choice((2**31, 2**63, 10**30))).encode() + data[last:]
            case 6:
                flipped = bytearray(data)
                for place in rng.choices(range(len(data)), k=rng.choice((1, 4))) if data else ():
                    flipped[place] ^= 1 << rng.randrange(8)
                data = bytes(flipped)
    return data


def mutate_value(value, rng: random.Random):
    """A JSON value with one of its parts replaced, lost or doubled."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        value = copy.copy(value)
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                del value[key]
            case 1 if isinstance(value, list):
                value += value
            case 1:
                value[rng.choice(("", "é", key + "2"))] = value[key]
            case _:
                value[key] = mutate_value(value[key], rng)
        return value
    return rng.choice(HOSTILE)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(mutate_value(json.loads(data), rng), ensure_ascii=rng.random() < 0.7)
    text = text.replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5)
    return text.encode(errors="surrogatepass")


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The JSON header with another value, and its length put right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate_json(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def mutate_csv(data: bytes, rng: random.Random) -> bytes:
    """Another cell."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = rng.choice([row for row in rows if row])
    row[rng.randrange(len(row))] = str(rng.choice(HOSTILE))
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode(errors="surrogatepass")


class Bomb:
    """A pickle of it calls a function, `exec` for one, as soon as it is loaded."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def bomb(rng: random.Random) -> bytes:
    code = "open('../bombed', 'w')"
    calls = (exec, code), (os.mkdir, "../bombed"), (os.system, "touch ../bombed"), (eval, code)
    thing, buffer = {"model": Bomb(*rng.choice(calls))}, io.BytesIO()
    if rng.random() < 0.5:
        return pickle.dumps(thing, rng.choice((0, 2, 4)))
    torch.save(thing, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
    return buffer.getvalue()


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """A file's content after a mutation that suits its name, or any."""
    suffix = Path(name).suffix
    if suffix in (".pt", ".pth", ".bin") and rng.random() < 0.2:
        return bomb(rng)
    if rng.random() < 0.5:
        if suffix == ".jsonl":
            lines = data.splitlines(keepends=True)
            at = rng.randrange(len(lines))
            return b"".join([*lines[:at], mutate_json(lines[at], rng), b"\n", *lines[at + 1 :]])
        kinds = {".json": mutate_json, ".safetensors": mutate_safetensors, ".csv": mutate_csv}
        if suffix in kinds:
            return kinds[suffix](data, rng)
    return mutate_bytes(data, rng)


# ---- targets -------------------------------------------------------------------------------------


class Target(NamedTuple):
    files: dict[str, bytes]  # good files, by name
    read: Callable[[str], None]  # reads them in "in", of which this one is mutated; writes to "out"
    damaged: tuple[str, ...] = ()  # which are mutated; empty: any


def contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def sound(rate: int = 16_000, channels: int = 1, **options) -> bytes:
    t = np.arange(rate // 4)[:, None] / rate
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, **options) as file:
        file.comment = json.dumps({"prompt": "rain"})
        file.write(0.3 * np.sin(2 * np.pi * 440 * t) * np.ones(channels))
    return buffer.getvalue()


SOUNDS = {
    "a.wav": sound(format="WAV", subtype="PCM_16"),
    "b.wav": sound(44_100, 2, format="WAV", subtype="FLOAT"),
    "c.flac": sound(22_050, format="FLAC", subtype="PCM_16"),
    "d.ogg": sound(format="OGG", subtype="VORBIS"),
}
CLASSES = b'index,mid,display_name\n0,/m/1,Speech\n1,/m/2,"Male speech, man speaking"\n'
SEGMENTS = (
    b"# Segments csv\n# YTID, start_seconds, end_seconds, positive_labels\n"
    b'a, 30.000, 40.000, "/m/1"\nnone, 0.000, 10.000, "/m/1,/m/2"\n'
)
TABLES = {
    "table.csv": b'file,caption,labels\na.wav,"a dog, barking",Dog;Bark\na.wav,rain,\n',
    "table.jsonl": b'{"file": "a.wav", "captions": ["a dog"], "labels": ["Dog"], "id": "1"}\n'
    b'{"file": "nowhere.wav", "caption": "rain"}\n',
    "segments.csv": SEGMENTS,
    "classes.csv": CLASSES,
}
RECORDS = {
    "records.jsonl": b'{"id": "a", "labels": ["Dog"], "visual_caption": "a dog", "history": [], '
    b'"entailment": {"bert": 0.5}, "merged_caption": "a dog barks", "start": 30.0}\n'
    b'{"file": "b.wav", "labels": ["Cat", "Dog"], "audio_caption": "a cat and a dog", '
    b'"frames": [], "entailment": {"bert": 0.1, "llm": null}}\n',
    "segments.csv": SEGMENTS,
    "classes.csv": CLASSES,
}
PROMPTS = {
    "prompts.txt": "A dog barks\nrain\n犬\n".encode(),
    "prompts.csv": b'name,caption\nDog-1,"a dog, barking"\n,rain\n',
    "prompts.jsonl": b'{"prompt": "rain", "name": 0}\n{"captions": ["cat"], "file": "sub/7.ogg"}\n',
}


def read_audio(name: str) -> None:
    for wave in (
        latents.load_audio(f"in/{name}"),
        latents.load_audio(f"in/{name}", 10.08),
        evaluate.load_sound(Path("in", name)),
    ):
        assert wave.isfinite().all() and wave.dim() == 1
    with contextlib.suppress(ValueError):
        caption_of(Path("in", name))


def encode_table(name: str) -> None:
    table = name if name.startswith("table") else "segments.csv"
    command = ["encode", "in", f"in/{table}", "--codec", "mel", "--workers", "0", "--out", "out"]
    command += ["--class-labels", "in/classes.csv"] if table == "segments.csv" else []
    with mock.patch.object(sys, "argv", ["latents.py", *command]):
        latents.main()


def write_captions(name: str) -> None:
    table = "records.jsonl" if name == "records.jsonl" else "segments.csv"
    for step in ("single-label", "filter"):
        options = ["--class-labels", "in/classes.csv", "--out", "out"]
        captions.main([step, f"in/{table}", *options])


def read_data(name: str) -> None:
    data = LatentDataset("in")
    some = range(min(len(data), 9))
    for i in some:
        data.record(i)
    if some:
        z = latents.load_codec(data.codec).dequantize(data.stored(some))
        data.stats.normalize(to_grid(z))


def tiny_unet() -> UNet:
    return UNet(UNetConfig(128, 128, (32, 32), (False, True), 1, 4, 32, 32))


def make_targets(root: Path) -> dict[str, Target]:
    """Good files of all kinds; `root` gets what the targets share."""
    torch.manual_seed(0)
    save_bert(root / "bert")
    tiny_unet().save_pretrained(root / "model/unet")
    LatentStats(torch.zeros(128).double(), torch.ones(128).double(), 9).save(
        root / "model/latent_stats.safetensors"
    )
    about = {"text_encoder": str(root / "bert"), "max_length": 24, "mask": "none", "guidance": 3}
    about |= {"codec": MelCodec().settings(), "schedule": "cosine", "schedule_shift": 0.5}
    (root / "model/model.json").write_text(json.dumps(about | {"prediction": "x0"}))
    model = sample.load_model(root / "model")
    options = "--steps 1 --precision fp32 --out out".split()

    def prompts(arguments: list[str]) -> None:
        def silence(model, prompts, **settings):
            model.encoder(prompts)
            return torch.zeros(len(prompts), 100)

        args = sample.make_parser("").parse_args([*options, *arguments])
        with mock.patch.object(sample, "load_model", lambda *_: model):
            list(sample.run(args, silence))

    def init_audio(name: str) -> None:
        with mock.patch.object(sample, "load_model", lambda *_: model):
            sample.main([*options, "--init-audio", f"in/{name}", "rain"])

    def merge(option: str) -> Callable:
        def read(name: str) -> None:
            command = ["merge", "--model", root / "model", option, f"in/{name}", "--out", "out/m"]
            adapt.main(list(map(str, command)))

        return read

    def use_encoder(name: str) -> None:
        captions.TextEncoder("in", 24, "both")(["a dog", "rain"])

    words = {"<dog>": torch.zeros(32), "<cat>": torch.ones(32)}
    words = safetensors.torch.save(words, {"text_encoder": adapt.table_hash(model.encoder)})
    to_q = next(n for n in model.unet.state_dict() if n.endswith("attn2.to_q.weight"))[:-7]
    lora = {f"unet.{to_q}.lora_A.weight": torch.ones(2, 32)}
    lora |= {f"unet.{to_q}.lora_B.weight": torch.ones(32, 2)}
    about = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
    lora = safetensors.torch.save(lora, about)

    ControlNet.copy_of(model.unet).save_pretrained(root / "controlnet")

    classifier = evaluate.Cnn14(2, (4,) * 6, ["dog", "cat"])
    classifier.save(root / "classifier.safetensors")
    state = dict(classifier.state_dict())
    state["logmel_extractor.melW"] = state.pop("mel")
    angle = 2 * torch.pi * torch.arange(257).double()[:, None] * torch.arange(512) / 512
    window = torch.hann_window(512, dtype=torch.float64)
    for part, wave in (("real", angle.cos()), ("imag", -angle.sin())):
        state[f"spectrogram_extractor.stft.conv_{part}.weight"] = (wave * window)[:, None].float()
    torch.save({"model": state}, root / "classifier.pth")
    classifiers = {f"classifier{x}": (root / f"classifier{x}").read_bytes()
                   for x in (".pth", ".safetensors")}  # fmt: skip
    weights = io.BytesIO()
    torch.save(model.unet.state_dict(), weights)
    folder = contents(root / "model")
    config = {"config.json": folder["unet/config.json"]}

    rows = [{"id": str(i), "file": f"{i}.wav", "captions": ["rain"], "labels": ["Rain"]}
            for i in range(6)]  # fmt: skip
    latents.encode_dataset(root / "data", MelCodec(), rows, lambda row: torch.rand(1, CLIP_SAMPLES))
    command = f"--data {root}/data --text-encoder {root}/bert --max-length 16 --num-heads 4 "
    command += "--block-out-channels 32,32 --attention 0,1 --cross-attention-dim 32 --val-clips 1 "
    command += f"--batch-size 1 --device cpu --steps 2 --checkpoint-every 1 --out {root}/run"
    train.main(command.split())
    checkpoints = {f"checkpoints/{path}": data
                   for path, data in contents(root / "run/checkpoints").items()}  # fmt: skip

    def encode_again(name: str) -> None:
        shutil.copytree("in", "out", dirs_exist_ok=True)
        latents.encode_dataset("out", MelCodec(), rows, lambda row: torch.rand(1, CLIP_SAMPLES))

    data, bert = contents(root / "data"), contents(root / "bert")
    latents.encode_dataset(root / "begun", MelCodec(), rows, None, rank=1, world_size=2)
    begun = {path: data for path, data in contents(root / "begun").items() if data}
    return {
        "audio": Target(SOUNDS, read_audio),
        "init audio": Target(SOUNDS, init_audio),
        "prompts": Target(PROMPTS, lambda name: prompts(["--prompts", f"in/{name}"])),
        "prompt": Target(
            {"prompt": "a dog barking, 犬".encode()},
            lambda name: prompts(["--", os.fsdecode(Path("in", name).read_bytes())]),
        ),
        "tables": Target(TABLES | SOUNDS, encode_table, tuple(TABLES)),
        "records": Target(RECORDS, write_captions),
        "other tables": Target(
            {"test.csv": b'youtube_id,caption\na,"a dog, barking"\n', "run.jsonl": b'{"id": 1}\n'},
            lambda name: latents.read_table(f"in/{name}"),
        ),
        "ratings": Target(
            {
                "ratings.csv": b"rater,row,score\r\nAda,1,0.5\r\nAda,2,\r\n",
                "key.json": b'{"1": ["a", "zero"], "2": ["a", "few"]}',
            },
            lambda name: caption_scores.main(
                ["average", "in/ratings.csv", "--key", "in/key.json"],
            ),
        ),
        "model folder": Target(
            folder,
            lambda name: sample.main([*options, "--model", "in", "rain"]),
        ),
        "U-Net": Target(
            {path[5:]: data for path, data in folder.items() if path.startswith("unet/")},
            lambda name: UNet.from_pretrained("in"),
        ),
        "U-Net .bin": Target(
            config | {f"{WEIGHTS}.bin": weights.getvalue()},
            lambda name: UNet.from_pretrained("in"),
            (f"{WEIGHTS}.bin",),
        ),
        "text encoder": Target(bert, use_encoder),
        "statistics": Target(
            {"s.safetensors": folder["latent_stats.safetensors"]},
            lambda name: LatentStats.load(f"in/{name}").normalize(torch.zeros(1, 128, 504)),
        ),
        "words": Target({"w.safetensors": words}, merge("--words")),
        "LoRA": Target({"l.safetensors": lora}, merge("--lora")),
        "ControlNet": Target(
            contents(root / "controlnet"),
            lambda name: add_control(model, "in", torch.rand(1000)),
        ),
        "classifier": Target(classifiers, lambda name: evaluate.Cnn14.load(f"in/{name}")),
        "checkpoint": Target(
            checkpoints,
            lambda name: train.load_newest(Path("in/checkpoints")),
            ("checkpoints/step-0000002.pt",),
        ),
        "data set": Target(data, read_data),
        "data set, begun": Target(begun, encode_again),
    }


# ---- what reading must not do --------------------------------------------------------------------


class TooLong(BaseException):
    """Not to be caught by those who catch every Exception."""


class Guard:
    """Notes what is written outside of some folders, and what is started, by anyone."""

    def __init__(self):
        self.allowed, self.seen = None, []
        sys.addaudithook(self)  # for ever: Python has no way to take it off

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"):
            self.seen.append(f"{event} {arguments[0]!r}")
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")
        if event == "open":
            writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(arguments[0], str | bytes | os.PathLike):
            with contextlib.suppress(ValueError):  # NUL in it: there is no such file
                path = os.fsdecode(arguments[0])
                if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # by shutil.rmtree
                    path = f"/proc/self/fd/{arguments[1]}/{path}"
                path = Path(os.path.realpath(path))
                if not any(path.is_relative_to(folder) for folder in (*self.allowed, "/dev")):
                    self.seen.append(f"{event} {path}")


GUARD = Guard()


def outcome(target: Target, name: str) -> tuple[str, str]:
    """Read the files in the current folder: ("read" or "refused" or "finding", why)."""
    GUARD.seen, GUARD.allowed = [], [Path.cwd() / "out"]
    if name.endswith(".pt"):  # resuming clears away, in the run's own folder, what a kill left
        GUARD.allowed.append(Path.cwd() / "in")
    message, kind = "", "read"
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(name)
    except (ValueError, OSError) as e:
        message, kind = f"{e}", "refused"
    except SystemExit as e:
        kind = "refused"
        if e.code not in (None, 0, 2):  # 2: a bad command line
            message = e.code if isinstance(e.code, str) else f"status {e.code}\n"
    except KeyboardInterrupt:
        raise
    except BaseException:
        message, kind = traceback.format_exc(), "finding"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        GUARD.allowed = None
    if "\n" in message:
        kind = "finding"
    if GUARD.seen or Path("../bombed").exists():
        message, kind = f"{GUARD.seen} {message}", "finding"
    return kind, message


@contextlib.contextmanager
def limits():
    """Time and memory for one input; what makes them quicker; and everything back afterwards."""

    def too_long(*_):
        raise TooLong(f"more than {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    alarm, here = signal.signal(signal.SIGALRM, too_long), Path.cwd()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        with mock.patch.object(MelCodec, "iterations", 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mock.patch.object(sys, "dont_write_bytecode", True):
                yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, alarm)
        os.chdir(here)


def inputs(targets: dict[str, Target], numbers: list[int], seed: int):
    """(what it is, target, file, its content) of all that is to be read."""
    for name, target in targets.items():
        for file in target.damaged or target.files:
            yield "good", name, file, target.files[file]
    for name, target in targets.items():
        for file in target.damaged or target.files:
            yield "empty", name, file, b""
            yield "nested", name, file, b"[" * 10**5
            yield "a bomb", name, file, bomb(random.Random(f"{seed} {name} {file}"))
    for i in numbers:
        rng = random.Random(f"{seed} {i}")
        name = list(targets)[i % len(targets)]
        file = rng.choice(targets[name].damaged or sorted(targets[name].files))
        yield f"input {i}", name, file, mutate(file, targets[name].files[file], rng)


def fuzz(root: Path, numbers: list[int], seed: int = 0) -> tuple[dict, list[str]]:
    """Read good files, the worst, and inputs of these numbers: how those of each target ended, with
    the seconds that they took; and what was found."""
    targets, results, findings = make_targets(root / "good"), {}, []
    folder = root / "now"
    with limits():
        for what, name, damaged, content in inputs(targets, numbers, seed):
            os.chdir(root)
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "out").mkdir(parents=True)
            os.chdir(folder)
            for file, data in targets[name].files.items():
                path = Path("in", file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content if file == damaged else data)
            begun = time.perf_counter()
            kind, message = outcome(targets[name], damaged)
            if what == "good":
                assert kind == "read", f"{name}: the good {damaged} gives {message}"
                continue
            counts, seconds = results.setdefault(name, (Counter(), []))
            counts[kind] += 1
            seconds.append(time.perf_counter() - begun)
            if kind == "finding":
                findings.append(f"{what}, {name}, {damaged}:\n{message}")
    return results, findings


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--inputs", type=int, default=2000, help="how many [2000]")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other inputs [0]")
    parser.add_argument("--only", type=int, nargs="*", help="the inputs of these numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = list(range(args.inputs)) if args.only is None else args.only
        results, findings = fuzz(Path(folder).resolve(), numbers, args.seed)
    print(*findings, sep="\n")
    print(f"{'target':20}{'read':>8}{'refused':>9}{'findings':>10}{'slowest s':>11}")
    for name, (counts, seconds) in results.items():
        row = f"{counts['read']:>8}{counts['refused']:>9}{counts['finding']:>10}"
        print(f"{name:20}{row}{max(seconds):>11.2f}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
