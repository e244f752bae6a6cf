"""What a user's machine may lack: triton, a GPU, a driver; and that the wheel holds what it should."""

import importlib.metadata
import subprocess
import sys

import pytest

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
    assert tops.isdisjoint({"lstm", "attention", "bench", "kernels", "curvature"}), tops


@pytest.mark.parametrize("package", ["kernels", "lstm", "attention", "curvature", "bench", "bench/answers"])
def test_typed_markers_are_shipped(package):
    import importlib.util
    import pathlib

    spec = importlib.util.find_spec("gatematch." + package.replace("/", "."))
    assert spec is not None and spec.origin is not None
    assert pathlib.Path(spec.origin).with_name("py.typed").exists()


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
