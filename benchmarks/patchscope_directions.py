"""Patchscopes of directions on the bundled model: does what is said name the planted variable?

    python -m benchmarks.patchscope_directions [--sets plt clt sae] [--json FILE]

Features with a clear label are those of which the bundled table says that they detect one single value of a variable
with precision >= 0.5 and recall >= 0.2, of the variables that have a name to be said. Supernodes of places are those
of the case studies, chosen on trained cities. Held-out cities choose nothing.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import circuit_lens as cl
from circuit_lens.errors import CircuitLensError
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.rates import Rate
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.patchscopes import presets
from circuit_lens.patchscopes.explain import explain_vectors
from circuit_lens.patchscopes.explanation import Explanation
from circuit_lens.patchscopes.labels import label_nodes
from circuit_lens.patchscopes.metrics import best_fixed, says
from circuit_lens.patchscopes.node_labels import NodeLabel
from circuit_lens.patchscopes.sources import Vectors
from circuit_lens.studies.places import Places
from circuit_lens.zoo.loading import load_features

SETS = ("plt", "clt", "sae")
MIN_PRECISION, MIN_RECALL = 0.5, 0.2
NAMES = ("state", "province", "country", "city", "person", "operand", "thing", "nation", "job", "answer")
KINDS = ("state", "province", "country")


def clear_features(rm: Any, which: str) -> dict[str, list[tuple[Any, int, str]]]:
    """Return (dictionary, index, value) of the features with a clear label: of words, and of other variables."""
    found: dict[str, list[tuple[Any, int, str]]] = {"word": [], "name": []}
    sites = {d.site: d for d in rm.dictionaries}
    for info in load_features("capitals", which).sites:
        for index, detections in enumerate(info.detections):
            for group, variables in (("word", ("word",)), ("name", NAMES)):
                fits = [
                    d for d in detections
                    if d.variable in variables and len(d.values) == 1
                    and d.precision >= MIN_PRECISION and d.recall >= MIN_RECALL
                ]  # fmt: skip
                if fits:
                    found[group].append((sites[info.site], index, max(fits, key=lambda d: d.f1).values[0]))
    return found


def supernodes(places: Places) -> list[Supernode]:
    """Return one supernode for each place, by the members of its first trained city."""
    found: dict[str, Supernode] = {}
    for i, name in enumerate(places.names):
        members = () if places.held[i] or name in found else places.supernode(i, 0)
        if members:
            found[name] = Supernode(name, members)
    return list(found.values())


def random_supernodes(rm: Any, like: list[Supernode], seed: int = 0) -> list[Supernode]:
    """Return a supernode of randomly drawn features for each, as many of each layer."""
    generator = torch.Generator().manual_seed(seed)
    of_layer = {d.layer: d for d in rm.dictionaries}
    drawn = []
    for one in like:
        layers = [f.layer for f in one.features]
        members = [
            Feature(layer, 0, int(i), of_layer[layer].site)
            for layer in sorted(set(layers))
            for i in torch.randperm(of_layer[layer].d_sae, generator=generator)[: layers.count(layer)]
        ]
        drawn.append(Supernode(one.name, members))
    return drawn


def rates(found: Explanation, answers: list[str]) -> dict[str, Any]:
    """Return how often the answers are said: by the search, a fixed cell, any cell, random directions, no patch."""
    texts = found.result.texts if found.result.patched.new_tokens.shape[-1] else found.result.top_tokens[..., 0]
    right = np.array([[[says(t, a) for t in row] for row in texts[i, 0]] for i, a in enumerate(answers)])
    chosen = best_fixed(right)
    cells = {(found.result.target_layers[t], found.result.scales[s]) for t, s in chosen.cells}
    random = [one.text for one in found.random_best()]
    return {
        "searched": Rate.of(says(text, a) for text, a in zip(found.texts, answers, strict=True)),
        "fixed": Rate.of(chosen.right),
        "fixed cells": sorted(cells),
        "any cell": Rate(int(right.any((1, 2)).sum()), len(right)),
        "random": Rate.of(says(text, a) for a in answers for text in random),
        "unpatched": Rate.of(says(found.unpatched, a) for a in answers),
        "p <= .05": Rate.of((found.p_value(i) or 1) <= 0.05 for i in range(len(found))),
        "different": Rate.of(bool(found.different(i)) for i in range(len(found))),
    }


def explained(rm: Any, which: str) -> list[dict[str, Any]]:
    """Return rows of the first table."""
    places = Places(rm, kinds=KINDS)
    groups: dict[str, tuple[Vectors, list[str]]] = {}
    for name, features in clear_features(rm, which).items():
        if features:
            rows = torch.cat([Vectors.decoder(d, i).values[:, 0, 0] for d, i, _ in features])
            groups[f"features: {name}"] = Vectors.of(rows), [value for *_, value in features]
    chosen = supernodes(places)
    for name, nodes in (("supernodes of places", chosen), ("random supernodes", random_supernodes(rm, chosen))):
        rows = torch.cat([Vectors.supernode(rm.dictionaries, one).values[:, 0, 0] for one in nodes])
        groups[name] = Vectors.of(rows), [one.name for one in nodes]
    lines = []
    for name, (vectors, answers) in groups.items():
        if len(answers) < 2:
            continue
        for asked in (presets.self_explanation("words"), presets.token_identity("words")):
            n_new = 4 if asked.max_new_tokens else 0
            for alpha in (0.5, 0.0, 1.0) if n_new else (0.5,):
                found = explain_vectors(rm, vectors, target=asked, max_new_tokens=n_new, alpha=alpha, progress=False)
                lines.append({"set": which, "of": name, "target": asked.name, "alpha": alpha, **rates(found, answers)})
    return lines


def strongest(rm: Any, graph: Any, which: str, place: str, kind: str, pos: int) -> Any | None:
    """Return the feature node of most influence at a position whose table entry detects this place."""
    table = load_features("capitals", which)
    for one in graph.top(None, pos=pos):
        detections = table.feature(one.node.site, one.node.layer, one.node.index).detections
        if any(d.variable == kind and place in d.values for d in detections):
            return one.node
    return None


def names_it(label: NodeLabel, place: str) -> bool:
    """Whether the label is one of the place's words."""
    return bool(label.label) and says(place, label.label)


def labelled(rm: Any, which: str) -> list[dict[str, Any]]:
    """Return rows of the second table: labels of nodes in the graphs of held-out cities."""
    places = Places(rm, kinds=KINDS)
    held = [i for i in range(len(places.cities)) if places.held[i]]
    hits: dict[tuple[str, str], list[tuple[NodeLabel, str]]] = {}
    generator = torch.Generator().manual_seed(0)
    for i in held:
        city = places.cities[i]
        prompts = {
            "two hops": places.question(i).text,
            "one hop": f"Fact : the {city.place.kind} containing {city.name} is",
        }
        for asked, text in prompts.items():
            graph = rm.attribute(text, progress=False)
            at = places.question(i).at if asked == "two hops" else len(graph.tokens) - 2
            members = places.supernode(i, at)
            nodes: dict[str, Any] = {}
            if members:
                nodes["supernode"] = Supernode("it", members)
                nodes["random supernode"] = random_supernodes(rm, [Supernode("random", members)], i)[0].at(at)
            best = strongest(rm, graph, which, city.place.name, city.place.kind, at)
            if best is not None:
                nodes["strongest feature"] = best
            here = [one.node for one in graph.top(None, pos=at)]
            nodes["random feature"] = here[int(torch.randint(len(here), (1,), generator=generator))]
            try:
                labels = label_nodes(rm, graph, nodes=list(nodes.values()), residuals=[(2, at)])
            except CircuitLensError as error:
                raise RuntimeError(f"{city.name}, {asked}") from error
            for name, label in zip([*nodes, "residual of layer 2"], labels, strict=True):
                hits.setdefault((asked, name), []).append((label, city.place.name))
    return [
        {"set": which, "prompt": asked, "of": name, **label_rates(found, places)}
        for (asked, name), found in hits.items()
    ]


def label_rates(found: list[tuple[NodeLabel, str]], places: Places) -> dict[str, Any]:
    """Return how often labels name the place, stand out, and sink when the node is ablated."""
    ablated = [label for label, _ in found if label.best.drop is not None]
    named = [label for label, place in found if names_it(label, place) and label.best.drop is not None]
    return {
        "names it": Rate.of(names_it(label, place) for label, place in found),
        "names it or a city in it": Rate.of(
            names_it(label, place)
            or any(city.place.name == place and label.label and says(city.name, label.label) for city in places.cities)
            for label, place in found
        ),
        "a candidate names it": Rate.of(
            any(one.text.strip() and says(place, one.text.strip()) for one in label.candidates)
            for label, place in found
        ),
        "own p <= .05": Rate.of(label.best.p_margin <= 0.05 for label, _ in found),
        "ablation lowers": Rate.of((label.best.drop or 0) > 0 for label in ablated),
        "median drop in nats": round(float(np.median([label.best.drop_nats or 0 for label in ablated])), 3)
        if ablated
        else None,
        "and more than 19 of 20 random": Rate.of((label.best.p_drop or 1) <= 0.05 for label in ablated),
        "lowers, where it names it": Rate.of((label.best.drop or 0) > 0 for label in named),
        "more than random, where it names it": Rate.of((label.best.p_drop or 1) <= 0.05 for label in named),
        "median drop in nats, where it names it": (
            round(float(np.median([label.best.drop_nats or 0 for label in named])), 2) if named else None
        ),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patchscope_directions", description=__doc__)
    parser.add_argument("--sets", nargs="+", default=SETS, help="dictionary sets of the bundled model")
    parser.add_argument("--json", type=Path, help="write all rows here as JSON lines")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    lines: list[dict[str, Any]] = []
    for which in arguments.sets:
        rm = cl.zoo.load("capitals", which)
        for line in [*explained(rm, which), *labelled(rm, which)]:
            print(*(f"{key}: {value}" for key, value in line.items()), sep="; ", flush=True)
            lines.append(line)
    if arguments.json is not None:
        text = [json.dumps({k: v.to_json() if isinstance(v, Rate) else v for k, v in line.items()}) for line in lines]
        arguments.json.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
