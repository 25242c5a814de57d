"""The self-check of a frozen model: is it linear, and if not, where does it leak first?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuit_lens.attribution.autograd import FrozenHooks
from circuit_lens.errors import LinearizationError
from circuit_lens.hooks import Hook
from circuit_lens.running import forward

# Relative additivity error of the frozen model, per dtype, above which something is not held.
LINEARITY_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# Where a leak shows first: what must be constant, and the stream it would enter.
_LEAKS = (
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_pattern",
    "attn.hook_z",
    "ln1_post.hook_scale",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "hook_mlp_out",
    "hook_resid_post",
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
)


def check_linearity(hooks: FrozenHooks) -> float:
    """Return the frozen model's relative additivity error along two directions of the residual stream's norm.

    A hook that does not hold makes every edge plausible and wrong, without any other sign.

    Raises:
        LinearizationError: The error exceeds the dtype's limit; names the first hook point where it appears.
    """
    frozen = hooks.frozen
    x = hooks.first_stream()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64).to(x)
    directions = directions / directions.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
    a, b = directions
    error = _additivity(hooks, x, a, b, ["ln_final.hook_normalized"], dead=float("inf"))["ln_final.hook_normalized"]
    limit = LINEARITY_LIMIT.get(frozen.values.native, 5e-2)
    if error <= limit:
        return error
    names = [n for n in hooks.model.hook_dict if n.endswith(_LEAKS)]
    errors = _additivity(hooks, x, a, b, names)
    default = "blocks.0.hook_resid_pre" if error == float("inf") else "ln_final.hook_normalized"
    leak = next((n for n, e in errors.items() if e > limit), default)
    raise LinearizationError(
        f"the frozen model is not linear: additivity error {error:.1e} (limit {limit:.0e}), first at {leak}. A hook "
        "that should hold a constant is ignored there by the model, or a hook of yours edits activations nonlinearly; "
        "the graph would be wrong, so none is made"
    )


def _additivity(
    hooks: FrozenHooks, x: Tensor, a: Tensor, b: Tensor, names: Sequence[str], *, dead: float = 0.0
) -> dict[str, float]:
    """Return, for each hook point in the order of the forward pass, the additivity error of its value.

    ``dead`` is the error of a value that does not depend on the stream: held where a constant is wanted, but at the
    end of the model a sign that edits of the stream are ignored.
    """
    seen: list[dict[str, Tensor]] = []
    for delta in (torch.zeros_like(a), a, b, a + b):
        values: dict[str, Tensor] = {}
        listed = [
            Hook("blocks.0.hook_resid_pre", lambda live, delta=delta: x + delta),
            *hooks.held(),
            *hooks.patches(),
            *hooks.mlps({}, lambda layer, value: value, False),
        ]
        for name in names:
            hook = FrozenHooks._keep(name, values, name)
            listed.append(Hook(name, hook.edit, must_fire=False))
        with torch.inference_mode(False), torch.no_grad():
            forward(hooks.model, hooks.frozen.values.tokens, hooks=listed, alone=True)
        seen.append(values)
    zero, one, two, both = seen
    errors = {}
    for name in zero:
        if not isinstance(zero[name], Tensor) or not zero[name].is_floating_point():
            continue
        f = [s[name].to(torch.float64) for s in (zero, one, two, both)]
        scale = max(float((f[i] - f[0]).norm()) for i in (1, 2, 3))
        # What does not depend on the stream, up to rounding, is held.
        floor = min(1e3 * torch.finfo(hooks.frozen.values.native).eps, 0.05) * float(f[0].norm())
        errors[name] = float((f[3] - f[1] - f[2] + f[0]).norm()) / scale if scale > floor else dead
    return errors
