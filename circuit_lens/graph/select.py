"""From what a user writes (a number, a record, a name, a token) to the nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from circuit_lens.errors import NodeNotFoundError, TokenNotFoundError, nearest
from circuit_lens.graph.nodes import Feature, Node, NodeKind, NodeTable
from circuit_lens.graph.positions import Which, find_position
from circuit_lens.graph.records import RankedNode

NodeRef = int | Node | RankedNode | Feature | str
"""A node's id, a Node (of this graph or one it was pruned from; ranked or not), a Feature, or a string."""
Role = Literal["any", "source", "target"]


def find_nodes(
    nodes: NodeTable,
    token_strings: Sequence[str],
    ref: NodeRef | Iterable[NodeRef],
    *,
    role: Role = "any",
    which: Which | None = None,
) -> list[int]:
    """Return the ids of the nodes that ``ref`` names, without repetition.

    A string is, in this order: a node's name ("L1 P9 #158"); a logit's label, or for a source the token at a position
    (the two change places with ``role``); the label of features, which names all that carry it.

    Raises:
        NodeNotFoundError: nothing has that id, that feature or that name.
        TokenNotFoundError: a string that is a token at several positions, and no ``which``.
    """
    if isinstance(ref, str):
        return _by_text(nodes, token_strings, ref, role, which)
    if isinstance(ref, Feature):
        return [_by_feature(nodes, token_strings, ref, which)]
    if isinstance(ref, RankedNode):
        ref = ref.node
    if isinstance(ref, Node):
        return [_by_node(nodes, ref)]
    if isinstance(ref, Iterable):
        found = [i for one in ref for i in find_nodes(nodes, token_strings, one, role=role, which=which)]
        return list(dict.fromkeys(found))
    if not 0 <= ref < len(nodes):
        raise NodeNotFoundError(f"No node {ref}: the graph has {len(nodes)} nodes, 0 to {len(nodes) - 1}.")
    return [int(ref)]


def find_node(
    nodes: NodeTable,
    token_strings: Sequence[str],
    ref: NodeRef,
    *,
    role: Role = "any",
    which: Which | None = None,
) -> int:
    """Return the id of the one node that ``ref`` names; see :func:`find_nodes`.

    Raises:
        NodeNotFoundError: none, or several; the text names some of them.
    """
    found = find_nodes(nodes, token_strings, ref, role=role, which=which)
    if len(found) != 1:
        names = ", ".join(nodes.name(i) for i in found[:5])
        raise NodeNotFoundError(f"{ref!r} names {len(found)} nodes ({names}{', ...' if len(found) > 5 else ''}): "
                                "give the name of one.")  # fmt: skip
    return found[0]


def _match(nodes: NodeTable, part: slice, **columns: int) -> list[int]:
    """Return the ids in a section whose columns have the given values."""
    mask = nodes.kind[part] >= 0
    for name, value in columns.items():
        mask = mask & (getattr(nodes, name)[part] == value)
    return (mask.nonzero().flatten() + part.start).tolist()


def _by_feature(nodes: NodeTable, token_strings: Sequence[str], ref: Feature, which: Which | None) -> int:
    part = nodes.slice_of(NodeKind.FEATURE)
    pos = find_position(token_strings, ref.pos, which=which)
    found = _match(nodes, part, layer=ref.layer, pos=pos, index=ref.index)
    if ref.site is not None:
        found = [i for i in found if nodes.sites[int(nodes.site[i])] == ref.site]
    if len(found) == 1:
        return found[0]
    if found:
        sites = [nodes.sites[int(nodes.site[i])] for i in found]
        raise NodeNotFoundError(
            f"{ref} occurs in several dictionaries of layer {ref.layer}: give site=, one of {sites}."
        )
    here = nodes.index[part][(nodes.layer[part] == ref.layer) & (nodes.pos[part] == pos)].tolist()
    where = f"position {pos} ({token_strings[pos]!r})"
    if here:
        around = ", ".join(map(str, sorted(sorted(here, key=lambda i: abs(i - ref.index))[:8])))
        hint = f"layer {ref.layer} has {len(here)} feature nodes at {where}, among them {around}"
    else:
        layers = sorted(set(nodes.layer[part].tolist()))
        hint = f"layer {ref.layer} has no feature node at {where}; layers with features are {layers}"
    raise NodeNotFoundError(
        f"No node for {ref}: the feature is not active there, or was pruned or summed into a rest node; {hint}."
    )


def _by_node(nodes: NodeTable, ref: Node) -> int:
    found = _match(nodes, nodes.slice_of(ref.kind), layer=ref.layer, pos=ref.pos, index=ref.index)
    found = [
        i
        for i in found
        if nodes.sites[int(nodes.site[i])] == ref.site
        and (nodes.labels[i] == ref.label or ref.kind is not NodeKind.LOGIT)
    ]
    if len(found) > 1 and ref.id in found:
        found = [ref.id]
    if len(found) != 1:
        raise NodeNotFoundError(
            f"This graph has no node {ref.name or ref}; it may have been pruned, or be another prompt's."
        )
    return found[0]


def _by_text(nodes: NodeTable, token_strings: Sequence[str], text: str, role: Role, which: Which | None) -> list[int]:
    wanted = " ".join(text.split()).lower()
    if wanted.startswith(("l", "p")):
        named = [i for i in range(len(nodes)) if nodes.name(i).lower() == wanted] if _looks_like_name(wanted) else []
        if named:
            return named
    logits = _labelled(nodes, nodes.slice_of(NodeKind.LOGIT), text)
    problem: TokenNotFoundError | None = None
    try:
        pos = find_position(token_strings, text, which=which)
        tokens = _match(nodes, nodes.slice_of(NodeKind.TOKEN), pos=pos)
    except TokenNotFoundError as error:
        problem, tokens = error, []
    order = {"any": (logits + tokens,), "target": (logits, tokens), "source": (tokens, logits)}[role]
    for found in order:
        if found:
            return found
    features = _labelled(nodes, nodes.slice_of(NodeKind.FEATURE), text)
    if features:
        return features
    if problem is not None and "occurs" in str(problem):
        raise problem
    targets = ", ".join(repr(nodes.labels[i]) for i in range(len(nodes))[nodes.slice_of(NodeKind.LOGIT)][:10])
    names = [
        nodes.name(i) for part in (NodeKind.LOGIT, NodeKind.TOKEN) for i in range(len(nodes))[nodes.slice_of(part)]
    ]
    texts = {label for label in nodes.labels if label} | {token.strip() for token in token_strings} | set(names)
    raise NodeNotFoundError(
        f"No node {text!r}: give a node's name (such as {nodes.name(0)!r}), the label of a logit or feature, "
        f"or a token of the prompt{nearest(text, sorted(texts))}. This graph explains {targets}."
    )


def _looks_like_name(text: str) -> bool:
    """Whether a lower-case text could be a node's name: "l1 p9 ...", "p9 token", "logit ..."."""
    return text.startswith("logit ") or text[1:2].isdigit()


def _labelled(nodes: NodeTable, part: slice, text: str) -> list[int]:
    """Return the ids in a section with this label; blanks around it count only where the exact text exists."""
    section = range(part.start, part.stop)
    exact = [i for i in section if nodes.labels[i] == text]
    return exact or [i for i in section if nodes.labels[i].strip() == text.strip() != ""]
