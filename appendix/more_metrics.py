"""Numbers beside evaluate.py's: FD at N → ∞, a CLAP score, and what common mistakes would give.

    FD(N) = FD∞ + b/N      FD of N clips comes out too high; a line in 1/N leads to FD∞
    CLAP  = mean cosine of CLAP's embeddings of a sound and of its caption; higher is better

The mistakes show what the papers' IS (1.64) and KL (0.13 to 0.26) could have been. "KL sigmoid" is
the field's second KL, over each class's own probability: no divergence, and it can be negative.

    python -m appendix.more_metrics GENERATED REFERENCE --clap laion/clap-htsat-unfused

Folders and --table are as in evaluate.py. CLAP's captions are those of the table,
or the prompts that sample.py left in its WAVs. The numbers go into OUT/more_metrics.json.
"""

import argparse
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
from appendix import make_parser, write_json
from evaluate import frechet_distance, inception_score, kl_divergence
from latents import SAMPLE_RATE, one_line_errors, pick_device, read_table, resample


def extrapolated_frechet_distance(x: Tensor, y: Tensor, draws: int = 4, seed: int = 0) -> float:
    """FD at N → ∞ (Chong & Forsyth, 2020): FD(n) = a + b/n fitted to random subsets of N/2 … N rows
    of both sets, and a. Rough as long as N isn't well above D."""
    most, generator = min(len(x), len(y)), torch.Generator().manual_seed(seed)
    sizes, values = [], []
    for n in torch.linspace(most // 2, most, 6).round().long().tolist() * draws:
        x_n = x[torch.randperm(len(x), generator=generator)[:n]]
        y_n = y[torch.randperm(len(y), generator=generator)[:n]]
        sizes.append([1.0, 1 / n])
        values.append(frechet_distance(x_n, y_n))
    line = torch.linalg.lstsq(torch.tensor(sizes).double(), torch.tensor(values).double()[:, None])
    return line.solution[0].item()


def variants(generated: Tensor, reference: Tensor) -> dict[str, float]:
    """What comes of common mistakes, from the same logits [N, K]."""
    p, q = reference.double().sigmoid(), generated.double().sigmoid()
    sigmoid = (torch.xlogy(p, p) - p * (q + 1e-6).log()).mean().item()
    return {
        "IS": inception_score(generated)[0],
        "IS of probabilities taken for logits": inception_score(q)[0],
        "IS in chunks of two clips": inception_score(generated, len(generated) // 2)[0],
        "IS in one chunk": inception_score(generated, 1)[0],
        "KL softmax": kl_divergence(reference, generated),
        "KL softmax, generated against reference": kl_divergence(generated, reference),
        "KL softmax of probabilities taken for logits": kl_divergence(p, q),
        "KL sigmoid": sigmoid * generated.shape[1],
        "KL sigmoid, a mean over the classes": sigmoid,
    }


def caption_of(path: Path) -> str:
    """The prompt that sample.py leaves in a WAV's comment; "" where there is none."""
    try:
        with soundfile.SoundFile(path) as file:
            return str(json.loads(file.comment)["prompt"])
    except (soundfile.LibsndfileError, ValueError, KeyError, TypeError, RecursionError):
        return ""


@torch.no_grad()
def clap_score(name: str, sounds: dict, captions: dict[str, str], device) -> dict:
    """Mean cosine of CLAP's embeddings of sounds and captions. `name`: folder or hub id. Comparable
    for one checkpoint only, so its hash stands beside it."""
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    model, info = ClapModel.from_pretrained(name, output_loading_info=True, weights_only=True)
    if missing := [key for key in info["missing_keys"] if "position_ids" not in key]:
        raise ValueError(f"{name}: no CLAP: {len(missing)} weights are missing ({missing[0]}, …)")
    model = model.to(device).eval()
    extractor = ClapFeatureExtractor.from_pretrained(name)

    def listen(wave: Tensor) -> Tensor:
        # The first 10 s: of anything longer the extractor would take a part at random.
        rate = extractor.sampling_rate
        wave = resample(wave, SAMPLE_RATE, rate)[:, : extractor.nb_max_samples].numpy()
        inputs = extractor(list(wave), sampling_rate=rate, return_tensors="pt").to(device)
        if "is_longer" in inputs:  # of a fused CLAP, where one clip of a batch is said to be
            inputs["is_longer"] = torch.zeros_like(inputs["is_longer"])
        return F.normalize(model.get_audio_features(**inputs).pooler_output, dim=1)

    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    heard = evaluate.embed(sounds, listen, "CLAP")
    tokenizer, cosines = AutoTokenizer.from_pretrained(name), []
    for n, audio in zip(heard.names, heard.values, strict=True):
        text = tokenizer(captions[n], truncation=True, return_tensors="pt").to(device)
        text = model.get_text_features(**text).pooler_output[0].cpu()
        cosines.append(F.cosine_similarity(audio, text, dim=0).item())
    return {"CLAP score": float(np.mean(cosines)), "CLAP": name, "its sha256": digest.hexdigest()}


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    classifier = evaluate.Cnn14.load(args.classifier).to(device)
    clips = read_table(args.table) if args.table else []
    folders = {"generated": args.generated, "reference": args.reference}
    sets, _ = evaluate.in_common({k: evaluate.sounds_of(f, clips) for k, f in folders.items()})
    load = evaluate.load_sound
    sounds = {k: {n: partial(load, path) for n, path in x.items()} for k, x in sets.items()}
    made, real = (evaluate.hear(sounds[k], classifier, k) for k in folders)
    result = {"command": " ".join(["python", "-m", *sys.argv]), "N": len(made.names)}
    result |= {"classifier": str(args.classifier), "classifier's sha256": classifier.sha256}
    if args.clap:
        texts = {clip["id"]: clip["captions"][0] for clip in clips if clip["captions"]}
        texts = texts or {name: caption_of(path) for name, path in sets["generated"].items()}
        if bare := [name for name in sets["generated"] if not texts.get(name)]:
            raise ValueError(f"{bare[0]} has no caption, nor a prompt in its WAV: give --table")
        result |= clap_score(args.clap, sounds["generated"], texts, device)
    (x, p), (y, q) = (f.values.tensor_split([classifier.widths[-1]], 1) for f in (made, real))
    result["FD"] = frechet_distance(x, y)
    if min(len(x), len(y)) >= 16:
        result["FD, N → ∞"] = extrapolated_frechet_distance(x, y)
    if len(x) >= 10 and made.names == real.names:
        result |= variants(p, q)
    path = (args.out or args.generated) / "more_metrics.json"
    write_json(path, result)
    print(f"{path.read_text()}{path}")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("generated", type=Path, help="folder of generated sounds")
    add("reference", type=Path, help="folder of real sounds; those of the same name are pairs")
    add("--classifier", type=Path, default=evaluate.CLASSIFIER, help="as in evaluate.py")
    add("--table", type=Path, help="table of clips with ids and captions: which to take")
    add("--clap", metavar="MODEL", help="CLAP score by this folder or hub id")
    add("--out", type=Path, help="folder for more_metrics.json [the generated one]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    with one_line_errors():
        run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
