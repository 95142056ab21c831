"""Models the tests share: the real default model and the tiny random ones of tests/data/tiny."""

import functools
import os
from pathlib import Path

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


def pytest_sessionfinish(session):
    """In CI nothing else is skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = [str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])]
    wrong = [reason for reason in reasons if not any(allowed in reason for allowed in MAY_SKIP)]
    if emulator.SANITIZER and (unseen := kernels_seen(reporter)):
        reporter.write_line(f"not on several blocks: {', '.join(unseen)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if os.environ.get("CI") and wrong:
        reporter.write_line(f"\nskipped, which must not be in CI: {'; '.join(sorted(set(wrong)))}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def kernels_seen(reporter):
    """Says how often each kernel ran under the sanitizer. -> names of those that never ran on several blocks"""
    seen = emulator.Kernel.started_with
    every = sorted({kernel for file in launch.files() for kernel in launch.kernels(file)})
    reporter.write_line("\n\nkernel               launches  blocks")
    for name in every:
        launches, most = seen.get(name, (0, 0))
        reporter.write_line(f"{name:<20}{launches:>9}{most:>8}")
    return [name for name in every if seen.get(name, (0, 0))[1] < 2]


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
    if request.param == "emulator":
        if reason := emulator.available():
            pytest.skip(reason)
        return emulator.EmulatedDevice()
    return cuda_device_or_skip()


def cuda_device_or_skip():
    device = _cuda_device()
    return pytest.skip(device) if isinstance(device, str) else device


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
