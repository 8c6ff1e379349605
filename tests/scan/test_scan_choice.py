"""Selection of the backend, and the errors if it cannot run, tested by their text."""

import ctypes
import fcntl
import functools
import importlib
import os
import pkgutil
import re
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dis_scale.scan
from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.scan import (
    FALLBACK,
    Direction,
    _backend,
    _choose,
    causal_conv_silu,
    choose,
    native_build,
    selective_scan,
    two_way_conv_silu,
    two_way_scan,
)
from dis_scale.scan.graphs import prepare_to_compile

ROOT = Path(__file__).parent.parent.parent


TWO_GPUS = [
    (torch.version, "hip", None),
    (torch.cuda, "is_available", lambda: True),
    (torch.cuda, "device_count", lambda: 2),
    (torch.cuda, "get_device_capability", [(9, 0), (8, 0)].__getitem__),
]


def random_direction(B: int, L: int, E: int, N: int) -> Direction:
    rows = [torch.randn(B, L, X) for X in (E, E, N, N)]
    return Direction(rows[0], rows[1], -torch.rand(E, N), rows[2], rows[3], torch.randn(E), torch.randn(E))


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Simulate a new process with an empty cache: nothing selected, nothing built. Loaded libraries stay loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("problem", "instruction_set", "library"):
        monkeypatch.setattr(native_build, name, functools.cache(getattr(native_build, name).__wrapped__))
    _choose.cache_clear()
    _backend.cache_clear()
    yield monkeypatch
    _choose.cache_clear()
    _backend.cache_clear()


def test_the_choice_gives_its_reason() -> None:
    assert str(choose("auto", "cpu")) == f"native (auto: cpu, {native_build.instruction_set()})"
    assert str(choose("chunked", "cpu")) == "chunked (as asked)"
    assert str(choose("auto", "meta")) == "chunked (auto: meta)"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no scan backend 'natve' \(did you mean 'native'\?\): there are auto, ref"):
        choose("natve", "cpu")


def test_native_on_a_gpu_is_an_error() -> None:
    with pytest.raises(UserError, match="the native scan is for the CPU, got tensors on cuda: set the backend to auto"):
        choose("native", "cuda")


def test_gpu_backends_on_a_cpu_are_errors() -> None:
    for name in ("triton", "mamba"):
        with pytest.raises(UserError, match=f"the {name} scan is for NVIDIA GPUs, got tensors on cpu: set the backend to"):
            choose(name, "cpu")


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="mamba-ssm is installed")
def test_without_mamba_ssm_the_error_gives_the_install_command() -> None:
    with pytest.raises(UserError) as error:
        choose("mamba", "cuda")
    assert str(error.value) == (
        "the mamba scan needs mamba-ssm and causal-conv1d: on a machine with nvcc, in the repository: pip install "
        "--no-build-isolation -e '.[gpu]' -c constraints.txt (got: No module named 'causal_conv1d')"
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert {name.split("==")[0] for name in extras} == {"mamba-ssm", "causal-conv1d"}
    assert "--build-arg EXTRAS=gpu" in (ROOT / "cluster" / "Dockerfile").read_text()


def test_mamba_ssm_that_imports_without_its_kernels_is_an_error(a_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As releases after 2.3 install themselves unless MAMBA_KEEP_CUDA_BUILD=TRUE: the function is there, and raises."""
    kernels = {"causal_conv1d.py": "causal_conv1d_fn", "mamba_ssm/ops/selective_scan_interface.py": "selective_scan_fn"}
    for file, function in kernels.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"def {function}(*_, **__): raise RuntimeError('the extension was not built')\n")
    a_gpu.syspath_prepend(tmp_path)
    ones = torch.ones
    a_gpu.setattr(torch, "ones", lambda *shape, **_: ones(*shape))  # in host memory: there is no GPU
    with pytest.raises(UserError, match=r"the mamba scan does not run here \(RuntimeError: the extension was not built\)"):
        choose("mamba", "cuda")


@pytest.fixture
def a_gpu(fresh_process: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two supported GPUs, as PyTorch describes them."""
    pytest.importorskip("triton")
    for owner, name, value in TWO_GPUS:
        fresh_process.setattr(owner, name, value)
    return fresh_process


def test_a_gpu_uses_triton(a_gpu: pytest.MonkeyPatch) -> None:
    assert str(choose("auto", "cuda")) == "triton (auto: cuda, an NVIDIA GPU)"
    assert str(choose("triton", "cuda")) == "triton (as asked)"


def test_a_gpu_without_triton_uses_chunked_and_gives_the_reason(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setitem(sys.modules, "dis_scale.scan.triton", None)
    assert str(choose("auto", "cuda")).startswith(
        "chunked (auto: the triton scan needs triton, which comes with PyTorch's builds for Linux: pip install triton (got:"
    )


UNSUPPORTED = {
    "ROCm": ((torch.version, "hip", "6.4"), "an NVIDIA GPU, got PyTorch for ROCm"),
    "no GPU": ((torch.cuda, "is_available", lambda: False), "a GPU, and PyTorch finds none"),
    "one old GPU of two": (
        (torch.cuda, "get_device_capability", [(9, 0), (7, 5)].__getitem__), "compute capability 8.0 or newer, got 7.5"
    ),
    "no headers": (
        (sysconfig, "get_paths", lambda _: {"include": "/nonexistent"}),
        "Python's headers for its launcher, and there is no /nonexistent/Python.h: install python3-dev",
    ),
}  # fmt: skip
"""What a machine has instead of what Triton's kernels need, and the reason that is given."""


@pytest.mark.parametrize("lacking", UNSUPPORTED)
def test_a_gpu_on_which_triton_is_not_right_uses_chunked_and_gives_the_reason(a_gpu: pytest.MonkeyPatch, lacking: str) -> None:
    instead, reason = UNSUPPORTED[lacking]
    a_gpu.setattr(*instead)
    require_chunked(reason)


@pytest.mark.parametrize(("variable", "value"), [("PATH", ""), ("CC", "/nonexistent/cc")])
def test_without_a_c_compiler_a_gpu_uses_chunked(a_gpu: pytest.MonkeyPatch, variable: str, value: str) -> None:
    a_gpu.delenv("CC", raising=False)
    a_gpu.setenv(variable, value)
    require_chunked("a C compiler for its launcher: install gcc, or set CC")


def require_chunked(reason: str) -> None:
    assert str(choose("auto", "cuda")).startswith(f"chunked (auto: the triton scan needs {reason}")
    with pytest.raises(UserError, match=f"the triton scan needs {reason}.*; or set the backend to chunked"):
        choose("triton", "cuda")


def test_a_failed_build_shows_the_compilers_output_and_auto_uses_chunked(fresh_process: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main( { return nothing; }\n")
    fresh_process.setattr(native_build, "SOURCES", [source])
    with pytest.raises(DisScaleError) as error:
        choose("native", "cpu")
    assert "the native scan cannot be built" in str(error.value)
    assert "broken.cpp:1" in str(error.value)
    assert "install a C++ compiler" in str(error.value)
    build = native_build._build
    fresh_process.setattr(native_build, "_build", lambda _: pytest.fail("built twice"))
    assert choose("auto", "cpu").name == "chunked"
    assert str(choose("auto", "cpu")).startswith("chunked (auto: the native scan cannot be built")
    assert selective_scan(*random_direction(1, 3, 2, 4)).shape == (1, 3, 2)
    assert [path.suffix for path in (tmp_path / "dis_scale").iterdir()] == [".lock"], "no incomplete library"
    source.write_text('extern "C" int answer() { return 42; }\n')
    assert build(tmp_path / "mended.so").answer() == 42, "a process can build after a build that failed"


def test_no_compiler_is_the_same_failure(fresh_process: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With `auto` the fall-back is said on each machine: one rank of one job logs what it runs."""
    fresh_process.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(DisScaleError, match=r"cannot be built(.|\n)*nonexistent(.|\n)*set the backend to chunked"):
        choose("native", "cpu")
    assert choose("auto", "cpu").name == FALLBACK
    assert "the scan is chunked, which is slow: the native scan cannot be built" in caplog.text


def test_build_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name, age_s in (("build-old", 4000), ("build-now", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    native_build._remove_stale_builds(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["build-now"]
    (tmp_path / "build-gone").symlink_to(tmp_path / "nowhere")  # as one that another builder removes after it is listed
    native_build._remove_stale_builds(tmp_path)


def test_a_user_without_a_home_is_told_what_to_set(fresh_process: pytest.MonkeyPatch) -> None:
    """Path.home raises for a container's user without a name: that was a traceback, not a slower scan."""
    fresh_process.delenv("XDG_CACHE_HOME", raising=False)
    fresh_process.setattr(Path, "home", classmethod(lambda _: Path("~nobody-knows").expanduser()))
    with pytest.raises(UserError, match="this user has no home folder: set XDG_CACHE_HOME"):
        choose("native", "cpu")


@pytest.mark.parametrize("content", [None, b"", b"half a library"], ids=["missing", "empty", "incomplete"])
def test_a_library_that_does_not_load_is_rebuilt(fresh_process: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None) -> None:
    built: list[Path] = []
    fresh_process.setattr(native_build, "_build", built.append)
    library = tmp_path / "native.so"
    if content is not None:
        library.write_bytes(content)
    native_build._load(library)
    assert built == [library]


def test_processes_wait_for_the_one_that_builds(fresh_process: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They load what it has built."""
    library, loaded = tmp_path / "native.so", list[Path]()

    def load(path: str) -> None:
        if not Path(path).exists():
            raise OSError("no such file")
        loaded.append(Path(path))

    fresh_process.setattr(ctypes, "CDLL", load)
    fresh_process.setattr(native_build, "_build", lambda _: pytest.fail("built twice"))
    with library.with_suffix(".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=native_build._load, args=[library])
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        library.touch()
    waiting.join(10)
    assert loaded == [library]


def test_the_librarys_name_depends_on_its_sources_and_flags() -> None:
    before = native_build.cached_library()
    assert native_build.cached_library() == before
    assert native_build.cached_library([*native_build.FLAGS, "-g"]) != before
    files = {path for pattern in ("*.cpp", "*.inl") for path in Path(native_build.__file__).parent.glob(pattern)}
    assert files == set(native_build.SOURCES)


def test_an_unknown_instruction_set_is_an_error() -> None:
    choose("native", "cpu")
    with pytest.raises(ValueError, match="no instruction set 'sse9': there are plain, avx2, avx512"):
        native_build.use_instruction_set("sse9")


RIGHT = random_direction(2, 5, 3, 4)
X, WEIGHT, BIAS = torch.ones(2, 5, 3), torch.ones(3, 4), torch.ones(3)


def wrong(**fields: torch.Tensor) -> Direction:
    return RIGHT._replace(**fields)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: selective_scan(*wrong(B_BLN=torch.ones(2, 5, 3))),
            "selective_scan: B_BLN is (2, 5, 3) torch.float32 on cpu, expected (2, 5, 4) of floats on cpu",
        ),
        (
            lambda: selective_scan(*wrong(C_BLN=torch.ones(2, 5, 4, device="meta"))),
            "selective_scan: C_BLN is (2, 5, 4) torch.float32 on meta, expected (2, 5, 4) of floats on cpu",
        ),
        (
            lambda: selective_scan(*wrong(u_BLE=torch.ones(6, 5))),
            "selective_scan: u_BLE is (6, 5) and A_EN (3, 4), expected 3 and 2 axes",
        ),
        (
            lambda: selective_scan(*wrong(u_BLE=torch.ones(2, 5, 3, dtype=torch.complex64))),
            "selective_scan: u_BLE is (2, 5, 3) torch.complex64 on cpu, expected",
        ),
        (lambda: two_way_scan(RIGHT, RIGHT, torch.ones(2, 5, 6)), "two_way_scan: z_BLE is (2, 5, 6)"),
        (
            lambda: two_way_scan(RIGHT, RIGHT, torch.ones(2, 5, 3, device="meta")),
            "two_way_scan: z_BLE is (2, 5, 3) torch.float32 on meta, expected",
        ),
        (
            lambda: two_way_scan(RIGHT, wrong(D_E=torch.ones(3, dtype=torch.int64)), None),
            "two_way_scan, backward: D_E is (3,) torch.int64",
        ),
        (lambda: causal_conv_silu(X, WEIGHT, torch.ones(4)), "causal_conv_silu: the bias is (4,)"),
        (lambda: two_way_conv_silu(X, WEIGHT, BIAS, torch.ones(3, 2), BIAS), "two_way_conv_silu, backward: the weight is (3, 2)"),
    ],
)
def test_inputs_of_another_shape_type_or_device_are_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        call()


def test_the_native_limits_are_named() -> None:
    direction = random_direction(1, 3, 2, 257)
    with pytest.raises(UserError, match="takes at most 256 states, got 257: set the backend to chunked"):
        selective_scan(*direction, backend="native")
    with pytest.raises(UserError, match="computes in float32, got float64"):
        selective_scan(*Direction(*(x.double() for x in random_direction(1, 3, 2, 4))), backend="native")


def test_each_function_of_autograd_refuses_a_second_derivative() -> None:
    """But for those that reorder, or only price. Triton's run on a GPU alone."""
    for module in pkgutil.iter_modules(dis_scale.scan.__path__, "dis_scale.scan."):
        if module.name != "dis_scale.scan.mamba":  # its packages' own functions
            importlib.import_module(module.name)
    own = [each for each in torch.autograd.Function.__subclasses__() if each.__module__.startswith("dis_scale.scan.")]
    unguarded = {each.__name__ for each in own if not hasattr(each.backward, "__wrapped__")}
    assert (len(own) > 10, unguarded) == (True, {"_Reordered", "_Keeping"})


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_a_second_derivative_is_refused_where_it_would_lack_terms(backend: str) -> None:
    """As of a gradient's penalty. PyTorch notices only an incoming gradient that has a derivative."""
    tensors = [x.requires_grad_() for x in random_direction(1, 3, 2, 4)]
    with pytest.raises(NotImplementedError, match=f"the {backend} scan is differentiable once: .* set the backend to reference"):
        torch.autograd.grad(selective_scan(*Direction(*tensors), backend=backend).square().sum(), tensors, create_graph=True)


def test_torch_compile_traces_none_of_the_functions() -> None:
    """A backend launches kernels that no graph may contain."""
    prepare_to_compile()
    direction, weights = random_direction(1, 3, 2, 4), (torch.ones(2, 4), torch.ones(2))
    calls: dict[str, Callable[[], object]] = {
        "selective_scan": lambda: selective_scan(*direction, backend="reference"),
        "two_way_scan": lambda: two_way_scan(direction, direction, None, backend="reference"),
        "causal_conv_silu": lambda: causal_conv_silu(direction.u_BLE, *weights, backend="reference"),
        "two_way_conv_silu": lambda: two_way_conv_silu(direction.u_BLE, *weights, *weights, backend="reference"),
    }
    for name, call in calls.items():
        with pytest.raises(torch._dynamo.exc.Unsupported, match=name):
            torch.compile(call, backend="eager", fullgraph=True)()
