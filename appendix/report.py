"""A page to listen to and look at: generated sounds beside real ones, with evaluate.py's numbers.

    python -m appendix.report GENERATED REFERENCE --table captions.csv --out report.html
    python -m appendix.report --efficiency --model tiny/model      the papers' table 2 for a model

The page is one file that opens from disk in any browser, on a phone too, and needs no network:
sounds are in it as MP3, spectrograms as PNG. The numbers are those of GENERATED/metrics.json
(`--metrics` for another), which evaluate.py writes.
"""

import base64
import html
import io
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

import evaluate
from appendix import make_parser
from appendix.more_metrics import caption_of
from latents import (
    CLIP_SAMPLES,
    SAMPLE_RATE,
    load_audio,
    one_line_errors,
    positive,
    read_json,
    read_table,
    write_aside,
)

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
.scroll { overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.clip { border-top: 1px solid #8884; padding: 1rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
figure { margin: 0; } figcaption, .note { color: #888; font-size: .9rem; overflow-wrap: anywhere; }
figure img { width: 100%; height: 8rem; image-rendering: pixelated; display: block; }
audio { width: 100%; } svg { width: 100%; max-width: 40rem; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; } svg rect { fill: #3b7dd8; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
"""
COLUMNS = {"N": "N", "FD": "FD", "IS": "IS", "KL_softmax": "KL"}


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def mp3_url(wave: Tensor) -> str:
    """16 kHz [samples], as an address that holds the sound itself."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.numpy(), SAMPLE_RATE, format="MP3")
    return data_url("audio/mpeg", buffer.getvalue())


def player(path: Path, caption: str) -> str:
    """A sound's spectrogram and player, as HTML."""
    import matplotlib.image

    wave, window = load_audio(path), torch.hann_window(512)
    spectrum = torch.stft(
        wave, 512, 320, window=window, pad_mode="constant", return_complex=True
    )  # [257, frames]
    decibel = 20 * spectrum[:256].abs().clamp(min=1e-5).log10()
    decibel = decibel.unflatten(0, (128, 2)).amax(1).flip(0)  # [128, frames], low ones last
    picture, top = io.BytesIO(), max(decibel.max().item(), -20.0)
    matplotlib.image.imsave(picture, decibel.numpy(), vmin=top - 70, vmax=top, cmap="magma")
    return (
        f'<figure><img alt="spectrogram, 0 to 8 kHz, {len(wave) / SAMPLE_RATE:.1f} s" '
        f'src="{data_url("image/png", picture.getvalue())}">'
        f'<audio controls preload="metadata" src="{mp3_url(wave)}"></audio>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[f"<th>{html.escape(x)}</th>" for x in head]]
    cells += [[f"<td>{html.escape(x)}</td>" for x in row] for row in rows]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="scroll"><table>{lines}</table></div>'


def page(title: str, body: str) -> bytes:
    """A page that needs nothing beside it; `body` is HTML."""
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    ).encode()


def report(generated: Path, reference: Path, clips: list[dict], metrics: dict, most: int) -> bytes:
    """The page: numbers, and at `most` so many pairs. ValueError if no names are in both folders.
    clips: of evaluate.py's --table, which says what is a pair; without, titles are the prompts."""
    ours, real = (evaluate.sounds_of(folder, clips) for folder in (generated, reference))
    captions = {clip["id"]: clip["captions"][0] for clip in clips if clip["captions"]}
    names = sorted(ours.keys() & real.keys())
    if not names:
        raise ValueError(f"{generated} and {reference}: no names in common")
    places = np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)
    sets, about = metrics["sets"], metrics["classifier"]
    rows = [[name, *(f"{row[k]:.4g}" if k in row else "" for k in COLUMNS)]
            for name, row in sets.items()]  # fmt: skip
    body = (
        f"<p>FD, IS and KL by {html.escape(about['file'])} at {about['sample_rate']} Hz. FD, KL: "
        f"lower is better; IS: higher.</p>{table(['', *COLUMNS.values()], rows)}"
        f"<p class=note>{'<br>'.join(map(html.escape, evaluate.notes(metrics)))}</p>"
    )
    shown = f"{len(places)} of {len(names)}, evenly spaced by name: not chosen."
    body += f"<h2>Sounds</h2><p class=note>{shown}</p>"
    for name in tqdm([names[i] for i in places], unit="clip"):
        title = html.escape(captions.get(name) or caption_of(ours[name]) or name)
        pair = player(ours[name], "generated") + player(real[name], "real")
        body += f"<div class=clip><h3>{title}</h3><div class=pair>{pair}</div></div>"
    last = f"{html.escape(metrics['command'])}<br>classifier sha256 {about['sha256']}"
    title = f"{generated.resolve().name} against {reference.resolve().name}"
    return page(title, f"{body}<p class=note>{last}</p>")


def efficiency(folder: Path, device: str | None) -> dict:
    """P2's table 2 for a model: one clip, 45 steps, guidance."""
    from sample import generate, load_model

    model = load_model(folder, device)
    stored = model.codec.encode(torch.zeros(1, CLIP_SAMPLES))
    generate(model, ["rain"], steps=3)  # warm
    started = time.perf_counter()
    generate(model, ["rain"], steps=45)
    return {
        "codec": model.codec.name,
        "bytes a clip on disk": stored.numel() * stored.element_size(),
        "latent": f"{model.codec.channels} × 24 × 21",
        "U-Net parameters": sum(p.numel() for p in model.unet.parameters()),
        "seconds a clip": round(time.perf_counter() - started, 2),
        "device": f"{model.device}, {torch.get_num_threads()} threads",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("generated", type=Path, nargs="?", help="folder of generated sounds")
    add("reference", type=Path, nargs="?", help="folder of real sounds of the same names")
    add("--table", type=Path, help="CSV of name (or youtube_id) and caption")
    add("--metrics", type=Path, help="evaluate.py's file [GENERATED/metrics.json]")
    add("--clips", type=positive, default=40, help="pairs on the page, evenly spaced by name [40]")
    add("--out", type=Path, default=Path("report.html"), help="the page [report.html]")
    add("--efficiency", action="store_true", help="print a model's costs instead")
    add("--model", type=Path, help="model folder, for --efficiency")
    add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    if not args.efficiency == bool(args.model) != bool(args.reference):
        parser.error("give GENERATED and REFERENCE for a page, or --efficiency and --model")
    with one_line_errors():
        if args.efficiency:
            for name, value in efficiency(args.model, args.device).items():
                print(f"{name:24}{value:,}" if isinstance(value, int) else f"{name:24}{value}")
            return
        path = args.metrics or args.generated / "metrics.json"
        metrics = read_json(path, "sets", "classifier", "command")
        clips = read_table(args.table) if args.table else []
        text = report(args.generated, args.reference, clips, metrics, args.clips)
        write_aside(args.out, text)
        print(f"{args.out}: {len(text) / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
