"""The C entry points refuse bad parameters with a message that names the field, and touch nothing."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from paddle_flashmask import _core


def good_params() -> tuple[_core.Params, list[np.ndarray]]:
    arrays = [np.zeros((1, 16, 2, 8), np.float32) for _ in range(8)]
    lse, workspace = np.zeros((1, 2, 16), np.float32), np.zeros(4096, np.uint8)
    views = [_core.tensor_view(array.ctypes.data, (256, 16, 8, 1)) for array in arrays]
    params = _core.Params(
        abi_version=_core.ABI_VERSION,
        batch=1,
        heads_q=2,
        heads_k=2,
        heads_mask=1,
        seqlen_q=16,
        seqlen_k=16,
        head_dim=8,
        head_dim_v=8,
        softmax_scale=1.0,
        lse=lse.ctypes.data,
        workspace=workspace.ctypes.data,
        workspace_bytes=workspace.nbytes,
    )
    for name, view in zip(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), views, strict=True):
        setattr(params, name, view)
    return params, [*arrays, lse, workspace]


def test_good_parameters_pass():
    library = _core.load_library()
    params, _arrays = good_params()
    library.forward(params)
    library.backward(params)


def test_kernel_name():
    library = _core.load_library()
    params, _arrays = good_params()
    assert library.kernel_name(params) == f"cpu {library.cpu_isa()}"
    params.cpu_isa = 1
    assert library.kernel_name(params, backward=True) == "cpu portable"
    params.head_dim = 12
    with pytest.raises(NotImplementedError, match="head_dim"):
        library.kernel_name(params)


def test_no_kernel_name_for_what_the_machine_lacks():
    library = _core.load_library()
    names = list(_core.ISA)  # from the least to the best
    lacking = names[names.index(library.cpu_isa()) + 1 :]
    if not lacking:
        pytest.skip(f"this machine has every instruction set, up to {library.cpu_isa()}")
    params, _arrays = good_params()
    for isa in lacking:
        params.cpu_isa = _core.ISA[isa]
        for call in (library.kernel_name, library.forward, library.backward):
            with pytest.raises(NotImplementedError, match=f"cpu_isa: .* goes up to {library.cpu_isa()}"):
                call(params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("abi_version", 0),
        ("device", 7),
        ("dtype", 3),
        ("dtype", -1),
        ("batch", 0),
        ("heads_q", -2),
        ("heads_k", 3),
        ("heads_mask", 4),
        ("seqlen_q", 0),
        ("seqlen_k", -1),
        ("head_dim", 12),
        ("head_dim", 264),
        ("head_dim_v", 0),
        ("num_bounds", 1),
        ("num_bounds", 3),
        ("flags", 2),
        ("flags", 0xFE),
        ("flags", -1),
        ("seqlen_q", 2**31 - 1),
        ("seqlen_k", 2**31 - 1),
        ("batch", 2**30),  # times heads_q, more than 32 bits count
        ("softmax_scale", float("nan")),
        ("softmax_scale", float("inf")),
        ("dropout", -0.1),
        ("dropout", 1.1),
        ("dropout", float("nan")),
        ("num_threads", -1),
        ("cpu_isa", 9),
    ],
)
def test_bad_values(field, value):
    library = _core.load_library()
    params, _arrays = good_params()
    setattr(params, field, value)
    for call in (library.forward, library.backward, library.forward_workspace_bytes, library.backward_workspace_bytes):
        with pytest.raises(ValueError, match=field.removesuffix("_v")):
            call(params)


@pytest.mark.parametrize("field", ["q", "k", "v", "out"])
def test_null_operand(field):
    params, _arrays = good_params()
    setattr(params, field, _core.TensorView())
    with pytest.raises(ValueError, match=field):
        _core.load_library().forward(params)


@pytest.mark.parametrize(
    ("field", "value"), [("lse", None), ("dout", _core.TensorView()), ("workspace", None), ("workspace_bytes", 3)]
)
def test_backward_needs(field, value):
    params, _arrays = good_params()
    setattr(params, field, value)
    with pytest.raises(ValueError, match=field):
        _core.load_library().backward(params)


def test_bounds_and_seed_are_needed_where_they_count():
    params, _arrays = good_params()
    params.num_bounds, params.causal = 1, 1
    with pytest.raises(ValueError, match="bounds"):
        _core.load_library().forward(params)
    params, _arrays = good_params()
    params.dropout = 0.5
    with pytest.raises(ValueError, match="seed_offset"):
        _core.load_library().forward(params)


def test_an_unknown_instruction_set_is_refused():
    array = np.zeros((1, 16, 2, 8), np.float32)
    with pytest.raises(ValueError, match=r"isa: expected one of auto, portable, .*'avx'"):
        _core.forward(array, array, array, isa="avx")


def test_lse_may_be_left_out_of_the_forward():
    params, _arrays = good_params()
    params.lse = None
    _core.load_library().forward(params)


def test_cuda_on_host_pointers_is_refused():
    params, _arrays = good_params()
    params.device = _core.CUDA
    # A build with CUDA refuses host pointers, or finds no device.
    with pytest.raises((NotImplementedError, ValueError, RuntimeError)):
        _core.load_library().forward(params)


def test_null_params():
    raw = ctypes.CDLL(str(_core.load_library().path))
    assert raw.flashmask_forward(None) == 1
    assert raw.flashmask_backward(None) == 1


def keep_mask(address: int | None, **changed: float) -> tuple[float, str]:
    """What the C entry point returns, without the checks in Python, and the last error."""
    raw = ctypes.CDLL(str(_core.load_library().path))
    function, last_error = raw.flashmask_dropout_keep_mask, raw.flashmask_last_error
    function.restype, last_error.restype = ctypes.c_float, ctypes.c_char_p
    function.argtypes = [ctypes.c_float, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_int32] * 5, ctypes.c_void_p]
    good = {"dropout": 0.5, "batch_index": 1, "head_index": 2, "heads_q": 3, "seqlen_q": 4, "seqlen_k": 5}
    dropout, *numbers = (good | changed).values()
    return function(dropout, 42, 7, *numbers, address), last_error().decode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 1.5),
        ("dropout", -1.0),
        ("dropout", float("nan")),
        ("batch_index", -1),
        ("batch_index", 2**30),  # times heads_q, more than 32 bits count
        ("head_index", -1),
        ("head_index", 3),
        ("heads_q", 0),
        ("seqlen_q", 0),
        ("seqlen_k", -1),
        ("seqlen_q", 2**31 - 1),
        ("seqlen_k", 2**31 - 1),
    ],
)
def test_bad_values_of_the_keep_mask(name, value):
    keep = np.full((4, 5), 7, np.uint8)
    factor, error = keep_mask(keep.ctypes.data, **{name: value})
    assert np.isnan(factor)
    assert name in error
    assert (keep == 7).all(), "something was written"


def test_null_keep_mask():
    keep = np.full((4, 5), 7, np.uint8)
    assert keep_mask(keep.ctypes.data)[0] == 2.0
    assert (keep < 2).all()
    factor, error = keep_mask(None)
    assert np.isnan(factor)
    assert error == "keep: null pointer"
