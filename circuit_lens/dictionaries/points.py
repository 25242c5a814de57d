"""The hook points a dictionary may read and write, by what their value is."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from circuit_lens.errors import DictionaryError

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


class Read(enum.Enum):
    """What a read hook's value is, as a function of the residual stream that enters the MLP branch."""

    NORMALIZED = "ln2.hook_normalized"  # normalised, before the norm's gain and bias
    NORM_OUTPUT = "mlp.hook_in"  # the norm's output, which the MLP reads
    RESIDUAL = "hook_resid_mid"  # the residual stream itself


class Write(enum.Enum):
    """What a write hook's value is."""

    MLP_OUT = "hook_mlp_out"  # added to the residual stream, after a post-norm where the block has one
    MLP_RAW = "mlp.hook_out"  # the MLP's own output, before a post-norm


READS = {
    "ln2.hook_normalized": Read.NORMALIZED,
    "mlp.hook_in": Read.NORM_OUTPUT,
    "ln2.hook_out": Read.NORM_OUTPUT,
    "hook_mlp_in": Read.RESIDUAL,
    "hook_resid_mid": Read.RESIDUAL,
}
WRITES = {"hook_mlp_out": Write.MLP_OUT, "mlp.hook_out": Write.MLP_RAW}


@dataclass(frozen=True)
class Point:
    """A hook name taken apart: its layer and its name within the block."""

    layer: int
    suffix: str


def parse_hook(name: str) -> Point:
    """Split ``blocks.<layer>.<suffix>``.

    Raises:
        DictionaryError: The name has another form.
    """
    match = _BLOCK.match(name or "")
    if match is None:
        raise DictionaryError(f"hook name {name!r} is not of the form 'blocks.<layer>.<hook>'")
    return Point(int(match.group(1)), match.group(2))


def read_kind(name: str) -> Read:
    """Return what the read hook's value is.

    Raises:
        DictionaryError: No dictionary reading there can be attributed; lists those that can.
    """
    suffix = parse_hook(name).suffix
    if suffix not in READS:
        raise DictionaryError(
            f"a dictionary that reads {name!r} cannot be attributed as a transcoder; it may read "
            f"{', '.join(READS)} of its block"
        )
    return READS[suffix]


def write_kind(name: str) -> Write:
    """Return what the write hook's value is.

    Raises:
        DictionaryError: No dictionary writing there can be attributed; lists those that can.
    """
    suffix = parse_hook(name).suffix
    if suffix not in WRITES:
        raise DictionaryError(
            f"a dictionary that writes {name!r} cannot be attributed as a transcoder; it may write {', '.join(WRITES)}"
        )
    return WRITES[suffix]
