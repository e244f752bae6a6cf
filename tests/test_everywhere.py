"""What holds of everything public: other defaults, tensors that are not strided, lengths in a list.

Run as a script, this prints what is wrong with tensors of other layouts and traces, some of which
would crash the process.
"""

import ast
import copy
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public import calls, public
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

PUBLIC, CALLS = public(), calls()
pytestmark = pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested|There is no mkldnn")


def test_there_is_a_call_of_everything() -> None:
    assert set(map(called, CALLS)) == PUBLIC.keys()


def called(name: str) -> str:
    return name.partition(",")[0]


def results(name: str, arguments: dict[str, Any]) -> list[Any]:
    """What a call returns or fills, as a flat list."""
    torch.manual_seed(1)
    found = PUBLIC[called(name)](**arguments)
    found = dict(found.state_dict()) if isinstance(found, nn.Module) else found
    filled = arguments["module"].state_dict() if name.endswith("_") else {}
    return tree_leaves((found, dict(filled)))


def same(found: Any, right: Any, tolerance: float = 0) -> bool:
    if isinstance(right, Tensor):
        alike = [getattr(found, k) == getattr(right, k) for k in ("device", "dtype", "layout", "shape")]
        return all(alike) and torch.allclose(found, right, rtol=0, atol=tolerance)
    if isinstance(right, (np.ndarray, float)):
        return np.array_equal(found, right)
    return type(found) is type(right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_defaults_of_device_and_dtype_change_no_result(name: str, dtype: torch.dtype) -> None:
    """The meta device stands for a GPU: a tensor that is made there by default has no values."""
    right, arguments = results(name, calls()[name]), calls()[name]
    made = isinstance(PUBLIC[called(name)], type) and issubclass(PUBLIC[called(name)], nn.Module)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = results(name, arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    if made:  # parameters follow the defaults, as torch.nn's do
        assert all(weight.is_meta and weight.dtype == dtype for weight in found)
    else:
        assert len(found) == len(right) and all(map(same, found, right))


NAMES = re.findall(
    r"\w+", "arange as_tensor empty eye full linspace ones rand randint randn randperm tensor zeros"
)
MAKERS = {f"torch.{name}" for name in NAMES}


@pytest.mark.parametrize("package", ["attention", "curvature", "kernels", "lstm", ""])
def test_every_tensor_is_made_on_a_named_device(package: str) -> None:
    """Also those that only a GPU's calls make."""
    folder = Path(next(iter(import_module(f"gatematch.{package}".rstrip(".")).__path__)))
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in MAKERS:
                assert "device" in [k.arg for k in node.keywords], f"{path}:{node.lineno}"


LENGTHS = [(name, key) for name, call in CALLS.items() for key in call if key.endswith("lengths")]
INTEGERS: list[Callable[[Tensor], Any]] = [
    Tensor.tolist,
    lambda n: tuple(n.tolist()),
    lambda n: n.numpy().astype(np.uint8),
    lambda n: n.numpy().astype(np.int32)[::1],
]


WRONG = ([1.5, 2.0], ["a", "b"], [[1], [2]], [[1], [2, 3]], [True, False], [1], [9, 9], [-1, 1], [None], "ab")


@pytest.mark.parametrize(("name", "key"), LENGTHS)
def test_lengths_in_a_list(name: str, key: str) -> None:
    right = results(name, CALLS[name])
    for convert in INTEGERS:
        with torch.device("meta"):
            found = results(name, CALLS[name] | {key: convert(CALLS[name][key])})
        assert all(map(same, found, right))
    for wrong in WRONG:
        with pytest.raises((TypeError, ValueError), match=rf"^{key}: expected [^\n]*$"):
            results(name, CALLS[name] | {key: wrong})


def test_lengths_in_a_list_are_not_compiled() -> None:
    call = CALLS["pairwise_sums"] | {"q_lengths": [3, 2]}
    with pytest.raises(
        Exception, match="q_lengths: expected a tensor inside of what is compiled or traced, got list"
    ):
        torch.compile(lambda: PUBLIC["pairwise_sums"](**call), backend="eager", fullgraph=True)()
    with pytest.raises(TypeError, match="q_lengths: expected a tensor inside of what is compiled or traced"):
        torch.jit.trace(lambda q: PUBLIC["pairwise_sums"](**call | {"q": q}), call["q"])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": lambda x: x.detach().to_sparse(),
    "sparse_csr": lambda x: x.detach().to_sparse_csr(),
    "mkldnn": lambda x: x.detach().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x.detach())),
    "jagged": lambda x: torch.nested.nested_tensor(list(x.detach()), layout=torch.jagged),
}


def replaced(value: Any, convert: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Any]]:
    """An argument with each of its tensors replaced in turn, and its name from there."""
    if isinstance(value, Tensor):
        try:
            yield "", convert(value)
        except (RuntimeError, IndexError):  # there is no such layout of it
            return
    elif isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            for n, new in replaced(item, convert):
                items = [*value[:k], new, *value[k + 1 :]]
                # Its constructor looks at what it is given.
                packed = isinstance(value, PackedSequence)
                yield f"[{k}]{n}", tuple.__new__(PackedSequence, items) if packed else type(value)(items)
    elif isinstance(value, nn.Module):
        for place, parameter in value.named_parameters():
            for _, new in replaced(parameter, convert):
                module = copy.deepcopy(value)
                *path, last = place.split(".")
                owner = module.get_submodule(".".join(path))
                delattr(owner, last)
                try:
                    owner.register_parameter(last, nn.Parameter(new))
                except RuntimeError:  # no layout of a parameter
                    continue
                yield f".{place}", module
    elif isinstance(value, dict):
        for k, item in value.items():
            yield from ((f"[{k!r}]{n}", value | {k: new}) for n, new in replaced(item, convert))


def fresh(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A call made anew, its modules and floating tensors of that dtype."""

    def cast(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(dtype)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    call = calls()[name]
    return call if dtype == torch.float32 else tree_map(cast, call)


INPUTS = {"input", "q", "x"}
COMPUTING = [name for name, call in CALLS.items() if call.keys() & INPUTS]


def layouts() -> Iterator[str]:
    """The calls in which a tensor of another layout neither raises a sentence nor changes nothing."""
    # `convert` hands parameters on without a look at them.
    every = [(name, torch.float32) for name in CALLS if name != "convert"]
    # Another memory crashes some of torch's ops in 16 bits alone.
    every += [(name, dtype) for name in COMPUTING for dtype in (torch.bfloat16, torch.float16)]
    for name, dtype in every:
        right, tolerance = results(name, fresh(name, dtype)), 1e-6 if dtype == torch.float32 else 1e-2
        for key, value in fresh(name, dtype).items():
            for layout, convert in LAYOUTS.items():
                for place, new in replaced(value, convert):
                    described = f"{name}, {dtype}, {key}{place}: {layout}"
                    print(described, flush=True)
                    try:
                        found = results(name, fresh(name, dtype) | {key: new})
                    except (TypeError, ValueError) as error:
                        if not re.fullmatch(r"[\w.]+(\(\)|\[.+?\])*( \(\w+\))?: expected .+", str(error)):
                            yield f"{described}: {type(error).__name__}: {error}"
                    except Exception as error:
                        yield f"{described}: {type(error).__name__}: {error}"
                    else:
                        if not all(same(x, y, tolerance) for x, y in zip(found, right, strict=True)):
                            yield f"{described}: another result"


def varying(function: Callable[..., Any], call: dict[str, Any], key: str) -> Callable[[Tensor], Any]:
    return lambda x: function(**call | {key: x})


def captured() -> Iterator[str]:
    """The calls in which torch.jit.trace does not say that it takes no gradient of what a function captures.

    Where its error is caught on the way, the process crashes.
    """
    for name in COMPUTING:
        call = calls()[name]
        key = next(iter(call.keys() & INPUTS))
        x = call.pop(key)
        if not isinstance(x, Tensor):
            continue
        for tensor in tree_leaves(call):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.requires_grad_()
        print(f"{name}, captured", flush=True)
        try:
            torch.jit.trace(varying(PUBLIC[called(name)], call, key), x)
            yield f"{name}, captured: no error"
        except RuntimeError as error:
            if "Tensor that requires grad as a constant" not in str(error):
                yield f"{name}, captured: {error}"


def test_calls_that_could_crash() -> None:
    folder = {"PYTHONPATH": str(Path(__file__).parent)}  # under PYTHONSAFEPATH it is not there by itself
    command = [sys.executable, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | folder)
    *tried, last = run.stdout.splitlines()
    assert run.returncode == 0, f"{last} ends the process with {run.returncode}: {run.stderr}"
    assert len(tried) > 900 and not run.stderr, run.stderr


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong = [*layouts(), *captured()]
    print("done")
    if wrong:
        sys.exit("\n".join(wrong))
