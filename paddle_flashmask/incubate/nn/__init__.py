"""See `paddle_flashmask.incubate.nn.functional`."""
