"""A page to listen to and look at: generated sounds beside real ones, with evaluate.py's numbers.

    python -m appendix.report GENERATED REFERENCE --table captions.csv --out report.html
    python -m appendix.report --efficiency --model tiny/model      the papers' table 2 for a model

The page is one file that opens from disk in any browser, on a phone too, and needs no network:
sounds are in it as MP3, spectrograms as PNG. The numbers are those of GENERATED/metrics.json
(`--metrics` for another), which evaluate.py writes.
"""

import argparse
import base64
import html
import io
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import evaluate
from appendix.more_metrics import caption_of
from latents import CLIP_SAMPLES, SAMPLE_RATE, read_audio, read_table, resample, write_aside

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #3b7dd8; --dim: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.clip { border-top: 1px solid var(--line); padding: 1rem 0; }
.clip h3 { margin: 0 0 .5rem; font-size: 1rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
figure { margin: 0; } figcaption { color: var(--dim); font-size: .85rem; }
figure img { width: 100%; height: 8rem; image-rendering: pixelated; display: block; }
audio { width: 100%; margin-top: .3rem; }
svg { width: 100%; max-width: 40rem; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; } svg rect { fill: var(--bar); }
.note { color: var(--dim); font-size: .9rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } body { padding: .6rem; } }
"""
COLUMNS = {"N": "N", "FD": "FD", "IS": "IS", "KL_softmax": "KL"}


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def player(path: Path, caption: str) -> str:
    """A sound's spectrogram and player, as HTML."""
    import matplotlib.image

    samples, rate = read_audio(path)
    wave = resample(samples.mean(1), rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.numpy(), SAMPLE_RATE, format="MP3")
    spectrum = torch.stft(
        wave, 512, 320, window=torch.hann_window(512), pad_mode="constant", return_complex=True
    )
    decibel = 20 * spectrum.abs().clamp(min=1e-5).log10()  # [257, frames]
    decibel = decibel[:256].unflatten(0, (128, 2)).amax(1).flip(0)
    picture, top = io.BytesIO(), max(decibel.max().item(), -20.0)
    matplotlib.image.imsave(picture, decibel.numpy(), vmin=top - 70, vmax=top, cmap="magma")
    seconds = len(wave) / SAMPLE_RATE
    return (
        f'<figure><img alt="spectrogram, 0 to 8 kHz, {seconds:.1f} s" '
        f'src="{data_url("image/png", picture.getvalue())}">'
        '<audio controls preload="metadata" '
        f'src="{data_url("audio/mpeg", buffer.getvalue())}"></audio>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table_of(sets: dict[str, dict]) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("", *COLUMNS.values()))
    body = ""
    for name, row in sets.items():
        cells = "".join(
            f"<td>{row[key]:.4g}</td>" if key in row else "<td></td>" for key in COLUMNS
        )
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def bars(sets: dict[str, dict], key: str) -> str:
    """A bar for each set, as SVG; square-root scale, since silence and noise are far away."""
    rows = {name: row[key] for name, row in sets.items() if key in row}
    most = max(max(rows.values(), default=0), 1e-9) ** 0.5
    parts = []
    for i, (name, value) in enumerate(rows.items()):
        width = 210 * max(value, 0) ** 0.5 / most
        parts.append(
            f'<text x="0" y="{24 * i + 16}">{html.escape(name)}</text>'
            f'<rect x="110" y="{24 * i + 4}" width="{width:.1f}" height="16" rx="2"/>'
            f'<text x="{116 + width:.1f}" y="{24 * i + 16}">{value:.4g}</text>'
        )
    size = f'viewBox="0 0 400 {24 * len(rows) + 4}"'
    return f'<svg {size} role="img" aria-label="{key} by set">{"".join(parts)}</svg>'


def prompt_of(path: Path) -> str:
    """The prompt in a WAV of sample.py's; "" in any other file."""
    try:
        return caption_of(path)
    except ValueError:
        return ""


def page(generated: Path, reference: Path, table: list[dict], metrics: dict, clips: int) -> str:
    """The whole page. ValueError if no names are in both folders. table: evaluate.py's --table,
    which then says what is a pair; without one, titles are the prompts in the WAVs."""
    ours, real = (evaluate.sounds_of(folder, table or None) for folder in (generated, reference))
    captions = {clip["id"]: clip["captions"][0] for clip in table if clip["captions"]}
    names = sorted(ours.keys() & real.keys())
    if not names:
        raise ValueError(f"{generated} and {reference}: no names in common")
    chosen = [
        names[i] for i in np.unique(np.linspace(0, len(names) - 1, clips).round().astype(int))
    ]
    sets, about = metrics["sets"], metrics["classifier"]
    parts = [f"<h1>{html.escape(generated.resolve().name)} against "
             f"{html.escape(reference.resolve().name)}</h1>"]  # fmt: skip
    parts += [
        f"<p>FD, IS and KL by {html.escape(about['file'])} at {about['sample_rate']} Hz. FD, KL: "
        "lower is better; IS: higher.</p>",
        table_of(sets),
        f"<p class=note>{'<br>'.join(map(html.escape, evaluate.notes(metrics)))}</p>",
    ]
    for key, title in (("FD", "FD"), ("KL_softmax", "KL")):
        if any(key in row for row in sets.values()):
            parts.append(f"<h2>{title}</h2><p class=note>Bars on a square-root scale.</p>")
            parts.append(bars(sets, key))
    shown = f"{len(chosen)} of {len(names)}" if len(chosen) < len(names) else f"All {len(names)}"
    parts.append(f"<h2>Sounds</h2><p class=note>{shown}, evenly spaced by name: not chosen.</p>")
    for name in tqdm(chosen, unit="clip"):
        title = html.escape(captions.get(name) or prompt_of(ours[name]) or name)
        pair = player(ours[name], "generated") + player(real[name], "real")
        parts.append(f"<div class=clip><h3>{title}</h3><div class=pair>{pair}</div></div>")
    parts.append(f"<p class=note>{html.escape(metrics['command'])}<br>classifier sha256 "
                 f"{about['sha256']}</p>")  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Audio-Journey report'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def efficiency(folder: Path, device: str | None) -> dict:
    """P2's table 2 for a model: one clip, 45 steps, guidance."""
    from sample import generate, load_model

    model = load_model(folder, device)
    stored = model.codec.encode(torch.zeros(1, CLIP_SAMPLES))
    parameters = sum(p.numel() for p in model.unet.parameters())
    generate(model, ["rain"], steps=3)  # warm
    started = time.perf_counter()
    generate(model, ["rain"])
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if model.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(model.device) / 2**30
    return {
        "codec": model.codec.name,
        "bytes a clip on disk": stored.numel() * stored.element_size(),
        "latent": f"{model.codec.channels} × 24 × 21",
        "U-Net parameters": parameters,
        "seconds a clip": round(seconds, 2),
        "peak memory, GiB": round(memory, 2),
        "device": f"{model.device}, {torch.get_num_threads()} threads",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("generated", type=Path, nargs="?", help="folder of generated sounds")
    add("reference", type=Path, nargs="?", help="folder of real sounds of the same names")
    add("--table", type=Path, help="CSV of name (or youtube_id) and caption")
    add("--metrics", type=Path, help="evaluate.py's file [GENERATED/metrics.json]")
    add("--clips", type=int, default=40, help="pairs on the page, evenly spaced by name [40]")
    add("--out", type=Path, default=Path("report.html"), help="the page [report.html]")
    add("--efficiency", action="store_true", help="print a model's costs instead")
    add("--model", type=Path, help="model folder, for --efficiency")
    add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    if args.efficiency != (args.model is not None) or args.efficiency == (
        args.reference is not None
    ):
        parser.error("give GENERATED and REFERENCE for a page, or --efficiency and --model")
    if args.clips < 1:
        parser.error("--clips is 1 or more")
    try:
        if args.efficiency:
            for name, value in efficiency(args.model, args.device).items():
                print(f"{name:24}{value:,}" if isinstance(value, int) else f"{name:24}{value}")
            return
        path = args.metrics or args.generated / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; evaluate.py writes it")
        try:
            metrics = json.loads(path.read_bytes())
            metrics["sets"], metrics["classifier"]["file"], metrics["command"]
            metrics["classifier"]["sha256"], evaluate.notes(metrics)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: not a file of evaluate.py's ({e!r})") from e
        clips = read_table(args.table) if args.table else []
        text = page(args.generated, args.reference, clips, metrics, args.clips)
        write_aside(args.out, text.encode())
        print(f"{args.out}: {len(text) / 2**20:.1f} MB")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
