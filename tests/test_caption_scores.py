"""appendix/caption_scores.py: metrics against the field's code, and the way from captions to the
table, to the raters' page, and back from their CSVs."""

import base64
import csv
import html
import io
import json
import random
import re

import numpy as np
import pytest
import soundfile
from conftest import Tags
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


def test_known_answers():
    words = "the dog barks at the cat".split()
    assert bleu([words], [[words]], 4) == 1 and rouge_l(words, [words]) == 1
    assert meteor(words, [words]) == 1 - 0.5 / 6**3  # one chunk of six matches
    assert meteor(["barking"], [["barks"]]) > 0 == meteor(["sings"], [["sang"]])  # Porter's stems
    # Papineni et al.'s example: "the" counts as often as a reference has it.
    refs = ["the cat is on the mat".split(), "there is a cat on the mat".split()]
    assert bleu([["the"] * 7], [refs], 1) == pytest.approx(2 / 7)
    assert cider_d([words, ["x"]], [[words], [["y"]]]) == pytest.approx(5)  # 10 and 0
    assert cider_d([words], [[words]]) == 0  # a single clip: every n-gram is in all of them
    # Words of no clip, and what has no words
    for metric in (meteor, rouge_l):
        assert metric(["x"], [["y"]]) == metric([], [["y"]]) == 0
    assert bleu([[]], [[["y"]]], 1) == cider_d([[], ["x"]], [[["y"]], [["z"]]]) == 0
    words = "a dog's bark and rain don't stop 10 5 s"
    assert tokenize("A dog’s bark, and RAIN: don't—stop (10.5 s)! …") == words.split()


# ---- judging -------------------------------------------------------------------------------------

RECORDS = [
    {"audio_caption": "A dog barks.", "merged_caption": None, "entailment": {"llm": 0.1, "t5": 0}},
    {"audio_caption": "Rain falls; the rain falls!", "entailment": {"llm": 0.9, "t5": 0.6}},
    {"audio_caption": "A <b>man</b> speaks", "merged_caption": "A man", "entailment": {"t5": 1}},
    {"audio_caption": "..."},
    {"audio_caption": "no reference"},
]
REFERENCES = [
    ("clip-0", "A dog is barking"),
    ("clip-0", "a dog barks twice, loudly"),
    ("clip-1", "rain falls on the roof"),
    ("clip-2", "a man, speaking"),
    ("clip-3", "wind"),
]


def run(*arguments):
    caption_scores.main([*map(str, arguments)])


def write(path, records):
    path.write_text(
        "".join(json.dumps(x | {"id": f"clip-{i}"}) + "\n" for i, x in enumerate(records))
    )


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "run.jsonl", RECORDS)
    with open(tmp_path / "references.csv", "w", newline="") as file:
        csv.writer(file).writerows([("youtube_id", "caption"), *REFERENCES])
    return tmp_path


def test_judge_command(folder, capsys):
    out, files = folder / "scores.html", [folder / "run.jsonl", folder / "references.csv"]
    run("judge", *files, "--field", "audio_caption", "--field", "merged_caption", "--out", out)
    result, printed = json.loads((folder / "scores.json").read_text()), capsys.readouterr().out
    row, merged = (result["sets"][key] for key in ("audio_caption", "merged_caption"))
    words = [["a", "dog", "barks"], ["rain", "falls", "the", "rain", "falls"]]
    words += [["a", "b", "man", "b", "speaks"], []]
    refs = [[tokenize(r) for i, r in REFERENCES if i == f"clip-{k}"] for k in range(4)]
    assert row["BLEU-1"] == bleu(words, refs, 1) > 0 and row["CIDEr"] == cider_d(words, refs) > 0
    assert row["METEOR"] == pytest.approx(np.mean([*map(meteor, words, refs)]))
    assert row["ROUGE-L"] == pytest.approx(np.mean([*map(rouge_l, words, refs)]))
    assert row["clips"] == 4 and merged["clips"] == 1
    assert (row["min"], row["median"], row["max"], row["mean"]) == (0, 4, 5, 3.25)
    assert row["std"] == pytest.approx(np.std([3, 5, 5, 0])) and row["vocabulary"] == 9
    assert row["top 20 words"]["rain"] == 2 and "the" not in row["top 20 words"]
    assert row["lengths"] == {"0": 1, "1": 0, "2": 0, "3": 1, "4": 0, "5": 2}
    for note in (
        "audio_caption: 1 of 5 have no reference: left out (clip-4, …)",
        "audio_caption: 1 of 5 have a caption without a word: it scores 0 (clip-3, …)",
        "merged_caption: 4 of 5 have no caption: left out (clip-0, …)",
    ):
        assert note in result["notes"] and note in printed
    assert f"{row['METEOR']:.3f}" in printed and "BLEU-4" in printed
    text = out.read_text()
    tags = Tags(text)
    assert not tags.open and sum(tag == "svg" for tag, _ in tags.found) == 2 + 3 * 2
    assert not re.search(r"(https?:)?//|<script|src=", text) and "METEOR" in text

    write(folder / "few.jsonl", RECORDS[:2])  # several files are several systems
    run("judge", folder / "few.jsonl", *files, "--field", "audio_caption", "--out", out)
    sets = json.loads((folder / "scores.json").read_text())["sets"]
    assert [row["clips"] for row in sets.values()] == [2, 4, 4]
    assert list(sets)[0] == f"{folder / 'few.jsonl'}:audio_caption"


def test_entailment_scores():
    x, y = np.random.default_rng(0).random((2, 50))
    records = [{"entailment": {"llm": a, "t5": a + b, "same": 1.0}} for a, b in zip(x, y)]
    found = entailment([*records, {}, {"entailment": {"llm": None, "t5": 1}}])
    assert found["llm"]["r with t5"] == pytest.approx(pearsonr(x, x + y).statistic, rel=1e-9)
    assert found["llm"]["r with same"] is None and found["llm"]["r with llm"] == pytest.approx(1)
    assert (found["llm"]["scored"], found["t5"]["scored"]) == (50, 51)
    values = [k / 20 for k in range(-4, 21)]  # a bin's first value is in it
    assert caption_scores.histogram(values, 0.05) == {f"{value:g}": 1 for value in values}


# ---- rating --------------------------------------------------------------------------------------


@pytest.fixture
def rated(folder):
    """A page of two systems, and its key; clip i sounds at 440·(i + 1) Hz."""
    for i in range(4):
        wave = 0.3 * np.sin(2 * np.pi * 440 * (i + 1) * np.arange(16_000) / 16_000)
        soundfile.write(folder / f"clip-{i}.wav", wave, 16_000)
    write(folder / "run.jsonl", [{"zero": f"zero {i}", "few": f"<i>{i}"} for i in range(6)])
    keys = ("--field", "zero", "--field", "few", "--references", folder / "references.csv")
    options = ("--audio", folder, *keys, "--out", folder / "page.html")
    run("rate", folder / "run.jsonl", *options)
    return folder, json.loads((folder / "page.key.json").read_text()), options


def test_rating_page(rated):
    folder, key, options = rated
    text = (folder / "page.html").read_text()
    tags = Tags(text)
    assert not tags.open and not re.search(r"(https?:)?//", re.sub('src="[^"]*"', "", text))
    fields = [a["id"] for tag, a in tags.found if a.get("type") == "number"]
    assert fields == list(key) and len(key) == 4 * 2
    # The sound under a heading is that of the clip whose captions are there.
    sources = [a["src"] for _, a in tags.found if "src" in a]
    for source, (i, _) in zip(sources, list(key.values())[::2], strict=True):
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(source.split(",")[1])))
        peak = np.fft.rfftfreq(len(wave), 1 / rate)[np.abs(np.fft.rfft(wave)).argmax()]
        assert abs(peak - 440 * (int(i[-1]) + 1)) < 5
    captions = dict(re.findall(r'<label for="(.*?)">(.*?)</label>', text))
    for row, (i, system) in key.items():
        assert captions[row] == html.escape(f"zero {i[-1]}" if system == "zero" else f"<i>{i[-1]}")
    assert "Reference: A dog is barking" in text and "barks twice" not in text
    # Nothing tells the system or the id, and neither order nor sample is the file's.
    bare = re.sub(r'src="[^"]*"|<label.*?</label>', "", text)
    assert "few" not in bare and "zero" not in bare and "clip-" not in bare
    run("rate", folder / "run.jsonl", *options)
    assert (folder / "page.html").read_text() == text  # seeded
    run("rate", folder / "run.jsonl", *options, "--seed", 1, "--clips", 3)
    found = json.loads((folder / "page.key.json").read_text())
    assert len(found) == 6 and not set(found) & set(key)


def test_average(tmp_path):
    key = {f"{x}{i}": [f"clip-{i}", system] for x, system in zip("zf", ("zero", "few"))
           for i in range(4)}  # fmt: skip
    (tmp_path / "a.csv").write_text("rater,row,score\n" + "".join(
        f"ann,{row},{0.2 if row[0] == 'z' else 0.9}\n" for row in key))  # fmt: skip
    wrong = ["bob,z2,", 'bob,f1,"1,0"', "bob,f3,1.05", "bob,z3", "bob,f3,nan", "bob,other,0.5"]
    wrong += [",z3,0.5", "bob,z0,0"]  # by nobody, and for the second time
    bob = ["rater,row,score", "bob,z0,0.4", "bob,z1,0.8", "bob,f0,1", *wrong]
    (tmp_path / "b.csv").write_text("\n".join(bob))
    table, left_out = caption_scores.average([tmp_path / "a.csv", tmp_path / "b.csv"], key)
    row = table["zero"]
    # Bob's mean of two weighs as much as Ann's of four; what he left open is not 0, nor 0.5.
    assert row["similarity"] == pytest.approx((0.2 + 0.6) / 2)
    assert row["std"] == pytest.approx(np.std([0.2, 0.6], ddof=1))
    assert (row["raters"], row["clips"], row["ratings"]) == (2, 4, 6)
    assert table["few"]["similarity"] == pytest.approx(0.95)
    for line, problem in zip(range(5, 13), left_out, strict=True):
        assert f"b.csv, line {line}: " in problem and ("unanswered" in problem) == (line == 5)


def test_mistakes_are_one_line(folder):
    captions, references = folder / "run.jsonl", folder / "references.csv"
    (folder / "other.csv").write_text("id,caption\nx,a dog\n")
    (folder / "empty.csv").write_text("id,caption\nclip-0,a\nclip-1, ...\n")
    (folder / "key.json").write_text('{"1": "clip-0"}')
    field = ("--field", "audio_caption")
    for arguments, message in (
        (("judge", captions, references), "'captions'"),
        (("judge", captions, folder / "empty.csv", *field), "clip-1 has a reference without"),
        (("judge", captions, folder / "other.csv", *field), "same id"),
        (("rate", captions, *field, "--audio", folder / "nowhere"), "no such folder"),
        (("average", references, "--key", folder / "key.json"), "not a key"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run(*arguments)
