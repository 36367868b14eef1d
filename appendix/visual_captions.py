"""Captions from video, and whether sound and picture belong together (P2, section 3, appendix A).

captions.py makes captions of labels. The steps here look at the video, too, and score the result.
`run` is the papers' whole chain, with those of captions.py in their places:

    single-label, labels   audio_caption: captions.py's
    frames                 pictures at 1/3, 1/2 and 3/4 of the segment, by PyAV
    describe               frame_captions: BLIP-2's of each picture
    merge-frames           visual_caption: the LLM's one sentence of these three
    merge-audio-visual     merged_caption: the LLM's, of visual caption and label, for single labels
    entail                 how likely what is seen and what is heard belong together, 0 to 1: by the
                           LLM, and by the cosine of sentences' states from T5 and BERT
    filter                 captions: captions.py's; the template where entailment is low

    python -m appendix.visual_captions run balanced_train_segments.csv --videos VIDEO_FOLDER \\
        --class-labels class_labels_indices.csv --ontology ontology.json --out captions

Videos are ID.mp4, .mkv, .webm, .mov or .avi, whole or cut to the segment. Without --videos, `run`
leaves out what needs them, and the LLM's caption is compared with the labels.

Departure. The sentence encoders' cosine is that of the mean of a text's states: sentence-T5's last
projection is left out.
"""

import io
import json
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

import captions
from captions import MINILM, Options, Prompt, TextEncoder, ask, load, read_prompt
from latents import open_media, safe_name, template

# ---- prompts, verbatim ---------------------------------------------------------------------------

# captions of three frames → visual caption
FRAMES = read_prompt("""A4
Create one sentence that summarizes these three simply:
a video game with a dragon in the water final fantasy xv - the end of an era final fantasy x-2 - \
the end of an era. → The end of an era awaits in Final Fantasy XV and X-2.
a person is using a printer to print out a document a white cash register with a keyboard and a \
keypad a person is holding a small piece of plastic on a plane. → a person using a piece of \
plastic to make a purchase at a cash register.
a man with a beard sitting on a bed a man in a cowboy hat is playing an acoustic guitar a man \
standing in the desert holding an acoustic guitar. → A man in a cowboy hat is playing a guitar and \
strumming away in the desert.
""")
# visual caption, label → caption
AUDIO_VISUAL = read_prompt("""A5
Summarize these two captions conditioned on the second caption, the second caption describes an \
audio class and is the main concept:
man in a cowboy hat is throwing a rope while standing on a green field. Whip → An audio scene \
emphasizing the sharp sound of a whip, set against a visual backdrop of a man in a cowboy hat \
throwing a whip on a green field.
a man eating a cupcake at a table Tick → An audio scene centered around the subtle ticking sound, \
with a backdrop of a man enjoying a cupcake at a table.
a person using a piece of plastic to make a purchase. Cash register → An audio scene capturing the \
distinctive sound of a cash register, accompanying the moment when a person uses a piece of \
plastic to make a purchase.
a man brushing his teeth Toothbrush → a man cleans his teeth with a toothbrush’s audible scrubbing.
man standing in the desert holding an acoustic guitar Country → An audio scene focused on the \
Country genre, featuring a man standing in the desert holding an acoustic guitar.
""")
# visual caption, label with the ontology's description → score
ENTAIL_LABEL = read_prompt("""A6
on a scale from 0 to 1, output the probability that the first caption describes a scenario with \
the second caption's sound description.
a man in a cowboy hat is throwing a rope while standing on a green field. Whip : The sound of \
whipping, i.e., the greatly accelerated motion of the tip of a flexible structure, as the result \
of concentrated angular momentum. → 0.85
a man eating a cupcake at a table Tick : A metallic tapping sound.: A metallic tapping sound. → 0.00
a person using a piece of plastic to make a purchase. Cash register : Sounds of a mechanical or \
electronic device for registering and calculating transactions, usually attached to a drawer for \
storing cash. → 0.45
a man brushing his teeth Toothbrush : Sound of an instrument used to clean the teeth and gums \
consisting of a head of tightly clustered bristles mounted on a handle. → 1.00
man standing in the desert holding an acoustic guitar Country : A genre of United States popular \
music with origins in folk, Blues and Western music, often consisting of ballads and dance tunes \
with generally simple forms and harmonies accompanied by mostly string instruments such as banjos, \
electric and acoustic guitars, dobros, and fiddles as well as harmonicas. → 0.90
""")
# visual caption, audio caption → score
ENTAIL_CAPTION = read_prompt("""A7
on a scale from 0 to 1, output the probability that the first caption describes a scenario with \
the second caption's sound description:
two young men wearing red and white shirts A person is speaking while there is a loud gush of air. \
→ 0.10
goat grazing on grass in the mountains A goat making music and someone speaking aswell. → 0.75
a young boy is riding a skateboard down a sidewalk A male is singing and a child is singing along \
to the same music. → 0.05
a person is holding a gun with a glove on it Gunfire and cap gun. → 0.80
a screenshot of a game with three people in red and blue outfits Gunfire and cap gun. → 0.00
a person playing a ukulele with their hands There is background music with a mandolin being \
played. → 0.70
a man in a green shirt is talking to the camera A cat meowing and a person speaking. → 0.50
a person holding a snake in front of a door A snake hissing. → 0.60
""")
# The wording of the text (A, "Entailment Scoring") for the last two; `--wording text` takes it.
ENTAIL_TEXT = (
    "on a scale from 0 to 1, output the probability that these two captions happen together in "
    "float format:"
)


VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")


# ---- the steps -----------------------------------------------------------------------------------


class FrameDescriber:
    """BLIP-2 (Li et al., 2023): PIL pictures in, captions out. name: hub id or local folder."""

    def __init__(self, name: str, device: str = "cpu"):
        from transformers import AutoImageProcessor

        self.model, self.tokenizer = load("Blip2ForConditionalGeneration", name, device)
        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)

    @torch.no_grad()
    def __call__(self, images: list, length: int = 30) -> list[str]:
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]  # [B, 3, h, w]
        pixels = pixels.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(pixel_values=pixels, max_new_tokens=length, do_sample=False)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


class VideoOptions(Options):
    """The command's options, and the models that they name, loaded when a record needs them."""

    @cached_property
    def describer(self) -> FrameDescriber:
        return FrameDescriber(self.blip, self.device)

    @cached_property
    def encoders(self) -> dict[str, TextEncoder]:
        names = {key: name for key, name in (("t5", self.t5), ("bert", self.bert)) if name}
        return {x: TextEncoder(names[x], 128, "both", device=self.device) for x in names}

    @cached_property
    def descriptions(self) -> dict[str, str]:
        """class name -> its description in AudioSet's ontology.json"""
        nodes = json.loads(Path(self.ontology).read_bytes()) if self.ontology else []
        return {node["name"]: node["description"] for node in nodes}


def frames(records, c):
    """P2, A: pictures at 1/3, 1/2 and 3/4 of the segments, as JPEGs: their paths, [] if not all."""
    out = []
    for record in records:
        start = record.get("start") or 0.0
        length = (record.get("end") or start + 10) - start
        files = [Path(c.videos, record["id"] + x) for x in VIDEOS]
        video, pictures = next((file for file in files if file.is_file()), None), []
        # Where the segment isn't found, the video is taken to be the segment, cut out already.
        for begin in (start, 0.0) if video else ():
            pictures = [picture_at(video, begin + x * length) for x in (1 / 3, 1 / 2, 3 / 4)]
            if all(pictures):
                break
        name, paths = safe_name(record["id"], given=True), []
        for k, picture in enumerate(pictures if all(pictures) else (), 1):
            path = Path(c.out, "frames", name[:2], f"{name}-{k}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
            paths.append(str(path))
        out.append((paths, str(video)))
    return out


def picture_at(video: Path, seconds: float) -> bytes:
    """A JPEG; nothing if there is no such frame."""
    import av

    picture = io.BytesIO()
    with suppress(av.FFmpegError, LookupError), open_media(video) as file:
        stream = file.streams.video[0]
        file.seek(round(seconds / stream.time_base), stream=stream)  # to the keyframe before
        frame = next((x for x in file.decode(stream) if x.time >= seconds - 1e-3), None)
        if frame:
            frame.to_image().save(picture, "JPEG")
    return picture.getvalue()


def describe(records, c):
    """P2, A: frames -> frame_captions by BLIP-2, those of all records at once."""
    from PIL import Image

    paths = [path for record in records for path in record["frames"]]
    texts = iter(c.describer([Image.open(path).convert("RGB") for path in paths]))
    return [([next(texts) for _ in record["frames"]], c.blip) for record in records]


def merge_frames(records, c):
    """P2, A: frame_captions -> the LLM's visual_caption; BLIP-2's first one if it fails."""
    queries = [" ".join(record["frame_captions"]) for record in records]
    return ask(records, c, FRAMES, queries, lambda record: record["frame_captions"][0])


# Words that say that something is heard; those between bars are of one sound
SOUNDS = """speech speak spoke talk say said conversation voice vocal | sing sang song vocal choir
chant | music musical melody tune | shout yell scream cheer crowd | laugh laughter giggl | cry
cries sob sobb | cough sneez | applause clap clapp | bark howl growl | meow purr | chirp tweet |
knock | siren alarm beep honk | gunshot gunfire explosion bang | whistl | thunder thunderstorm
rumbl | footstep""".split("|")


def sounds_in(text: str) -> set[int]:
    """Which groups of SOUNDS a text speaks of: by a list of words, with no understanding."""
    words = ["|".join(group.split()) for group in SOUNDS]
    endings = [rf"\b(?:{x})(?:e|s|es|ed|ing|er|ers)?\b" for x in words]
    return {i for i, pattern in enumerate(endings) if re.search(pattern, text, re.I)}


def merge_audio_visual(records, c):
    """P2, A.3: visual_caption and the single label -> the LLM's merged_caption, None if it fails.

    It fails, too, with a sound that the label doesn't have, "such as the implication of speech
    through the depiction of a person", and without the label's own, in its or in other words.
    """

    def check(record, answer):
        label, found = record["labels"][0], sounds_in(answer)
        kept = any(word[:4].lower() in answer.lower() for word in re.findall(r"\w{3,}", label))
        kept = kept or sounds_in(label) & found
        return kept and found <= sounds_in(f"{label} {c.descriptions.get(label, '')}")

    queries = [f"{record['visual_caption']} {record['labels'][0]}" for record in records]
    return ask(records, c, AUDIO_VISUAL, queries, lambda record: None, check)


def parse_score(answer: str) -> float | None:
    """A score in 0 … 1 at the start of an answer, with nothing but words after it; or None.

    "0.85", ".9", "1.0." and "0.9 because …" are scores; "1,0", "0.5-0.7", "8/10", "n/a" are not.
    """
    found = re.fullmatch(r"(0|1|0?\.\d+|1\.0+)[.,;:]?(\s[^\d%]*)?", answer.strip())
    return float(found[1]) if found else None


def cosine(encoder: TextEncoder, first: list[str], second: list[str]) -> list[float]:
    """Cosine of N pairs of texts, each the mean of its tokens' states; −1 … 1."""
    states, mask = encoder([*first, *second])  # [2·N, L, dim], [2·N, L]
    states = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    a, b = F.normalize(states, dim=-1).chunk(2)  # [N, dim] each
    return [round(x, 4) for x in (a * b).sum(-1).tolist()]


def pair(record: dict, c: VideoOptions) -> tuple[Prompt, str, str]:
    """What entail compares, and how: (Prompt, what is seen, what is heard).

    Heard is the label with its description (clips of one label) or the audio caption; without a
    visual caption, the LLM's audio caption is compared with the labels' template.
    """
    prompt, label, seen = ENTAIL_CAPTION, record["labels"][0], record.get("visual_caption")
    if len(record["labels"]) == 1:
        prompt, heard = ENTAIL_LABEL, f"{label} : {c.descriptions.get(label, label)}"
    elif seen:
        heard = record["audio_caption"]
    else:
        seen, heard = record["audio_caption"], template(record["labels"])
    return prompt._replace(head=ENTAIL_TEXT) if c.wording == "text" else prompt, seen, heard


def entail(records, c):
    """P2, A.4: does what is seen fit what is heard? -> entailment: {"llm": …, "t5": …, "bert": …},
    as many as are asked for; the LLM's is None if its answer is no score."""
    prompts, first, second = zip(*[pair(record, c) for record in records])
    scores = {key: cosine(encoder, first, second) for key, encoder in c.encoders.items()}
    if not c.no_llm_score:
        texts = [x.text(f"{a} {b}", c.shots) for x, a, b in zip(prompts, first, second)]
        answers = c.language_model(texts, 12, c.temperature, c.seed)
        scores["llm"] = [parse_score(answer) for answer, _ in answers]
    made = {key: {"llm": c.llm, "t5": c.t5, "bert": c.bert}[key] for key in scores}
    return [(dict(zip(scores, row)), made) for row in zip(*scores.values())]


def is_single(record: dict) -> bool:
    return len(record["labels"]) == 1


def is_merged(record: dict) -> bool:
    return is_single(record) and "visual_caption" in record


def has_pair(record: dict) -> bool:
    return is_merged(record) or not is_single(record) and "audio_caption" in record


STEPS = {  # as captions.STEPS
    "single-label": captions.STEPS["single-label"],
    "labels": captions.STEPS["labels"],
    "frames": ("frames", lambda record: True, frames),
    "describe": ("frame_captions", lambda record: record.get("frames"), describe),
    "merge-frames": ("visual_caption", lambda record: record.get("frame_captions"), merge_frames),
    "merge-audio-visual": ("merged_caption", is_merged, merge_audio_visual),
    "entail": ("entailment", has_pair, entail),
    "filter": captions.STEPS["filter"],
}


def parse_args(arguments: list[str] | None = None) -> VideoOptions:
    parser, t5 = captions.options_for(__doc__, STEPS), "sentence-transformers/sentence-t5-base"
    add = parser.add_argument
    add("--videos", help="folder of videos, ID.mp4 or so")
    add("--ontology", help="AudioSet's ontology.json, for its descriptions of single labels")
    add("--blip", default="Salesforce/blip2-opt-2.7b", help="hub id or folder [%(default)s]")
    add("--wording", choices=("tables", "text"), default="tables", help="entail's prompt [tables]")
    add("--no-llm-score", action="store_true", help="entail only by the text encoders")
    add("--t5", default=t5, help="encoder of the T5 score; '': no such score [%(default)s]")
    add("--bert", default=MINILM, help="of the BERT score; '': no such score [%(default)s]")
    c = parser.parse_args(arguments, VideoOptions())
    if (c.videos or c.step == "frames") and not Path(c.videos or "none").is_dir():
        parser.error(f"--videos {c.videos}: {c.step} needs a folder of videos")
    return c


def main(arguments: list[str] | None = None) -> None:
    c = parse_args(arguments)
    # Without videos, there are only the frames that records have from before.
    left_out = () if c.videos or c.step != "run" else ("frames",)
    captions.run(c, {name: step for name, step in STEPS.items() if name not in left_out})


if __name__ == "__main__":
    main()
