"""Tagging by ear and eye, where what is seen counts as far as it fits (P2, A.4.2, table A8).

h_i, i = 1 … T, are the states of the audio, then those of the video, brought to one width; s in
0 … 1 is the clip's entailment score (visual_captions.py). For each class k, attention pooling:

    α_ki = exp(a_ki) / Σ_j exp(a_kj)       c_k = Σ_i α_ki·h_i       logit_k = w_k·c_k + b_k

P2: "the corresponding embedding indexes' attention score gets discounted by the entailment score".
It doesn't say if that is before the softmax or after it, nor if the weights add up to 1 then. Here

    α_ki = e_i·exp(a_ki) / Σ_j e_j·exp(a_kj)       e_i = 1 for the audio, s for the video

the softmax of a + log e: s = 0 is the audio alone, s = 1 attention without a discount, and the odds
of looking against listening are s times what they were. P2's c_t: here t is the class. Its naive
fusion is "pure concatenation": w_k·[c_k of the audio; c_k of the video], each by its own softmax.

    python -m appendix.fusion simulate             what the discount does, where that is known
    python -m appendix.fusion train AUDIO --test AUDIO --video FOLDER --scores run.jsonl
    python -m appendix.fusion train … --tagger runs/taltrans/model/tagger.safetensors --steps 800

AUDIO: a stored data set (latents.py) with labels; what is heard are a tagger's states (classify.py)
or else the latents. Video: features of any pretrained network (P2: R(2+1)D on Kinetics), an array
[frames, D] for each clip, as a folder of ID.npy. One way to get them, with pieces of a second or
two, is torchvision's r2plus1d_18(weights="DEFAULT") with nn.Identity() as its `fc`. Scores: what
`appendix.visual_captions entail` adds to its records. All is held in memory: some ten thousand
clips. A clip without video goes by its audio; "video" and "concatenation" see zeros there.

`simulate` makes videos and scores up: it shows whether the formula does what it should, and nothing
about real videos.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import latents
import train
from appendix import classify, make_parser, markdown, write_json
from appendix.classify import LogMelCodec, TALTrans, labels_of, load_tagger, targets_of
from latents import LatentDataset, natural, number, one_line_errors, positive

BLOCKS = 21  # states of an audio clip: one for 0.48 s
# At a rate of 3e-3 attention was still on its way after these steps.
LOOP = "--steps 400 --warmup-steps 40 --batch-size 64 --lr 1e-2"
# How much audio and video count, if it isn't a score that says so.
FIXED = {"audio": (1.0, 0.0), "video": (0.0, 1.0), "attention": (1.0, 1.0)}


class Fusion(nn.Module):
    """mode: "audio", "video", "concatenation", "attention" (no discount) or "discount"."""

    def __init__(self, audio_dim: int, video_dim: int, classes: int, width: int, mode: str):
        super().__init__()
        self.mode = mode
        sizes = (audio_dim, video_dim)
        parts = [(nn.LayerNorm(n), nn.Linear(n, width), nn.GELU()) for n in sizes]
        self.audio, self.video = (nn.Sequential(*part) for part in parts)
        self.weight, self.score = nn.Linear(width, classes), nn.Linear(width, classes)
        self.score_video = self.score
        if mode == "concatenation":  # its w_k has twice the width
            self.score_video = nn.Linear(width, classes, bias=False)

    def attend(self, audio: Tensor, video: Tensor, there: Tensor, s: Tensor) -> tuple:
        """audio [B, T, Da], video [B, F, Dv], there [B, F] (0: no such frame), s [B] ->
        h [B, T + F, width] and α [B, T + F, classes]."""
        h = torch.cat([self.audio(audio), self.video(video)], 1)
        a = self.weight(h)
        if self.mode in ("video", "concatenation"):  # what has to look, without video sees zeros
            there = torch.where(there.any(1, keepdim=True), there, 1.0)
        if self.mode == "concatenation":
            of_audio, of_video = a.split([audio.shape[1], video.shape[1]], 1)
            of_video = of_video + there.log()[..., None]
            return h, torch.cat([of_audio.softmax(1), of_video.softmax(1)], 1)
        ears, eyes = FIXED.get(self.mode, (1.0, s[:, None]))
        e = torch.cat([torch.full_like(audio[..., 0], ears), there * eyes], 1)  # [B, T + F]
        return h, (a + e.log()[..., None]).softmax(1)  # log 0 = −∞, and α = 0

    def forward(self, audio: Tensor, video: Tensor, there: Tensor, s: Tensor) -> Tensor:
        """Logits [B, classes]: w_k·Σ_i α_ki·h_i = Σ_i α_ki·(w_k·h_i)."""
        h, alpha = self.attend(audio, video, there, s)
        of_audio, of_video = h.split([audio.shape[1], video.shape[1]], 1)
        return (alpha * torch.cat([self.score(of_audio), self.score_video(of_video)], 1)).sum(1)


@dataclass
class Clips:
    """audio [N, T, Da], video [N, F, Dv], there [N, F] of 0 and 1, scores: name -> [N] of 0 … 1,
    targets [N, classes]; fits [N]: does the video belong to the audio? (where that is known)"""

    audio: Tensor
    video: Tensor
    there: Tensor
    scores: dict[str, Tensor]
    targets: Tensor
    fits: Tensor | None = None

    def inputs(self, score: str, indices, device) -> list[Tensor]:
        """What a Fusion takes; s is 1 where there is no `score`."""
        s = self.scores.get(score, torch.ones(len(self.audio)))
        return [x[indices].to(device) for x in (self.audio, self.video, self.there, s)]


# ---- reading -------------------------------------------------------------------------------------


@torch.no_grad()
def read_audio(data: LatentDataset, n: int, tagger: TALTrans | None, known: LatentDataset) -> Clips:
    """The first n clips, without video. audio is [n, 21, D]: the mean of a tagger's states in each
    block of 0.48 s; without a tagger, mean and standard deviation of the latents, normalised as the
    training set's, `known`. targets: its labels."""
    log_mel, states = LogMelCodec(), []
    if tagger and data.codec != log_mel.settings():
        raise ValueError(f"{data.folder}: a tagger hears log-mel frames (appendix.classify encode)")
    codec = log_mel if data.codec == log_mel.settings() else latents.load_codec(data.codec)
    for part in tqdm(torch.arange(n).split(32), unit="batch", leave=False, desc="audio"):
        z = codec.dequantize(data.stored(part))  # [B, C, frames]
        z = tagger.states(z.mT) if tagger else known.stats.normalize(z).mT
        z = z[:, : z.shape[1] // BLOCKS * BLOCKS].unflatten(1, (BLOCKS, -1))
        std, mean = torch.std_mean(z, 2)
        states.append(mean if tagger else torch.cat([mean, std], 2))
    targets = targets_of(data, range(n), labels_of(known)).float()
    return Clips(torch.cat(states), torch.zeros(n, 1, 1), torch.ones(n, 1), {}, targets)


def read_video(folder: Path, ids: list[str]) -> tuple[Tensor, Tensor]:
    """Features of these clips, from a folder of ID.npy: video [N, F, D], there [N, F]. ValueError
    names what is no array [frames, D], or doesn't have the others' D."""
    found = {}
    for i, path in enumerate(Path(folder, f"{name}.npy") for name in ids):
        if path.is_file():
            x = torch.from_numpy(np.load(path, allow_pickle=False)).float()
            size = next(iter(found.values()), x).shape[-1]
            if x.dim() != 2 or x.shape[1] != size or not len(x) or not x.isfinite().all():
                raise ValueError(f"{path}: {list(x.shape)}, expected finite [frames, {size}]")
            found[i] = x
    if not found:
        raise ValueError(f"{folder}: no array is named as one of the clips, such as {ids[0]}.npy")
    print(f"{folder}: {len(found)} of {len(ids)} clips have video")
    video = torch.zeros(len(ids), max(map(len, found.values())), size)
    there = torch.zeros(video.shape[:2])
    for i, x in found.items():
        video[i, : len(x)], there[i, : len(x)] = x, 1
    return video, there


def read_scores(path: Path, ids: list[str]) -> dict[str, Tensor]:
    """The entailment scores of captions.py's records: {"llm": [N], …}, in 0 … 1 (a cosine below 0
    counts as 0). A clip without a score: 1, no discount."""
    records = {x["id"]: x.get("entailment") or {} for x in latents.read_table(path)}
    scores = {}
    for name in sorted({name for x in records.values() for name in x}):
        values = [records.get(i, {}).get(name) for i in ids]
        if missing := values.count(None):
            print(f"{path}: {missing} of {len(ids)} clips have no score {name}: not discounted")
        scores[name] = torch.tensor([1.0 if x is None else float(x) for x in values]).clamp(0, 1)
    if not scores:
        raise ValueError(f"{path}: no record has scores (appendix.visual_captions entail)")
    return scores


# ---- simulation ----------------------------------------------------------------------------------


def simulated(clips: Clips, seed: int, noise: float, frames: int = 8, dim: int = 32) -> Clips:
    """The clips with made-up videos and scores. A class looks like a fixed random vector; a frame
    is the sum of those seen, and noise. In half of the clips, `fits`, what is seen is what is
    heard; in the others it is what is heard in another clip, of other labels. Scores: `relevance`,
    fits itself; `noisy`, N(0.7, 0.2) or N(0.3, 0.2); `shuffled`, another clip's noisy one."""
    looks = np.random.default_rng(0).standard_normal((clips.targets.shape[1], dim))
    rng, n = np.random.default_rng((seed, 1)), len(clips.targets)
    fits, seen = rng.random(n) < 0.5, clips.targets.numpy().copy()
    for i in np.flatnonzero(~fits):
        others = np.flatnonzero(clips.targets.numpy() @ clips.targets[i].numpy() == 0)
        seen[i] = clips.targets[int(rng.choice(others))]
    video = (seen @ looks)[:, None] + noise * rng.standard_normal((n, frames, dim))
    noisy = rng.normal(np.where(fits, 0.7, 0.3), 0.2).clip(0, 1)
    scores = {"relevance": fits, "noisy": noisy, "shuffled": rng.permutation(noisy)}
    scores = {name: torch.from_numpy(x).float() for name, x in scores.items()}
    video, fits = torch.from_numpy(video).float(), torch.from_numpy(fits)
    return replace(clips, video=video, there=torch.ones(n, frames), scores=scores, fits=fits)


# ---- training and testing ------------------------------------------------------------------------


def fit(mode: str, score: str, clips: Clips, width: int, c: train.Config, device) -> Fusion:
    torch.manual_seed(c.seed)
    net = Fusion(clips.audio.shape[2], clips.video.shape[2], clips.targets.shape[1], width, mode)
    optimizer = torch.optim.AdamW(net.to(device).parameters(), c.lr, weight_decay=0.01)
    for step in tqdm(range(c.steps), unit="step", leave=False, desc=f"{mode} {score}"):
        indices = train.clips_of_step(step, c.batch_size, len(clips.audio), c.seed)
        logits = net(*clips.inputs(score, indices, device))
        loss = F.binary_cross_entropy_with_logits(logits, clips.targets[indices].to(device))
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def measure(net: Fusion, score: str, clips: Clips, labels: list[str], device) -> dict[str, float]:
    """mAP; where it is known which videos fit, that of either part alone, too, and how much of the
    attention is on the video there (of the concatenation it is always half)."""
    logits, shares = [], []
    for part in torch.arange(len(clips.audio)).split(256):
        inputs = clips.inputs(score, part, device)
        logits.append(net(*inputs).cpu())
        alpha = net.attend(*inputs)[1]  # [B, T + F, classes]
        shares.append((alpha[:, inputs[0].shape[1] :].sum(1) / alpha.sum(1)).mean(1).cpu())
    logits, shares = torch.cat(logits), torch.cat(shares)
    result = {"mAP": classify.scores_of(logits, clips.targets, labels, "test")["mAP"]}
    if clips.fits is not None:
        parts = {"fits": clips.fits, "doesn't fit": ~clips.fits}
        for name, part in parts.items():
            about = logits[part], clips.targets[part], labels, "test"
            result[f"mAP, video {name}"] = classify.scores_of(*about)["mAP"]
        result |= {f"attention, {name}": shares[part].mean().item() for name, part in parts.items()}
    return result


def table(clips: Clips, held_out: Clips, labels: list[str], args: argparse.Namespace) -> None:
    """Train and measure all; print the table, and write it as JSON."""
    device = latents.pick_device(args.loop.device)
    rows = {mode: (mode, "") for mode in ("audio", "video", "concatenation", "attention")}
    rows |= {f"discount by {name}": ("discount", name) for name in clips.scores}
    found, lines = {row: [] for row in rows}, []
    for seed in tqdm(args.seeds, unit="seed"):
        for row, (mode, score) in rows.items():
            net = fit(mode, score, clips, args.width, replace(args.loop, seed=seed), device)
            found[row].append(measure(net, score, held_out, labels, device))
    columns, show = list(found["audio"][0]), classify.mean_and_std
    for row, values in found.items():
        lines.append([row, *(show([x[column] for x in values]) for column in columns)])
    path = args.out / "table.json"
    write_json(path, {"seeds": args.seeds, "rows": found})
    print(f"in per cent; {len(clips.audio)} clips, tested on {len(held_out.audio)}, "
          f"{len(args.seeds)} seeds\n\n{markdown(['', *columns], lines)}\n{path}")  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Our own options, and as `loop` those of train.py."""
    parser = make_parser(__doc__, epilog=f"and train.py's options: [{LOOP}]")
    add = parser.add_argument
    add("command", choices=("train", "simulate"), help="with real or made-up videos and scores")
    add("data", type=Path, nargs="?", help="stored data set [simulate: of tiny/]")
    add("--test", type=Path, help="the same, to test on")
    add("--video", type=Path, help="train: features, a folder of ID.npy")
    add("--scores", type=Path, help="train: records with entailment scores")
    add("--noise", type=number(float, 0), default=2.0, help="simulate: std of a frame [2]")
    add("--tagger", type=Path, help="a taltrans: its states are what is heard [the latents]")
    add("--clips", type=positive, default=3000, help="of each set the first so many [3000]")
    add("--width", type=positive, default=64, help="of h [64]")
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2], help="[0 1 2]")
    add("--out", type=Path, default=Path("runs/fusion"), help="folder [runs/fusion]")
    args, rest = parser.parse_known_args(arguments)
    args.loop = train.parse_args([*LOOP.split(), *rest])
    if args.command == "train" and not all((args.data, args.test, args.video, args.scores)):
        parser.error("train needs DATA, --test, --video and --scores")
    if bool(args.data) != bool(args.test):
        parser.error("DATA and --test go together")
    return args


def run(args: argparse.Namespace) -> None:
    if not args.data:
        train.compose_tiny()
        args.data, args.test = (train.TINY / "data" / split for split in ("train", "test"))
    sets = data, test = LatentDataset(args.data), LatentDataset(args.test)
    if test.codec != data.codec:
        raise ValueError(f"{test.folder}: made with another codec than {data.folder}")
    tagger = load_tagger(args.tagger)[0] if args.tagger else None
    if tagger and not isinstance(tagger, TALTrans):
        raise ValueError(f"{args.tagger}: expected a taltrans, which has states over time")
    clips = [read_audio(part, min(args.clips, len(part)), tagger, data) for part in sets]
    if args.command == "simulate":
        clips = [simulated(x, seed, args.noise) for seed, x in enumerate(clips)]
        print("A simulation: videos and scores are made up; nothing here is about real videos.")
    else:
        for i, part in enumerate(sets):
            ids = [part.record(k)["id"] for k in range(len(clips[i].audio))]
            video, there = read_video(args.video, ids)
            scores = read_scores(args.scores, ids)
            clips[i] = replace(clips[i], video=video, there=there, scores=scores)
    table(*clips, labels_of(data), args)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
