"""How exact d² = ||x||² + ||y||² - 2 x·y is on this GPU's tensor cores: `gatematch-bench expansion`.

kernels/distance.py takes a distance from that expansion where d² >= TAU (||x||² + ||y||²), and an error of
c ε (||x||² + ||y||²) in d² leaves c ε / (8 TAU) in S = 1 / (1 + d). How large c is depends on how tensor
cores add up, which no data sheet says. It is measured here, for every way in which the kernels multiply rows:

    float32, bfloat16, float16             tiles of short sequences; float32 in two parts in float16
    tf32                                   the same with precision "tf32", of rows that TF32 holds
    bfloat16 centred, float16 centred      rows less a centre, in a part in float16; of a centre of 0
    ... prepared                           tiles of long sequences, from parts in float16
    ... streamed                           tiles of pairwise_attend and pairwise_sums, from prepared copies

The functions that compute a tile are the kernels' own, in the kernels' own configurations. Rows are such that
none is rounded before it is multiplied: what that would do to S is no error of the expansion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gatematch.kernels import config
from gatematch.kernels.distance import TAU, is_near, offset_and_size, score
from gatematch.kernels.launch import obstacle, product_precision
from gatematch.kernels.pairwise import EXPONENT_HALF, EXPONENT_WHOLE, expand
from gatematch.kernels.pairwise_parts import ROWS as PREPARED_ROWS
from gatematch.kernels.pairwise_parts import exponent_of, parts_of, power_of_two
from gatematch.kernels.pairwise_prepare import FEATURES, ROWS, padded, prepare, tile_distances
from gatematch.kernels.pairwise_tiles import product_of

from .progress import track

SIZES = (9, 16, 50, 64, 128, 300, 768, 1024, 2048, 4096)
TILES = 256
WORDS = 7  # odd: evenly spaced rows, as kernels look at for an offset, are of many words
# S is most sensitive at d = 1, where norms are 2 for a pair on the border of near and far.
NORMS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 16.0, 1024.0)
EPS = 2.0**-24
BOUND = 1e-6
# Processes that compile: beside them there may be other stages.
_SHARES = 8


@triton.jit(do_not_specialize=["D"])
def expanded(
    x_ptr, y_ptr, centre_ptr, squares_ptr, d2_ptr, near_ptr, s_ptr, D,
    PARTS: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile as in pairwise_fwd, of x (tiles, BLOCK_M, D), y (tiles, BLOCK_N, D) and a row as the centre."""
    tile = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = BLOCK_N // 2 if CENTRED else BLOCK_N
    inverse, scale = 1.0, 1.0
    if PARTS > 0:
        _, size = offset_and_size(y_ptr + tile * BLOCK_N * D, D, BLOCK_N, D)
        exponent = exponent_of(size) - (EXPONENT_WHOLE if PARTS == 2 else EXPONENT_HALF)
        inverse, scale = power_of_two(-exponent), power_of_two(exponent)
    for j0 in tl.static_range(0, BLOCK_N, WIDTH):
        squares, d2 = expand(
            x_ptr + tile * BLOCK_M * D, y_ptr + (tile * BLOCK_N + j0) * D, centre_ptr,
            BLOCK_M, WIDTH, WIDTH, D, D, D, 0, inverse, PARTS, CENTRED,
            BLOCK_M, WIDTH, 16 if CENTRED else BLOCK_K,
        )  # fmt: skip
        at = (tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]) * BLOCK_N + j0 + tl.arange(0, WIDTH)[None, :]
        tl.store(squares_ptr + at, squares * scale * scale)
        tl.store(d2_ptr + at, d2 * scale * scale)
        tl.store(near_ptr + at, is_near(d2, squares, at >= 0).to(tl.int8))
        tl.store(s_ptr + at, score(tl.sqrt(d2) * scale, s_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["D"])
def expanded_stream(
    x_ptr, y_ptr, x_copy_ptr, y_copy_ptr, x_squares_ptr, y_squares_ptr, d_ptr, near_ptr, s_ptr, D,
    PREC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile as in the streaming kernels, from the copies of both sides, of up to ROWS rows each."""
    tile = tl.program_id(0).to(tl.int64)
    at = tile * BLOCK_M * BLOCK_N + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    features = padded(D, FEATURES)
    d, near, _ = tile_distances(
        x_ptr + tile * BLOCK_M * D, y_ptr + tile * BLOCK_N * D, x_copy_ptr + tile * ROWS * features,
        y_copy_ptr + tile * ROWS * features, x_squares_ptr + tile * ROWS, y_squares_ptr + tile * ROWS,
        BLOCK_M, BLOCK_N, D, features.to(tl.int32), D, D, PREC, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(d_ptr + at, d)
    tl.store(near_ptr + at, near.to(tl.int8))
    tl.store(s_ptr + at, (1.0 / (1.0 + d)).to(s_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["features"])
def expanded_parts(
    x_parts_ptr, y_parts_ptr, x_squares_ptr, y_squares_ptr, x_scale_ptr, y_scale_ptr,
    squares_ptr, d2_ptr, near_ptr, s_ptr, features,
    PARTS: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile as in pairwise_tiles_fwd, from the parts of both sides, of up to PREPARED_ROWS rows each."""
    tile = tl.program_id(0).to(tl.int64)
    step = PARTS * features
    i = tile * PREPARED_ROWS + tl.arange(0, BLOCK_M)
    j = tile * PREPARED_ROWS + tl.arange(0, BLOCK_N)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, features, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_at = x_parts_ptr + i[:, None] * step + k[None, :]
        x_low = tl.load(x_at + features) if PARTS == 2 else 0
        y_at = y_parts_ptr + tile * PREPARED_ROWS * step
        product = product_of(tl.load(x_at), x_low, y_at, product, step, features, k, PARTS, BLOCK_N)
    squares = tl.load(x_squares_ptr + i)[:, None] + tl.load(y_squares_ptr + j)[None, :]
    if BY_ROW:
        scale = tl.load(x_scale_ptr + i)[:, None] * tl.load(y_scale_ptr + j)[None, :]
    else:
        scale = tl.load(x_scale_ptr + tile) * tl.load(y_scale_ptr + tile)
    d2 = squares - 2.0 * scale * product
    at = tile * BLOCK_M * BLOCK_N + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(squares_ptr + at, squares)
    tl.store(d2_ptr + at, d2)
    tl.store(near_ptr + at, (d2 - TAU * squares < 0.0).to(tl.int8))
    tl.store(s_ptr + at, score(tl.sqrt(d2), s_ptr.dtype.element_ty))


class Path(NamedTuple):
    """A way in which tensor cores are given rows, and the largest error of S that is allowed there."""

    name: str
    dtype: torch.dtype
    bound: float
    precision: str = "float32"
    variant: str = ""

    @property
    def parts(self) -> int:
        """Into how many its rows are split, where they are."""
        return 2 if self.name.startswith("float32") else 1

    @property
    def kernel(self) -> str:
        """The one whose configuration is taken."""
        return {"streamed": "pairwise_stream_fwd", "prepared": "pairwise_tiles_fwd"}.get(
            self.variant, "pairwise_fwd"
        )


def paths() -> Iterator[Path]:
    """All of them. Where more than the expansion rounds, half a unit of numbers up to 1 is allowed on top."""
    for name, dtype, unit in (
        ("float32", torch.float32, 0.0),
        ("tf32", torch.float32, 2.0**-11),
        ("bfloat16", torch.bfloat16, 2.0**-8),
        ("float16", torch.float16, 2.0**-11),
    ):
        precision = "tf32" if name == "tf32" else "float32"
        centred = () if dtype == torch.float32 else ("centred",)
        for variant in ("", *centred, "prepared", "streamed"):
            yield Path(f"{name} {variant}".rstrip(), dtype, BOUND + unit / 2, precision, variant)


def close_rows(tiles: int, M: int, N: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x (tiles, M, D) and y (tiles, N, D), float32, one of NORMS in each tile.

    Each row is one of a few words, of which a random share of 0 to 1 is replaced by noise. d² is 0 to 1 times
    the sum of the squares in pairs of the same word, and about 1 times in others. Products of close rows have
    the same sign: their sums grow without cancelling. The words are enough that rows have no common offset.
    """
    words = torch.randn(tiles, WORDS, D, device=device)
    norms = torch.tensor(NORMS, device=device).repeat(tiles)[:tiles, None, None]

    def rows(number: int) -> Tensor:
        share = torch.rand(tiles, number, 1, device=device) ** 2
        share[:, ::4] = 0.0
        word = words[:, torch.arange(number, device=device) % WORDS]
        mixed = (1 - share).sqrt() * word + share.sqrt() * torch.randn_like(word)
        return mixed * norms / D**0.5

    return rows(M), rows(N)


class Tiles(NamedTuple):
    """What the kernels make of tiles, (tiles, M, N) each: S is rounded as it is stored."""

    squares: Tensor
    d2: Tensor
    near: Tensor
    S: Tensor


def tiles_of(path: Path, x: Tensor, y: Tensor, tile: config.Config) -> Tiles:
    """x and y, of the path's dtype, by its kernel.

    Streamed tiles give d alone: d² has the rounding of the root, too, and counts as 0 where it was negative.
    """
    (tiles, M, D), N = x.shape, y.shape[1]
    blocks = {name: tile.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    options = replace(tile, blocks=blocks).options
    d2 = x.new_empty(tiles, M, N, dtype=torch.float32)
    near = x.new_empty(tiles, M, N, dtype=torch.int8)
    S = x.new_empty(tiles, M, N)
    with torch.cuda.device_of(x):
        if path.variant == "streamed":
            x_side, y_side = prepare(x, y, None, None, path.precision)
            PREC = product_precision(path.dtype, path.precision, config.architecture(x.device))
            expanded_stream[(tiles,)](
                x, y, x_side.copy, y_side.copy, x_side.squares, y_side.squares, d2, near, S, D,
                PREC=PREC, **options,
            )  # fmt: skip
            squares = x_side.squares[:, :M, None] + y_side.squares[:, None, :N]
            return Tiles(squares, d2.nan_to_num(0.0).double().square(), near.bool(), S)
        squares = torch.empty_like(d2)
        if path.variant == "prepared":
            x_parts, y_parts, _ = parts_of(x, y, None, None, number=path.parts)
            both = (side for of in zip(x_parts[2:5], y_parts[2:5], strict=True) for side in of)
            expanded_parts[(tiles,)](
                *both, squares, d2, near, S, x_parts.parts.shape[3],
                PARTS=path.parts, BY_ROW=path.dtype == torch.float32, **options,
            )  # fmt: skip
            return Tiles(squares, d2.double(), near.bool(), S)
        centre = x.new_zeros(D)
        centred = path.variant == "centred"
        number = path.parts if centred or path.dtype == torch.float32 else 0
        expanded[(tiles,)](x, y, centre, squares, d2, near, S, D, PARTS=number, CENTRED=centred, **options)
    return Tiles(squares, d2.double(), near.bool(), S)


def measure(path: Path, D: int, tiles: int, device: torch.device) -> dict[str, Any]:
    """A row: c, the error of S that it leaves, the largest one among far pairs, the TAU that 1e-6 needs."""
    length = 512 if path.variant in ("prepared", "streamed") else 40
    shape = {**dict.fromkeys("QAMN", length), "D": D, "V": D}
    tile = config.choose(path.kernel, config.architecture(device), path.dtype, shape)
    x, y = close_rows(tiles, tile.blocks["BLOCK_M"], tile.blocks["BLOCK_N"], D, device)
    if path.precision == "tf32":
        x, y = x.half().float(), y.half().float()  # float16 has the digits of TF32
    x, y = x.to(path.dtype), y.to(path.dtype)
    got = tiles_of(path, x, y, tile)
    d = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    c = float(((got.d2 - d.square()).abs() / (EPS * got.squares)).max())
    errors = (got.S - 1 / (1 + d)).abs()[~got.near]
    return {
        "case": f"expansion/{path.name}/D {D}",
        "path": path.name,
        "D": D,
        "far": errors.numel(),
        "near": int(got.near.sum()),
        "c": c,
        "tau": TAU.value,
        "left": c * EPS / (8 * TAU.value),
        "error": float(errors.max()),
        "bound": path.bound,
        "tau_needed": c * EPS / (8 * BOUND),
    }


def run_expansion(device: torch.device) -> list[dict[str, Any]]:
    """A row for every path and number of features, of fresh rows each.

    Raises:
        ValueError: the device is no GPU, and Triton does not interpret kernels.
    """
    if (reason := obstacle(torch.empty(0, device=device))) is not None:
        raise ValueError(f"--device must be a GPU, for expansion measures its tensor cores: {reason}")
    chosen = [(path, D) for path in paths() for D in SIZES]
    if device.type == "cuda":
        from .ahead import compile_ahead

        shares = [chosen[n::_SHARES] for n in range(_SHARES)]
        print(compile_ahead(shares, partial(compile_some, device=device), device))
    torch.manual_seed(0)
    rows = []
    for path, D in track(chosen, "expansion"):
        try:
            rows.append(measure(path, D, TILES, device))
        except Exception as failure:
            if device.type != "cuda":
                raise
            # A kernel that cannot be compiled or launched is no reason to lose the other rows.
            nothing = dict.fromkeys(("c", "left", "error", "tau_needed"), float("nan"))
            head = {"case": f"expansion/{path.name}/D {D}", "path": path.name, "D": D, "bound": path.bound}
            rows.append(head | nothing | {"reason": f"{type(failure).__name__}: {failure}"})
    return rows


def compile_some(chosen: list[tuple[Path, int]], device: torch.device) -> None:
    for path, D in chosen:
        with suppress(Exception):  # which is told in its row
            measure(path, D, TILES, device)


def failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows past their bound, by what c leaves or by what was seen; a NaN is past every bound."""
    return [row for row in rows if not (row["left"] <= row["bound"] and row["error"] <= row["bound"])]
