"""minillm beside llama.cpp and transformers on this machine's CPU: one run, the same weights, prompts and threads.

    python tools/compare_cpu.py --llama-python llama/bin/python --torch-python torch/bin/python --write README.md

Every measurement is a process of its own, and the engines take turns: A B C A B C. A process loads the model, reads a
prompt (from its start to the first token: "start"), reads 32 more tokens of the text one by one (generation: the median
step) and tells its peak memory. A prompt that took less than 5 s is then read again, warm, up to three times, and the
median is the prompt's speed; a longer one counts as it was. All engines get the same token ids, of the language
reference that Python brings. A rival whose interpreter is not given, or that fails, is left out, and the table says so.

llama.cpp runs as llama-cpp-python has it by default, without flash attention, and Q4_0, its fastest file, also with it:
prompts are read faster then and tokens generated more slowly. "At its best" is the best of all its rows, cell by cell.

The weights are those of a .gguf (default: the default model's, Q4_1 with the embedding in Q8_0). The other files are
made from it in --work: Q4_0, Q8_0 and BF16 with the gguf package; for transformers a folder in bfloat16 and one in
float32, as tools/make_golden.py reads them. Environments for the rivals:

    python3 -m venv torch && torch/bin/pip install torch transformers gguf --extra-index-url https://download.pytorch.org/whl/cpu

    python3 -m venv llama && llama/bin/pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    sed -i 's/^    _tile_loadconfig(&tc);/    __asm__ volatile("" : : "m"(tc));\\n&/' \\
        llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
    CMAKE_ARGS="-DLLAVA_BUILD=OFF" llama/bin/pip install ./llama_cpp_python-0.3.36

The `sed` keeps AMX in llama.cpp where GCC 12 would break it: that compiler thinks that _tile_loadconfig reads 8 of the
64 bytes, drops the rest, and quantised files crash on prompts. It changes nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

N_GENERATED = 32
SHORT_SECONDS, REPEATS = 5.0, 3  # a prompt that takes less is read again, so often
BEGIN, END = "<!-- tools/compare_cpu.py -->", "<!-- end -->"


# The engines, each in a process of its own: load in __init__, read(ids) and step(id) up to the logits, clear()


class Minillm:
    def __init__(self, path, n_threads, n_context, cache):
        from minillm import LLM, CacheConfig
        from minillm.compress.reading import recompress

        self.recompress = recompress
        config = CacheConfig("full") if cache == "full" else CacheConfig(budget=cache)
        self.llm = LLM.load(path, cache=config, threads=n_threads, offline=True)
        self.session = self.llm.session()
        self.about = f"minillm {version('minillm-engine')}"

    def read(self, ids):
        self.session.unread = list(ids)
        return self.session.read().argmax()

    def step(self, token):
        cache, compressor = self.session.cache, self.session.compressor
        logits = self.llm.model.decode([token], [cache])[0]
        if compressor.due(cache):
            self.recompress(self.llm.model, cache, compressor)
        return logits.argmax()

    def clear(self):
        self.session.cache.clear()


class Llama:
    def __init__(self, path, n_threads, n_context, flash_attention):
        import llama_cpp
        import numpy as np

        threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
        self.llm = llama_cpp.Llama(path, n_ctx=n_context, flash_attn=flash_attention, verbose=False, **threads)
        self.logits = lambda: np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(self.llm.ctx, -1), shape=(self.llm.n_vocab(),)
        )
        amx = "AMX_INT8 = 1" in llama_cpp.llama_print_system_info().decode()
        self.about = f"llama-cpp-python {version('llama-cpp-python')} (AMX {'on' if amx else 'off'})"

    def read(self, ids):
        self.llm.eval(ids)
        return self.logits().argmax()

    def step(self, token):
        return self.read([token])

    def clear(self):
        self.llm.reset()


class Transformers:
    def __init__(self, path, n_threads, n_context, dtype):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(n_threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self.about = f"transformers {version('transformers')} with torch {version('torch')}"
        self.clear()

    def read(self, ids):
        ids = self.torch.tensor([ids])
        out = self.model(ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[0, -1].argmax().item()

    def step(self, token):
        return self.read([token])

    def clear(self):
        self.past = None


ENGINES = {"minillm": Minillm, "llama.cpp": Llama, "transformers": Transformers}


def version(package):
    from importlib.metadata import version

    return version(package)


def measure():
    """The process of one measurement: a request on stdin, a line at the first token and one with the figures."""
    request = json.load(sys.stdin)
    engine = ENGINES[request["engine"]](request["path"], request["threads"], request["context"], request["setting"])
    ids, more = request["ids"][:-N_GENERATED], request["ids"][-N_GENERATED:]
    first, chosen = timed(engine.read, ids)
    print("first token", flush=True)
    prompts, steps = [first], [timed(engine.step, token)[0] for token in more]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    if first < SHORT_SECONDS:
        prompts = []
        while len(prompts) < REPEATS and sum(prompts) < SHORT_SECONDS:
            engine.clear()
            prompts.append(timed(engine.read, ids)[0])
    found = {
        "prompts": prompts,
        "steps": steps,
        "peak": int(peak.split()[1]) * 1024,
        "token": int(chosen),
        "about": engine.about,
    }
    print(json.dumps(found), flush=True)


def timed(work, argument):
    """-> (seconds, what it returned)"""
    start = time.perf_counter()
    result = work(argument)
    return time.perf_counter() - start, result


# The files


def write_gguf(source, target, kind):
    """The .gguf `source` with its matrices as `kind`; the embedding is left in Q8_0 unless that is a float type."""
    import gguf
    from gguf.quants import dequantize, quantize

    reader, kind = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, arch="llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            array = entry.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if array else None)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if len(tensor.shape) > 1 and (tensor.name != "token_embd.weight" or kind.name == "BF16"):
            data, stored = quantize(dequantize(data, stored), kind), kind
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_transformers(source, folder, dtype):
    """The same weights as a folder for transformers; runs in torch's environment."""
    import gguf
    import torch
    from make_golden import model_of

    model_of(gguf.GGUFReader(source)).to(getattr(torch, dtype)).save_pretrained(folder)


@dataclass
class Contestant:
    engine: str
    kind: str  # Q4_1, ... of a .gguf; bfloat16 or float32 of a folder
    setting: object  # cache of minillm, flash attention of llama.cpp, dtype of transformers
    path: Path
    python: str
    environment: dict = field(default_factory=dict)

    @property
    def name(self):
        cpu = self.environment.get("MINILLM_CPU")
        return self.engine + (f", {cpu}" if cpu else "")

    @property
    def cache(self):
        if isinstance(self.setting, float):
            return f"{self.setting:.0%}"
        return "full, flash attention" if self.setting is True else "full"


def contestants(args, source, notes):
    """Everything that is measured, with its files made where they are not there yet."""
    from minillm.ops import cpu_lib

    args.work.mkdir(parents=True, exist_ok=True)
    files = {"Q4_1": source}
    for kind in ("Q4_0", "Q8_0", "BF16"):
        files[kind] = args.work / f"{source.name.split('.')[0]}.{kind}.gguf"
        if not files[kind].exists():
            write_gguf(source, files[kind], kind)
    found = []
    paths = cpu_lib.available_paths()[:2] or ["numpy"]
    for path in paths if paths[0] == "amx" else paths[:1]:
        others = [("Q8_0", "full"), ("BF16", "full")] if path == paths[0] else []
        for kind, cache in [("Q4_1", "full"), ("Q4_1", 0.2), *others]:
            found.append(Contestant("minillm", kind, cache, files[kind], sys.executable, {"MINILLM_CPU": path}))
    if args.llama_python:
        for kind, flash_attention in (
            ("Q4_0", False),
            ("Q4_0", True),
            ("Q4_1", False),
            ("Q8_0", False),
            ("BF16", False),
        ):
            found.append(Contestant("llama.cpp", kind, flash_attention, files[kind], args.llama_python))
    else:
        notes.append("llama.cpp is left out: no --llama-python.")
    if args.torch_python:
        for dtype in ("bfloat16", "float32"):
            folder = args.work / dtype
            if not (folder / "model.safetensors").exists():
                subprocess.run([args.torch_python, __file__, "--make", source, folder, dtype], check=True)
            found.append(Contestant("transformers", dtype, dtype, folder, args.torch_python))
    else:
        notes.append("transformers is left out: no --torch-python.")
    return found


# The run


def run(contestant, ids, args):
    """One measurement -> its figures; an Exception that says what happened if the process failed."""
    request = {"engine": contestant.engine, "path": str(contestant.path), "setting": contestant.setting}
    request |= {"threads": args.threads, "context": len(ids), "ids": ids}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)} | contestant.environment
    # A second start of any Python program finds its modules compiled; pip did that for all but those of a checkout.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start, begun = time.perf_counter(), None
    command, pipes = [contestant.python, __file__, "--measure"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, text=True, **pipes) as process,
    ):
        with suppress(BrokenPipeError), process.stdin as stdin:
            json.dump(request, stdin)
        for line in process.stdout:
            if line == "first token\n":
                begun = time.perf_counter() - start
            elif line.startswith("{"):
                return json.loads(line) | {"start": begun}
        process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()[-1:]
    raise RuntimeError(" ".join([f"status {process.returncode}", *said]))


def compare(args, found, ids, notes):
    """{(index of the contestant, length): its figures, a list over rounds}"""
    from tqdm import tqdm

    figures, log = {}, args.work / "measurements.jsonl"
    turns = [(n, i) for _ in range(args.rounds) for n in args.lengths for i in range(len(found))]
    failed = set()
    with open(log, "w") as out, tqdm(turns, unit="run", disable=None) as bar:
        for n, i in bar:
            contestant = found[i]
            bar.set_description(f"{contestant.name} {contestant.kind} {contestant.cache} at {n}")
            if i in failed:
                continue
            try:
                result = run(contestant, ids[: n + N_GENERATED], args)
            except RuntimeError as error:
                failed.add(i)
                notes.append(f"{contestant.name} {contestant.kind} failed at {n} tokens: {error}.")
                continue
            figures.setdefault((i, n), []).append(result)
            print(
                json.dumps({"name": contestant.name, "kind": contestant.kind, "n": n, **result}), file=out, flush=True
            )
    return figures


# The table


METRICS = {  # name -> (of the figures over rounds, whether more is better, how it is written)
    "prompt": (lambda n, rounds: n / median(s for r in rounds for s in r["prompts"]), True, "{:.0f}"),
    "generated": (lambda n, rounds: 1 / median(s for r in rounds for s in r["steps"]), True, "{:.1f}"),
    "start": (lambda n, rounds: median(r["start"] for r in rounds), False, "{:.2f}"),
    "peak": (lambda n, rounds: max(r["peak"] for r in rounds) / 2**20, False, "{:.0f}"),
}


def median(values):
    return statistics.median(list(values))


def tables(args, found, figures, notes, load, bandwidth):
    values = {
        (i, n, metric): of(n, rounds) for (i, n), rounds in figures.items() for metric, (of, _, _) in METRICS.items()
    }
    at = " / ".join(map(str, args.lengths))
    head = ["engine", "weights", "cache", f"prompt tok/s at {at}", "generated tok/s", "start to first token, s"]
    lines = table([*head, "peak MiB"])
    for i, c in enumerate(found):
        cells = [c.name, c.kind, c.cache]
        for metric, (_, _, form) in METRICS.items():
            cells.append(" / ".join(form.format(v) if (v := values.get((i, n, metric))) else "-" for n in args.lengths))
        lines.append(row(cells))
    lines += ["", "minillm / rival: speeds above 1 are faster, seconds and MiB below 1 are less.", ""]
    lines += table(["minillm", "against", f"prompt at {at}", "generated", "start", "peak"])
    for ours, (mine, rivals, label) in pairs(found):
        cells = [ours, label]
        for metric, (_, more, _) in METRICS.items():
            ratios = []
            for n in args.lengths:
                theirs = [v for i in rivals if (v := values.get((i, n, metric)))]
                own = values.get((mine, n, metric))
                ratios.append(f"{own / (max if more else min)(theirs):.2f}" if own and theirs else "-")
            cells.append(" / ".join(ratios))
        lines.append(row(cells))
    lines += ["", agreement(args, found, figures)]
    abouts = dict.fromkeys(r["about"] for rounds in figures.values() for r in rounds)
    return "\n".join([machine(args, load, bandwidth, abouts), "", *lines, *([""] + notes if notes else [])])


def agreement(args, found, figures):
    """A sentence: whether all found the same token likeliest after each prompt, as nearly the same weights should."""
    parts = []
    for n in args.lengths:
        names = {}
        for i, c in enumerate(found):
            for measured in figures.get((i, n), []):
                names.setdefault(measured["token"], {})[f"{c.name} {c.kind}"] = True
        if len(names) > 1:
            parts.append(f"{n}: " + ", ".join(f"{token} ({', '.join(who)})" for token, who in names.items()))
    differ = f" They differ at {'; '.join(parts)}." if parts else ""
    return f"All engines choose the same token after the prompt{' but where said' if parts else ''}.{differ}"


def pairs(found):
    """What is set against what: (name of ours, (its index, indices of rivals, their name))."""
    llama = {"llama.cpp at its best": [i for i, c in enumerate(found) if c.engine == "llama.cpp"]}
    torch = {"transformers, bfloat16": [i for i, c in enumerate(found) if c.kind == "bfloat16"]}
    for i, c in enumerate(found):
        if c.engine == "minillm":
            same = [j for j, d in enumerate(found) if d.engine == "llama.cpp" and d.kind == c.kind]
            rivals = {"llama.cpp, same file": same} if c.cache == "full" else {}
            rivals |= llama | torch if c.kind == "Q4_1" else {}
            for label, theirs in rivals.items():
                if theirs:
                    yield f"{c.name} {c.kind}, {c.cache}", (i, theirs, label)


def row(cells):
    return f"| {' | '.join(cells)} |"


def table(head):
    return [row(head), "|---" * len(head) + "|"]


def machine(args, load, bandwidth, abouts):
    from minillm.programs.bench import cpu_name, n_cores

    flags = Path("/proc/cpuinfo").read_text()
    extensions = [
        name for name in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if f" {name}" in flags
    ]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    compiler = subprocess.run("cc --version | head -n 1", shell=True, capture_output=True, text=True).stdout.strip()
    before, after = (f"{b / 1e9:.1f}" for b in bandwidth)
    return (
        f"{cpu_name()} ({', '.join(extensions)}), {args.threads} threads of {n_cores()} cores, {gib:.0f} GiB; "
        f"load average {load:.1f} before the run, read bandwidth {before} GB/s before and {after} after it; "
        f"{platform.system()}, Python {platform.python_version()}, {compiler}; {', '.join(abouts)}; "
        f"{time.strftime('%Y-%m-%d')}, {args.rounds} rounds."
    )


def around_marks(path):
    """What stands before and after BEGIN ... END in the file, marks included."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no lines {BEGIN} and {END}: add them where the table is to stand")
    return before + begin, end + after


def main():
    if sys.argv[1:] == ["--measure"]:
        return measure()
    if sys.argv[1:2] == ["--make"]:
        return write_transformers(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a Q4_1 .gguf of a Llama with a tied head (default: the default model)")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--torch-python", help="a Python that has torch, transformers and gguf")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 7000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("compare_cpu"), help="folder for files that are made")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what is between {BEGIN} and {END} in it")
    args = parser.parse_args()
    if args.write:
        around_marks(args.write)  # what is wrong with the file is said before the run, not after it
    from minillm import ops
    from minillm.files import hub
    from minillm.programs import bench

    files, notes = hub.resolve(args.model), []
    text, source = bench._text(None)
    ids = bench._encode(files, text, max(args.lengths) + N_GENERATED, source)
    found = contestants(args, files.path, notes)
    backend = ops.backend("cpu", args.threads)
    load, bandwidth = os.getloadavg()[0], backend.bandwidth()
    figures = compare(args, found, ids, notes)
    shown = tables(args, found, figures, notes, load, (bandwidth, backend.bandwidth()))
    print(shown)
    if args.write:
        before, after = around_marks(args.write)
        args.write.write_text(f"{before}\n{shown}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
