"""Random attention problems for the emulated kernels, and how far their results are from the float64 reference."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reference

from paddle_flashmask import _core, masks

# Fault of machine.h.
NO_FAULT, BARRIER_WAIT, NAMED_BARRIER, PROXY_FENCE, STORE_WAIT, WGMMA_WAIT, WGMMA_BEGIN, ARRIVAL, COUNT_WAIT = range(9)
COPY_WAIT = 9
UNCHECKED, BY_WARPS, BY_LANES = range(3)  # Races of machine.h
LIMIT = 8.0  # roundings, see Problem.noise; 5.4 was the largest of 2,000 cases


class EmulatedError(RuntimeError):
    """What the emulated machine found wrong."""


class Emulated:
    """A library of compilation.py."""

    def __init__(self, path: Path) -> None:
        self.direction = path.stem.removeprefix("lib").partition("_")[0]
        library = ctypes.CDLL(str(path))
        params = ctypes.POINTER(_core.Params)
        self._workspace_bytes, self._run = library.emulator_workspace_bytes, library.emulator_run
        self._workspace_bytes.restype = ctypes.c_int64
        self._workspace_bytes.argtypes = [params, ctypes.c_int]
        self._run.argtypes = [
            *(params, ctypes.c_int, ctypes.c_uint64),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int),
        ]

    def run(
        self, params: _core.Params, backward: bool, seed: int, blocks: int, fault: tuple[int, int], races: int
    ) -> None:
        size = self._workspace_bytes(ctypes.byref(params), backward)
        workspace = np.full(size + 256, 0xFF, np.uint8)  # NaN in every type
        params.workspace = workspace.ctypes.data + -workspace.ctypes.data % 256
        params.workspace_bytes = size
        message = ctypes.create_string_buffer(4096)
        if self._run(ctypes.byref(params), backward, seed, blocks, *fault, races, message, len(message)):
            raise EmulatedError(message.value.decode())


@dataclass
class Problem:
    """One shape and mask. `schedule` is the seed of the emulated machine, `seed` that of the values."""

    b: int
    s_q: int
    s_k: int
    h_q: int
    h_k: int
    h_m: int
    d: int
    d_v: int
    n: int
    causal: bool
    dtype: str = "bf16"
    block_mask: bool = False
    documents: tuple[int, ...] = ()  # their ends; of causal documents, with n = 1
    scale: float | None = None
    no_skip: bool = False
    deterministic: bool = False
    dropout: float = 0.0
    growth: float = 0.0  # of keys along the sequence: the last is so many times larger than the first
    sunk: float = 0.0  # the first 192 keys are so far below all others
    seed: int = 0
    schedule: int = 0
    blocks: int = 2
    races: int = UNCHECKED

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        shapes = {
            "q": (self.b, self.s_q, self.h_q, self.d),
            "k": (self.b, self.s_k, self.h_k, self.d),
            "v": (self.b, self.s_k, self.h_k, self.d_v),
            "dout": (self.b, self.s_q, self.h_q, self.d_v),
        }
        drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        drawn["k"] *= 1 + self.growth * np.linspace(0, 1, self.s_k, dtype=np.float32)[:, None, None] ** 2
        if self.sunk:
            drawn["q"] = 1 + drawn["q"] / 8
            drawn["k"][:, :192] = -self.sunk
        self.stored = {name: self.store(array) for name, array in drawn.items()}
        self.values = {name: load(array) for name, array in self.stored.items()}
        self.bounds = self.blocked = None
        if self.n:
            self.bounds = reference.random_intervals(rng, self.b, self.h_m, self.s_q, self.s_k, self.n)
        if self.documents:
            ends = np.array(self.documents, np.int32)
            self.bounds[...] = ends[np.searchsorted(ends, np.arange(self.s_k), "right")][:, None]
        if self.block_mask:
            shape = (self.b, self.h_m, -(-self.s_q // 128), -(-self.s_k // 128))
            self.blocked = (rng.random(shape) < 0.6).astype(np.int32)
        self.true_scale = self.d**-0.5 if self.scale is None else self.scale
        self._results: list[tuple[np.ndarray, tuple[slice, ...]]] = []
        self.keep, self.keep_scale = None, 1.0
        if self.dropout:
            self.keep, self.keep_scale = reference.dropout_keep(
                self.dropout, *self.philox, self.b, self.h_q, self.s_q, self.s_k
            )
        self.expected = self._expected()

    def store(self, array: np.ndarray) -> np.ndarray:
        return _core.to_bf16(array) if self.dtype == "bf16" else array.astype(np.float16)

    def empty(self, batch: int, rows: int, heads: int, dims: int) -> np.ndarray:
        """NaN: what the kernels leave out will show. All around it are ones: what they write outside will, too."""
        inside = (slice(None), slice(1, rows + 1), slice(0, heads), slice(0, dims))
        whole = self.store(np.ones((batch, rows + 2, heads + 1, dims + 8), np.float32))
        whole[inside] = self.store(np.full((batch, rows, heads, dims), np.nan, np.float32))
        self._results.append((whole, inside))
        return whole[inside]

    def check_outside(self) -> None:
        """That nothing was written beside the results."""
        for whole, inside in self._results:
            outside = whole.copy()
            outside[inside] = outside[0, 0, 0, 0]
            assert (load(outside) == 1).all(), "written outside of a result"
        self._results.clear()

    @property
    def philox(self) -> tuple[int, int]:
        return self.seed, self.seed // 3

    def visible(self) -> np.ndarray:
        return masks.to_dense(self.bounds, self.causal, self.s_q, self.s_k, self.blocked)

    def _expected(self) -> dict[str, np.ndarray]:
        q, k, v, dout = (self.values[name] for name in ("q", "k", "v", "dout"))
        visible = self.visible()
        out, lse = reference.attention(q, k, v, visible, self.true_scale, self.keep, self.keep_scale)
        dq, dk, dv = reference.attention_grads(q, k, v, visible, self.true_scale, dout, self.keep, self.keep_scale)
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    @functools.cached_property
    def noise(self) -> dict[str, np.ndarray]:
        """How large an error each result may typically have, if all 16-bit roundings were off by their whole value.

        Roundings are independent, so this is the root of the sum of squares of what a result is the sum of. An element
        that is left out, or taken twice, is far above it however long the sum.
        """
        expected = self.expected
        q, k, v, dout, out = (
            reference.per_query_head(np.asarray(x, np.float64), self.h_q, axis=2).swapaxes(1, 2)
            for x in (*(self.values[name] for name in ("q", "k", "v", "dout")), expected["out"])
        )
        visible = reference.per_query_head(self.visible(), self.h_q, axis=1)
        lse = np.where(np.isfinite(expected["lse"]), expected["lse"], 0.0)[..., None]
        p = np.where(visible, np.exp(np.where(visible, q @ k.swapaxes(2, 3) * self.true_scale - lse, 0.0)), 0.0)
        factor = 1.0 if self.keep is None else self.keep * self.keep_scale
        ds = p * (dout @ v.swapaxes(2, 3) * factor - (out * dout).sum(-1, keepdims=True))
        # P and dS are rounded, and so was `out`, from which delta comes.
        ds2 = (2 * ds**2 + p**2 * ((out * dout) ** 2).sum(-1, keepdims=True)) * self.true_scale**2

        def shared(squares: np.ndarray) -> np.ndarray:
            return squares.reshape(self.b, self.h_k, -1, *squares.shape[2:]).sum(2)

        squares = {
            "out": (p * factor) ** 2 @ v**2,
            "dq": ds2 @ k**2,
            "dk": shared(ds2.swapaxes(2, 3) @ q**2),
            "dv": shared(((p * factor) ** 2).swapaxes(2, 3) @ dout**2),
        }
        noise = {name: np.sqrt(array).swapaxes(1, 2) + np.abs(expected[name]) for name, array in squares.items()}
        return noise | {"lse": np.ones_like(expected["lse"])}

    def errors(self, got: dict[str, np.ndarray]) -> dict[str, float]:
        """The largest error of each result, in roundings of `noise`; inf where NaN is."""
        rounding = 2.0**-9 if self.dtype == "bf16" else 2.0**-12
        result = {}
        for name, array in got.items():
            want = self.expected[name]
            with np.errstate(invalid="ignore"):
                difference = np.where(array == want, 0.0, np.abs(array - want))  # lse may be -inf
            ratio = difference / (self.noise[name] * rounding + 1e-5)
            result[name] = float(np.nan_to_num(ratio, nan=np.inf).max())
        return result

    def forward(self, library: Emulated, fault: tuple[int, int] = (0, 0)) -> dict[str, np.ndarray]:
        """out and lse by the emulated kernel."""
        out = self.empty(self.b, self.s_q, self.h_q, self.d_v)
        lse = np.full((self.b, self.h_q, self.s_q), np.nan, np.float32)
        library.run(self._params(out, lse), False, self.schedule, self.blocks, fault, self.races)
        self.check_outside()
        return {"out": load(out), "lse": lse}

    def backward(self, library: Emulated, fault: tuple[int, int] = (0, 0)) -> dict[str, np.ndarray]:
        """dq, dk, dv by the emulated kernels, from the reference's out and lse."""
        out, lse = self.store(self.expected["out"].astype(np.float32)), self.expected["lse"].astype(np.float32)
        gradients = {f"d{name}": self.empty(*self.stored[name].shape) for name in ("q", "k", "v")}
        params = self._params(out, lse)
        for name, array in gradients.items():
            setattr(params, name, _view(array))
        library.run(params, True, self.schedule, self.blocks, fault, self.races)
        self.check_outside()
        return {name: load(array) for name, array in gradients.items()}

    def run(self, library: Emulated, fault: tuple[int, int] = (0, 0)) -> dict[str, np.ndarray]:
        """The results of the direction that the library was built for."""
        return self.backward(library, fault) if library.direction == "backward" else self.forward(library, fault)

    def _params(self, out: np.ndarray, lse: np.ndarray) -> _core.Params:
        seed_offset = np.array(self.philox, np.int64)
        self._alive: Any = (out, lse, seed_offset)
        return _core.Params(
            abi_version=_core.ABI_VERSION,
            device=_core.CUDA,
            dtype=_core.BFLOAT16 if self.dtype == "bf16" else _core.FLOAT16,
            batch=self.b,
            heads_q=self.h_q,
            heads_k=self.h_k,
            heads_mask=self.h_m,
            seqlen_q=self.s_q,
            seqlen_k=self.s_k,
            head_dim=self.d,
            head_dim_v=self.d_v,
            causal=self.causal,
            num_bounds=self.n,
            deterministic=self.deterministic,
            dropout=self.dropout,
            seed_offset=seed_offset.ctypes.data,
            flags=_core.FLAG_NO_SKIP if self.no_skip else 0,
            softmax_scale=self.true_scale,
            q=_view(self.stored["q"]),
            k=_view(self.stored["k"]),
            v=_view(self.stored["v"]),
            out=_view(out),
            lse=lse.ctypes.data,
            dout=_view(self.stored["dout"]),
            bounds=None if self.bounds is None else self.bounds.ctypes.data,
            block_mask=None if self.blocked is None else self.blocked.ctypes.data,
        )


def is_noticed(case: Problem, library: Emulated, fault: tuple[int, int]) -> bool:
    """Whether a fault gives an error, wrong values or a crash; in a process of its own, which it may ruin.

    In the deterministic mode other bits than without the fault are wrong, too.
    """
    _ = case.noise
    exact = case.run(library) if case.deterministic else {}
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            got = case.run(library, fault)
            code = int(max(case.errors(got).values()) >= LIMIT)
            code |= any(array.tobytes() != got[name].tobytes() for name, array in exact.items())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def load(array: np.ndarray) -> np.ndarray:
    return _core.from_bf16(array) if array.dtype == np.uint16 else array.astype(np.float32)


def _view(array: np.ndarray) -> _core.TensorView:
    assert array.ctypes.data % 16 == 0
    return _core.tensor_view(array.ctypes.data, tuple(stride // array.itemsize for stride in array.strides))


def random_problem(rng: np.random.Generator, compiled_dim: int, low_dim: int, **fixed: Any) -> Problem:
    """Any shape and mask that the kernels of `compiled_dim` take; the head dims go down to `low_dim`."""

    def length() -> int:
        return int(rng.integers(1, 9) if rng.random() < 0.15 else rng.integers(1, 401))

    h_k = int(rng.integers(1, 3))
    h_q = h_k * int(rng.integers(1, 4))
    n, causal = ((0, False), (0, True), *reference.FORMS)[int(rng.integers(6))]
    dims = [8 * int(x) for x in rng.integers(low_dim // 8, compiled_dim // 8 + 1, 2)]
    if rng.random() < 0.5:
        dims = [compiled_dim, compiled_dim]
    block_mask = bool(rng.random() < 0.2)
    drawn: dict[str, Any] = {
        "b": int(rng.integers(1, 3)),
        "s_q": length(),
        "s_k": length(),
        "h_q": h_q,
        "h_k": h_k,
        "h_m": int(rng.choice([1, h_k, h_q])) if n or block_mask else 1,
        "d": dims[0],
        "d_v": dims[1],
        "n": n,
        "causal": causal,
        "dtype": str(rng.choice(["bf16", "fp16"])),
        "block_mask": block_mask,
        "scale": float(rng.choice([-0.2, 0.0, 0.7])) if rng.random() < 0.2 else None,
        "no_skip": bool(rng.random() < 0.1),
        "deterministic": bool(rng.random() < 0.5),
        "seed": int(rng.integers(1 << 31)),
        "schedule": int(rng.integers(1 << 31)),
        "blocks": int(rng.integers(1, 4)),
    }
    return Problem(**{**drawn, **fixed})
