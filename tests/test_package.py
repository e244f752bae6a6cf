"""What a user's machine may lack: triton, a GPU, a driver; and that the wheel holds what it should."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

MODULES = "gatematch.lstm, gatematch.attention"


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
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


def test_imports_without_a_driver():
    # No CUDA library can be found, as on a machine without one.
    code = f"import {MODULES}, torch; assert not torch.cuda.is_available()"
    result = subprocess.run([sys.executable, "-P", "-c", code], env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
    assert result.returncode == 0


def test_the_top_folders_are_not_installed_under_their_own_names():
    files = importlib.metadata.files("gatematch")
    assert files is not None
    tops = {str(file).split("/")[0] for file in files}
    assert tops.isdisjoint({"lstm", "attention", "bench", "kernels", "curvature"}), tops


@pytest.mark.parametrize("package", ["lstm", "attention", "bench", "bench/answers"])
def test_typed_markers_are_shipped(package):
    import importlib.util
    import pathlib

    spec = importlib.util.find_spec("gatematch." + package.replace("/", "."))
    assert spec is not None and spec.origin is not None
    assert pathlib.Path(spec.origin).with_name("py.typed").exists()


def test_version_and_requirements():
    requires = importlib.metadata.requires("gatematch") or []
    assert any(r.startswith("torch>=2.11") for r in requires)
    assert any(r.startswith("triton") and "linux" in r for r in requires)
    assert torch.__version__ >= "2.1"
