"""TODO ntm_jax.core.config."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ntm_jax.core import layers


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a model. Static: a change compiles anew."""

    grid: tuple[int, int]  # tokens by row and column
    dim: int  # channels of a token
    num_classes: int  # 0: no class conditioning
    steps: tuple[int, ...]  # the numbers of steps T trained together
    width: int
    head_size: int
    kv_heads: int
    mlp_ratio: int
    positions: str  # learned, rotary
    transporter_width: int
    transporter_blocks: int  # 0: the identity, which makes the model Gaussian denoising
    transporter_layers: int
    predictor_layers: int
    head: str  # direct, preconditioned, posterior (over a backbone)
    log_scale_bound: float
    data_std: float  # standard deviation of the clean tokens, r
    dtype: Any
    transporter_dtype: Any  # float32 where a likelihood is reported or an exact inverse asked for
    remat: str  # none, full, narrow, dots: what the backward pass finds saved, from all to least to most
    scan: bool
    text_width: int = 0  # E of the text states that the predictor is told; 0: none
    transporter_text: bool = False  # whether the transporter is told them too
    transporter_positions_std: float = 0.02  # of a new learned table: near 1, which token it is counts as much as what it holds
    flat: bool = False  # see layers.Stack
    precision: str | None = None  # of float32 products, see layers.precision; exact() sets highest

    def __post_init__(self):
        for name, value, known in (
            ("positions", self.positions, ("learned", "rotary")),
            ("head", self.head, ("direct", "preconditioned", "posterior")),
            ("remat", self.remat, tuple(layers.REMAT)),
        ):
            if value not in known:
                raise ValueError(f"model.{name} is {value!r}: expected one of {', '.join(known)}")
        for name in ("width", "transporter_width") if self.transporter_blocks else ("width",):
            heads, rest = divmod(getattr(self, name), self.head_size)
            if rest or heads % self.kv_heads:
                raise ValueError(f"model.{name} = {getattr(self, name)} must be a multiple of head_size x kv_heads "
                                 f"= {self.head_size} x {self.kv_heads}")
        if self.head_size % 4:
            raise ValueError(f"model.head_size = {self.head_size} must be a multiple of 4")

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def exact(self) -> "ModelConfig":
        """The same model for reported likelihoods and exact inverses: float32 means float32.

        The transporter's network runs in float32, and all float32 products at full precision.
        """
        return dataclasses.replace(self, transporter_dtype=jnp.float32, precision="highest")
