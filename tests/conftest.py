"""Models the tests share: the real default model and the tiny random ones of tests/data/tiny."""

import functools
import os
import signal
from pathlib import Path

# Tests run side by side, one on a core. NumPy reads this once, when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import emulator
import pytest

from minillm.errors import MinillmError
from minillm.files.hub import resolve
from minillm.ops import launch

# The suite's tolerances are those of the specification; tests/test_cpu_*.py choose the compiled paths themselves.
os.environ.setdefault("MINILLM_CPU", "numpy")

NO_COMPILER = "there is no C compiler, and so no compiled kernels"
DATA = Path(__file__).parent / "data"
TINY = sorted(path.name for path in (DATA / "tiny").iterdir() if path.is_dir())


# Why a test may be skipped even in CI: no compiler, no GPU, and NVRTC, which .ci/run installs and tests by itself.
MAY_SKIP = (NO_COMPILER, "no GPU", "no CuPy or no NVRTC")
AHEAD = pytest.StashKey()  # the process that compiles kernels


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """None: one on each core. But one process has the GPU: its tests measure what it has free."""
    return None if no_gpu() else 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What cannot run here is skipped before anything is made for it."""
    for item in items:
        if reason := cannot_run(device_of(item)):
            item.add_marker(pytest.mark.skip(reason))


def device_of(item):
    """The parameter of the fixture `device`, or None."""
    return item.callspec.params.get("device") if hasattr(item, "callspec") else None


def cannot_run(device):
    """None, or why nothing runs on a device here."""
    if device == "emulator":
        return emulator.available()
    return no_gpu() if device == "gpu" else None


def pytest_collection_finish(session):
    """While the first tests run, kernels are compiled for others, by one process beside the first worker."""
    first = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0"
    wanted = any(device_of(item) == "emulator" for item in session.items) and not emulator.available()
    if first and wanted and not session.config.option.collectonly:
        session.config.stash[AHEAD] = emulator.start_ahead()


def pytest_sessionfinish(session):
    """A worker tells which kernels it ran. In the end, in CI, nothing else than MAY_SKIP is skipped."""
    if ahead := session.config.stash.get(AHEAD, None):
        ahead.terminate()
        ahead.wait()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = emulator.Kernel.started_with
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = [str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])]
    wrong = [reason for reason in reasons if not any(allowed in reason for allowed in MAY_SKIP)]
    if emulator.SANITIZER and (unseen := kernels_seen(reporter)):
        reporter.write_line(f"not on several blocks: {', '.join(unseen)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if os.environ.get("CI") and wrong:
        reporter.write_line(f"\nskipped, which must not be in CI: {'; '.join(sorted(set(wrong)))}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What a worker's kernels did, added to what is known here."""
    for name, told in getattr(node, "workeroutput", {}).get("kernels", {}).items():
        emulator.Kernel.note(name, *told)


def kernels_seen(reporter):
    """Says how often each kernel ran under the sanitizer. -> names of those that never ran on several blocks"""
    seen = emulator.Kernel.started_with
    every = sorted({kernel for file in launch.files() for kernel in launch.kernels(file)})
    reporter.write_line("\n\nkernel               launches  blocks")
    for name in every:
        launches, most = seen.get(name, (0, 0))
        reporter.write_line(f"{name:<20}{launches:>9}{most:>8}")
    return [name for name in every if seen.get(name, (0, 0))[1] < 2]


@pytest.fixture
def ctrl_c():
    """SIGINT is as a terminal's Ctrl-C finds it, here and in children; a shell ignores it for what it starts in the
    background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's .gguf, fetched if need be. Without a network its tests are skipped, but never in CI."""
    try:
        files = resolve(None, progress=False)
    except MinillmError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    if files.kind != "gguf":
        pytest.skip("the default model is here as safetensors only: its goldens are those of the .gguf")
    return files.path


@pytest.fixture(params=TINY)
def tiny_model(request) -> Path:
    """Each tiny model in turn: a folder with config.json, *.safetensors and golden.npz (ids, logits)."""
    return DATA / "tiny" / request.param


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Path]:
    """All tiny models by name, for a test that wants a certain one."""
    return {name: DATA / "tiny" / name for name in TINY}


@pytest.fixture(params=["emulator", "gpu"])
def device(request):
    """Where CUDA kernels are run: the emulator, and a GPU where there is one."""
    return emulator.EmulatedDevice() if request.param == "emulator" else cuda_device_or_skip()


def cuda_device_or_skip():
    return pytest.skip(no_gpu()) if no_gpu() else _cuda_device()


def no_gpu():
    """None, or why there is none."""
    device = _cuda_device()
    return device if isinstance(device, str) else None


@functools.cache
def _cuda_device():
    """The first GPU, or why there is none. Under compute-sanitizer every array is an allocation of its own, so that it
    sees the first byte beyond one."""
    from minillm.ops import cuda_device

    try:
        device = cuda_device.open_device(0)
    except MinillmError as error:
        return f"no GPU: {error}"
    if os.environ.get("MINILLM_SANITIZER"):
        device.cupy.cuda.set_allocator(None)
    return device
