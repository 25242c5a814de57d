"""A second frozen model, from hook points of TransformerLens alone: what an edge means, by doing it.

Nothing of the engine is used. Queries, keys, norm denominators and MLP outputs of one run are held by hooks; a source's
contribution is added once more where it enters, and the targets are read again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Edits = dict[str, Tensor]


class FrozenByHand:
    """One prompt's frozen model.

    Args:
        model: The model.
        saes: One SAELens transcoder per layer that has one.
        tokens: The prompt, ``[n_pos]``.
        thaw: Name of one hook point that is not held; for negative controls.
        permanent: Constant vectors that were added in the run at hook points.
    """

    def __init__(
        self, model: Any, saes: Sequence[Any], tokens: Tensor, *, thaw: str = "", permanent: Edits | None = None
    ) -> None:
        self.model, self.tokens, self.permanent = model, tokens, permanent or {}
        self.saes = {int(s.cfg.metadata.hook_name.split(".")[1]): s for s in saes}
        self.points = dict(model.hook_dict)
        held = ("attn.hook_q", "attn.hook_k", "hook_mlp_out")
        points = {
            id(p): n
            for n, p in self.points.items()
            if n.endswith(held) or (n.endswith("hook_scale") and ".attn." not in n)
        }
        self.names = [n for n in points.values() if n != thaw]
        self.parallel = "blocks.0.hook_resid_mid" not in self.points
        self.clean: dict[str, Tensor] = {}
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        self.clean_norms: dict[int, tuple[Tensor, Tensor]] = {}
        self.clean = self._run({}, hold=False)
        self.clean_norms = dict(self.norms)

    # Reading

    def read(self, layer: int, values: dict[str, Tensor], norms: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Return what the layer's transcoder reads, ``[n_pos, d_model]``."""
        hook = self.saes[layer].cfg.metadata.hook_name
        if hook.endswith("ln2.hook_normalized"):
            return values[hook]
        return norms[layer][1 if hook.endswith("mlp.hook_in") else 0]

    def run(self, edits: Edits) -> tuple[dict[int, Tensor], Tensor]:
        """Return every transcoder's pre-activations and the demeaned logits, with vectors added at hook points."""
        values = self._run(edits, hold=True)
        pre = {}
        for layer, sae in self.saes.items():
            pre[layer] = self.read(layer, values, self.norms) @ sae.W_enc + sae.b_enc
        logits = values["unembed.hook_out"]
        return pre, logits - logits.mean(-1, keepdim=True)

    def attention_constant(self, layer: int, zero_from: str) -> Tensor:
        """Return what the layer's attention adds when the residual stream before it is zero."""
        out = f"blocks.{layer}.hook_attn_out"
        return self._run({zero_from: None}, hold=True)[out] - self.permanent.get(out, 0.0)

    # Running

    def _run(self, edits: dict[str, Tensor | None], *, hold: bool) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        hooks: list[tuple[str, Callable[..., Any]]] = []
        for name, vector in self.permanent.items():
            hooks.append((name, lambda value, hook, vector=vector: value + vector))
        if hold:
            hooks += [(name, self._hold(name)) for name in self.names]
        for name, vector in edits.items():
            hooks.append((name, lambda value, hook, vector=vector: value * 0 if vector is None else value + vector))
        for name in self._kept():
            hooks.append((name, lambda value, hook, name=name: seen.__setitem__(name, value[0].clone())))
        with torch.no_grad(), self._norm_ends(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A forward hook edited hook_scale/hook_normalized")
            # Looked up once: a bridge builds its dictionary of hook points anew at every question.
            try:
                for name, hook in hooks:
                    self.points[name].add_hook(hook)
                self.model(self.tokens[None])
            finally:
                for name, _ in hooks:
                    self.points[name].remove_hooks()
        return seen

    def _kept(self) -> list[str]:
        blocks = range(self.model.cfg.n_layers)
        suffixes = ("hook_resid_pre", "hook_attn_out", "ln2.hook_normalized")
        kept = [f"blocks.{layer}.{suffix}" for layer in blocks for suffix in suffixes]
        embeddings = [n for n in ("hook_embed", "hook_pos_embed") if n in self.points]
        return list(dict.fromkeys([*self.names, *kept, *embeddings, "unembed.hook_out"]))

    def _hold(self, name: str) -> Callable[..., Tensor]:
        layer = int(name.split(".")[1]) if name.startswith("blocks") else -1
        sae = self.saes.get(layer)

        def hook(value: Tensor, hook: Any) -> Tensor:
            out = self.clean[name].expand_as(value)
            if name.endswith("hook_mlp_out") and getattr(sae, "W_skip", None) is not None:
                seen = {f"blocks.{layer}.ln2.hook_normalized": self._live_normalized[layer]}
                moved = self.read(layer, seen, self.norms) - self.read(layer, self.clean, self.clean_norms)
                out = out + moved @ sae.W_skip.T
            return out

        return hook

    @contextlib.contextmanager
    def _norm_ends(self) -> Iterator[None]:
        """Catch each second norm's input, normalised value and output."""
        self.norms, self._live_normalized = {}, {}
        with contextlib.ExitStack() as stack:
            for layer in range(self.model.cfg.n_layers):
                norm = self.model.blocks[layer].ln2

                def ends(module: nn.Module, args: Any, out: Tensor, layer: int = layer) -> None:
                    self.norms[layer] = (args[0][0].clone(), out[0].clone())

                def middle(module: nn.Module, args: Any, out: Tensor, layer: int = layer) -> None:
                    self._live_normalized[layer] = out[0].clone()

                stack.callback(norm.register_forward_hook(ends).remove)
                stack.callback(norm.hook_normalized.register_forward_hook(middle).remove)
            yield
