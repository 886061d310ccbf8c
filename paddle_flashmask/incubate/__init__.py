"""The same call under the path that it has in `paddle.incubate`-style code."""
