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
    python -m appendix.fusion train … --tagger runs/taltrans/model/tagger.safetensors

What AUDIO, FOLDER and run.jsonl are, appendix/audio_visual.py says. A clip without video goes by
its audio; "video" and "concatenation" see zeros there. `simulate` makes videos and scores up: it
shows whether the formula does what it should, and nothing about real videos.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import latents
from appendix.audio_visual import Clips, read_audio, read_scores, read_video, simulated
from appendix.classify import TALTrans, labels_of, load_tagger, markdown, mean_and_std, scores_of
from latents import LatentDataset, read_json, write_aside
from train import TINY, clips_of_step, compose_tiny, learning_rate, must_agree

# How much audio and video count, if it isn't a score that says so.
FIXED = {"audio": (1.0, 0.0), "video": (0.0, 1.0), "attention": (1.0, 1.0)}


class Fusion(nn.Module):
    """mode: "audio", "video", "concatenation", "attention" (no discount) or "discount"."""

    def __init__(self, audio_dim: int, video_dim: int, classes: int, width: int, mode: str):
        super().__init__()
        self.mode = mode
        dims = (audio_dim, video_dim)
        self.audio, self.video = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU()) for dim in dims
        )
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


@dataclass(frozen=True)
class Config:
    width: int = 64  # of h
    steps: int = 400
    batch_size: int = 64
    lr: float = 1e-2  # peak; with 3e-3 attention was still on its way after these steps
    warmup_steps: int = 40


# ---- training and testing ------------------------------------------------------------------------


def fit(mode: str, score: str, clips: Clips, c: Config, seed: int, device) -> Fusion:
    torch.manual_seed(seed)
    net = Fusion(clips.audio.shape[2], clips.video.shape[2], clips.targets.shape[1], c.width, mode)
    optimizer = torch.optim.AdamW(net.to(device).parameters(), c.lr, weight_decay=0.01)
    for step in tqdm(range(c.steps), unit="step", leave=False, desc=f"{mode} {score}"):
        indices = clips_of_step(step, c.batch_size, len(clips.audio), seed)
        logits = net(*clips.inputs(score, indices, device))
        loss = F.binary_cross_entropy_with_logits(logits, clips.targets[indices].to(device))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
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
    result = {"mAP": scores_of(logits, clips.targets, labels, "test")["mAP"]}
    if clips.fits is not None:
        parts = {"fits": clips.fits, "doesn't fit": ~clips.fits}
        for name, part in parts.items():
            about = logits[part], clips.targets[part], labels, "test"
            result[f"mAP, video {name}"] = scores_of(*about)["mAP"]
        result |= {f"attention, {name}": shares[part].mean().item() for name, part in parts.items()}
    return result


def table(clips: Clips, held_out: Clips, labels: list[str], c: Config, args) -> None:
    """Train and measure all that aren't in OUT/table.json yet; print it."""
    path, device = args.out / "table.json", latents.pick_device(args.device)
    digest = hashlib.sha256()  # files of the same name may have changed
    for part in (clips, held_out):
        for x in (part.audio, part.video, part.there, part.targets, *part.scores.values()):
            digest.update(x.contiguous().numpy().tobytes())
    about = asdict(c) | {"features (their hash)": digest.hexdigest()}
    saved = {"about": about, "rows": {}}
    if path.is_file():
        saved = read_json(path, "about", "rows")
        must_agree(f"{path} has", saved["about"], about, "give the same, or another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {mode: (mode, "") for mode in ("audio", "video", "concatenation", "attention")}
    rows |= {f"discount by {name}": ("discount", name) for name in clips.scores}
    for seed in tqdm(args.seeds, unit="seed"):
        for row, (mode, score) in rows.items():
            found = saved["rows"].setdefault(row, {})
            if str(seed) not in found:
                net = fit(mode, score, clips, c, seed, device)
                found[str(seed)] = measure(net, score, held_out, labels, device)
                write_aside(path, (json.dumps(saved, indent=1) + "\n").encode())
    columns, lines = list(saved["rows"]["audio"][str(args.seeds[0])]), []
    for row in rows:
        found = [saved["rows"][row][str(seed)] for seed in args.seeds]
        lines.append([row, *(mean_and_std([x[column] for x in found]) for column in columns)])
    print(f"in per cent; {len(clips.audio)} clips, tested on {len(held_out.audio)}, "
          f"{len(args.seeds)} seeds\n\n{markdown(['', *columns], lines)}\n{path}")  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("train", "real features"), ("simulate", "made-up videos and scores")):
        add = commands.add_parser(command, help=text, description=text).add_argument
        tiny = " [scenes of tiny/]" if command == "simulate" else ""
        add("data", type=Path, nargs="?" if tiny else None, help="stored data set" + tiny)
        add("--test", type=Path, required=not tiny, help="the same, to test on" + tiny)
        if command == "train":
            add("--video", type=Path, required=True, help="features: folder of ID.npy, or an .npz")
            add("--scores", type=Path, required=True, help="records with entailment scores")
        else:
            add("--noise", type=float, default=2.0, help="std of a frame's; a class's looks: 1 [2]")
        add("--tagger", type=Path, help="a taltrans: its states are what is heard [the latents]")
        add("--clips", type=int, help=f"the first so many [{3000 if tiny else 'all'}]")
        add("--out", type=Path, default=Path("runs/fusion"), help="folder [runs/fusion]")
        for name, default in asdict(Config()).items():
            option = "--" + name.replace("_", "-")
            add(option, type=type(default), default=default, help=f"[{default}]")
        add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
        add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    if bool(args.data) != bool(args.test):
        parser.error("DATA and --test go together")
    return args


def run(args: argparse.Namespace) -> None:
    simulate = args.command == "simulate"
    if not args.data:
        compose_tiny()
    data = LatentDataset(args.data or TINY / "data" / "train")
    test = LatentDataset(args.test or TINY / "data" / "test")
    if test.codec != data.codec:
        raise ValueError(f"{test.folder}: made with another codec than {data.folder}")
    tagger = load_tagger(args.tagger)[0] if args.tagger else None
    if tagger and not isinstance(tagger, TALTrans):
        raise ValueError(f"{args.tagger}: expected a taltrans, which has states over time")
    sizes = [min(args.clips or (3000 if simulate else len(data)), len(data)), len(test)]
    clips = [read_audio(x, n, tagger, data) for x, n in zip((data, test), sizes)]
    if simulate:
        clips = [simulated(x, seed, args.noise) for seed, x in enumerate(clips)]
    else:
        ids = [part.record(i)["id"] for part, n in zip((data, test), sizes) for i in range(n)]
        video, there, found = read_video(args.video, ids)
        print(f"{args.video}: {int(found.sum())} of {len(ids)} clips have video")
        scores = read_scores(args.scores, ids)
        for i, part in enumerate((slice(sizes[0]), slice(sizes[0], None))):
            mine = {name: s[part] for name, s in scores.items()}
            clips[i] = replace(clips[i], video=video[part], there=there[part], scores=mine)
    c = Config(**{name: getattr(args, name) for name in asdict(Config())})
    table(*clips, labels_of(data), c, args)
    if simulate:
        print("A simulation: videos and scores are made up; nothing here is about real videos.")


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        run(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on")


if __name__ == "__main__":
    main()
