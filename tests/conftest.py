"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import settings

# No deadline: a loaded machine must not fail a correct test. Fixed examples: a failure is the change's, not the draw's.
settings.register_profile("flashmask", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("flashmask")
