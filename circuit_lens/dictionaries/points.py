"""The hook points a dictionary may read and write, by what their value is."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

from circuit_lens.errors import DictionaryError

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


class Place(enum.IntEnum):
    """Where in a block something is read or enters, in the order in which a block computes.

    At one hook point the user's edits come first, then reads, then writes. What enters at a place reaches what is read
    at later ones.
    """

    PRE_EDIT = 0  # embeddings (first block), and the user's edits of hook_resid_pre
    PRE_READ = 1
    PRE_WRITE = 2
    HEADS = 3  # constants of attention's values
    HEADS_READ = 4
    HEADS_WRITE = 5
    ATTENTION = 6  # constants of attention's output map and of a norm after it
    ATTENTION_READ = 7
    ATTENTION_WRITE = 8
    MID_EDIT = 9
    MID_READ = 10
    MID_WRITE = 11
    MLP_READ = 12  # behind the second norm, or on its way there
    MLP = 13  # what the MLP itself adds: constants around its Jacobian, or all of it
    MLP_OUT_READ = 14
    MLP_WRITE = 15
    POST_EDIT = 16
    POST_READ = 17
    POST_WRITE = 18

    def at(self, layer: int) -> int:
        """Return the place of a layer as one number, in the order of computing."""
        return layer * len(Place) + self


class Read(enum.Enum):
    """What a read hook's value is: something in the MLP branch, or what an SAE may read."""

    NORMALIZED = "ln2.hook_normalized"  # normalised, before the norm's gain and bias
    NORM_OUTPUT = "mlp.hook_in"  # the norm's output, which the MLP reads
    RESIDUAL = "hook_mlp_in"  # the residual stream that enters the MLP branch
    MID = "hook_resid_mid"  # the same where attention comes before the MLP
    PRE = "hook_resid_pre"
    POST = "hook_resid_post"
    HEADS = "attn.hook_z"  # every head's mix of values, side by side
    ATTENTION = "hook_attn_out"
    MLP_OUT = "hook_mlp_out"

    @property
    def in_mlp_branch(self) -> bool:
        """Whether a transcoder may read there."""
        return self in (Read.NORMALIZED, Read.NORM_OUTPUT, Read.RESIDUAL, Read.MID)

    @property
    def place(self) -> Place:
        """Where in the block it is read."""
        return _READ_PLACES.get(self, Place.MLP_READ)


class Write(enum.Enum):
    """What a write hook's value is: an MLP's output, or what an SAE may replace."""

    MLP_OUT = "hook_mlp_out"  # added to the residual stream, after a post-norm where the block has one
    MLP_RAW = "mlp.hook_out"  # the MLP's own output, before a post-norm
    PRE = "hook_resid_pre"
    MID = "hook_resid_mid"
    POST = "hook_resid_post"
    HEADS = "attn.hook_z"
    ATTENTION = "hook_attn_out"

    @property
    def of_mlp(self) -> bool:
        """Whether it is an MLP's output."""
        return self in (Write.MLP_OUT, Write.MLP_RAW)

    @property
    def is_stream(self) -> bool:
        """Whether it is the whole residual stream."""
        return self in (Write.PRE, Write.MID, Write.POST)

    @property
    def place(self) -> Place:
        """Where in the block it enters."""
        return _WRITE_PLACES.get(self, Place.MLP_WRITE)


_READ_PLACES = {
    Read.PRE: Place.PRE_READ,
    Read.HEADS: Place.HEADS_READ,
    Read.ATTENTION: Place.ATTENTION_READ,
    Read.MID: Place.MID_READ,
    Read.MLP_OUT: Place.MLP_OUT_READ,
    Read.POST: Place.POST_READ,
}
_WRITE_PLACES = {
    Write.PRE: Place.PRE_WRITE,
    Write.HEADS: Place.HEADS_WRITE,
    Write.ATTENTION: Place.ATTENTION_WRITE,
    Write.MID: Place.MID_WRITE,
    Write.POST: Place.POST_WRITE,
}
READS = {kind.value: kind for kind in Read} | {"ln2.hook_out": Read.NORM_OUTPUT}
WRITES = {kind.value: kind for kind in Write}
SAE_HOOKS = tuple(kind.value for kind in Write if kind is not Write.MLP_RAW)
TRANSCODER_READS = tuple(name for name, kind in READS.items() if kind.in_mlp_branch)
TRANSCODER_WRITES = (Write.MLP_OUT.value, Write.MLP_RAW.value)


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
            f"a dictionary that reads {name!r} cannot be attributed; a transcoder may read "
            f"{', '.join(TRANSCODER_READS)} of its block, an SAE {', '.join(SAE_HOOKS)}"
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
            f"a dictionary that writes {name!r} cannot be attributed; a transcoder may write "
            f"{', '.join(TRANSCODER_WRITES)}, an SAE {', '.join(SAE_HOOKS)}"
        )
    return WRITES[suffix]


def check_transcoder_hooks(hook_in: str, hooks_out: Iterable[str]) -> None:
    """Raise unless a transcoder may read and write at these hooks.

    Raises:
        DictionaryError: It may not; lists the valid ones.
    """
    if not read_kind(hook_in).in_mlp_branch:
        raise DictionaryError(
            f"a transcoder that reads {hook_in!r} cannot be attributed; it may read {', '.join(TRANSCODER_READS)} of "
            "its block"
        )
    for hook in hooks_out:
        if not write_kind(hook).of_mlp:
            raise DictionaryError(
                f"a transcoder that writes {hook!r} cannot be attributed; it may write {', '.join(TRANSCODER_WRITES)}"
            )
