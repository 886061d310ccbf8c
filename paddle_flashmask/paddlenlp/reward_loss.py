"""Losses of reward models over any number of answers a prompt.

The scores of a batch come as one vector, with the prompt that each answers and its rank. Answers of one rank are not
compared with each other. Every prompt counts the same, however many answers it has.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F

__all__ = ["LOSSES", "comparisons", "listwise_loss", "pairwise_loss"]


def comparisons(prompts: paddle.Tensor, sort: paddle.Tensor) -> paddle.Tensor:
    """Which answer is better than which: bool ``[n, n]``, True where answer i must win against answer j.

    Args:
        prompts: int ``[n]``, the prompt that each answer belongs to.
        sort: float ``[n]``, higher is better.
    """
    same = prompts.unsqueeze(1) == prompts.unsqueeze(0)
    return same & (sort.unsqueeze(1) > sort.unsqueeze(0))


def pairwise_loss(scores: paddle.Tensor, prompts: paddle.Tensor, sort: paddle.Tensor) -> paddle.Tensor:
    """Bradley-Terry loss: the mean of ``-log sigmoid(s_i - s_j)`` over the pairs of a prompt, then over the prompts.

    Equation 1 of Ouyang et al., arXiv 2203.02155. For two answers it is ``-log sigmoid(chosen - rejected)``.

    Args:
        scores: float32 ``[n]``.
        prompts, sort: see ``comparisons``.

    Returns:
        float32, without axes.
    """
    same, better = _masks(prompts, sort, scores.dtype)
    losses = -F.log_sigmoid(scores.unsqueeze(1) - scores.unsqueeze(0)) * better
    pairs = same @ better.sum(axis=1)  # at each answer: the pairs of its prompt
    return (losses.sum(axis=1) / pairs.clip(min=1)).sum() / _compared_prompts(same, pairs)


def listwise_loss(scores: paddle.Tensor, prompts: paddle.Tensor, sort: paddle.Tensor) -> paddle.Tensor:
    """Plackett-Luce loss: each answer against all that rank below it, averaged over a prompt's answers, then prompts.

    An answer's term is ``-log(exp(s_i) / (exp(s_i) + sum of exp(s_j) over the answers j below i))``; the last rank has
    none. Without ties it is ListMLE (Xia et al., ICML 2008) over the number of terms; for two answers it equals
    ``pairwise_loss``. Arguments and result as there.
    """
    same, better = _masks(prompts, sort, scores.dtype)
    against = better + paddle.eye(scores.shape[0], dtype=scores.dtype)  # what an answer meets: itself and what is below
    rivals = paddle.where(against > 0, scores.unsqueeze(0).expand_as(against), paddle.full_like(against, -1e30))
    losses = paddle.logsumexp(rivals, axis=1) - scores  # 0 for the last rank
    terms = same @ (better.sum(axis=1) > 0).astype(scores.dtype)  # at each answer: the terms of its prompt
    return (losses / terms.clip(min=1)).sum() / _compared_prompts(same, terms)


def _masks(prompts: paddle.Tensor, sort: paddle.Tensor, dtype: Any) -> tuple[paddle.Tensor, paddle.Tensor]:
    """As numbers ``[n, n]``: which answers are of one prompt, and which is better than which."""
    same = (prompts.unsqueeze(1) == prompts.unsqueeze(0)).astype(dtype)
    return same, comparisons(prompts, sort).astype(dtype)


def _compared_prompts(same: paddle.Tensor, count: paddle.Tensor) -> paddle.Tensor:
    """How many prompts have answers to compare (`count` above 0), at least 1."""
    # An answer is worth 1 / (answers of its prompt), so that a prompt is worth 1.
    return ((count > 0).astype(same.dtype) / same.sum(axis=1)).sum().clip(min=1)


LOSSES = {"pairwise": pairwise_loss, "listwise": listwise_loss}
