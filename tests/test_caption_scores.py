"""appendix/caption_scores.py: metrics against the field's code, and the way from captions to the
table, to the raters' page, and back from their CSVs."""

import base64
import csv
import html
import io
import json
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from conftest import Tags
from nltk.translate.meteor_score import meteor_score
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from scipy.stats import pearsonr

from appendix import caption_scores
from appendix.caption_scores import bleu, cider_d, entailment, meteor, rouge_l, tokenize

VOCABULARY = """a a a the and dog dogs bark barks barking man men speak speaks speaking spoken rain
rains raining falls falling happily happy water waters loudly loud engine engines idle idling"""


@pytest.fixture(scope="module")
def pairs():
    """200 clips: (candidate, references), as lists of words."""
    rng, vocabulary = random.Random(0), VOCABULARY.split()

    def sentence():
        return rng.choices(vocabulary, k=rng.randint(1, 14))

    found = [("the bird sings and the birds sing".split(), ["birds sing and the bird".split()])]
    while len(found) < 200:
        refs = [sentence() for _ in range(rng.randint(1, 3))]
        candidate = sentence()
        if rng.random() < 0.5:  # a reference with some words lost and changed
            candidate = [rng.choice([w, w, w, rng.choice(vocabulary)]) for w in rng.choice(refs)]
        found.append((candidate, refs))
    return found


def coco(metric, pairs):
    """(The corpus's score, the clips'), by the field's own code."""
    references = {i: [" ".join(r) for r in refs] for i, (_, refs) in enumerate(pairs)}
    candidates = {i: [" ".join(c)] for i, (c, _) in enumerate(pairs)}
    options = {"verbose": 0} if isinstance(metric, Bleu) else {}
    return metric.compute_score(references, candidates, **options)


class NoWordNet:
    def synsets(self, word):
        return []


# ---- metrics -------------------------------------------------------------------------------------


def test_bleu_rouge_and_cider_are_cocos(pairs):
    expected = coco(Bleu(4), pairs)[0]
    assert [bleu(*zip(*pairs), n) for n in (1, 2, 3, 4)] == pytest.approx(expected, rel=1e-9)
    assert 0.05 < expected[3] < expected[0] < 0.95
    short = [(c[:2] or c, refs) for c, refs in pairs]  # the brevity penalty
    assert bleu(*zip(*short), 1) == pytest.approx(coco(Bleu(4), short)[0][0], rel=1e-9)
    assert bleu(*zip(*short), 4) == 0  # no 4-grams, and no smoothing
    expected = coco(Rouge(), pairs)[1].tolist()
    assert [rouge_l(*pair) for pair in pairs] == pytest.approx(expected, rel=1e-9)
    for some in (pairs, pairs[:9]):
        assert cider_d(*zip(*some)) == pytest.approx(coco(Cider(), some)[0], rel=1e-9)


def test_meteor_is_nltks(pairs):
    expected = [meteor_score(refs, c, wordnet=NoWordNet()) for c, refs in pairs]
    assert [meteor(*pair) for pair in pairs] == pytest.approx(expected, rel=1e-9)
    # Porter's stems count: without them other scores would come out.
    assert meteor(["barking"], [["barks"]]) > 0 == meteor(["sings"], [["sang"]])


def test_known_answers():
    words = "the dog barks at the cat".split()
    assert bleu([words], [[words]], 4) == 1 and rouge_l(words, [words]) == 1
    assert meteor(words, [words]) == 1 - 0.5 / 6**3  # one chunk of six matches
    # Papineni et al.'s example: "the" counts as often as a reference has it.
    refs = ["the cat is on the mat".split(), "there is a cat on the mat".split()]
    assert bleu([["the"] * 7], [refs], 1) == pytest.approx(2 / 7)
    assert cider_d([words, ["x"]], [[words], [["y"]]]) == pytest.approx(5)  # 10 and 0
    assert cider_d([words], [[words]]) == 0  # a single clip: every n-gram is in all of them
    # Words of no clip, and what has no words
    for metric in (meteor, rouge_l):
        assert metric(["x"], [["y"]]) == metric([], [["y"]]) == 0
    assert bleu([[]], [[["y"]]], 1) == cider_d([[], ["x"]], [[["y"]], [["z"]]]) == 0


def test_tokenizer():
    words = "a dog's bark and rain don't stop 10 5 s"
    assert tokenize("A dog’s bark, and RAIN: don't—stop (10.5 s)! …") == words.split()


# ---- judging -------------------------------------------------------------------------------------

RECORDS = [
    {"audio_caption": "A dog barks.", "merged_caption": None, "scores": (0.1, 0.5, -0.2)},
    {"audio_caption": "Rain falls; the rain falls!", "scores": (0.9, 0.6, 0.1)},
    {"audio_caption": "A <b>man</b> speaks", "merged_caption": "A man", "scores": (None, 0.8, 0.7)},
    {"audio_caption": "...", "scores": (0.4, 0.75, 0.3)},
    {"audio_caption": "no reference"},
]
REFERENCES = [
    ("clip-0", "A dog is barking"),
    ("clip-0", "a dog barks twice, loudly"),
    ("clip-1", "rain falls on the roof"),
    ("clip-2", "a man, speaking"),
    ("clip-3", "wind"),
    ("clip-9", "never asked for"),
]


@pytest.fixture
def folder(tmp_path):
    records = []
    for i, record in enumerate(RECORDS):
        scores = dict(zip(("llm", "t5", "bert"), record.get("scores", ())))
        entry = {"id": f"clip-{i}", "labels": ["Dog"], "entailment": scores}
        records.append(entry | {k: x for k, x in record.items() if k != "scores"})
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    with open(tmp_path / "references.csv", "w", newline="") as file:
        csv.writer(file).writerows([("youtube_id", "caption"), *REFERENCES])
    (tmp_path / "sounds").mkdir()
    for i in range(4):
        wave = 0.3 * np.sin(2 * np.pi * 440 * (i + 1) * np.arange(16_000) / 16_000)
        soundfile.write(tmp_path / "sounds" / f"clip-{i}.wav", wave, 16_000)
    return tmp_path


def run(*arguments):
    caption_scores.main([*map(str, arguments)])


def test_judge_command(folder, capsys):
    out = folder / "scores.html"
    keys = ("--field", "audio_caption", "--field", "merged_caption")
    run("judge", folder / "run.jsonl", folder / "references.csv", *keys, "--out", out)
    result, printed = json.loads((folder / "scores.json").read_text()), capsys.readouterr().out
    row, merged = (result["sets"][key] for key in ("audio_caption", "merged_caption"))
    words = [["a", "dog", "barks"], ["rain", "falls", "the", "rain", "falls"]]
    words += [["a", "b", "man", "b", "speaks"], []]
    refs = [[tokenize(r) for i, r in REFERENCES if i == f"clip-{k}"] for k in range(4)]
    assert row["BLEU-1"] == bleu(words, refs, 1) > 0
    assert row["METEOR"] == pytest.approx(np.mean([*map(meteor, words, refs)]))
    assert row["ROUGE-L"] == pytest.approx(np.mean([*map(rouge_l, words, refs)]))
    assert row["CIDEr"] == cider_d(words, refs) > 0
    assert row["clips"] == 4 and merged["clips"] == 1
    assert (row["min"], row["median"], row["max"]) == (0, 4, 5)
    assert (row["mean"], row["std"]) == (3.25, pytest.approx(np.std([3, 5, 5, 0])))
    assert row["vocabulary"] == len(set(sum(words, []))) == 9
    assert row["top 20 words"]["rain"] == 2 and "the" not in row["top 20 words"]
    assert row["lengths"] == {"0": 1, "1": 0, "2": 0, "3": 1, "4": 0, "5": 2}
    first = {word for r in refs for word in r[0]}
    assert result["sets"]["references (first)"]["vocabulary"] == len(first)
    notes = "\n".join(result["notes"])
    assert "audio_caption: 1 of 5 have no reference: left out (clip-4, …)" in notes
    assert "audio_caption: 1 of 5 have a caption without a word: it scores 0 (clip-3, …)" in notes
    assert "merged_caption: 4 of 5 have no caption: left out (clip-0, …)" in notes
    assert notes in printed and f"{row['METEOR']:.3f}" in printed and "BLEU-4" in printed

    text = out.read_text()
    tags = Tags(text)
    assert not tags.open and sum(tag == "svg" for tag, _ in tags.found) == 3 + 3 * 2
    assert not re.search(r"(https?:)?//|<script|src=", text) and "METEOR" in text


def test_entailment_scores():
    rng = np.random.default_rng(0)
    x, y = rng.random(50), rng.random(50)
    records = [{"entailment": {"llm": a, "t5": (a + b) / 2, "same": 1.0}} for a, b in zip(x, y)]
    records += [{}, {"entailment": {"llm": None, "t5": 1}}]
    found = entailment(records)
    assert found["llm"]["r with t5"] == pytest.approx(pearsonr(x, (x + y) / 2).statistic, rel=1e-9)
    assert found["t5"]["r with llm"] == found["llm"]["r with t5"]
    assert found["llm"]["r with same"] is None and found["llm"]["r with llm"] == pytest.approx(1)
    assert (found["llm"]["scored"], found["t5"]["scored"], found["t5"]["max"]) == (50, 51, 1)
    assert (found["llm"]["min"], found["llm"]["median"]) == (x.min(), pytest.approx(np.median(x)))
    values = [k / 20 for k in range(-4, 21)]  # a bin's first value is in it
    assert caption_scores.histogram(values, 0.05) == {f"{value:g}": 1 for value in values}


def test_several_files_are_several_systems(folder):
    lines = (folder / "run.jsonl").read_text().splitlines()[:2]
    (folder / "few.jsonl").write_text("\n".join(lines))
    files = [folder / "few.jsonl", folder / "run.jsonl"]
    options = ("--field", "audio_caption", "--out", folder / "s.html")
    run("judge", *files, folder / "references.csv", *options)
    sets = json.loads((folder / "s.json").read_text())["sets"]
    assert [row["clips"] for row in sets.values()] == [2, 4, 4]
    assert list(sets)[0] == f"{folder / 'few.jsonl'}:audio_caption"


# ---- rating --------------------------------------------------------------------------------------


@pytest.fixture
def rated(folder):
    """A page of two systems, and its key."""
    rows = [{"id": f"clip-{i}", "zero": f"zero {i}", "few": f"<i>{i}"} for i in range(6)]
    (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("--field", "zero", "--field", "few", "--references", folder / "references.csv")
    options = ("--audio", folder / "sounds", *keys, "--out", folder / "page.html")
    run("rate", folder / "run.jsonl", *options)
    return folder, json.loads((folder / "page.key.json").read_text()), options


def test_rating_page(rated, capsys):
    folder, key, options = rated
    text = (folder / "page.html").read_text()
    tags = Tags(text)
    assert not tags.open
    sliders = [a for tag, a in tags.found if tag == "input" and a.get("type") == "range"]
    assert [s["id"] for s in sliders] == list(key) and len(key) == 4 * 2
    assert all((s["min"], s["max"], s["step"]) == ("0", "1", "0.05") for s in sliders)
    sources = [a["src"] for _, a in tags.found if "src" in a]
    assert len(sources) == 4 and all(s.startswith("data:audio/mpeg;base64,") for s in sources)
    # The sound under a heading is that of the clip whose captions are there.
    captions = dict(re.findall(r'<label for="(.*?)">(.*?)</label>', text))
    for source, (i, _) in zip(sources, list(key.values())[::2]):
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(source.split(",")[1])))
        peak = np.fft.rfftfreq(len(wave), 1 / rate)[np.abs(np.fft.rfft(wave)).argmax()]
        assert abs(peak - 440 * (int(i[-1]) + 1)) < 5
    for row, (i, system) in key.items():
        assert captions[row] == html.escape(f"zero {i[-1]}" if system == "zero" else f"<i>{i[-1]}")
    assert "Reference: A dog is barking" in text and "barks twice" not in text

    # Nothing tells the system or the id, and neither order nor sample is the file's.
    bare = re.sub(r'src="[^"]*"|<label.*?</label>', "", text)
    assert "few" not in bare and "zero" not in bare and "clip-" not in bare
    assert not re.search(r"(https?:)?//", bare)
    run("rate", folder / "run.jsonl", *options)
    assert (folder / "page.html").read_text() == text  # seeded
    run("rate", folder / "run.jsonl", *options, "--seed", 1, "--clips", 3)
    found = json.loads((folder / "page.key.json").read_text())
    assert len(found) == 6 and not set(found) & set(key)


PAGE_IN_NODE = """
const sliders = IDS.map(id => ({ id, value: "0.5", nextElementSibling: {} }));
const by_id = { rater: { value: "" , focus() {} }, state: {}, save: {} };
const document = {
  querySelectorAll: () => sliders, getElementById: id => by_id[id],
  createElement: () => ({ click() { console.error(this.download); } }),
};
const localStorage = STORED;
URL.createObjectURL = blob => { blob.text().then(text => process.stdout.write(text)); };
{ SCRIPT }
by_id.save.onclick();  // nobody's yet: nothing is saved
RATED
by_id.save.onclick();
process.on("exit", () => console.error(JSON.stringify(localStorage)));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node, to run the page's script")
def test_what_the_page_saves_is_what_average_reads(rated, capsys):
    folder, key, _ = rated
    script = re.search(r"<script>(.*)</script>", (folder / "page.html").read_text(), re.S)[1]

    def save(rated, stored="{}"):
        program = PAGE_IN_NODE.replace("IDS", json.dumps(list(key))).replace("STORED", stored)
        program = program.replace("SCRIPT", script).replace("RATED", rated)
        done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
        return done.stdout, done.stderr.splitlines()

    name = r'by_id.rater.value = " Ann \"A.\", Ø "; by_id.rater.oninput();'
    slide = "for (const s of sliders.slice(1)) { s.value = '0.35'; s.oninput(); }"
    text, (download, stored) = save(name + slide + "sliders[1].value = '1'; sliders[1].onclick();")
    assert download == "ratings-Ann-A-Ø.csv"
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["rater", "row", "score"]
    assert rows[1:] == [['Ann "A.", Ø', row, x] for row, x in zip(key, ["", "1"] + ["0.35"] * 6)]
    assert text in save("", stored)[0]  # the closed page goes on, and can be saved at once
    (folder / "ann.csv").write_text(text)
    run("average", folder / "ann.csv", "--key", folder / "page.key.json")
    printed = capsys.readouterr().out
    first, second = list(key.values())[:2]
    assert f'ann.csv, line 2: {first[0]} of {first[1]}, by Ann "A.", Ø' in printed
    assert "1 rows unanswered" in printed and "0 rows invalid" in printed


def test_average(rated):
    folder, key, _ = rated
    zero, few = ([row for row in key if key[row][1] == system] for system in ("zero", "few"))
    a = [("ann", row, 0.2) for row in zero] + [("ann", row, 0.9) for row in few]
    b = [("bob", zero[0], 0.4), ("bob", zero[1], 0.8), ("bob", zero[2], ""), ("bob", few[0], 1)]
    wrong = {
        ("bob", few[1], "1,0"): "could not convert string to float: '1,0'",
        ("bob", few[3], 1.05): "score 1.05 is not in 0 … 1",
        ("bob", zero[3]): "2 columns instead of 3",
        ("bob", "other-1", 0.5): "row 'other-1' is not in the key",
        ("", zero[3], 0.5): "no rater",
        ("bob", zero[0], 0): "bob rates .* for the second time",
    }
    for name, rows in (("a.csv", a), ("b.csv", b + [*wrong])):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows([("rater", "row", "score"), *rows])
    table, unanswered, invalid = caption_scores.average([folder / "a.csv", folder / "b.csv"], key)
    row = table["zero"]
    # Bob's mean of two weighs as much as Ann's of four; what he left open is not 0, nor 0.5.
    assert row["similarity"] == pytest.approx((0.2 + 0.6) / 2)
    assert row["std"] == pytest.approx(np.std([0.2, 0.6], ddof=1))
    assert (row["raters"], row["clips"], row["ratings"]) == (2, 4, 6)
    assert table["few"]["similarity"] == pytest.approx(0.95) and table["few"]["ratings"] == 5
    assert unanswered == [f"{folder / 'b.csv'}, line 4: {key[zero[2]][0]} of zero, by bob"]
    for line, reason, problem in zip(range(6, 12), wrong.values(), invalid, strict=True):
        assert re.match(rf".*b\.csv, line {line}: {reason}", problem)


# ---- bad input -----------------------------------------------------------------------------------


def test_mistakes_are_one_line(folder):
    captions, references = folder / "run.jsonl", folder / "references.csv"
    (folder / "other.csv").write_text("id,caption\nx,a dog\n")
    (folder / "empty.csv").write_text("id,caption\nclip-0,a\nclip-1, ...\n")
    key, field = folder / "page.key.json", ("--field", "audio_caption")
    for arguments, message in (
        (("judge", captions, references), "'captions'"),
        (("judge", captions, folder / "empty.csv", *field), "clip-1 has a reference without"),
        (("judge", captions, folder / "other.csv", *field), "same id"),
        (("judge", captions, references, "--out", folder / "s.json"), 2),  # page and JSON: one file
        (("rate", captions, *field, "--audio", folder / "nowhere"), "no such folder"),
        (("average", folder / "nowhere.csv", "--key", key), "nowhere"),
    ):
        key.write_text("{}")
        with pytest.raises(SystemExit) as e:
            run(*arguments)
        text = e.value.code
        assert text == message or text.startswith("error: ") and message in text
