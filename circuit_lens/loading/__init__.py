"""Models and published dictionaries by name, and dictionaries from files in every layout they are published in.

>>> from circuit_lens import loading
>>> "gemma-2-2b" in {entry.model for entry in loading.table()}
True
"""

from circuit_lens.loading.dictionaries import load_dictionaries as load_dictionaries
from circuit_lens.loading.failures import FetchError as FetchError
from circuit_lens.loading.failures import LoadError as LoadError
from circuit_lens.loading.pairs import load as load
from circuit_lens.loading.published import Published as Published
from circuit_lens.loading.published import table as table

__all__ = ["FetchError", "LoadError", "Published", "load", "load_dictionaries", "table"]
