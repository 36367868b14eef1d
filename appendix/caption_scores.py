"""Captions judged by metrics and by people (workshop paper, P2, appendix A: table A2, figures 3 and
5 to 7; ICASSP paper, table 1).

Glossary. A caption to be judged is a *candidate*, people's captions of its clip are *references*,
and a *system* is what wrote the candidates. An *n-gram* is n words in a row.

    BLEU-n   exp(min(0, 1 − r/c) + mean over k = 1 … n of log p_k);  p_k: share of the candidates'
             k-grams that are in a reference, c and r: lengths of the candidates, and of the closest
             references, all clips summed                                  (Papineni et al., 2002)
    METEOR   P·R / (0.9·P + 0.1·R) · (1 − 0.5·(chunks/matches)³);  P, R: matches per word of the
             candidate, of the reference; chunks: runs of matches    (Lavie and Agarwal, 2007)
    ROUGE-L  (1 + β²)·P·R / (R + β²·P), β = 1.2;  P, R: longest common subsequence per word of the
             candidate, of the reference                                          (Lin, 2004)
    CIDEr    CIDEr-D: 10 · mean over n = 1 … 4 of Σ min(x, y)·y / (|x|·|y|) · exp(−(c − r)²/(2·6²));
             x, y: n-gram counts × log(clips / clips with it)         (Vedantam et al., 2015)

BLEU, ROUGE-L and CIDEr-D are those of the COCO caption evaluation, whose CIDEr is CIDEr-D too. BLEU
has no smoothing: without a common 4-gram, BLEU-4 is 0. METEOR is NLTK's, without WordNet: words
match if they or their Porter stems are equal, never by meaning, and the clips' mean is given. It is
not the Java METEOR of the field, which also matches synonyms and paraphrases. The papers don't say
which theirs is. All share one tokenizer: lower case, no punctuation, inner apostrophes kept.

    python -m appendix.caption_scores judge captions/run.jsonl references.csv
    python -m appendix.caption_scores rate captions/run.jsonl --audio sounds --out rate.html
    python -m appendix.caption_scores average ratings-*.csv --key rate.key.json

CAPTIONS and REFERENCES are tables (latents.read_table): JSONL of captions.py's kind, or CSV with
an id and captions; several rows of one id are its several references.
"""

import argparse
import csv
import html
import itertools
import math
import random
import re
import statistics
import zlib
from collections import Counter, defaultdict
from functools import reduce
from operator import or_
from pathlib import Path

from appendix import make_parser, markdown, write_json
from appendix.report import mp3_url, page, table
from latents import (
    find_audio,
    load_audio,
    natural,
    one_line_errors,
    positive,
    read_json,
    read_table,
    write_aside,
)

Words = list[str]

# Left out of the top 20 words, as in the papers' figures 5 to 7, whose list isn't given: this is
# ours, English words that say how others belong together.
STOP_WORDS = set(
    """a about after again all an and another any are as at away back be been before behind being
    both but by can down each for from had has have he her his i in into is it its more of off on
    one or other out over several she so some someone something than that the their them then there
    they this through to together two under up very was we were what when where which while who will
    with without you""".split()
)


# ---- metrics -------------------------------------------------------------------------------------


def tokenize(text: str) -> Words:
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("’", "'"))


def ngrams(words: Words, n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(candidates: list[Words], references: list[list[Words]], n: int) -> float:
    """BLEU-n of all clips at once, 0 … 1."""
    hits, total, c, r = [0] * n, [0] * n, 0, 0
    for candidate, refs in zip(candidates, references):
        c += len(candidate)
        # The closest length; of two that are equally close, the shorter.
        r += min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        for k in range(n):
            grams = ngrams(candidate, k + 1)
            # A k-gram counts as often as it is in the reference that has it most often.
            most = reduce(or_, (ngrams(ref, k + 1) for ref in refs))
            hits[k] += (grams & most).total()
            total[k] += grams.total()
    if not all(hits):
        return 0.0
    logs = [math.log(hit / all_) for hit, all_ in zip(hits, total)]
    return math.exp(min(0, 1 - r / c) + statistics.fmean(logs))


class NoWordNet:
    @staticmethod
    def synsets(word: str) -> tuple:
        return ()


def meteor(candidate: Words, refs: list[Words]) -> float:
    """METEOR of a clip with its best reference, 0 … 1."""
    from nltk.translate.meteor_score import meteor_score  # slow to import

    return meteor_score(refs, candidate, wordnet=NoWordNet)


def rouge_l(candidate: Words, refs: list[Words], beta: float = 1.2) -> float:
    """ROUGE-L of a clip, 0 … 1. As in COCO, P and R may be of different references."""
    longest = []
    for ref in refs:
        row = [0] * (len(ref) + 1)  # row[j]: longest subsequence of what was read and of ref[:j]
        for word in candidate:
            before = row[:]
            for j, other in enumerate(ref):
                row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
        longest.append(row[-1])
    if not any(longest):
        return 0.0
    p = max(longest) / len(candidate)
    r = max(n / len(ref) for n, ref in zip(longest, refs))
    return (1 + beta**2) * p * r / (r + beta**2 * p)


def cider_d(candidates: list[Words], references: list[list[Words]], sigma: float = 6.0) -> float:
    """CIDEr-D, 0 … 10. What is rare among these clips' references weighs more: it depends on all
    clips, and is 0 for a single one."""
    clips_with = Counter()
    for refs in references:
        clips_with.update({gram for ref in refs for n in (1, 2, 3, 4) for gram in ngrams(ref, n)})

    def weighted(words, n):
        grams = ngrams(words, n).items()
        return {g: k * math.log(len(references) / max(1, clips_with[g])) for g, k in grams}

    scores = []
    for candidate, refs in zip(candidates, references):
        for ref, n in itertools.product(refs, (1, 2, 3, 4)):
            x, y = weighted(candidate, n), weighted(ref, n)
            common = sum(min(x[gram], y[gram]) * y[gram] for gram in x if gram in y)
            norm = math.hypot(*x.values()) * math.hypot(*y.values())
            penalty = math.exp(-((len(candidate) - len(ref)) ** 2) / (2 * sigma**2))
            scores.append(penalty * common / norm / len(refs) if norm else 0.0)
    return 10 * sum(scores) / 4 / len(references)


# ---- judging -------------------------------------------------------------------------------------


def read_references(path: Path) -> dict[str, list[str]]:
    """id -> its references. ValueError if one has no word, which no metric could compare with."""
    references = {record["id"]: record["captions"] for record in read_table(path)}
    for name, captions in references.items():
        if not captions or not all(map(tokenize, captions)):
            raise ValueError(f"{path}: {name} has a reference without a word, or none")
    return references


def systems_of(files: dict[Path, list[dict]], fields: list[str]) -> dict[str, dict]:
    """system -> {id: candidate, or None if it has none}; a system is a field of a file's records.
    Of several captions the first counts."""
    systems = {}
    for path, field in itertools.product(files, fields):
        found = {record["id"]: record.get(field) or None for record in files[path]}
        found = {i: x[0] if isinstance(x, list) else x for i, x in found.items()}
        if set(found.values()) == {None}:
            raise ValueError(f"{path}: no record has a caption as {field!r}; see --field")
        systems[field if len(files) == 1 else f"{path}:{field}"] = found
    return systems


def histogram(values: list[float], width: float) -> dict[str, int]:
    """{from where a bin begins: how many values are in it}, empty bins between included."""
    bins = Counter(math.floor(x / width + 1e-9) for x in values)  # 0.15 / 0.05 is 2.9999…
    return {f"{k * width:g}": bins[k] for k in range(min(bins), max(bins) + 1)}


def spread(values: list[float]) -> dict:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def statistics_of(captions: list[Words]) -> dict:
    """Vocabulary, lengths in words (std of the whole, not of a sample), and top 20 words."""
    lengths, words = [len(words) for words in captions], Counter(itertools.chain(*captions))
    out = {"clips": len(captions), "vocabulary": len(words), "mean": statistics.fmean(lengths)}
    out |= {"std": statistics.pstdev(lengths)} | spread(lengths)
    top = [(word, n) for word, n in words.most_common() if word not in STOP_WORDS]
    bins = histogram(lengths, max(1, math.ceil(max(lengths) / 40)))
    return out | {"top 20 words": dict(top[:20]), "lengths": bins}


def judge(systems: dict, references: dict[str, list[str]]) -> tuple[dict, list[str]]:
    """Table A2: the scores and statistics of each system, and of the references; what to note."""
    sets, notes, judged = {}, [], {}
    for name, captions in systems.items():
        words = {i: tokenize(text or "") for i, text in captions.items()}
        given = [i for i in words if captions[i] is not None]
        for what, ids in (
            ("have no caption: left out", [i for i in words if captions[i] is None]),
            ("have no reference: left out", [i for i in words if i not in references]),
            ("have a caption without a word: it scores 0", [i for i in given if not words[i]]),
        ):
            if ids:
                notes.append(f"{name}: {len(ids)} of {len(words)} {what} ({ids[0]}, …)")
        ours = [i for i in given if i in references]
        if not ours:
            raise ValueError(f"{name}: none of its captions has a reference of the same id")
        candidates, refs = [words[i] for i in ours], [[*map(tokenize, references[i])] for i in ours]
        judged |= dict(zip(ours, refs))
        sets[name] = {f"BLEU-{n}": bleu(candidates, refs, n) for n in (1, 4)}
        sets[name]["METEOR"] = statistics.fmean(map(meteor, candidates, refs))
        sets[name]["ROUGE-L"] = statistics.fmean(map(rouge_l, candidates, refs))
        sets[name] |= {"CIDEr": cider_d(candidates, refs)} | statistics_of(candidates)
    # A vocabulary grows with the number of captions: of several references the first counts here.
    sets["references (first)"] = statistics_of([refs[0] for refs in judged.values()])
    return sets, notes


def entailment(records: list[dict]) -> dict[str, dict]:
    """scorer -> (min, median, max), Pearson's r with each scorer (None: undefined), histogram."""
    scores = [record.get("entailment") or {} for record in records]
    scores = [{key: x for key, x in row.items() if x is not None} for row in scores]
    names, out = list(dict.fromkeys(itertools.chain(*scores))), {}
    for a in names:
        found = [row[a] for row in scores if a in row]
        out[a] = {"scored": len(found)} | spread(found)
        for b in names:
            both = [(row[a], row[b]) for row in scores if a in row and b in row]
            varies = all(len(set(column)) > 1 for column in zip(*both)) and both
            out[a][f"r with {b}"] = statistics.correlation(*zip(*both)) if varies else None
        out[a]["histogram"] = histogram(found, 0.05)
    return out


# ---- the judge's command -------------------------------------------------------------------------


def show(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}" if isinstance(x, float) else f"{x:,}"


def cells(rows: dict[str, dict], columns: list[str]) -> list[list[str]]:
    """The lines of a table: each row's name and its values."""
    return [[name, *(show(row.get(key)) for key in columns)] for name, row in rows.items()]


def bars(title: str, rows: dict[str, int]) -> str:
    """Counts as horizontal bars of SVG."""
    parts, most = [], max(rows.values(), default=1)
    for i, (name, value) in enumerate(rows.items()):
        y, width = 20 * i, 330 * value / most
        parts.append(
            f'<text x="0" y="{y + 14}">{html.escape(name)}</text>'
            f'<rect x="110" y="{y + 3}" width="{width:.1f}" height="15" rx="2"/>'
            f'<text x="{116 + width:.1f}" y="{y + 14}">{value:,}</text>'
        )
    svg = f'<svg viewBox="0 0 520 {20 * len(rows) + 4}">{"".join(parts)}</svg>'
    return f"<h3>{html.escape(title)}</h3>{svg}"


def judge_command(args: argparse.Namespace) -> None:
    """Prints table A2 and the entailment scores, and writes them as JSON and, with plots, HTML."""
    files = {path: read_table(path) for path in args.captions}
    systems = systems_of(files, args.field or ["captions"])
    sets, notes = judge(systems, read_references(args.references))
    scores = {str(path): entailment(records) for path, records in files.items()}
    scores = {path: found for path, found in scores.items() if found}
    columns = ["clips", "BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    columns += ["vocabulary", "mean", "std", "min", "median", "max"]
    tables = {"words a caption: mean … max": (sets, columns)}
    for path, found in scores.items():
        columns = ["scored", "min", "median", "max", *(f"r with {key}" for key in found)]
        tables[f"entailment, {path}"] = found, columns
    body = ""
    for title, (rows, columns) in tables.items():
        head, lines = ["", *columns], cells(rows, columns)
        print(f"\n{title}\n\n{markdown(head, lines)}")
        body += f"<h3>{html.escape(title)}</h3>{table(head, lines)}"
    print("", *notes, sep="\n")
    body += "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)
    for path, found in scores.items():
        for key, row in found.items():
            body += bars(f"Entailment by {key}, {path}: clips by score", row["histogram"])
    for name, row in sets.items():
        body += bars(f"Top 20 words, no stop words: {name}", row["top 20 words"])
        body += bars(f"Captions by number of words: {name}", row["lengths"])
    write_aside(args.out.with_suffix(".html"), page("Caption scores", body))
    result = {"captions": [*map(str, files)], "references": str(args.references), "notes": notes}
    write_json(args.out.with_suffix(".json"), result | {"sets": sets, "entailment": scores})
    print(f"\n{args.out} and .json")


# ---- rating by people ----------------------------------------------------------------------------
#
# P2, A.5: five people gave 500 clips' captions a similarity to the reference from 0 to 1; where it
# was in doubt, the sound counted. The page shows both. It knows a caption by its row only: which
# system wrote it is in the key file, which raters don't get.

RATING_STYLE = """<style>
.row { margin: 1rem 0; } .row input { width: 5rem; }
header { position: sticky; top: 0; background: Canvas; padding: .5rem 0; z-index: 1; }
</style>"""
# What was rated is kept in the browser, where it allows that, so that a closed page goes on.
SCRIPT = """
const inputs = [...document.querySelectorAll("input")], [rater, ...rows] = inputs;
let kept = {};
try { kept = JSON.parse(localStorage[PAGE]); } catch {}
for (const input of inputs) {
  input.value = kept[input.id] ?? "";
  input.oninput = () => {
    kept[input.id] = input.value;
    try { localStorage[PAGE] = JSON.stringify(kept); } catch {}
  };
}
document.getElementById("save").onclick = () => {
  if (!rater.value.trim()) { rater.focus(); return; }
  const name = '"' + rater.value.trim().replaceAll('"', '""') + '"';
  const lines = ["rater,row,score", ...rows.map(r => name + "," + r.id + "," + r.value)];
  const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob([lines.join("\\r\\n") + "\\r\\n"], { type: "text/csv" }));
  a.download = "ratings-" + rater.value.trim().replace(/[^\\p{L}\\p{N}]+/gu, "-") + ".csv";
  a.click();
};
"""


def rating_page(
    systems: dict, references: dict, sounds: dict[str, Path], n: int, seed: int
) -> tuple[bytes, dict]:
    """A page of n clips (all, if there are fewer), and its key: {row: [id, system]}.

    Of the clips that have a sound and a caption by every system, a sample is drawn from `seed`, and
    the captions of each are shuffled. ValueError if there are none.
    """
    captions = {i: [system.get(i) for system in systems.values()] for i in sounds}
    ids = sorted(i for i in captions if all(map(tokenize, [x or "" for x in captions[i]])))
    if not ids:
        raise ValueError("no clip has a sound and a caption by every system")
    rng, key, body = random.Random(seed), {}, []
    chosen = rng.sample(ids, min(n, len(ids)))
    tag = f"{zlib.crc32(repr((seed, chosen, captions)).encode()):08x}"  # tells pages apart
    for number, i in enumerate(chosen, 1):
        sound = mp3_url(load_audio(sounds[i]))
        body.append(f'<div class="clip"><h3>Clip {number} of {len(chosen)}</h3>'
                    f'<audio controls preload="none" src="{sound}"></audio>')  # fmt: skip
        body += [f"<p>Reference: {html.escape(text)}</p>" for text in references.get(i, [])[:1]]
        for name, text in rng.sample(list(zip(systems, captions[i])), len(systems)):
            row = f"{tag}-{len(key) + 1}"
            key[row] = [i, name]
            body.append(
                f'<div class="row"><label for="{row}">{html.escape(text)}</label><br>'
                f'<input id="{row}" type="number" min="0" max="1" step="0.05"></div>'
            )
        body.append("</div>")
    head = (
        f"{RATING_STYLE}<p>Listen to each clip, and say how well each caption describes it: 0, not "
        "at all, to 1, entirely. A reference is what somebody else wrote; where they differ, "
        "believe your ears. Then save the CSV and send it back.</p><header><label>Your name "
        '<input id="rater"></label> <button id="save">Save CSV</button></header>'
    )
    script = f'<script>const PAGE = "audio-journey-{tag}";{SCRIPT}</script>'
    return page("How well do captions describe sounds?", head + "".join(body) + script), key


def average(paths: list[Path], key: dict[str, list[str]]) -> tuple[dict, list[str]]:
    """Raters' CSVs -> similarity scores by system (table 1), and what isn't counted.

    A system's mean is the mean over raters of each one's mean, its std the sample's over these.
    """
    scores, left_out = defaultdict(dict), []  # scores: {(rater, system): {id: x}}
    for path in paths:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
        if rows[:1] != [["rater", "row", "score"]]:
            raise ValueError(f"{path}: expected the columns rater, row and score")
        for line, row in enumerate(rows[1:], 2):
            try:
                rater, name, score = map(str.strip, row)
                i, system = key[name]
                if not rater or i in scores[rater, system] or not 0 <= float(score) <= 1:
                    raise ValueError("no rater, rated before, or not in 0 … 1")
                scores[rater, system][i] = float(score)
            except (ValueError, KeyError) as e:
                reason = "unanswered" if row[2:] == [""] else f"{type(e).__name__}, {e}"
                left_out.append(f"{path}, line {line}: {', '.join(row)} ({reason})")
    table = {}
    for system in dict.fromkeys(system for _, system in key.values()):
        found = [by_clip for (_, name), by_clip in scores.items() if name == system and by_clip]
        means = [statistics.fmean(by_clip.values()) for by_clip in found]
        table[system] = {"similarity": statistics.fmean(means) if means else None}
        table[system] |= {"std": statistics.stdev(means) if len(means) > 1 else None}
        table[system] |= {"raters": len(found), "clips": len(set().union(*found))}
        table[system] |= {"ratings": sum(map(len, found))}
    return table, left_out


def rate_command(args: argparse.Namespace) -> None:
    if not args.audio.is_dir():
        raise FileNotFoundError(f"{args.audio}: no such folder")
    files = {path: read_table(path) for path in args.captions}
    systems = systems_of(files, args.field or ["captions"])
    references = read_references(args.references) if args.references else {}
    records = {record["id"]: record for record in itertools.chain(*files.values())}
    found = zip(records, find_audio([*records.values()], args.audio))
    sounds = {i: path for i, path in found if path}
    text, key = rating_page(systems, references, sounds, args.clips, args.seed)
    aside = args.out.with_suffix(".key.json")
    write_json(aside, key)
    write_aside(args.out.with_suffix(".html"), text)
    print(f"{args.out}: {len(key) // len(systems)} clips of {len(records)} ids, "
          f"{len(text) / 2**20:.1f} MB, for the raters. {aside}: for `average`")  # fmt: skip


def average_command(args: argparse.Namespace) -> None:
    key = read_json(args.key)
    if any(not isinstance(x, list) or [*map(type, x)] != [str, str] for x in key.values()):
        raise ValueError(f"{args.key}: not a key that `rate` wrote")
    rows, left_out = average(args.ratings, key)
    columns = ["similarity", "std", "raters", "clips", "ratings"]
    print(markdown(["", *columns], cells(rows, columns)))
    print(f"{len(left_out)} rows aren't counted", *left_out, sep="\n  ")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    judging = commands.add_parser("judge", help="metrics, as table, JSON and page with plots")
    rating = commands.add_parser("rate", help="a page on which people rate captions")
    for command, out in ((judging, Path("caption_scores.html")), (rating, Path("rate.html"))):
        add = command.add_argument
        add("captions", nargs="+", type=Path, help="JSONL or CSV; several: each its own system")
        add("--field", action="append", help="which holds the caption; may be repeated [captions]")
        add("--out", type=Path, default=out, help=f"the page, with JSON beside it [{out}]")
    judging.add_argument("references", type=Path, help="JSONL or CSV")
    judging.set_defaults(run=judge_command)
    add = rating.add_argument
    add("--audio", type=Path, required=True, help="folder of sounds, ID.wav or so")
    add("--references", type=Path, help="JSONL or CSV, to show the first of each clip")
    add("--clips", type=positive, default=500, help="at most [500]")
    add("--seed", type=natural, default=0, help="of the sample and the order [0]")
    rating.set_defaults(run=rate_command)
    averaging = commands.add_parser("average", help="raters' CSVs -> mean scores by system")
    averaging.add_argument("ratings", nargs="+", type=Path, help="what the page has saved")
    averaging.add_argument("--key", type=Path, required=True, help="what rate wrote: *.key.json")
    averaging.set_defaults(run=average_command)
    args = parser.parse_args(arguments)
    with one_line_errors():
        args.run(args)


if __name__ == "__main__":
    main()
