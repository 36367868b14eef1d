"""Scenes composed from the recordings of `tiny/`, written as an ordinary stored data set.

Some hundreds of short recordings are too little to train on as they are: a dog barks for half a
second, and a clip has ten. So a scene is composed: one to three labels, each a *layer* of *events*
(a recording, or a part of one, at a start, a level and a pitch), every layer with its own filter,
all of them in one room, sometimes over a faint noise. AudioSet's labels are weak (what is heard,
not when), and so are a scene's.

    layer_k = Σ_e gain_e · pitch_e(recording_e), shifted to start_e
    wave    = Σ_k layer_k ∗ filter_k ∗ (δ + wet · room) + noise,   room(t) = n(t) · 10^(−3t / RT60)

Scene number i of a split is drawn by a generator seeded with (seed, split, i) and nothing else: the
order, the number of workers and the number of scenes don't matter. Its record in the data set holds
all that was drawn, so `compose_scene(record, recordings)` gives the same sound again. Draws are
balanced over classes, then over the sources of a class (a soundfont with 60 notes counts as much as
one field recording), then over the recordings of a source.

Scenes to train on vary more than those of "test", in pitch and in the rooms near by. As the tagger
hears them, they are then more like scenes of other recordings.

Not in the papers, which train on two million clips of AudioSet.

    python -m tiny.compose                                    # tiny/data/train, tiny/data/test
    python -m tiny.compose --out /tmp/scenes --clips 100 --seed 1
"""

import argparse
import csv
import functools
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from latents import (
    CLIP_SAMPLES,
    SAMPLE_RATE,
    MelCodec,
    encode_dataset,
    load_audio,
    natural,
    pick_device,
    positive,
)
from tiny.wording import draw_captions, read_wording

HERE = Path(__file__).resolve().parent
CLIPS = {"train": 12_000, "test": 512}
SECONDS = CLIP_SAMPLES / SAMPLE_RATE  # 10.08
LABELS_A_SCENE = {"train": (0.5, 0.4, 0.1), "test": (0.65, 0.27, 0.08)}  # one, two, three labels

# Pitch and speed change together, as on a tape, by p/q. Small terms only: resampling between rates
# with a large coprime ratio is slow. One dog keeps to one row; notes move in just intonation.
PITCHES = (((5, 6), (9, 10)), ((15, 16), (1, 1), (1, 1), (16, 15)), ((10, 9), (6, 5)))
WIDE_PITCHES = (  # of training scenes: their recordings are few, and others sound otherwise
    ((2, 3), (3, 4)), ((3, 4), (4, 5)), *PITCHES, ((5, 4), (4, 3)), ((4, 3), (3, 2)),
)  # fmt: skip
SCALE = ((1, 1), (1, 1), (9, 8), (5, 4), (4, 3), (8, 9), (4, 5), (3, 4))

# Where a scene is heard: reverberation time in seconds, amplitude of the reverberation relative to
# the sound's, and RMS of the sounding part in dB of full scale.
PLACES = {
    "near": {"rt60": (0.1, 0.6), "wet": (0.0, 0.4), "level_db": (-22, -16)},
    "hall": {"rt60": (1.2, 2.0), "wet": (0.6, 1.2), "level_db": (-22, -16)},
    "far": {"rt60": (0.4, 1.5), "wet": (0.3, 1.0), "level_db": (-34, -28)},
}
WIDE_NEAR = {"rt60": (0.1, 1.2), "wet": (0.0, 0.9)}  # of training scenes
FFT_SAMPLES = 180_000  # a clip and 1.17 s of reverberation; 2^5 · 3^2 · 5^4 is quick to transform


class Recordings:
    """The recordings of a split by class and source, and their waves, read once.

    Args:
        table: `recordings.csv`: file (relative to the table), labels (the first one is the class;
            separated by ';'), source_group, split.
        split: "train" or "test".
    Raises OSError or ValueError, with one line that says which file or label is amiss.
    """

    def __init__(self, table: str | Path, split: str):
        self.folder, self.split = Path(table).parent, split
        self.pitches = WIDE_PITCHES if split == "train" else PITCHES
        self.wording = read_wording()
        self.classes = defaultdict(lambda: defaultdict(list))  # class -> source -> recordings
        self.waves: dict[str, Tensor] = {}
        with open(table, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := {"file", "labels", "source_group", "split"} - set(
                reader.fieldnames or []
            ):
                raise ValueError(f"{table}: lacks the columns {sorted(missing)}")
            rows = [row for row in reader if row["split"] == split]
        for row in rows:
            label = row["labels"].split(";")[0]
            if label not in self.wording:
                raise ValueError(f"{table}: wording.csv has no words for the label {label!r}")
            try:
                seconds = soundfile.info(self.folder / row["file"]).duration
            except soundfile.LibsndfileError as error:
                raise ValueError(f"{table}: {row['file']} can't be read ({error})") from error
            if not seconds:
                raise ValueError(f"{table}: {row['file']} is empty")
            take = {"file": row["file"], "seconds": seconds}
            self.classes[label][row["source_group"]].append(take)
        if not rows:
            raise ValueError(f"{table}: no recordings of the split {split!r}")
        self.names = sorted(self.classes)

    def wave(self, file: str) -> Tensor:
        """[samples] at 16 kHz, scaled so that its loudest 50 ms have an RMS of 1."""
        if file not in self.waves:
            wave = load_audio(self.folder / file)
            loudest = frame_rms(wave).max()
            if loudest < 1e-4:
                raise ValueError(f"{self.folder / file}: is silent")
            self.waves[file] = wave / loudest
        return self.waves[file]

    def preload(self, scenes: list[dict]) -> None:
        """Reads the waves of these scenes, before workers are forked: they share the memory."""
        for scene in scenes:
            for layer in scene["layers"]:
                for item in layer["events"]:
                    self.wave(item["file"])


def frame_rms(wave: Tensor) -> Tensor:
    """[samples] -> [frames]: RMS of consecutive frames of 50 ms, the last one zero-padded."""
    size = SAMPLE_RATE // 20
    frames = torch.nn.functional.pad(wave, (0, -len(wave) % size)).view(-1, size)
    return frames.square().mean(1).sqrt()


# ------------------------------------------------------------------ drawing a scene


def draw_scene(rng: np.random.Generator, recordings: Recordings, name: str = "scene") -> dict:
    """A scene's record: id, captions, labels, order, place, layers, room, levels. Reads no audio.

    A layer: label, gain_db, its filter (low_db, high_db, cutoff in Hz or None) and its events. An
    event: file, start (s in the clip), offset and seconds (of the recording), pitch ([p, q]),
    gain_db and fade (s, at both ends).
    """
    count = min(1 + rng.choice(3, p=LABELS_A_SCENE[recordings.split]), len(recordings.names))
    labels = [str(x) for x in rng.choice(recordings.names, count, replace=False)]
    is_texture = {x: recordings.wording[x]["plays"] == "texture" for x in labels}
    order = "then" if count == 2 and rng.random() < 0.4 else "together"
    if order == "together":
        labels.sort(key=is_texture.get)  # the last layer is the background: a texture, if any
    layers = draw_layers(rng, recordings, labels, order)

    place = "near"
    if count == 1 and not is_texture[labels[0]]:  # nobody says "rain in a large hall"
        place = str(rng.choice(list(PLACES), p=[0.76, 0.12, 0.12]))
    if place == "far":
        layers[0]["cutoff"] = uniform(rng, 900, 2200)
    scene = {"id": name, "file": name, "labels": sorted(labels), "order": order, "place": place}
    scene |= {key: uniform(rng, *PLACES[place][key]) for key in ("rt60", "wet", "level_db")}
    scene["noise_db"] = uniform(rng, -60, -35) if rng.random() < 0.3 else None
    scene["seed"] = int(rng.integers(2**31))  # of the room and the noise
    scene["layers"] = layers
    if recordings.split == "train" and place == "near":
        scene |= {key: uniform(rng, *WIDE_NEAR[key]) for key in WIDE_NEAR}
    return scene | {"captions": draw_captions(rng, scene, recordings.wording)}


def draw_layers(
    rng: np.random.Generator, recordings: Recordings, labels: list[str], order: str
) -> list[dict]:
    """A layer for each label: one "then" the other, or all "together", the last one softer."""
    spans = [(0.0, SECONDS)] * len(labels)
    if order == "then":
        change = rng.uniform(4.0, 6.0)
        spans = [(0.0, change), (change, SECONDS)]
    layers = [draw_layer(rng, recordings, x, *span) for x, span in zip(labels, spans, strict=True)]
    if order == "together" and len(labels) > 1:
        layers[-1]["gain_db"] = uniform(rng, -14, -4)
    return layers


def draw_layer(
    rng: np.random.Generator, recordings: Recordings, label: str, begin: float, end: float
) -> dict:
    """One class from `begin` to `end` (s): a source, one or all of its takes, events, a filter."""
    sources = recordings.classes[label]
    takes = sources[pick(rng, sorted(sources))]
    if rng.random() < 0.4:
        takes = [pick(rng, takes)]  # the same bark again and again
    repeated = functools.partial(repeated_events, pitches=recordings.pitches)
    events = {
        "texture": functools.partial(texture_events, pitches=recordings.pitches),
        "notes": note_events,
        "calls": functools.partial(repeated, longest=1.2, jitter=0.7),
        "beats": functools.partial(repeated, longest=0.3, jitter=0.1),
    }[recordings.wording[label]["plays"]](rng, takes, begin, end)
    shelves = {"low_db": uniform(rng, -6, 4), "high_db": uniform(rng, -6, 4)}
    return {"label": label, "gain_db": 0.0, **shelves, "cutoff": None, "events": events}


def texture_events(rng, takes: list[dict], begin: float, end: float, pitches=PITCHES) -> list[dict]:
    """Rain, wind, an engine: pieces crossfaded into each other until the time is full."""
    events, pitch = [], pick(rng, pick(rng, pitches))
    ratio = pitch[0] / pitch[1]
    start, end = begin - 0.25, end + 0.25  # fades at the ends of a clip lie outside
    while True:
        take = pick(rng, takes)
        length = min(take["seconds"] / ratio, end - start)
        offset = rng.uniform() * max(take["seconds"] - length * ratio, 0)
        fade = min(0.5, length / 4)
        events.append(event(take, start, length, pitch, uniform(rng, -1, 1), fade, offset))
        if start + length > end - 0.01:
            return events
        start += length - fade


def repeated_events(
    rng, takes: list[dict], begin: float, end: float, longest: float, jitter: float, pitches
) -> list[dict]:
    """A bark, a step: again and again, with pauses no longer than itself, or than `longest` s."""
    events, pitches = [], pick(rng, pitches)
    pause = rng.uniform(0.1, 1.0)
    start = begin + rng.uniform(0, 0.1) * (end - begin)
    end -= rng.uniform(0, 0.15) * (end - begin)
    while start < end:
        take, pitch = pick(rng, takes), pick(rng, pitches)
        length = take["seconds"] * pitch[1] / pitch[0]
        if events and end - start < min(length / 2, 1):  # too little of it would be heard
            break
        events.append(event(take, start, length, pitch, uniform(rng, -5, 0), 0.005))
        start += length + min(pause * length, longest) * rng.uniform(1 - jitter, 1 + jitter)
    return events


def note_events(rng, takes: list[dict], begin: float, end: float) -> list[dict]:
    """An instrument: a phrase of notes on a beat, some of them held, some of them two at a time."""
    events, beat = [], rng.uniform(0.25, 0.75)
    start = begin + rng.uniform(0, 0.3)
    while start < end - 0.2:
        hold = beat * pick(rng, (0.5, 1, 1, 1, 2))
        for _ in range(2 if rng.random() < 0.2 else 1):
            take, pitch = pick(rng, takes), pick(rng, SCALE)
            length = min(take["seconds"] * pitch[1] / pitch[0], hold * 1.3, end - start)
            events.append(event(take, start, length, pitch, uniform(rng, -5, 0), 0.03))
        start += hold
    return events


def event(take, start, length, pitch, gain_db, fade, offset=0.0) -> dict:
    """`length`: as heard, s; the record has the seconds of the recording that this takes."""
    seconds = round(length * pitch[0] / pitch[1], 4)
    place = {"file": take["file"], "start": round(start, 4), "offset": round(offset, 4)}
    fade = round(min(fade, length / 4), 4)
    return {**place, "seconds": seconds, "pitch": list(pitch), "gain_db": gain_db, "fade": fade}


def pick(rng: np.random.Generator, items):
    return items[rng.integers(len(items))]


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(rng.uniform(low, high), 3)


# ------------------------------------------------------------------ from the record to the sound


def compose_scene(scene: dict, recordings: Recordings) -> Tensor:
    """The sound of a record: float32 [161280] at 16 kHz, |wave| < 1. Nothing is random but `seed`.

    Filters and room are products of spectra: an FFT for each layer, one for the room, one back.
    """
    hertz = torch.fft.rfftfreq(FFT_SAMPLES, 1 / SAMPLE_RATE)
    spectrum = torch.zeros(len(hertz), dtype=torch.complex64)
    for layer in scene["layers"]:
        stem = torch.zeros(FFT_SAMPLES)
        for item in layer["events"]:
            place_event(stem, item, recordings.wave(item["file"]))
        spectrum += torch.fft.rfft(stem) * filter_gain(hertz, layer)

    generator = torch.Generator().manual_seed(scene["seed"])
    samples = min(round(scene["rt60"] * SAMPLE_RATE), FFT_SAMPLES - CLIP_SAMPLES)
    decay = 10 ** (-3 / (scene["rt60"] * SAMPLE_RATE) * torch.arange(samples))
    room = torch.randn(samples, generator=generator) * decay
    spectrum *= 1 + scene["wet"] * torch.fft.rfft(room / room.norm(), FFT_SAMPLES)

    wave = torch.fft.irfft(spectrum, FFT_SAMPLES)[:CLIP_SAMPLES]
    rms = frame_rms(wave)
    sounding = rms[rms > rms.max() / 30]  # within 30 dB of the loudest
    wave = wave / sounding.square().mean().sqrt()
    if scene["noise_db"] is not None:
        noise = torch.randn(CLIP_SAMPLES, generator=generator)
        wave = wave + noise * 10 ** (scene["noise_db"] / 20)
    wave = wave * 10 ** (scene["level_db"] / 20)
    return wave * (0.97 / wave.abs().max()).clamp(max=1)


def place_event(stem: Tensor, item: dict, wave: Tensor) -> None:
    """Adds a recording, or a part of one, to a layer: cut, pitch, fade, level, position."""
    first = round(item["offset"] * SAMPLE_RATE)
    piece = wave[first : first + round(item["seconds"] * SAMPLE_RATE)]
    piece = torchaudio.functional.resample(piece, *item["pitch"]).clone()
    size = round(item["fade"] * SAMPLE_RATE)
    ramp = torch.sin(torch.linspace(0, math.pi / 2, size))  # equal power where two pieces cross
    piece[:size] *= ramp
    piece[len(piece) - size :] *= ramp.flip(0)
    start = round(item["start"] * SAMPLE_RATE)
    piece = piece[max(-start, 0) : CLIP_SAMPLES - start]
    start = max(start, 0)
    stem[start : start + len(piece)] += piece * 10 ** (item["gain_db"] / 20)


def filter_gain(hertz: Tensor, layer: dict) -> Tensor:
    """[bins]: two gentle shelves, at 250 Hz and 3 kHz, and the low-pass of distance, zero-phase."""
    low, high = (hertz / 250) ** 2, (hertz / 3000) ** 2
    db = layer["gain_db"] + layer["low_db"] / (1 + low) + layer["high_db"] * high / (1 + high)
    if layer["cutoff"] is not None:
        db = db - 10 * torch.log10(1 + (hertz / layer["cutoff"]) ** 4)
    return 10 ** (db / 20)


# ------------------------------------------------------------------ the data set


def draw_scenes(recordings: Recordings, split: str, clips: int, seed: int) -> list[dict]:
    """The records of scenes 0 … clips − 1 of a split, each from its own generator."""
    scenes = []
    for i in range(clips):
        rng = np.random.default_rng([seed, list(CLIPS).index(split), i])
        scenes.append(draw_scene(rng, recordings, f"{split}-{seed}-{i:06d}"))
    return scenes


def load_clips(recordings: Recordings, scene: dict) -> Tensor:
    """What `encode_dataset` asks for: the clips of one row, [1, 161280]."""
    return compose_scene(scene, recordings)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compose scenes and store them as a data set.")
    parser.add_argument("--out", type=Path, help="folder (default: tiny/data/SPLIT, both splits)")
    parser.add_argument("--split", choices=list(CLIPS), help="recordings used (default: train)")
    parser.add_argument("--clips", type=positive, help=f"number of scenes (default: {CLIPS})")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--recordings", type=Path, default=HERE / "recordings.csv")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=natural, default=cores, help="processes that compose")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the workers fill the cores
    splits = [args.split or "train"] if args.split or args.out else list(CLIPS)
    codec = MelCodec(pick_device(None))
    try:
        for split in splits:
            out = args.out or HERE / "data" / split
            recordings = Recordings(args.recordings, split)
            scenes = draw_scenes(recordings, split, args.clips or CLIPS[split], args.seed)
            print(f"{out}: {len(scenes)} scenes of {len(recordings.names)} classes")
            recordings.preload(scenes)
            load = functools.partial(load_clips, recordings)
            encode_dataset(out, codec, scenes, load, workers=args.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
