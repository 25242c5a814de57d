"""From what users have to Dictionaries: SAELens modules, sets of dictionaries, and objects that are ones already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from circuit_lens.dictionaries.cross_layer_files import ARCHITECTURE as CROSS_LAYER
from circuit_lens.dictionaries.saelens import ARCHITECTURES as TRANSCODERS
from circuit_lens.dictionaries.saelens import SaelensTranscoder, architecture_of
from circuit_lens.dictionaries.saes import SaelensSae
from circuit_lens.errors import DictionaryError
from circuit_lens.protocols import Dictionary


def adapt(dictionary: Any) -> Dictionary:
    """Return a Dictionary for what the user gave: one of ours as it is, a SAELens module wrapped.

    Raises:
        DictionaryError: Anything else, or a module that cannot be attributed.
    """
    if isinstance(dictionary, Dictionary):
        return dictionary
    if hasattr(dictionary, "cfg") and hasattr(dictionary, "W_dec"):
        kind = architecture_of(dictionary)
        if kind in TRANSCODERS:
            return SaelensTranscoder(dictionary)
        if kind == CROSS_LAYER:
            from circuit_lens.dictionaries.cross_layer_saelens import layer_of

            return layer_of(dictionary)
        return SaelensSae(dictionary)
    raise DictionaryError(
        f"{type(dictionary).__name__} is no dictionary; give SAELens transcoders or SAEs (SAE.from_pretrained, "
        "SAE.load_from_disk), a CrossLayerTranscoder, or objects that follow circuit_lens.protocols.Dictionary. "
        "SAE.from_pretrained of older SAELens versions returns a tuple: give its first item."
    )


def expand(given: Any) -> Iterator[Any]:
    """Yield the single dictionaries of what the user gave: one, several, a mapping, or sets such as a CLT."""
    if isinstance(given, Mapping):
        given = given.values()
    if hasattr(given, "dictionaries"):
        given = given.dictionaries
    # SAELens modules pass for tuples, of one item.
    if hasattr(given, "cfg") or isinstance(given, str) or not isinstance(given, Iterable):
        yield given
        return
    for item in given:
        if hasattr(item, "dictionaries"):
            yield from item.dictionaries
        else:
            yield item
