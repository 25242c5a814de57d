"""Directions with a planted meaning: supernodes of places say the place, random ones do not, and p-values are valid."""

from __future__ import annotations

import pytest
import torch

import circuit_lens as cl
from circuit_lens.graph.nodes import Feature
from circuit_lens.graph.rates import Rate
from circuit_lens.graph.supernodes import Supernode
from circuit_lens.patchscopes.explain import explain_vectors, random_directions
from circuit_lens.patchscopes.metrics import says
from circuit_lens.patchscopes.sources import Vectors
from circuit_lens.studies.places import Places


@pytest.mark.slow
def test_supernodes_of_states_say_the_state_and_random_features_of_their_layers_do_not() -> None:
    rm = cl.zoo.load("capitals")
    places = Places(rm)
    chosen = {places.names[i]: i for i in range(len(places.cities)) if not places.held[i]}
    planted = [Supernode(name, members) for name, i in chosen.items() if (members := places.supernode(i, 0))]
    assert len(planted) >= 40
    generator = torch.Generator().manual_seed(0)
    drawn = [
        Supernode(
            one.name,
            {
                Feature(f.layer, 0, int(torch.randint(rm.dictionaries[f.layer].d_sae, (1,), generator=generator)))
                for f in one.features
            },
        )
        for one in planted
    ]
    shares = []
    for nodes in (planted, drawn):
        rows = torch.cat([Vectors.supernode(rm.dictionaries, one).values[:, 0, 0] for one in nodes])
        found = explain_vectors(rm, Vectors.of(rows), scales=(4.0,), target_layers=[0], n_random=0)
        shares.append(Rate.of(says(text, one.name) for text, one in zip(found.texts, nodes, strict=True)))
    assert shares[0].interval[0] > shares[1].interval[1], shares


@pytest.mark.slow
def test_random_directions_are_called_better_than_all_controls_one_time_in_twenty() -> None:
    model = cl.zoo.load("capitals").model
    n, seeds = 50, range(8)
    hits = []
    for seed in seeds:
        items = Vectors.of(random_directions(n, model.cfg.d_model, 1000 + seed).float())
        found = explain_vectors(model, items, n_random=19, seed=seed, max_new_tokens=0, scales=(0.5, 2.0))
        hits.append(sum((found.p_value(i) or 1.0) <= 0.05 for i in range(n)) / n)
    # The share beyond the best of 19 has mean 1/20 and standard deviation < 0.05; four standard errors of 8 seeds.
    assert abs(sum(hits) / len(hits) - 0.05) < 4 * (0.05**2 + 0.05 * 0.95 / n) ** 0.5 / len(hits) ** 0.5, hits
