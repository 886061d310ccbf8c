"""The same call under the path that code written for `paddle.incubate.nn.functional` expects."""
