"""LongBench v1 (Bai et al. 2023, arXiv 2308.14508): 21 sets of real tasks, with the templates, answer lengths and
truncation of its published code (data/longbench.json).

The rows come from a folder with SET.jsonl files, from the data.zip that holds them, or from the Hub."""

import functools
import hashlib
import json
import zipfile
from importlib import resources
from pathlib import Path

from minillm.errors import MinillmError, UsageError
from minillm.evaluate.metrics import score_row, segment
from minillm.evaluate.prompt import Prompt, chat, encode

REPO, ARCHIVE = "THUDM/LongBench", "data.zip"
NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # read without the chat template
SETS = json.loads(resources.files("minillm.evaluate").joinpath("data/longbench.json").read_text(encoding="utf-8"))


def samples(sets, n, length, data, offline=False):
    """The first n rows of each set. length: tokens that a prompt is cut to, None: `default_length`."""
    for name in sets:
        if SETS[name]["metric"].endswith("_zh"):
            segment("")  # says at once where jieba is not there
    found = []
    for name in sets:
        for row in rows(name, data, offline)[:n]:
            digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]
            found.append({"kind": name, "id": row["_id"], "row": digest, "length": length})
    return found


@functools.cache
def rows(name, data, offline=False):
    """The rows of a set: dicts with input, context, answers, length, all_classes, _id. Raises MinillmError."""
    path = Path(data).expanduser() if data else _from_hub(offline)
    try:
        if path.is_dir():
            file = next((p for p in (path / f"{name}.jsonl", path / "data" / f"{name}.jsonl") if p.exists()), None)
            if file is None:
                raise UsageError(f"--data {path} has no {name}.jsonl: unpack LongBench's {ARCHIVE} there")
            text = file.read_text(encoding="utf-8")
        else:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(f"data/{name}.jsonl").decode("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise MinillmError(
            f"LongBench's set {name} cannot be read from {path} ({error}): get {ARCHIVE} of "
            f"https://huggingface.co/datasets/{REPO} once more"
        ) from error


@functools.cache
def _from_hub(offline):
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPO, ARCHIVE, repo_type="dataset", local_files_only=offline))
    except Exception as error:  # no network, no such file, offline: there are dozens of classes
        raise MinillmError(
            f"LongBench's data is not here and could not be fetched ({type(error).__name__}): get {ARCHIVE} "
            f"of https://huggingface.co/datasets/{REPO} and give it, or the folder it was unpacked to, with --data"
        ) from error


def default_length(context):
    """Tokens that a prompt is cut to: 3500 of a context of 4k, 7500 of 8k, 31500 of 32k, as the benchmark has it."""
    return context // 1000 * 1000 - 500


def prompt(llm, sample, data, offline=False):
    name, spec = sample["kind"], SETS[sample["kind"]]
    row = next(row for row in rows(name, data, offline) if row["_id"] == sample["id"])
    length = sample["length"] or default_length(llm.context)
    before, after = spec["template"].split("{context}")
    before, after = (part.format(input=row["input"]) for part in (before, after))
    context, after = cut(llm, before + row["context"], after, length)
    head, tail = (context, after) if name in NO_CHAT else chat(llm.tokenizer, context, after)
    newline = llm.encode("\n", bos=False)[-1:] if name == "samsum" else []

    def grade(prediction):
        return {"score": score_row(name, spec["metric"], prediction, row["answers"], row["all_classes"])}

    return Prompt(
        *encode(llm, head, tail),
        max_tokens=spec["max_tokens"],
        stop_ids=frozenset(newline),
        min_tokens=len(newline),  # samsum's answer has one token at least
        grade=grade,
    )


def cut(llm, context, after, length):
    """A prompt of more than `length` tokens loses its middle. Raises UsageError where that reaches into `after`, the
    text that follows the context."""
    text = context + after
    ids = llm.encode(text)
    if len(ids) <= length:
        return context, after
    half = length // 2
    text = llm.tokenizer.decode(ids[:half]) + llm.tokenizer.decode(ids[-half:])
    if not half or not text.endswith(after) or len(llm.encode(after, bos=False)) > half:
        raise UsageError(f"--length {length} leaves no room for the question: give a greater one")
    return text[: len(text) - len(after)], after
