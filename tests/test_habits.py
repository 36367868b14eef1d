"""What people's files and habits do to the commands: names, tables, folders."""

import json
import os
import shutil
import signal
import time

import pytest

import captions
import evaluate
import latents
import sample
from tests.conftest import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory, quick_sounds):
    folder = tmp_path_factory.mktemp("habits") / "model"
    save_model(folder)
    return folder


def make(model, *arguments):
    sample.main([*map(str, arguments), "--model", str(model), "--steps", "2", "--device", "cpu"])


TABLES = {  # a table of prompts; the names of what sample.py writes for it
    "t.csv": ("name,caption\ndog bark.wav,a dog\nrain #2.wav,rain\n", ["dog_bark", "rain_2"]),
    "t.tsv": ("file\tcaption\nsub/dog.flac\ta dog\nb.wav\train\n", ["dog", "b"]),
    "t.json": ('[{"id": "-0xzrMun0Rs", "caption": "a dog"}, {"id": "b", "caption": "rain"}]',
               ["-0xzrMun0Rs", "b"]),
    "t.txt": ("a dog\n\nrain\n", ["a_dog", "rain"]),
    "caps.csv": ("audiocap_id,youtube_id,start_time,caption\n1,ab,30,a dog\n2,cd,5,rain\n",
                 ["ab", "cd"]),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_evaluate_finds_what_sample_wrote(table, model, tmp_path):
    text, names = TABLES[table]
    (tmp_path / table).write_text(text)
    make(model, "--prompts", tmp_path / table, "--out", tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(names)
    found = evaluate.sounds_of(tmp_path / "out", latents.read_table(tmp_path / table))
    assert {path.stem for path in found.values()} == set(names)
    with pytest.raises(ValueError, match=r"none of the table's clips, such as .*\.wav"):
        evaluate.sounds_of(tmp_path / "in", latents.read_table(tmp_path / table))


def test_a_folder_works_from_anywhere(model, tmp_path, monkeypatch):
    """With a text encoder of its own, wherever it was moved to and whoever asks from where."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "a/model")
    shutil.copytree(model.parent / "bert", "a/model/text_encoder")
    about = json.loads((model / "model.json").read_text()) | {"text_encoder": "text_encoder"}
    (tmp_path / "a/model/model.json").write_text(json.dumps(about))
    (tmp_path / "b").mkdir()
    shutil.move("a/model", "b/model")
    monkeypatch.chdir("b")
    make("model", "a dog")
    assert (tmp_path / "b/a_dog.wav").is_file()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["dog", "--out", "x.flac"], "x.flac: sounds are written as .wav"),
        (["dog", "--negative", "rain", "--guidance", "1"], "a negative prompt does nothing"),
        (["--prompts", "x.xlsx"], "x.xlsx, row 1: expected a .csv"),
    ],
)
def test_what_would_do_something_else_is_refused(
    arguments, complaint, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.xlsx").write_text("PK")
    with pytest.raises(SystemExit) as e:
        make(model, *arguments)
    assert complaint in e.value.code and [x.name for x in tmp_path.iterdir()] == ["x.xlsx"]


def test_two_of_the_same_command(tmp_path):
    """The second is refused in a line, and a kill frees the lock (train and encode have tests)."""
    (tmp_path / "t.jsonl").write_text('{"id": "a", "labels": ["Dog"]}\n')
    command = ["single-label", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out")]
    captions.main(command)
    before, (ready, say) = (tmp_path / "out/single-label.jsonl").read_bytes(), os.pipe()
    if (pid := os.fork()) == 0:
        file = open(tmp_path / "out/single-label.jsonl", "ab")
        latents.lock(file)
        os.write(say, b"x")
        time.sleep(60)
    os.read(ready, 1)
    with pytest.raises(SystemExit, match="single-label.jsonl: another command is writing there"):
        captions.main(command)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    captions.main(command)
    assert (tmp_path / "out/single-label.jsonl").read_bytes() == before
    (tmp_path / "t.jsonl").write_text('{"id": "a", "labels": ["Cat"]}\n')
    with pytest.raises(SystemExit, match="begun with other settings"):
        captions.main(command)
