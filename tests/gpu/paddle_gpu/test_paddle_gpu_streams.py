"""Streams and CUDA graphs: the op works on Paddle's current stream and never waits for the device."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import carrier
import numpy as np
import paddle
import pytest
from attention_case import NAMES, AttentionCase

from paddle_flashmask import flashmask_attention, masks

carrier.require_device()
if not carrier.ON_GPU:
    pytest.skip("this run is on CPU tensors", allow_module_level=True)

KERNEL_NODE = 0
THREAD_LOCAL = 1


class Driver:
    """The few calls of the CUDA driver that a capture takes; a status other than 0 raises."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {status} {text.value.decode() if text.value else ''}")

    def copy_to(self, tensor: Any, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self("cuMemcpyHtoD_v2", ctypes.c_uint64(tensor.data_ptr()), ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def kernels_in(self, graph: ctypes.c_void_p) -> int:
        count = ctypes.c_size_t()
        self("cuGraphGetNodes", graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        self("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
        kinds = []
        for node in nodes:
            kind = ctypes.c_int()
            self("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
            kinds.append(kind.value)
        return kinds.count(KERNEL_NODE)


def case_of(rng_seed: int) -> AttentionCase:
    bounds, causal = masks.causal_document([[300, 212]])
    return AttentionCase(
        1, 512, 512, 4, 2, 64, bounds=bounds, causal=causal, dtype="bfloat16", dropout=0.2, rng_seed=rng_seed
    )


class Inputs:
    """Tensors of a case that stay where they are, so that a graph can be replayed on other values."""

    def __init__(self, case: AttentionCase) -> None:
        self.case = case
        *inputs, dout = case.stored()
        self.leaves = [carrier.tensor(array, grad=True) for array in inputs]
        self.dout = carrier.tensor(dout)
        self.bounds = carrier.tensor(case.bounds)
        self.options = carrier.options_of(case, deterministic=True)

    def run(self) -> list[Any]:
        out, lse = flashmask_attention(*self.leaves, self.bounds, **self.options)
        return [out, lse, *paddle.grad(out, self.leaves, grad_outputs=[self.dout])]

    def refill(self, driver: Driver, case: AttentionCase) -> None:
        for tensor, array in zip((*self.leaves, self.dout), case.stored(), strict=True):
            driver.copy_to(tensor, array)


def results_of(tensors: list[Any]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in zip(NAMES, tensors, strict=True)}


def test_captured_from_the_current_stream(record_property):
    """A capture of Paddle's current stream holds every kernel of forward and backward, and replays on new inputs.

    Work on another stream would be missing from the graph; a wait for the device would make the capture fail.
    """
    driver = Driver()
    inputs = Inputs(case_of(0))
    inputs.run()  # the allocator has what it needs from here on: cudaMalloc cannot be captured
    carrier.synchronize()
    stream, graph, executable = ctypes.c_void_p(carrier.stream_handle()), ctypes.c_void_p(), ctypes.c_void_p()
    assert stream.value, "Paddle works on the legacy default stream, which cannot be captured"
    driver("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)
    try:
        tensors = inputs.run()
    finally:
        driver("cuStreamEndCapture", stream, ctypes.byref(graph))
    kernels = driver.kernels_in(graph)
    record_property("kernel_nodes", kernels)
    # Tile lists and attention; then at least tile lists, attention, and what makes rows ready and finishes them.
    assert kernels >= 5
    driver("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    for seed in (0, 1):
        inputs.refill(driver, case_of(seed))
        driver("cuGraphLaunch", executable, stream)
        driver("cuStreamSynchronize", stream)
        carrier.assert_same_bits(results_of(tensors), carrier.through_c(case_of(seed)))


def test_follows_stream_guard(record_property):
    """Inside stream_guard the kernels are on that stream: a capture of it alone holds them."""
    driver = Driver()
    inputs = Inputs(case_of(0))
    expected = results_of(inputs.run())
    carrier.synchronize()
    default = carrier.stream_handle()
    side = paddle.device.cuda.Stream()
    with paddle.device.cuda.stream_guard(side):
        handle = carrier.stream_handle()
        assert handle != default
        inputs.run()
        carrier.synchronize()
        graph = ctypes.c_void_p()
        driver("cuStreamBeginCapture_v2", ctypes.c_void_p(handle), THREAD_LOCAL)
        try:
            inputs.run()
        finally:
            driver("cuStreamEndCapture", ctypes.c_void_p(handle), ctypes.byref(graph))
        record_property("kernel_nodes", driver.kernels_in(graph))
        assert driver.kernels_in(graph) >= 5
        tensors = inputs.run()
        carrier.synchronize()
        carrier.assert_same_bits(results_of(tensors), expected)
    assert carrier.stream_handle() == default


@pytest.mark.parametrize("seed", ["none", "on the device", "on the host"])
def test_returns_before_the_device_is_done(seed):
    """Long forward passes: the calls are back while their stream is still busy, wherever the seed of dropout lies."""
    s = 32768
    array = np.random.default_rng(0).standard_normal((1, s, 8, 128), np.float32).astype(np.float16)
    query, key, value = (carrier.tensor(array) for _ in range(3))
    options: dict[str, Any] = {}
    if seed != "none":
        place = paddle.CPUPlace() if seed == "on the host" else None
        options.update(dropout=0.1, fixed_seed_offset=carrier.tensor(np.array([1, 2], np.int64), at=place))
    flashmask_attention(query, key, value, **options)
    carrier.synchronize()
    done = paddle.device.cuda.Event()
    for _ in range(8):
        flashmask_attention(query, key, value, **options)
    done.record(paddle.device.cuda.current_stream())
    assert not done.query(), "the host waited for the device"
    done.synchronize()
    assert done.query()


def test_takes_the_time_of_the_kernels(record_property):
    """Forward and backward at 8,192 tokens through Paddle, against the C entry points alone: within a tenth."""
    s, repeats = 8192, 10
    bounds, causal = masks.causal_document([[3000, 1192, 4000]])
    case = AttentionCase(1, s, s, 16, 16, 128, bounds=bounds, causal=causal, dtype="bfloat16")
    leaves = [carrier.tensor(array, grad=True) for array in case.stored()[:3]]
    dout, indices = carrier.tensor(case.stored()[3]), carrier.tensor(bounds)
    direct = carrier.Direct(case, deterministic=False)

    def paddle_call() -> None:
        out = flashmask_attention(*leaves, indices, causal=causal)
        paddle.grad(out, leaves, grad_outputs=[dout])

    def c_call() -> None:
        direct.forward()
        direct.backward()

    def milliseconds(call: Any) -> float:
        """Best of five rounds of calls in a row."""
        rounds = []
        for _ in range(5):
            carrier.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            carrier.synchronize()
            rounds.append((time.perf_counter() - start) / repeats * 1e3)
        return min(rounds)

    through_paddle, alone = milliseconds(paddle_call), milliseconds(c_call)
    record_property("ms_through_paddle", round(through_paddle, 4))
    record_property("ms_alone", round(alone, 4))
    assert through_paddle <= 1.1 * alone


def test_paddles_own_cuda_graph():
    """paddle.device.cuda.graphs.CUDAGraph, with Paddle's allocator in capture mode. Last: a failure may leave it so."""
    from paddle.device.cuda.graphs import CUDAGraph

    driver = Driver()
    inputs = Inputs(case_of(0))
    inputs.run()
    carrier.synchronize()
    graph = CUDAGraph()
    graph.capture_begin()
    tensors = inputs.run()
    graph.capture_end()
    for seed in (0, 1):
        inputs.refill(driver, case_of(seed))
        graph.replay()
        carrier.synchronize()
        carrier.assert_same_bits(results_of(tensors), carrier.through_c(case_of(seed)))
