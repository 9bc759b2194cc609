"""A weight that stays as it is, with a low-rank product learnt beside it: W + scale · A B (LoRA, arXiv:2106.09685).

`nn.project` takes x W + scale · (x A) B, so that what the backward pass computes and devices exchange is of the size of
A and B. Whatever else uses a weight finds the sum in its place. No model file knows of it.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

RANK = "R"  # the letter of the dim that A and B share


class Adapted(nnx.Module):
    """Stands where a layer's weight stood. `down_DR` and `up_RHK` are A and B of a `query_DHK`."""

    def __init__(self, base: nnx.Param, pair: dict[str, jax.Array], scale: float):
        (down, a), (up, b) = sorted(pair.items())
        self.base, self.down, self.up, self.scale = base, nnx.Param(a), nnx.Param(b), scale
        self.stack, self.columns = up.rpartition("_")[2].split(RANK)
        self.rows = down.rpartition("_")[2][len(self.stack) : -1]

    def __getitem__(self, _) -> jax.Array:
        """The sum, placed as the weight, in its type."""
        base = self.base[...]
        lead = "L" * (base.ndim - len(self.stack + self.rows + self.columns))
        down, up = (f"{lead}{self.stack}{side}" for side in (self.rows + RANK, RANK + self.columns))
        place = P(*jax.typeof(base).sharding.spec.partitions)
        # A sum over devices cannot be left open here (nn.open_sums).
        a, b = (jax.reshard(x, P(*jax.typeof(x).sharding.spec.partitions)) for x in (self.down[...], self.up[...]))
        product = jnp.einsum(f"{down},{up}->{lead}{self.stack}{self.rows}{self.columns}", a, b, out_sharding=place)
        return (base.astype(jnp.float32) + self.scale * product).astype(base.dtype)

    def beside(self, subscripts: str) -> tuple[str, str] | None:
        """The subscripts of x A and of (x A) B that make up x W; None where the product is another one."""
        x_dims, rest = subscripts.split(",")
        dims, out = rest.split("->")
        if self.stack or "".join(d for d in dims if d not in out) != self.rows:
            return None
        kept = "".join(d for d in x_dims if d not in self.rows)
        return f"{x_dims},{self.rows}{RANK}->{kept}{RANK}", f"{kept}{RANK},{RANK}{self.columns}->{out}"


def plain(weight: nnx.Param | Adapted, subscripts: str) -> jax.Array:
    """What `nn.project` multiplies x by, besides A."""
    return weight.base[...] if isinstance(weight, Adapted) and weight.beside(subscripts) else weight[...]


def beside(weight: nnx.Param | Adapted, subscripts: str) -> tuple[str, str] | None:
    """As `Adapted.beside`; None of a weight alone."""
    return weight.beside(subscripts) if isinstance(weight, Adapted) else None
