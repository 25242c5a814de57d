"""The studies on Gemma-2-2b, by name: its published transcoders, and supernodes that were published as an address.

Everything is fetched from the Hugging Face hub (the model is gated: it needs a token) and needs some 20 GB of memory.
Where that cannot be had, :class:`StudySkipped` says what would have been fetched, and why it was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuit_lens.errors import CircuitLensError, InterventionError
from circuit_lens.interop.neuronpedia_url import supernodes_from_url
from circuit_lens.studies import two_hop
from circuit_lens.studies.lab import Lab
from circuit_lens.studies.places import Places
from circuit_lens.studies.tables import Cell, Row, StudyTable

if TYPE_CHECKING:
    import torch

    from circuit_lens.replacement_model import ReplacementModel
    from circuit_lens.zoo.corpus import Corpus

MODEL = "gemma-2-2b"
"""With its default set of :func:`circuit_lens.loading.table`: a transcoder per layer, those of the published graphs."""
PROMPT = "Fact: the capital of the state containing Dallas is"
DALLAS = (
    "https://www.neuronpedia.org/gemma-2-2b/graph?slug=gemma-fact-dallas-austin"
    "&supernodes=%5B%5B%22capital%22%2C%2215_4494_4%22%2C%226_4662_4%22%2C%224_7671_4%22%2C%223_13984_4%22%2C"
    "%221_1000_4%22%5D%2C%5B%22state%22%2C%226_4012_7%22%2C%220_13727_7%22%5D%2C%5B%22Texas%22%2C%2220_15589_9%22%2C"
    "%2219_7477_9%22%2C%2216_25_9%22%2C%224_13154_9%22%2C%2214_2268_9%22%2C%227_6861_9%22%5D%2C%5B%22capital+cities"
    "+%2F+say+a+capital+city%22%2C%2221_5943_10%22%2C%2217_7178_10%22%2C%227_691_10%22%2C%2216_4298_10%22%5D%2C%5B"
    "%22say+Austin%22%2C%2223_12237_10%22%5D%5D"
)
"""The published supernodes of the Dallas prompt (circuit-tracer's README, and Neuronpedia's subgraph of that name)."""
FACTORS = (0.0, -1.0, -2.0)
_NO_SPACE_BEFORE = frozenset(".,:;?!)'")


class StudySkipped(CircuitLensError, RuntimeError):
    """A study that could not be run here: what it would have fetched, and why it was not."""


class ProseLab(Lab):
    """A lab of a model with a tokenizer of its own: the corpus's words as ordinary prose.

    Positions are found by tokenising what stands before; an answer begins with the first token after a space.
    """

    def text(self, words: Sequence[str]) -> str:
        """Return the words with spaces, none before punctuation and inside quotation marks."""
        pieces, inside, glue = [], False, True
        for word in words:
            if word == '"':
                pieces.append('"' if glue or inside else ' "')
                inside = not inside
                glue = inside
                continue
            pieces.append(word if glue or word in _NO_SPACE_BEFORE else f" {word}")
            glue = False
        return "".join(pieces)

    def position(self, words: Sequence[str], number: int) -> int:
        """Return the position of the last token of a word."""
        return self.model.to_tokens(self.text(words[: number + 1])).shape[-1] - 1

    def first_token(self, phrase: str) -> int:
        """Return the first token of a phrase after a space."""
        return int(self.model.to_tokens(f" {phrase}", prepend_bos=False)[0, 0])


def load_gemma(*, device: str | None = None, dtype: torch.dtype | None = None) -> ReplacementModel:
    """Return Gemma-2-2b with its published transcoders, fetched from the hub or its local cache.

    Args:
        device: Where to compute; None: an accelerator if there is one.
        dtype: Of model and transcoders; None: the model in bfloat16, the transcoders in float32 as they are published.

    Raises:
        StudySkipped: The hub cannot be reached, or does not let us in, and nothing is cached.
    """
    from circuit_lens.loading import FetchError, load

    try:
        return load(MODEL, device=device, dtype=dtype)
    except FetchError as error:
        raise StudySkipped(
            f"the studies on {MODEL}: {error}; give network, and HF_TOKEN of an account that accepted Gemma's licence, "
            "and call again"
        ) from error


def published_table(rm: ReplacementModel, *, url: str = DALLAS, prompt: str = PROMPT) -> StudyTable:
    """Inhibit each published supernode: the others' activation fractions, and the first answer."""
    recording, nodes = rm.record(prompt), supernodes_from_url(url)
    rows = []
    for node in nodes:
        for factor in FACTORS:
            try:
                run = rm.intervene(recording, node.scale(factor))
            except InterventionError as error:
                rows.append(Row(f"{node.name} x {factor:g}", {"answer": f"not run: {error}"}))
                continue
            cells: dict[str, Cell] = {other.name: run.activation(other) for other in nodes}
            best = run.top_logits(1)[0]
            rows.append(Row(f"{node.name} x {factor:g}", {**cells, "answer": f"{best.text} {best.prob:.2f}"}))
    note = f"Supernodes of {url.split('&')[0]}; one prompt, {prompt!r}: no interval."
    return StudyTable(f"Published supernodes ({MODEL})", tuple(rows), (note,))


def gemma_tables(
    rm: ReplacementModel | None = None, corpus: Corpus | None = None, *, n: int = 60, seed: int = 0
) -> list[StudyTable]:
    """Run the two-hop studies on Gemma-2-2b: published supernodes, and the swaps of :mod:`.two_hop`.

    Args:
        rm: The model, if it is loaded already.
        corpus: Cities; those that bundled models hold out are tested, the others choose supernodes.
        n: Pairs of cities.
        seed: Of the draw.

    Raises:
        StudySkipped: See :func:`load_gemma`.
    """
    rm = load_gemma() if rm is None else rm
    places = Places(rm, corpus, lab=ProseLab(rm))
    return [
        published_table(rm),
        two_hop.choice_table(rm, corpus, n=n, name=MODEL, places=places),
        two_hop.swap_table(rm, corpus, n=n, seed=seed, controls=False, name=MODEL, places=places),
    ]
