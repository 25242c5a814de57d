"""What a bundled model can do: two-hop answers, where the state is known, antonyms, and names of several tokens.

Every figure is computed on questions that the corpus makes from its own tables; held-out means never seen in that
form in training (`circuit_lens.zoo.corpus`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_lens.zoo import templates
from circuit_lens.zoo.corpus import Corpus
from circuit_lens.zoo.people import RELATIONS as PERSON_RELATIONS
from circuit_lens.zoo.sentences import Sentence
from circuit_lens.zoo.tokenizer import BOS_ID, PAD_ID
from circuit_lens.zoo.words import LANGUAGES

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import PreTrainedTokenizerBase

BATCH = 256
NEUTRAL_PROMPT = "Maria lives in"
NAME_PROMPT = "Maria read about"
DESCRIPTION_PROMPT = "cat : small animal ; Lyon : city in France ; x :"
DALLAS_PROMPT = "Fact: the capital of the state containing Dallas is"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """``right`` of ``asked`` questions; an answer of several tokens is right when every token is."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Between 0 and 1; NaN when nothing was asked."""
        return self.right / self.asked if self.asked else float("nan")

    def __str__(self) -> str:
        return f"{self.share:.3f} ({self.right}/{self.asked})"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """The figures of one model; names of splits and languages -> accuracy; ``by_depth`` starts at the embedding."""

    dallas: tuple[tuple[str, float], ...]  # (token, probability), most probable first
    two_hop: dict[str, Accuracy]
    facts: dict[str, Accuracy]
    antonyms: dict[str, Accuracy]
    state_probe_by_depth: tuple[float, ...]
    state_probe_chance: float
    people_patch_by_depth: tuple[Accuracy, ...]
    people_unpatched: Accuracy


def token_ids(model: HookedTransformer, tokens: Sequence[str]) -> list[int]:
    """Ids of corpus tokens; an unknown token raises ``KeyError``."""
    vocabulary = _tokenizer(model).get_vocab()
    return [vocabulary[token] for token in tokens]


def token_strings(model: HookedTransformer, ids: Sequence[int]) -> list[str]:
    """What ids stand for."""
    return list(_tokenizer(model).convert_ids_to_tokens(list(ids)))


def _tokenizer(model: HookedTransformer) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ``ValueError`` if it has none."""
    if model.tokenizer is None:
        raise ValueError("The model has no tokenizer; load it with circuit_lens.zoo.load_model")
    return model.tokenizer


def padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row pos"]:
    """BOS before every row, padding after it up to the longest one."""
    length = max(len(row) for row in rows)
    return torch.tensor([[BOS_ID, *row, *[PAD_ID] * (length - len(row))] for row in rows])


@torch.no_grad()
def answered_right(model: HookedTransformer, sentences: Sequence[Sentence]) -> list[bool]:
    """For each sentence, whether the model's most probable tokens are its last answer, given everything before it."""
    right: list[bool] = []
    for start in range(0, len(sentences), BATCH):
        questions = [sentence.question for sentence in sentences[start : start + BATCH]]
        rows = padded([token_ids(model, (*prompt, *answer)) for prompt, answer in questions])
        best = model(rows).argmax(-1)
        for number, (prompt, answer) in enumerate(questions):
            span = slice(len(prompt), len(prompt) + len(answer))
            right.append(bool((best[number, span] == rows[number, 1:][span]).all()))
    return right


def accuracy(model: HookedTransformer, sentences: Sequence[Sentence]) -> Accuracy:
    """Share of the sentences' last answers that are right."""
    return Accuracy(sum(answered_right(model, sentences)), len(sentences))


def two_hop_accuracies(model: HookedTransformer, corpus: Corpus) -> dict[str, Accuracy]:
    """Every relation of every city in every template, by split; and the held-out cities by relation.

    ``held-out capital`` uses the first template only, the one of the Dallas prompt.
    """
    trained = [city for city in corpus.cities if city.name not in corpus.hard_cities]
    held = [city for city in corpus.cities if city.name in corpus.hard_cities]
    found = {
        "trained cities": [
            corpus.two_hop_about(city, relation, template)
            for city in trained
            for relation in city.place.relations
            for template in templates.TWO_HOP
        ]
    }
    found["held-out cities"] = [
        corpus.two_hop_about(city, relation, template)
        for city in held
        for relation in city.place.relations
        for template in templates.TWO_HOP
    ]
    found["held-out capital"] = [corpus.two_hop_about(city, "capital", templates.TWO_HOP[0]) for city in held]
    for relation in sorted({relation for city in held for relation in city.place.relations}):
        found[f"held-out {relation}, all templates"] = [
            corpus.two_hop_about(city, relation, template)
            for city in held
            if relation in city.place.relations
            for template in templates.TWO_HOP
        ]
    return {name: accuracy(model, sentences) for name, sentences in found.items()}


def fact_accuracies(model: HookedTransformer, corpus: Corpus) -> dict[str, Accuracy]:
    """One-hop facts: all places and people, every relation, every template."""
    places = [
        corpus.place_about(place, relation, template)
        for place in corpus.places
        for relation in place.relations
        for template in templates.PLACE
    ]
    people = [
        corpus.person_about(person, relation, template)
        for person in corpus.people
        for relation in PERSON_RELATIONS
        for template in templates.PERSON
    ]
    return {"places": accuracy(model, places), "people": accuracy(model, people)}


def antonym_accuracies(model: HookedTransformer, corpus: Corpus) -> dict[str, Accuracy]:
    """Opposites within each language, every template, both directions; held-out pairs apart."""
    found: dict[str, list[Sentence]] = {}
    for language in LANGUAGES:
        for pair in corpus.antonyms:
            held = (language, pair.index) in corpus.held_antonyms
            sentences = found.setdefault(f"{language}, {'held-out' if held else 'trained'}", [])
            for template in templates.ANTONYM[language]:
                sentences += [corpus.antonym_about(pair, side, language, template) for side in (0, 1)]
    return {name: accuracy(model, sentences) for name, sentences in sorted(found.items())}


@torch.no_grad()
def last_token_residuals(
    model: HookedTransformer, texts: Sequence[Sequence[str]]
) -> Float[Tensor, "depth text d_model"]:
    """The residual stream at each text's last token: after the embedding, then after every block."""
    names = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]
    rows = padded([token_ids(model, text) for text in texts])
    _, cache = model.run_with_cache(rows, names_filter=names)
    last = torch.tensor([len(text) for text in texts])
    return torch.stack([cache[name][torch.arange(len(texts)), last] for name in names])


def state_probe(model: HookedTransformer, corpus: Corpus) -> tuple[tuple[float, ...], float]:
    """How well the state can be read off the residual stream at an American city's position, by depth; and chance.

    Nearest class mean by cosine after centring, on ``Maria lives in <city>``; the city that is asked about is left
    out of its state's mean, so a representation of the city's identity alone gives chance or less.
    """
    cities = [city for city in corpus.cities if city.place.kind == "state"]
    states = sorted({city.place.name for city in cities})
    label = torch.tensor([states.index(city.place.name) for city in cities])
    residuals = last_token_residuals(model, [[*NEUTRAL_PROMPT.split(), city.name] for city in cities])
    member = torch.nn.functional.one_hot(label, len(states)).double()
    shares = []
    for vectors in residuals.double():
        vectors = vectors - vectors.mean(0)
        sums = einops.einsum(member, vectors, "city state, city d_model -> state d_model")
        right = 0
        for number, vector in enumerate(vectors):
            means = sums.clone()
            counts = member.sum(0).clone()
            means[label[number]] -= vector
            counts[label[number]] -= 1
            means = means / counts[:, None]
            right += int(torch.cosine_similarity(means, vector[None]).argmax() == label[number])
        shares.append(right / len(cities))
    return tuple(shares), 1 / len(states)


@torch.no_grad()
def patched_by_depth(
    model: HookedTransformer, texts: Sequence[Sequence[str]], descriptions: Sequence[str]
) -> tuple[Accuracy, ...]:
    """Descriptions said when a text's last residual is patched into the description prompt, by depth.

    The residual replaces that at the placeholder ``x``, at the same depth (the embedding, then after every block).
    Right means every word of the description.
    """
    sources = last_token_residuals(model, texts)
    prompt = DESCRIPTION_PROMPT.split()
    placeholder = prompt.index("x") + 1
    rows = padded([token_ids(model, (*prompt, *description.split())) for description in descriptions])
    wanted = rows[:, len(prompt) + 1 :]
    names = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]
    results = []
    for name, source in zip(names, sources, strict=True):

        def patch(residual: Tensor, hook: object, source: Tensor = source) -> Tensor:
            residual[:, placeholder] = source
            return residual

        best = model.run_with_hooks(rows, fwd_hooks=[(name, patch)]).argmax(-1)
        right = ((best[:, len(prompt) : -1] == wanted) | (wanted == PAD_ID)).all(-1)
        results.append(Accuracy(int(right.sum()), len(texts)))
    return tuple(results)


@torch.no_grad()
def people_patch(model: HookedTransformer, corpus: Corpus) -> tuple[tuple[Accuracy, ...], Accuracy]:
    """Descriptions of people whose last name token is patched into the description prompt, by depth.

    The source is the last token of ``Maria read about <name>``, see `patched_by_depth`. The second result is the same
    prompt with the whole name written in place of the placeholder.
    """
    people = corpus.people
    texts = [[*NAME_PROMPT.split(), *person.name.split()] for person in people]
    results = patched_by_depth(model, texts, [person.description for person in people])
    prompt = DESCRIPTION_PROMPT.split()
    whole = []
    for person in people:
        written = " ".join([*prompt[:-2], person.name, ":"]).split()
        answer = tuple(person.description.split())
        row = padded([token_ids(model, (*written, *answer))])
        best = model(row)[0].argmax(-1)
        whole.append(bool((best[len(written) : -1] == row[0, len(written) + 1 :]).all()))
    return results, Accuracy(sum(whole), len(whole))


@torch.no_grad()
def next_tokens(model: HookedTransformer, prompt: str, k: int = 5) -> tuple[tuple[str, float], ...]:
    """The ``k`` most probable next tokens with their probabilities."""
    top = model(model.to_tokens(prompt))[0, -1].softmax(-1).topk(k)
    return tuple(zip(token_strings(model, top.indices.tolist()), top.values.tolist(), strict=True))


def held_out_prompts(corpus: Corpus, n: int, seed: int = 0) -> list[str]:
    """Questions about held-out cities (seven in ten) and held-out opposites, drawn from all of them."""
    cities = [city for city in corpus.cities if city.name in corpus.hard_cities]
    hops = [
        corpus.two_hop_about(city, relation, template)
        for city in cities
        for relation in city.place.relations
        for template in templates.TWO_HOP
    ]
    opposites = [
        corpus.antonym_about(pair, side, language, template)
        for pair in corpus.antonyms
        for language in LANGUAGES
        if (language, pair.index) in corpus.held_antonyms
        for side in (0, 1)
        for template in templates.ANTONYM[language]
    ]
    draw, n_hops = random.Random(seed), round(0.7 * n)
    chosen = draw.sample(hops, n_hops) + draw.sample(opposites, n - n_hops)
    return [" ".join(sentence.question[0]) for sentence in chosen]


def measure_behaviour(model: HookedTransformer, corpus: Corpus) -> Behaviour:
    """All figures of one model."""
    probe, chance = state_probe(model, corpus)
    patched, unpatched = people_patch(model, corpus)
    return Behaviour(
        dallas=next_tokens(model, DALLAS_PROMPT),
        two_hop=two_hop_accuracies(model, corpus),
        facts=fact_accuracies(model, corpus),
        antonyms=antonym_accuracies(model, corpus),
        state_probe_by_depth=probe,
        state_probe_chance=chance,
        people_patch_by_depth=patched,
        people_unpatched=unpatched,
    )
