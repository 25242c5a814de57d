"""The text of ``circuit-lens train``, and a model's activations on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_lens.cli.progress import show_bar

if TYPE_CHECKING:
    from circuit_lens.training.data import ActivationStore
    from circuit_lens.training.data_text import TokenRows

LONGEST_ROW = 256


def read_rows(
    model: Any, text: str | None, dataset: str | None, wanted: int, context: int | None, seed: int
) -> TokenRows:
    """Return the text that was given, as rows of tokens."""
    from circuit_lens.training.data_text import token_rows

    length = min(LONGEST_ROW, int(getattr(model.cfg, "n_ctx", None) or LONGEST_ROW)) if context is None else context
    source: Any = (
        Path(text) if text is not None else _dataset(dataset) if dataset is not None else _corpus(wanted, seed)
    )
    return token_rows(model, source, n_ctx=length, max_tokens=wanted)


def _corpus(wanted: int, seed: int) -> Iterator[str]:
    """Yield documents of about fifty words of the bundled models' corpus."""
    from circuit_lens.zoo.corpus import Corpus
    from circuit_lens.zoo.recipe import DICTIONARY_TEXT

    words: list[str] = []
    for sentence in Corpus().take(wanted + 1000, DICTIONARY_TEXT + seed):
        if words and len(words) + len(sentence.tokens) > 50:
            yield " ".join(words)
            words = []
        words.extend(sentence.tokens)
    yield " ".join(words)


def _dataset(name: str) -> Any:
    import datasets

    from circuit_lens.loading.failures import fetching

    folder = Path(name).expanduser()
    with fetching(f"the data set {name}", f"datasets/{name}"):
        if folder.is_dir() and (folder / "state.json").exists():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(name, split="train", streaming=not folder.is_dir())


def activations(
    model: Any, rows: TokenRows, names: list[str], folder: Path, memory: float, quiet: bool
) -> ActivationStore:
    """Collect activations: in memory, or in files where they are larger."""
    from circuit_lens.training.data_collect import collect_activations
    from circuit_lens.training.data_text import TokenRows

    n_bytes = int(memory * 1e9)
    first = int(rows.keep.any(1).nonzero()[0])
    sample = collect_activations(model, TokenRows(rows.tokens[first : first + 1], rows.keep[first : first + 1]), names)
    large = 4 * rows.n_tokens * sum(sample.widths.values()) > n_bytes
    return collect_activations(
        model, rows, names, folder=folder if large else None, memory=n_bytes, progress=show_bar(quiet)
    )
