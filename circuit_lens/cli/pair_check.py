"""Whether a model and its dictionaries belong together, measured on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuit_lens.errors import CircuitLensError, TokensError

if TYPE_CHECKING:
    from torch import Tensor

    from circuit_lens.replacement_model import ReplacementModel

# Explained variance below which a dictionary is of no use, and below which it deserves a word.
BROKEN_BELOW, WEAK_BELOW = 0.0, 0.3
_WORDS, _CHUNKS = 60, 64
_PROSE = """
The river rises in the hills north of the old town and runs for about ninety miles before it reaches the sea. In the
spring, when the snow melts, it floods the meadows, and the farmers move their sheep to higher ground.
Most people who work in the city live outside it. They take the early train, read the news or sleep, and are at their
desks by nine. In the evening the same train takes them home again, and the offices stand empty until the morning.
She opened the letter at the kitchen table. It was from her brother, who had gone to Paris to study music, and it was
three pages long. He wrote about the rain, the price of bread, and a concert that he would never forget.
Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. A cook who moves from
the coast to the hills has to learn again how long an egg takes.
def mean(values): return sum(values) / len(values)
In 1969 two men walked on the Moon for the first time, and about six hundred million people watched them on television.
"""


@dataclass(frozen=True)
class LayerCheck:
    """How well one dictionary reconstructs what it should.

    Attributes:
        site: the dictionary's name.
        layer: its layer.
        reads, writes: its hooks, without the layer.
        n_features: size of the dictionary.
        explained: explained variance of its output, 1 - sum |error|² / sum |output - mean|²; the first position of a
            prompt is left out.
        l0: active features per position.
        verdict: "" for a good one.
    """

    site: str
    layer: int
    reads: str
    writes: str
    n_features: int
    explained: float
    l0: float
    verdict: str

    @property
    def broken(self) -> bool:
        """Whether the dictionary is of no use with this model."""
        return not self.explained >= BROKEN_BELOW or self.l0 == 0.0


@dataclass
class _Sums:
    n: int = 0
    total: Any = 0.0
    square: float = 0.0
    error: float = 0.0
    active: int = 0


def default_text(bundled: bool) -> str:
    """Return text to check on: the corpus' own for a bundled model, which knows no other words; else plain English."""
    if not bundled:
        return _PROSE
    from circuit_lens.zoo.corpus import Corpus

    return "\n".join(" ".join(sentence.tokens) for sentence in Corpus().take(2000, seed=1))


def chunks(rm: ReplacementModel, text: str) -> list[Tensor]:
    """Return the text as prompts of at most some dozens of words, a line at a time.

    Raises:
        TokensError: no words, or words that the model does not know.
    """
    from circuit_lens.running import to_tokens

    found = [to_tokens(rm.model, words) for line in text.splitlines() for words in _pieces(line)][:_CHUNKS]
    found = [tokens for tokens in found if len(tokens) > 1]
    if not found:
        raise TokensError("the text to check on has no words")
    return found


def _pieces(line: str) -> Iterator[str]:
    words = line.split()
    for start in range(0, len(words), _WORDS):
        yield " ".join(words[start : start + _WORDS])


def check_layers(rm: ReplacementModel, prompts: Sequence[Tensor]) -> list[LayerCheck]:
    """Return how well each dictionary does on the prompts."""
    from circuit_lens.graph.nodes import NodeKind

    sums = [_Sums() for _ in rm.dictionaries]
    for tokens in prompts:
        local = rm.local(tokens, check=False)
        errors = {p.layer: p.vectors for p in local.sources.points if p.kind is NodeKind.ERROR}
        for sum_, features in zip(sums, local.sources.features, strict=True):
            layer = features.dictionary.out_layers[0]
            output, error = local.frozen.mlp_out[layer][1:].double(), errors[layer][1:].double()
            sum_.n += len(output)
            sum_.total = sum_.total + output.sum(0)
            sum_.square += float(output.square().sum())
            sum_.error += float(error.square().sum())
            sum_.active += int((features.pos > 0).sum())
    return [_verdict(dictionary, sum_) for dictionary, sum_ in zip(rm.dictionaries, sums, strict=True)]


def _verdict(dictionary: Any, sums: _Sums) -> LayerCheck:
    from circuit_lens.dictionaries.points import parse_hook

    variance = sums.square - float(sums.total.square().sum()) / sums.n
    explained, l0 = 1.0 - sums.error / max(variance, 1e-300), sums.active / sums.n
    verdict = ""
    if l0 == 0.0:
        verdict = "no feature is ever active"
    elif explained < BROKEN_BELOW:
        verdict = "worse than its mean: another input hook, or processed weights"
    elif explained < WEAK_BELOW:
        verdict = "weak: much of this layer will be error"
    elif l0 > dictionary.d_sae / 4:
        verdict = "dense: graphs will be large"
    reads, writes = (parse_hook(hook).suffix for hook in (dictionary.hook_in, dictionary.hooks_out[0]))
    return LayerCheck(dictionary.site, dictionary.layer, reads, writes, dictionary.d_sae, explained, l0, verdict)


def check_local(rm: ReplacementModel, tokens: Tensor) -> tuple[dict[str, float], str]:
    """Build one local replacement with all its checks; return what they measured, and what is wrong, or ""."""
    try:
        local = rm.local(tokens)
    except CircuitLensError as error:
        return {}, str(error)
    note = local.engine_note if local.engine_note.startswith("fallback") else ""
    figures = {name: float(value) for name, value in local.checks.items() if isinstance(value, int | float)}
    return figures, note
