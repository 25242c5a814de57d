"""The case studies of "On the Biology of a Large Language Model" and of Patchscopes on models whose facts are known.

Each study is a function that returns a :class:`~circuit_lens.studies.tables.StudyTable`: rates with 95 % intervals,
failures, text, HTML and JSON. ``python -m circuit_lens.studies`` prints all of them.

- :mod:`.two_hop`: the state exchanged in two-hop questions, with ceilings, controls and specificity.
- :mod:`.two_hop_patterns`: what inhibiting and injecting each supernode does to the others.
- :mod:`.mediation`: how much of a city's effect runs through its state, by graph and by clamping.
- :mod:`.multilingual`, :mod:`.operations`: language, operand and operation exchanged; what languages share.
- :mod:`.patch_entities`, :mod:`.patch_contexts`: what entities are, read from their last token, and at which layer.
- :mod:`.patch_cuts`: the same entities in one, two and three tokens.
- :mod:`.patch_attributes`: attributes without examples, beside probes; :mod:`.patch_hops`: two steps put together.
- :mod:`.patch_lenses`: next tokens by lenses and token identity, and one model's states read by another.
- :mod:`.patch_through`: writing at one layer, or also below it.
- :mod:`.hub`: the same on models of the hub, by name, and one of them read by another.
"""
