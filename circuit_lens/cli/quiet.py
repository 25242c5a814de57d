"""Keep what the libraries under us say about themselves out of a command's output, and nothing else."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

_WARNINGS = (
    r"HookedTransformer(\.\w+)? is deprecated",
    "The 'utils' module has been deprecated",
    "`torch_dtype` is deprecated",
    "You are sending unauthenticated requests to the HF Hub",
)
_LOGGERS = ("transformers", "huggingface_hub", "httpx", "transformer_lens", "sae_lens", "root")


@contextlib.contextmanager
def upstream_quiet() -> Iterator[None]:
    """Silence known notices of TransformerLens, SAELens and transformers, and what they print, while loading.

    Errors pass; progress bars of downloads, which go to stderr, stay where somebody looks. Everything is as before
    afterwards, but for those bars.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the libraries are first imported
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
