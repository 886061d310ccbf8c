"""Several GPUs in one process."""

from __future__ import annotations

import pytest
from device_tensors import Call, architectures, why_not
from reference import random_intervals

if why_not():
    pytest.skip(str(why_not()), allow_module_level=True)

import numpy as np
import torch

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}", allow_module_level=True)


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("d", [64, 256])
def test_each_device_computes_its_own(arch: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits on both, by turns; with the other one as the current device, a ValueError and nothing written."""
    monkeypatch.setenv("FLASHMASK_FORCE_ARCH", "" if arch == "default" else arch)
    generator = torch.Generator().manual_seed(d)
    inputs = [torch.randn(2, 500, 4, d, generator=generator).to(torch.bfloat16) for _ in range(4)]
    bounds = torch.from_numpy(random_intervals(np.random.default_rng(d), 2, 1, 500, 500, 1))
    calls = []
    for device in range(2):
        with torch.cuda.device(device):
            q, k, v, dout, on_device = (x.cuda() for x in (*inputs, bounds))
            call = Call(q, k, v, on_device, causal=True, deterministic=True)
            call.set_gradient(dout)
            calls.append(call)
    for device in (0, 1, 0):
        other, call = 1 - device, calls[device]
        with torch.cuda.device(other):
            for run in (call.forward, call.backward):
                with pytest.raises(
                    ValueError, match=f"^device: q lies in the memory of GPU {device}, .* device is GPU {other}"
                ):
                    run()
        for written in (call.out, call.lse, *call.gradients):
            assert written.isnan().all()
        with torch.cuda.device(device):
            call.forward()
            call.backward()
            torch.cuda.synchronize()
        results = [x.cpu() for x in (call.out, call.lse, *call.gradients)]
        if device == 0:
            expected = results
            assert not any(x.isnan().any() for x in expected)
        else:
            assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
        for written in (call.out, call.lse, *call.gradients):
            written.fill_(float("nan"))
