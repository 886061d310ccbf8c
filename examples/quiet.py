"""Imported before anything else: threads for Paddle, no network, and no output but the example's own."""

import contextlib
import io
import logging
import os
import warnings

# Paddle runs on one thread unless this is set before it is imported.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
os.environ.setdefault("GLOG_minloglevel", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set it to 0 to load a checkpoint by its hub name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

with contextlib.redirect_stderr(io.StringIO()):  # Paddle prints a warning whenever it has more than one thread
    import paddle  # noqa: F401
    from paddlenlp.utils.log import logger

logger.set_level("ERROR")
# force: PaddleNLP has set up a handler that writes where standard error went above.
logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
logging.getLogger("paddle_flashmask").setLevel(logging.INFO)
