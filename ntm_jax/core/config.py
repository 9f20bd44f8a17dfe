"""The sizes and choices of a model."""

import dataclasses
from typing import Any

from ntm_jax.core.conditions import NOTHING, Condition
from ntm_jax.core.transformer import PLAIN, Arithmetic


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a model. Static: a change compiles again."""

    grid: tuple[int, int]  # the rows and columns of tokens
    dim: int  # channels of a token
    steps: tuple[int, ...]  # the numbers of steps T trained together
    width: int  # of the predictor, a multiple of head_size x kv_heads
    head_size: int
    kv_heads: int
    mlp_ratio: int
    positions: str  # learned or rotary
    transporter_width: int
    transporter_blocks: int  # 0 is the identity: Gaussian denoising
    transporter_layers: int
    predictor_layers: int
    head: str  # direct, preconditioned, flow_matching: over a backbone, or standard: N(0, I)
    log_scale_bound: float  # of the transporter's log-scales, softly
    data_std: float  # standard deviation of the clean tokens
    dtype: Any
    transporter_dtype: Any  # float32 for reported likelihoods and exact inverses
    remat: str  # which activations are saved for the backward pass; see transformer.REMAT
    scan: bool  # loops over layers, which compiles faster, or unrolls them
    condition: Condition = NOTHING  # what it is conditioned on
    # Initial deviation of the transporter's table of positions: near 1, a token's position counts
    # as much as its content.
    transporter_positions_std: float = 0.02
    learned_values: int = 0  # the number of pixel values whose noise at t_0 is learned
    precision: str | None = None  # of float32 products; see transformer.precision
    arithmetic: Arithmetic = PLAIN

    @property
    def tokens(self) -> int:
        """N, the number of tokens."""
        return self.grid[0] * self.grid[1]
