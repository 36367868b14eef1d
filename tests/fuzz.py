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
import traceback
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
from encodec import EncodecModel
from safetensors.torch import save_file

import captions
import evaluate
import latents
import sample
import train
from appendix import adapt, caption_scores
from appendix.control import ControlNet, add_control
from appendix.more_metrics import caption_of
from appendix.visual_captions import picture_at
from latents import CLIP_SAMPLES, LatentDataset, MelCodec, to_grid
from tests.conftest import Bomb, save_model
from tests.test_captions_pipeline import write_video
from unet import UNet

SECONDS = 20  # for one input
MEMORY = 3 * 2**30  # bytes that one input may ask for, beside what the process has
sys.dont_write_bytecode = True  # which would be a file written somewhere


# ---- mutations -----------------------------------------------------------------------------------

BRACKETS = "[" * 10**5
DEEP = "deep" * 5  # stands for BRACKETS, which json.dumps could not write
HUGE = [2**31, 2**63, 10**30, 10**400]
HOSTILE = [*HUGE, None, True, 0, -1, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "🐕"]
HOSTILE += ["a\0b", "two\nlines", "\ud83d", "../../up", "/", ".", "~", "1e999", [], {}, [[]], DEEP]
PIECES = [b"\0", b"\xff\xfe", b"\xc3\x28", b"\xf0\x9f\x90", b"\n", b"\r", b'"', b"'", b",", b"{"]
PIECES += [b"]", b"\xff" * 8, b"\0" * 64, b"9" * 400, b"-1", b"1e999", b"../", BRACKETS.encode()]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes, half of them among the first 200, where headers are."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange((min(len(data), 200) if rng.random() < 0.5 else len(data)) + 1)
        end = at + rng.choice((1, 2, 8, rng.randrange(len(data) + 1)))
        before, piece, after = data[:at], data[at:end], data[end:]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:4])
        data = rng.choice((
            before,  # the rest is lost,
            before + after,  # a piece is lost,
            before + piece + piece + after,  # doubled,
            before + rng.choice(PIECES) + piece + after,  # inserted,
            before + rng.randbytes(len(piece[:16])) + after,  # random,
            before + flipped + piece[4:] + after,  # has flipped bits,
            before + re.sub(rb"\d+", b"%d" % rng.choice(HUGE), data[at:], count=1),  # huge numbers
        ))  # fmt: skip
    return data


# A JSON's keys, values, innermost lists and objects, or a CSV's cells; a key with its value
TOKEN = re.compile(rb'"[^"]*"|[^][{}",:\s]+|\[[^][]*\]|{[^{}]*}')
PAIR = re.compile(rb'"[^"]*": *(?:"[^"]*"|[^][{}"]+|\[[^][]*\]|{[^{}]*}),? *')


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """A token becomes another, or a key with its value is lost or doubled."""
    pattern = PAIR if rng.random() < 0.3 and PAIR.search(data) else TOKEN
    found = rng.choice(list(pattern.finditer(data)))
    new = rng.choice((b"", 2 * found[0]))
    if pattern is TOKEN:
        text = json.dumps(rng.choice(HOSTILE), ensure_ascii=rng.random() < 0.7)
        new = text.replace(f'"{DEEP}"', BRACKETS).encode(errors="surrogatepass")
    return data[: found.start()] + new + data[found.end() :]


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The JSON header mutated, and its length put right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate_text(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def bomb(data: bytes, rng: random.Random) -> bytes:
    """A pickle that runs code, bare or as torch saves it, instead of the data."""
    code = "open('../bombed', 'w')"
    calls = (exec, code), (eval, code), (os.mkdir, "../bombed"), (os.system, "touch ../bombed")
    thing, buffer = {"model": Bomb(*rng.choice(calls))}, io.BytesIO()
    if rng.random() < 0.5:
        return pickle.dumps(thing, rng.choice((0, 2, 4)))
    torch.save(thing, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
    return buffer.getvalue()


KINDS = dict.fromkeys((".json", ".jsonl", ".csv", ".txt"), mutate_text)
KINDS |= {".safetensors": mutate_safetensors, ".pt": bomb, ".pth": bomb, ".bin": bomb}


# ---- good files ----------------------------------------------------------------------------------

TEXTS = {
    "prompt/prompt": "a dog barking, 犬",
    "prompts/prompts.txt": "A dog barks\nrain\n犬\n",
    "prompts/prompts.csv": 'name,caption\nDog-1,"a dog, barking"\n,rain\n',
    "prompts/prompts.jsonl": '{"prompt": "a", "name": 0}\n{"captions": ["cat"], "file": "a/7"}\n',
    "tables/table.csv": 'file,caption,labels\na.wav,"a dog, barking",Dog;Bark\na.wav,rain,\n',
    "tables/table.jsonl": '{"file": "a.wav", "captions": ["a dog"], "labels": ["Dog"], "id": "1"}\n'
    '{"file": "nowhere.wav", "caption": "rain"}\n',
    "tables/segments.csv": "# Segments csv\n# YTID, start_seconds, end_seconds, positive_labels\n"
    'a, 30.000, 40.000, "/m/1"\nnone, 0.000, 10.000, "/m/1,/m/2"\n',
    "tables/classes.csv": 'index,mid,display_name\n0,/m/1,Speech\n1,/m/2,"Male speech, a man"\n',
    "records/records.jsonl": '{"id": "a", "labels": ["Dog"], "visual_caption": "dog", "start": 9, '
    '"history": [], "entailment": {"bert": 0.5}, "merged_caption": "a dog barks"}\n'
    '{"file": "b.wav", "labels": ["Cat", "Dog"], "audio_caption": "a cat and a dog", '
    '"frames": [], "entailment": {"bert": 0.1, "llm": null}}\n',
    "ratings/ratings.csv": "rater,row,score\r\nAda,1,0.5\r\nAda,2,\r\n",
    "ratings/key.json": '{"1": ["a", "zero"], "2": ["a", "few"]}',
}


def encode(folder: str | Path, **ranks) -> None:
    rows = [{"id": f"{i}", "file": f"{i}", "captions": ["a"], "labels": ["A"]} for i in range(6)]
    latents.encode_dataset(folder, MelCodec(), rows, lambda _: torch.rand(1, CLIP_SAMPLES), **ranks)


def make_good(root: Path) -> None:
    """A folder of good files for each target, and those that they share."""
    for path, text in TEXTS.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8", newline="")
    for folder in ("audio", "classifier", "words", "LoRA", "U-Net .bin", "EnCodec", "video"):
        (root / folder).mkdir()
    for name, rate, channels in (("a.wav", 16_000, 1), ("b.flac", 44_100, 2), ("c.ogg", 16_000, 1)):
        with soundfile.SoundFile(root / "audio" / name, "w", rate, channels) as file:
            file.comment = json.dumps({"prompt": "rain"})
            file.write(0.3 * np.sin(np.arange(rate // 4))[:, None] * np.ones(channels))
    soundfile.write(root / "audio/d.mp3", np.sin(np.arange(8000)), 16_000)
    write_video(root / "video/v.mp4", [(10 * i, 0, 0) for i in range(20)])
    with warnings.catch_warnings(action="ignore"):
        weights = EncodecModel.encodec_model_24khz(pretrained=False).state_dict()
    torch.save(weights, root / "EnCodec" / Path(latents.EncodecCodec.url).name)

    save_model(root / "model")
    shutil.copytree(root / "bert", root / "text encoder")
    shutil.copy(root / "model/unet/config.json", root / "U-Net .bin")
    model = sample.load_model(root / "model")
    torch.save(model.unet.unet.state_dict(), root / "U-Net .bin/diffusion_pytorch_model.bin")
    ControlNet.copy_of(model.unet.unet).save_pretrained(root / "ControlNet")

    words = {"<dog>": torch.zeros(32), "<cat>": torch.ones(32)}
    about = {"text_encoder": adapt.table_hash(model.encoder)}
    save_file(words, root / "words/words.safetensors", about)
    to_q = next(n for n in model.unet.unet.state_dict() if n.endswith("attn2.to_q.weight"))[:-7]
    lora = {f"unet.{to_q}.lora_{x}.weight": torch.ones(n, 34 - n) for x, n in zip("AB", (2, 32))}
    about = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
    save_file(lora, root / "LoRA/lora.safetensors", about)

    classifier = evaluate.Cnn14(2, (4,) * 6, ["dog", "cat"])
    classifier.save(root / "classifier/classifier.safetensors")
    state = classifier.state_dict()
    state["logmel_extractor.melW"] = state.pop("mel")
    torch.save({"model": dict(state)}, root / "classifier/classifier.pth")

    captions.main(["single-label", f"{root}/records/records.jsonl", "--out", f"{root}/captions"])
    encode(root / "data set")
    encode(root / "data set, begun", rank=1, world_size=2)
    command = f"--text-encoder {root}/bert --max-length 16 --num-heads 4 --cross-attention-dim 32 "
    command += "--block-out-channels 32,32 --attention 0,1 --val-clips 1 --batch-size 1 --steps 2 "
    command += f"--checkpoint-every 1 --device cpu --out {root}/run --data"
    for path in (root / "data set, begun").rglob("*"):
        if path.is_file() and not path.stat().st_size:
            path.unlink()
    train.main([*command.split(), f"{root}/data set"])
    (root / "run/checkpoints").rename(root / "checkpoint")


# ---- targets: what reads them, in the folder "in", and writes to "out" ---------------------------


@cache
def good_model() -> sample.Model:
    return sample.load_model("../good/model")


def write_sounds(*arguments: str) -> None:
    """sample.py without its network."""
    model = good_model()

    def silence(_, prompts, **settings):
        model.encoder(prompts)
        if settings["init_audio"] is not None:
            model.latent(settings["init_audio"])
        return torch.zeros(len(prompts), 100)

    args = sample.make_parser("").parse_args(["--steps", "1", "--out", "out", *arguments])
    with mock.patch.object(sample, "load_model", lambda *_: model):
        list(sample.run(args, silence))


def read_audio(name: str) -> None:
    path = Path("in", name)
    waves = latents.load_audio(path), latents.load_audio(path, 10.08), evaluate.load_sound(path)
    assert all(wave.isfinite().all() and wave.dim() == 1 for wave in waves)
    with contextlib.suppress(ValueError):
        caption_of(path)


def encode_table(name: str) -> None:
    table = name if name.startswith("table") else "segments.csv --class-labels in/classes.csv"
    command = f"latents.py encode ../good/audio in/{table} --codec mel --workers 0 --out out"
    with mock.patch.object(sys, "argv", command.split()):
        latents.main()


def write_captions(name: str) -> None:
    for step in ("single-label", "filter"):
        captions.main([step, f"in/{name}", "--out", "out"])


def go_on(name: str) -> None:
    shutil.copytree("in", "out", dirs_exist_ok=True)
    captions.main(["single-label", "../good/records/records.jsonl", "--out", "out"])


def read_data(name: str) -> None:
    data = LatentDataset("in")
    if some := range(min(len(data), 9)):
        z = latents.load_codec(data.codec).dequantize(data.stored(some))
        data.stats.normalize(to_grid(z))
    for i in some:
        data.record(i)


def encode_again(name: str) -> None:
    shutil.copytree("in", "out", dirs_exist_ok=True)
    encode("out")


def merge(option: str, name: str) -> None:
    adapt.main(["merge", "--model", "../good/model", option, f"in/{name}", "--out", "out/m"])


TARGETS = {  # folder of good files: what reads them, given the name of the one that is damaged
    "audio": read_audio,
    "init audio": lambda name: write_sounds("--init-audio", f"in/{name}", "rain"),
    "prompt": lambda name: write_sounds("--", os.fsdecode(Path("in", name).read_bytes())),
    "prompts": lambda name: write_sounds("--prompts", f"in/{name}"),
    "tables": encode_table,
    "records": write_captions,
    "captions": go_on,
    "video": lambda name: picture_at(Path("in", name), 0.5),
    "EnCodec": lambda _: latents.EncodecCodec("in"),
    "ratings": lambda _: caption_scores.main("average in/ratings.csv --key in/key.json".split()),
    "model": lambda _: sample.main("rain --model in --steps 1 --precision fp32 --out out".split()),
    "U-Net .bin": lambda _: UNet.from_pretrained("in"),
    "text encoder": lambda _: captions.TextEncoder("in", 24, "both")(["a dog", "rain"]),
    "words": lambda name: merge("--words", name),
    "LoRA": lambda name: merge("--lora", name),
    "ControlNet": lambda _: add_control(good_model(), "in", torch.rand(1000)),
    "classifier": lambda name: evaluate.Cnn14.load(f"in/{name}"),
    "checkpoint": lambda _: train.load_newest(Path("in")),
    "data set": read_data,
    "data set, begun": encode_again,
}


def contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class TooLong(BaseException):
    """Not to be caught by those who catch every Exception."""


def too_long(*_):
    raise TooLong(f"more than {SECONDS} seconds")


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


def outcome(target: str, name: str) -> tuple[str, str]:
    """Read the files in the current folder: ("read" or "refused" or "finding", why)."""
    GUARD.seen, GUARD.allowed = [], [Path.cwd() / "out"]
    if target == "checkpoint":  # resuming clears away, in the run's own folder, what a kill left
        GUARD.allowed.append(Path.cwd() / "in")
    message, kind = "", "read"
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings(action="ignore"):
                TARGETS[target](name)
    except (ValueError, OSError, SystemExit) as e:
        message, kind = str(e), "refused"
    except KeyboardInterrupt:
        raise
    except BaseException:
        message = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        GUARD.allowed = None
    bombed = GUARD.seen or Path("../bombed").exists()
    if bombed or "\n" in message or message == "1":  # a status without a line
        return "finding", f"{GUARD.seen} {message}"
    return kind, message


def inputs(good: dict[str, dict[str, bytes]], numbers: list[int], seed: int):
    """(what it is, target, file, its content) of all that is to be read."""
    for target, files in good.items():
        for file, data in files.items():
            yield "good", target, file, data
            yield "empty", target, file, b""
            yield "nested", target, file, BRACKETS.encode()
            yield "a bomb", target, file, bomb(data, random.Random(f"{seed} {target} {file}"))
    for i in numbers:
        rng, target = random.Random(f"{seed} {i}"), list(good)[i % len(good)]
        file = rng.choice(sorted(good[target]))
        kind = KINDS.get(Path(file).suffix, mutate_bytes)  # one that suits its name, or any
        kind = kind if rng.random() < (0.2 if kind is bomb else 0.5) else mutate_bytes
        yield f"input {i}", target, file, kind(good[target][file], rng)


def fuzz(root: Path, numbers: list[int], seed: int = 0) -> tuple[dict, list[str]]:
    """Read good files, the worst, and inputs of these numbers: how many of each target ended how,
    and what was found."""
    make_good(root / "good")
    good = {name: contents(root / "good" / name.replace("init ", "")) for name in TARGETS}
    results, findings, here = {name: Counter() for name in TARGETS}, [], Path.cwd()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    alarm = signal.signal(signal.SIGALRM, too_long)
    try:
        for what, target, damaged, content in inputs(good, numbers, seed):
            os.chdir(root)
            shutil.rmtree("now", ignore_errors=True)
            Path("now/out").mkdir(parents=True)
            os.chdir("now")
            for file, data in (good[target] | {damaged: content}).items():
                Path("in", file).parent.mkdir(parents=True, exist_ok=True)
                Path("in", file).write_bytes(data)
            kind, message = outcome(target, damaged)
            results[target][kind] += 1
            if kind == "finding" or what == "good" and kind != "read":
                findings.append(f"{what}, {target}, {damaged}:\n{message}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, alarm)
        os.chdir(here)
    return results, findings


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--inputs", type=int, default=2000, help="how many [2000]")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other inputs [0]")
    parser.add_argument("--only", type=int, nargs="*", help="the inputs of these numbers")
    args = parser.parse_args()
    numbers = list(range(args.inputs)) if args.only is None else args.only
    with tempfile.TemporaryDirectory() as folder:
        results, findings = fuzz(Path(folder).resolve(), numbers, args.seed)
    print(*findings, sep="\n")
    for name, counts in results.items():
        print(f"{name:20}" + "".join(f"{counts[x]:>6} {x}" for x in ("read", "refused", "finding")))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
