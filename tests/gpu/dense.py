"""Dense attention on the device, in float64 or in a low precision: what the kernels are compared with."""

from __future__ import annotations

from typing import Any

import torch
from reference import dropout_keep


def visible(bounds: Any, causal: bool, seqlen_q: int, seqlen_k: int, block_mask: Any = None) -> torch.Tensor:
    """True where row i sees column j: bool [b or 1, h_m or 1, s_q, s_k]."""
    device = next((x.device for x in (bounds, block_mask) if x is not None), torch.device("cuda"))
    row = torch.arange(seqlen_q, device=device, dtype=torch.int64)[:, None]
    column = torch.arange(seqlen_k, device=device, dtype=torch.int64)[None, :]
    sees = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal:
        sees = sees & (row >= column - (seqlen_k - seqlen_q))
    if bounds is not None:
        b = [x[:, :, None, :] for x in bounds.to(torch.int64).unbind(-1)]
        if causal and len(b) == 1:
            masked = row >= b[0]
        elif causal:
            masked = (row >= b[0]) & (row < b[1])
        elif len(b) == 2:
            masked = (row >= b[0]) | (row < b[1])
        else:
            masked = ((row >= b[0]) & (row < b[1])) | ((row >= b[2]) & (row < b[3]))
        sees = sees & ~masked
    if block_mask is not None:
        blocks = block_mask.ne(0).repeat_interleave(128, 2).repeat_interleave(128, 3)
        sees = sees & blocks[:, :, :seqlen_q, :seqlen_k]
    return sees


def attention(q, k, v, sees, scale, keep=None, keep_scale=1.0, dout=None, dtype=torch.float64) -> dict[str, Any]:
    """out and lse, and with `dout` dq, dk and dv, with products in `dtype` and all between them in float32 at least.

    The gradients follow the formula that needs no probabilities of the forward pass, delta = sum(dout * out) with the
    rounded out, so that in a low precision this has the rounding errors that any fused kernel must have.
    """
    heads_q, heads_k = q.shape[2], k.shape[2]
    wide = torch.promote_types(dtype, torch.float32)
    qh, doh = (None if x is None else x.to(dtype).transpose(1, 2) for x in (q, dout))
    kh, vh = (x.to(dtype).transpose(1, 2).repeat_interleave(heads_q // heads_k, 1) for x in (k, v))
    sees = sees.repeat_interleave(heads_q // sees.shape[1], 1)
    scores = (qh @ kh.transpose(2, 3)).to(wide) * scale
    scores = scores.masked_fill(~sees, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    # A row that sees nothing: probabilities 0, gradients 0.
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    factor = 1.0 if keep is None else keep * keep_scale
    out = (p * factor).to(dtype) @ vh
    result = {"out": out.transpose(1, 2), "lse": lse}
    if doh is not None:

        def per_key_head(x: torch.Tensor) -> torch.Tensor:
            grouped = x.to(wide).unflatten(1, (heads_k, heads_q // heads_k)).sum(2)
            return grouped.to(dtype).transpose(1, 2)

        delta = (doh.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        ds = (p * ((doh @ vh.transpose(2, 3)).to(wide) * factor - delta)).to(dtype)
        result["dq"] = ((ds @ kh).to(wide) * scale).to(dtype).transpose(1, 2)
        result["dk"] = per_key_head((ds.transpose(2, 3) @ qh) * scale)
        result["dv"] = per_key_head((p * factor).to(dtype).transpose(2, 3) @ doh)
    return result


def keep_mask(dropout, seed, offset, q, k) -> tuple[Any, float]:
    keep, factor = dropout_keep(dropout, seed, offset, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return torch.from_numpy(keep).to(q.device), factor


def check(got: dict[str, Any], want: dict[str, Any], naive: dict[str, Any], times: float = 2.0) -> dict[str, float]:
    """Asserts that every result is finite and, in its worst element, at most twice (`times`) as far from `want` as low
    precision without any fusing is (FlashAttention's criterion), and close in norm. Returns the errors in norm.

    Where a row sees one key its dQ is zero but for rounding: low precision is far off in norm there, and may be here.
    """
    errors = {}
    for name, reference in want.items():
        mine, plain = got[name].double(), naive[name].double()
        reference = reference.double()
        if name == "lse":
            nothing = reference == float("-inf")
            assert torch.equal(mine == float("-inf"), nothing), "lse: other rows are fully masked"
            mine, plain, reference = (x.masked_fill(nothing, 0.0) for x in (mine, plain, reference))
        assert torch.isfinite(mine).all(), f"{name}: {(~torch.isfinite(mine)).sum().item()} values are not finite"
        worst, allowed = (mine - reference).abs().max().item(), (plain - reference).abs().max().item()
        size = reference.norm().item()
        errors[name] = (mine - reference).norm().item() / size if size else mine.norm().item()
        floor = 1e-5 if name == "lse" else 1e-4
        assert worst <= times * allowed + floor, f"{name}: worst error {worst:.3g}, plain low precision {allowed:.3g}"
        plain_error = (plain - reference).norm().item() / size if size else 0.0
        assert errors[name] < max(1.2e-2, times * plain_error), f"{name}: relative error {errors[name]:.3g}"
        if name == "out":
            rows = got["lse"].transpose(1, 2) == float("-inf")
            assert (mine[rows] == 0).all(), "out: a fully masked row is not exactly zero"
        if name == "dq":
            rows = got["lse"].transpose(1, 2) == float("-inf")
            assert (mine[rows] == 0).all(), "dq: a fully masked row is not exactly zero"
    return errors


def attention_by_rows(q, k, v, bounds, causal, scale, dout, rows=2048) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv in float64 for one batch row and head, a block of query rows at a time."""
    s_q, s_k = q.shape[1], k.shape[1]
    q, k, v, dout = (x[0, :, 0].double() for x in (q, k, v, dout))
    out, dq, dk, dv = torch.empty_like(dout), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = torch.empty(s_q, dtype=torch.float64, device=q.device)
    column = torch.arange(s_k, device=q.device)[None, :]
    b = [x[None, :].to(torch.int64) for x in bounds[0, 0].unbind(-1)]
    for begin in range(0, s_q, rows):
        part = slice(begin, min(begin + rows, s_q))
        row = torch.arange(part.start, part.stop, device=q.device)[:, None]
        if causal:
            masked = (row >= b[0]) if len(b) == 1 else (row >= b[0]) & (row < b[1])
            masked |= row < column - (s_k - s_q)
        elif len(b) == 2:
            masked = (row >= b[0]) | (row < b[1])
        else:
            masked = ((row >= b[0]) & (row < b[1])) | ((row >= b[2]) & (row < b[3]))
        p = (q[part] @ k.T).mul_(scale).masked_fill_(masked, float("-inf"))
        lse[part] = torch.logsumexp(p, -1)
        p.sub_(lse[part, None].clamp_min(-1e300)).exp_()
        out[part] = p @ v
        dv += p.T @ dout[part]
        dp = dout[part] @ v.T
        ds = dp.sub_((dout[part] * out[part]).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        dq[part] = ds @ k
        dk += ds.T @ q[part]
    result = {name: x[None, :, None] for name, x in (("out", out), ("dq", dq), ("dk", dk), ("dv", dv))}
    return {**result, "lse": lse[None, None]}
