"""PaddleFormers' command line in this process, with ``flashmask_custom`` registered.

    python -m paddle_flashmask.paddleformers train config.yaml _attn_implementation=flashmask_custom

``paddleformers-cli`` starts processes of its own, in which nothing is registered. For several devices give this file to
Paddle's launcher, as paddleformers-cli does with its own:

    python -m paddle.distributed.launch --gpus 0,1 PATH/paddle_flashmask/paddleformers/__main__.py train config.yaml
"""

from __future__ import annotations

import sys

from paddle_flashmask.paddleformers import register

COMMANDS = ("train", "export")


def main() -> None:
    """Check the command, register, and hand over to PaddleFormers."""
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        raise SystemExit(
            f"usage: python -m paddle_flashmask.paddleformers {{{','.join(COMMANDS)}}} CONFIG [key=value ...]"
        )
    register()
    from paddleformers.cli.launcher import launch

    launch()


if __name__ == "__main__":
    main()
