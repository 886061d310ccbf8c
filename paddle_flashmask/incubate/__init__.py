"""The same call under the path that code written for `paddle.incubate.nn.functional` expects."""

from . import nn

__all__ = ["nn"]
