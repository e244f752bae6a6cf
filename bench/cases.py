"""The cases of `gatematch-bench speed`: of a CPU, and of a GPU."""

from __future__ import annotations

from typing import Any

import torch

from .lstm_problems import lstm_problem
from .pairwise_problems import pairwise_problem
from .problems import Case, Problem


def _pairwise(name: str, B: int, Q: int, A: int, D: int, data: str = "random", **more: Any) -> Case:
    return Case(f"pairwise/{name}", {"B": B, "Q": Q, "A": A, "D": D}, data, **more)


def _lstm(
    name: str, T: int, B: int, I: int, H: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    return Case(f"lstm/{name}", {"T": T, "B": B, "I": I, "H": H}, dtype=dtype, options=options)


CASES = [
    _lstm("single-step", 1, 1, 64, 64),
    _lstm("decode", 1, 8, 256, 256),
    _lstm("short", 32, 16, 64, 64, compiled=True),
    _lstm("odd", 63, 5, 65, 63),
    _lstm("medium", 100, 16, 128, 256),
    _lstm("bidirectional-2-layers", 50, 16, 128, 128, num_layers=2, bidirectional=True),
    _lstm("projection", 50, 16, 128, 128, proj_size=64),
    _lstm("batch-first", 50, 32, 64, 128, batch_first=True),
    _lstm("variable-length", 64, 32, 128, 128, lengths=True),
    _lstm("variable-length-bidirectional", 64, 32, 128, 128, lengths=True, bidirectional=True),
    _lstm("bfloat16", 32, 16, 128, 128, dtype=torch.bfloat16),
    _lstm("cell", 1, 32, 128, 128, cell=True),
    _pairwise("one-pair-of-sentences", 1, 40, 40, 300),
    _pairwise("sentences-50", 256, 40, 40, 50),
    _pairwise("sentences-50", 256, 40, 40, 50, "text"),
    _pairwise("sentences-300", 64, 40, 40, 300),
    _pairwise("sentences-300", 64, 40, 40, 300, "text"),
    _pairwise("sentences-300", 64, 40, 40, 300, "offset"),
    _pairwise("odd", 4, 65, 63, 300),
    _pairwise("paragraphs", 32, 128, 128, 64),
    _pairwise("documents", 8, 512, 512, 128),
    _pairwise("documents", 8, 512, 512, 128, "offset"),
    _pairwise("documents-300", 16, 512, 512, 300),
    _pairwise("long", 1, 2048, 2048, 128),
    _pairwise("narrow", 8, 512, 512, 16),
    _pairwise("points", 8, 512, 512, 3),
]


def _gpu_pairwise(
    name: str, B: int, L: int, D: int, data: str = "random", timings: tuple[str, ...] = ("cold",), **op: Any
) -> list[Case]:
    """In the dtypes that matter, float32 by three passes."""
    shape = {"B": B, "Q": L, "A": L, "D": D} | ({"V": D} if op else {})
    return [
        Case(f"pairwise/{name}", shape, data, dtype, op, timings=timings)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def _gpu_lstm(
    name: str, T: int, B: int, H: int, timings: tuple[str, ...] = ("warm",), **options: Any
) -> list[Case]:
    shape = {"T": T, "B": B, "I": H, "H": H}
    kinds = [(torch.bfloat16, "ieee"), (torch.float32, "tf32")]
    if B in _FEWER["B"] and H in _FEWER["H"]:
        kinds += [(torch.float32, "ieee"), (torch.float16, "ieee")]
    return [
        Case(f"lstm/{name}", shape, "random", dtype, options, precision, timings)
        for dtype, precision in kinds
    ]


_BOTH = ("cold", "warm")
_BATCHES = (1, 16, 64, 128, 256)
_HIDDEN = (64, 128, 256, 512, 768, 1024, 2048)
# Sizes that an LSTM in exact float32 and in float16 has rows of, too.
_FEWER = {"B": (1, 8, 32, 64, 256), "H": (128, 512, 1024, 2048)}
# What a claim of speed on a GPU rests on; a class of the LSTM has one name.
GPU_CASES = [
    *_gpu_pairwise("long", 8, 8192, 128),
    *_gpu_pairwise("long", 8, 8192, 128, "text"),
    *_gpu_pairwise("long", 8, 8192, 128, "offset"),
    *_gpu_pairwise("documents-300", 64, 512, 300, timings=_BOTH),
    *_gpu_pairwise("documents-300", 64, 512, 300, "text"),
    *_gpu_pairwise("sentences-300", 4096, 40, 300, timings=_BOTH),
    *_gpu_pairwise("sentences-300", 4096, 40, 300, "text", timings=_BOTH),
    *_gpu_pairwise("points", 8, 4096, 3),
    *_gpu_pairwise("attend-long", 8, 8192, 128, op="attend"),
    *_gpu_pairwise("attend-rows-long", 8, 8192, 128, op="attend", normalize="rows"),
    *_gpu_pairwise("attend-documents", 64, 512, 256, op="attend", normalize="rows"),
    *_gpu_pairwise("attend-longest", 1, 65_536, 128, op="attend"),
    *(case for H in _HIDDEN for B in _BATCHES for case in _gpu_lstm("single", 512, B, H)),
    *(
        case
        for H in (256, 512, 1024)
        for B in (32, 128)
        for case in _gpu_lstm("stacked-bidirectional", 512, B, H, num_layers=2, bidirectional=True)
    ),
    *(
        case
        for H in (256, 512, 1024)
        for B in (32, 128)
        for case in _gpu_lstm("variable-length", 512, B, H, lengths=True)
    ),
    *(
        case
        for H in (256, 512, 1024)
        for B in (1, 8, 64)
        for case in _gpu_lstm("decode", 1, B, H, timings=("warm", "graph"))
    ),
    # The TF32 switch of torch.nn.LSTM is not that of the loop's products.
    *(case for case in _gpu_lstm("loop", 64, 32, 512, compiled=True) if case.precision == "ieee"),
    *(
        Case(
            "lstm/answer-matcher",
            {"T": 40, "B": B, "I": I, "H": H},
            options={"matcher": True},
            precision="tf32",
        )
        for B, I, H in ((16, 64, 32), (64, 304, 256))
    ),
]
# What most depends on comes first, should time run out.
GPU_CASES.sort(key=lambda case: ("bfloat16", "tf32", "float32", "float16").index(case.numbers))


def cases_of(device: torch.device) -> list[Case]:
    return GPU_CASES if device.type == "cuda" else CASES


def build(case: Case, device: torch.device, compiled: bool = True) -> Problem:
    """The problem of one case, from fresh random inputs; `compiled` adds the peers of torch.compile."""
    make = pairwise_problem if case.name.startswith("pairwise/") else lstm_problem
    return make(case, device, compiled)
