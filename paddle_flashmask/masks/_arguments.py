"""Checks of the builders' arguments: every error names the argument, what was expected and what came."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INT32_MAX = int(np.iinfo(np.int32).max)

Lengths = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Lengths on one level: a list, a tuple or a 1-D NumPy array of integers."""


def shown(value: object) -> str:
    """A short description of a value for an error message."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def integer(name: str, value: Any, minimum: int, maximum: int = INT32_MAX) -> int:
    """`value` as a Python int in [minimum, maximum]. Booleans and floats are refused, even 3.0."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {shown(value)}") from None
    if result < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {result}")
    if result > maximum:
        raise ValueError(f"{name}: expected at most {maximum}, got {result}")
    return result


def sequence(name: str, value: Any, of_what: str) -> Sequence[Any]:
    """`value` if it is a non-empty list, tuple or array."""
    is_array = isinstance(value, np.ndarray) and value.ndim >= 1
    if not is_array and not isinstance(value, list | tuple):
        raise TypeError(f"{name}: expected a sequence of {of_what}, got {shown(value)}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one of {of_what}, got an empty sequence")
    result: Sequence[Any] = value
    return result


def integers(name: str, value: Any, of_what: str, minimum: int, booleans: bool = False) -> npt.NDArray[np.int64]:
    """`value` as int64 `[k]`, k >= 1, each element in [minimum, INT32_MAX]; `booleans` lets 0 and 1 be given so."""
    values = sequence(name, value, of_what)
    try:
        array = np.asarray(values)
    except ValueError:  # ragged nesting
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in ("iub" if booleans else "iu"):
        for position, element in enumerate(values):  # names the culprit
            integer(f"{name}[{position}]", element, minimum)
        raise TypeError(f"{name}: expected a flat sequence of {of_what}, got {shown(value)}")
    wrong = (array < minimum) | (array > INT32_MAX)
    if wrong.any():
        position = int(wrong.argmax())
        integer(f"{name}[{position}]", array[position], minimum)
    return array.astype(np.int64)


@dataclass(frozen=True)
class Row:
    """Where the spans packed into one row lie: span k is [starts[k], ends[k]); from `total` on there is padding."""

    lengths: npt.NDArray[np.int64]

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.lengths)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        return self.ends - self.lengths

    @property
    def total(self) -> int:
        return int(self.lengths.sum())

    def per_token(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One value a span -> one value a token, `[total]`."""
        return np.repeat(values, self.lengths)


def resolve_seqlen(seqlen: Any, totals: Sequence[int], name: str = "lengths") -> int:
    """The row length S: `seqlen`, or the longest sample if it is None."""
    limit = INT32_MAX if seqlen is None else integer("seqlen", seqlen, 1)
    for position, total in enumerate(totals):
        if total > limit:
            bound = f"seqlen = {limit}" if seqlen is not None else str(limit)
            raise ValueError(f"{name}[{position}]: expected a sum of at most {bound}, got {total}")
    return max(totals) if seqlen is None else limit


def packed_rows(lengths: Any, seqlen: Any, what: str = "document lengths", minimum: int = 1) -> tuple[list[Row], int]:
    """The rows of `lengths` (`[sample][span]`) and the row length S."""
    samples = sequence("lengths", lengths, f"samples, each a sequence of {what}")
    rows = [Row(integers(f"lengths[{i}]", sample, what, minimum)) for i, sample in enumerate(samples)]
    return rows, resolve_seqlen(seqlen, [row.total for row in rows])


def sample_lengths(lengths: Any, seqlen: Any) -> tuple[list[int], int]:
    """One length a sample (a plain integer is one sample) and the row length S."""
    if isinstance(lengths, int | np.integer):
        lengths = [integer("lengths", lengths, 1)]
    totals = [int(n) for n in integers("lengths", lengths, "sample lengths", 1)]
    return totals, resolve_seqlen(seqlen, totals)


def per_sample(name: str, value: Any, totals: Sequence[int]) -> list[int]:
    """An integer for all samples or one a sample, each in [0, length of the sample]."""
    if isinstance(value, int | np.integer):
        values = [integer(name, value, 0)] * len(totals)
        names = [name] * len(totals)
    else:
        values = [int(n) for n in integers(name, value, "integers, one a sample", 0)]
        names = [f"{name}[{i}]" for i in range(len(values))]
    if len(values) != len(totals):
        raise ValueError(f"{name}: expected {len(totals)} values, one a sample, got {len(values)}")
    for i, (one, total) in enumerate(zip(values, totals, strict=True)):
        if one > total:
            raise ValueError(f"{names[i]}: expected at most the length of sample {i} = {total}, got {one}")
    return values


def per_span(
    name: str, value: Any, rows: Sequence[Row], of_what: str, booleans: bool = False
) -> list[npt.NDArray[np.int64]]:
    """A non-negative integer a span, nested as `lengths` is."""
    samples = sequence(name, value, f"samples, each a sequence of {of_what}")
    if len(samples) != len(rows):
        raise ValueError(f"{name}: expected {len(rows)} samples as in lengths, got {len(samples)}")
    result = []
    for i, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        array = integers(f"{name}[{i}]", sample, of_what, 0, booleans)
        if array.size != row.lengths.size:
            raise ValueError(f"{name}[{i}]: expected {row.lengths.size} values as in lengths[{i}], got {array.size}")
        result.append(array)
    return result
