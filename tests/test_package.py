"""What a user's machine may lack: triton, a GPU, a driver; and that the wheel holds what it should."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import gatematch

ROOT = Path(__file__).parents[1]

MODULES = "gatematch.kernels.config, gatematch.lstm, gatematch.attention, gatematch.curvature"


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_without_triton():
    python(
        "import sys; sys.modules['triton'] = None; "
        f"import {MODULES}, torch; gatematch.lstm.LSTM(3, 4)(torch.ones(2, 1, 3)); "
        "gatematch.attention.pairwise_attention(torch.ones(1, 2, 3), torch.ones(1, 2, 3))"
    )


def test_import_leaves_triton_and_every_device_alone():
    out = python(
        "import torch\n"
        "def trap(*args, **kwargs): raise AssertionError('a device was queried at import')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_properties',\n"
        "             '_lazy_init', 'get_device_capability', 'get_device_name', 'init'):\n"
        "    setattr(torch.cuda, name, trap)\n"
        "import sys\n"
        "before = 'triton' in sys.modules\n"
        f"import {MODULES}\n"
        "print('triton' in sys.modules and not before)"
    )
    assert out == "False"


def test_imports_without_a_driver_or_a_gpu():
    # Whatever the machine has, torch is told of no device, and any attempt to load a CUDA library fails.
    python(
        "import ctypes, os\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "import torch\n"
        "load = ctypes.CDLL.__init__\n"
        "def guarded(self, name=None, *args, **kwargs):\n"
        "    assert 'cuda' not in str(name) and 'nvidia' not in str(name), name\n"
        "    load(self, name, *args, **kwargs)\n"
        "ctypes.CDLL.__init__ = guarded\n"
        f"import {MODULES}\n"
        "assert not torch.cuda.is_initialized()"
    )


def test_the_top_folders_are_not_installed_under_their_own_names():
    files = importlib.metadata.files("gatematch")
    assert files is not None
    tops = {str(file).split("/")[0] for file in files}
    assert tops.isdisjoint({"core", "lstm", "attention", "bench", "kernels", "curvature"}), tops


def test_the_package_alone_loads_no_torch_and_all_public_names_on_demand():
    loaded = python(
        "import sys, gatematch\n"
        "print(gatematch.__version__, 'torch' in sys.modules)\n"
        "print(gatematch.lstm.lstm.__name__, 'gatematch.attention' in sys.modules)\n"
        "from gatematch import *\n"
        "print(LSTM.__module__, attention.__name__, hessian.__module__)"
    )
    assert loaded.splitlines() == [
        f"{importlib.metadata.version('gatematch')} False",
        "lstm False",
        "gatematch.lstm.modules gatematch.attention gatematch.curvature.matrix",
    ]
    packages = [gatematch.lstm, gatematch.attention, gatematch.curvature]
    public = {name: package for package in packages for name in package.__all__ if name != "lstm"}
    assert {"__version__", "lstm", "attention", "curvature", *public} == set(gatematch.__all__)
    assert set(gatematch.__all__) <= set(dir(gatematch))
    for name, package in public.items():
        assert getattr(gatematch, name) is getattr(package, name)
    with pytest.raises(AttributeError, match="module 'gatematch' has no attribute 'LTSM'"):
        _ = gatematch.LTSM


def test_every_file_of_every_package_is_named_where_it_has_to_be():
    """Packages, folders, data and device code in pyproject.toml, and SOURCES in the Makefile."""
    tool = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["tool"]
    folders = tool["setuptools"]["package-dir"]
    assert set(folders) == set(tool["setuptools"]["packages"]) == set(tool["setuptools"]["package-data"])
    tops = {ROOT / folder.partition("/")[0] for folder in folders.values()}
    code = {path for top in tops for path in top.rglob("*.py")}
    assert {path.parent for path in code} == {ROOT / folder for folder in folders.values()}
    assert all((ROOT / folder / "py.typed").exists() for folder in folders.values())
    data = {
        path
        for name, folder in folders.items()
        for pattern in tool["setuptools"]["package-data"][name]
        for path in (ROOT / folder).glob(pattern)
    }

    def module(path: Path) -> str:
        (package,) = (name for name, folder in folders.items() if ROOT / folder == path.parent)
        return f"{package}.{path.stem}"

    device_code = {module(path) for path in code if "@triton.jit" in path.read_text()}
    assert device_code == set(tool["mypy"]["overrides"][0]["module"])
    make = ["make", "-s", "--eval", "sources: ; @echo $(SOURCES)", "sources"]
    sources = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {ROOT / name for name in sources if (ROOT / name).is_file()} == {
        ROOT / "pyproject.toml",
        ROOT / "constraints.txt",
    } | code | data


def test_requirements_and_extras():
    requires = importlib.metadata.requires("gatematch") or []
    assert any(r.startswith("torch>=2.11") for r in requires)
    assert any(r.startswith("triton") and "linux" in r for r in requires)
    extras = importlib.metadata.metadata("gatematch").get_all("Provides-Extra") or []
    assert {"bench", "test", "docs"} <= set(extras)


@pytest.mark.parametrize("command", ["['kernels']", "['tune', '--device', 'cpu']"])
def test_the_commands_for_kernels_say_that_they_need_triton(command):
    code = (
        f"import sys; sys.modules['triton'] = None; from gatematch.bench.__main__ import app; app({command})"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: ") and "triton" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_command_says_which_extra_it_needs():
    code = "import sys; sys.modules['typer'] = None; import gatematch.bench.__main__"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'gatematch-bench needs typer: pip install "gatematch[bench]"' in result.stderr
    assert "Traceback" not in result.stderr
