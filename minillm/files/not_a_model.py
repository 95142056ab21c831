"""What people have beside models, by the names of the files or a GGUF file's metadata: what it is, and the way out."""

import fnmatch
import json
from collections.abc import Collection
from pathlib import Path

from minillm.errors import MinillmError

_NEITHER = "neither config.json with model.safetensors nor a .gguf file"
_SAVE = "save the model again with transformers' save_pretrained, or take a .gguf of it"
_OTHER_KIND = "minillm runs language models: take one"
# (names of files, one of which is there; what the folder holds then; what to do): the first line that fits
_FOLDERS = (
    (
        ("adapter_config.json", "adapter_model.*"),
        "a LoRA adapter",
        "merge it into its base model (peft's merge_and_unload, then save_pretrained) and give that folder",
    ),
    (("model_index.json",), "a diffusers pipeline, which makes pictures", _OTHER_KIND),
    (("config_sentence_transformers.json", "modules.json"), "a model that embeds texts", _OTHER_KIND),
    (
        ("model-?????-of-?????.safetensors",),
        "parts of one without their list",
        "get model.safetensors.index.json and config.json, too, into the same folder",
    ),
    (
        ("consolidated*.safetensors", "consolidated*.pth"),
        "a model in its maker's own form",
        "take the repository of it that has config.json and model*.safetensors",
    ),
    (
        ("model.safetensors", "model.safetensors.index.json"),
        "weights without config.json",
        "get that file, too, from where the weights came",
    ),
    (("*.safetensors",), "safetensors of other names", f"rename a whole model to model.safetensors, or {_SAVE}"),
    (("*.onnx",), "an ONNX model", f"take the one that it was made of: {_SAVE}"),
    (("*.h5", "*.tflite", "saved_model.pb"), "a TensorFlow model", _SAVE),
    (("*.msgpack",), "a Flax model", _SAVE),
    (("*.bin", "*.pth", "*.pt", "*.ckpt"), "a PyTorch checkpoint", _SAVE),
    (("config.json", "tokenizer*"), "files of a model without its weights", "get all of its files"),
)
# architectures of GGUF files
_PICTURES = ("clip",)
_EMBEDS = ("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "t5encoder")


def refuse_names(where: str, names: Collection[str], of: str = "") -> MinillmError:
    """The error for a folder, a repository or a file that is no model. names: of all files in it; of: what is known of
    a base model."""
    found = next(((what, fix) for signs, what, fix in _FOLDERS if _any(names, signs)), None)
    if found is None:
        return MinillmError(f"{where} holds no model: {_NEITHER}; give the folder or the file of one")
    what, fix = found
    return MinillmError(f"{where} holds no model: {_NEITHER}, but {what}{of}: {fix}")


def refuse_folder(folder: Path) -> MinillmError:
    """The error for a folder that is no model."""
    files = list(folder.iterdir())
    if lost := sorted(file.name for file in files if not file.exists()):
        return MinillmError(
            f"{folder} holds no whole model: {lost[0]} links to a file that is not there, as an interrupted download "
            "leaves it; fetch the model again"
        )
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        base = None
    return refuse_names(str(folder), {file.name for file in files}, f" of {base}" if isinstance(base, str) else "")


def refuse_file(path: Path) -> MinillmError:
    """The error for a file that does not begin as a GGUF file does."""
    found = next(((what, fix) for signs, what, fix in _FOLDERS if _any({path.name}, signs)), None)
    if path.suffix == ".safetensors" and found[0] != "a LoRA adapter":
        return MinillmError(f"{path} is only the weights: give the folder that holds it together with config.json")
    what, fix = found or ("something else", "give one, or a folder with config.json and model.safetensors")
    return MinillmError(f"{path} is not a GGUF file, but {what}: {fix}")


def check_gguf(path: Path, metadata: dict) -> None:
    """Raises MinillmError where a GGUF file says that it is something beside a model."""
    kind, name = metadata.get("general.type"), metadata.get("general.architecture")
    if kind == "adapter":
        raise MinillmError(f"{path} is a LoRA adapter: merge it into its base model with llama-export-lora")
    if kind == "mmproj" or name in _PICTURES:
        raise MinillmError(
            f"{path} is what a model sees pictures with (mmproj), and minillm reads text: give the model's own .gguf"
        )
    if kind == "imatrix" or "imatrix.chunk_count" in metadata:
        raise MinillmError(
            f"{path} is an importance matrix, which quantising takes: give the .gguf of the model itself"
        )
    pooling = metadata.get(f"{name}.pooling_type")
    if name in _EMBEDS or isinstance(pooling, int) and pooling > 0:
        raise MinillmError(f"{path} is a model that embeds texts ({name}): {_OTHER_KIND}")


def _any(names: Collection[str], signs: Collection[str]) -> bool:
    return any(fnmatch.filter(names, sign) for sign in signs)
