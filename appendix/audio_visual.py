"""Audio and video features of clips, with entailment scores: read, or made up (P2, A.4.2).

What appendix/fusion.py learns from. Audio: a stored data set (latents.py), of whose records ids and
labels are used; states of a tagger (classify.py), or else the latents. Video: features of any
pretrained network (P2: R(2+1)D on Kinetics), an array [frames, D] for each clip, as a folder of
ID.npy or as one .npz with an array for each id. One way to get them:

    network = torchvision.models.video.r2plus1d_18(weights="DEFAULT"); network.fc = nn.Identity()
    np.save(f"{id}.npy", torch.cat([network(piece) for piece in pieces]))       [pieces, 512]

with pieces of a second or two, or transformers' VideoMAEModel or TimesformerModel. Scores: what
`appendix.visual_captions entail` adds to its records. All is held in memory: some ten thousand
clips.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import latents
from appendix.classify import LogMelCodec, TALTrans, labels_of, targets_of
from latents import LatentDataset

BLOCKS = 21  # states of an audio clip: one for 0.48 s


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
def read_audio(data: LatentDataset, n: int, tagger: TALTrans | None, train: LatentDataset) -> Clips:
    """The first n clips, without video. audio is [n, 21, D]: the mean of a tagger's states in each
    block of 0.48 s; without a tagger, mean and standard deviation of the latents, normalised as the
    training set's. targets: its labels."""
    log_mel, states = LogMelCodec(), []
    if tagger and data.codec != log_mel.settings():
        raise ValueError(f"{data.folder}: a tagger hears log-mel frames (appendix.classify encode)")
    codec = log_mel if data.codec == log_mel.settings() else latents.load_codec(data.codec)
    for part in tqdm(torch.arange(n).split(32), unit="batch", leave=False, desc="audio"):
        z = codec.dequantize(data.stored(part))  # [B, C, frames]
        z = tagger.states(z.mT) if tagger else train.stats.normalize(z).mT
        z = z[:, : z.shape[1] // BLOCKS * BLOCKS].unflatten(1, (BLOCKS, -1))
        std, mean = torch.std_mean(z, 2)
        states.append(mean if tagger else torch.cat([mean, std], 2))
    targets = targets_of(data, range(n), labels_of(train)).float()
    return Clips(torch.cat(states), torch.zeros(n, 1, 1), torch.ones(n, 1), {}, targets)


def read_video(path: Path, ids: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Features of these clips, from a folder of ID.npy or one .npz: video [N, F, D], there [N, F],
    and found [N]. ValueError names what is no array [frames, D], or doesn't have the others' D."""
    if not path.is_dir() and path.suffix != ".npz":
        raise ValueError(f"{path}: expected a folder of ID.npy, or an .npz file")
    found, size, name = {}, None, "it"
    try:
        table = None if path.is_dir() else np.load(path, allow_pickle=False)
        for i, name in enumerate(tqdm(ids, unit="clip", leave=False, desc="video")):
            file = path / f"{name}.npy"
            if not (file.is_file() if table is None else name in table):
                continue
            x = np.load(file, allow_pickle=False) if table is None else table[name]
            size = size or x.shape[-1]
            if x.ndim != 2 or x.shape[1] != size or not x.size or not np.isfinite(x).all():
                raise ValueError(f"{list(x.shape)}, expected finite [frames, {size}]")
            found[i] = torch.from_numpy(x).float()
    except (ValueError, TypeError, IndexError, EOFError, BadZipFile) as e:
        raise ValueError(f"{path}: {name} can't be used ({e})") from e
    if not found:
        raise ValueError(f"{path}: no array is named as one of the clips, such as {ids[0]!r}")
    frames = max(map(len, found.values()))
    video, there = torch.zeros(len(ids), frames, size), torch.zeros(len(ids), frames)
    for i, x in found.items():
        video[i, : len(x)], there[i, : len(x)] = x, 1
    return video, there, torch.tensor([i in found for i in range(len(ids))])


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
        raise ValueError(
            f"{path}: no record has entailment scores (appendix.visual_captions entail)"
        )
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
