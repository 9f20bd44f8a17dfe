"""The fixed forward process: noise levels, transitions, posteriors, trajectories, densities.

Symbols: B batch, T steps, K = T+1 levels ascending from t_0 (nearly clean) to t_T = 1 (pure noise),
N tokens, D token channels. Equation numbers are those of arXiv 2605.08078.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp

from ntm_jax.typed import setting

LOG_2PI = math.log(2 * math.pi)


def log_normal(x, mean, scale):
    """Elementwise log N(x; mean, scale^2) in nats, float32."""
    z = (x - mean) / scale
    return -0.5 * (z * z + LOG_2PI) - jnp.log(scale)


def per_example(t, like):
    """Appends axes to t so that it broadcasts over the trailing axes of `like`."""
    return jnp.reshape(t, t.shape + (1,) * (like.ndim - t.ndim))


def shifted(ratio, shift: float):
    """e^m / (e^m + T/k - 1), the level t_k of the `shifted` schedule (C.2), for ratio = T/k."""
    return math.exp(shift) / (math.exp(shift) + ratio - 1)


def default_shift(tokens: int) -> float:
    """The shift m of the `shifted` schedule for a sequence of `tokens` tokens (C.1)."""
    return 0.5 + 0.65 * (tokens - 256) / (4096 - 256)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The noise levels of trajectories. Hashable: a static argument of jitted functions."""

    schedule: str = setting(
        "shifted", "Spacing of noise levels.", choices=("linear", "shifted"))
    shift: float | None = setting(  # beyond 10, float32 does not tell the last levels from 1
        None, "Shift of schedule=shifted; None derives it from the number of tokens.", low=-10,
        high=10)
    steps: tuple[int, ...] = setting(
        (4,), "Tuple of step counts T, trained together.", low=1, high=10_000)
    t_min: float = setting(
        0.04, "Noise level of x_0 in evaluation and sampling.", above=0, below=1)
    t_min_range: tuple[float, float] = setting(
        (0.03, 0.05), "Range of the noise level of x_0 in training, uniform.", low=0, below=1)

    def level(self, k, steps, t_min):
        """Noise level t_k of a trajectory of T = `steps` steps (C.1, C.2).

        t_0 = t_min and t_T = 1 exactly. 0 <= k <= steps need not be an integer; arguments
        broadcast. `linear` is t_k = t_min + (1 - t_min) k/T; `shifted` is t_k = e^m / (e^m + T/k -
        1) with m = self.shift.
        """
        k, steps = jnp.asarray(k, jnp.float32), jnp.asarray(steps, jnp.float32)
        if self.schedule == "linear":
            t = t_min + (1 - t_min) * k / steps
        else:
            assert self.shift is not None  # Config.schedule derives what the settings leave None
            t = shifted(steps / jnp.where(k == 0, 1, k), self.shift)
        return jnp.where(k == 0, t_min, jnp.where(k == steps, 1.0, t))

    def levels(self, steps: int, t_min):
        """All levels [B, steps + 1], ascending, of trajectories that start at t_min [B]."""
        return self.level(jnp.arange(steps + 1)[None], steps, jnp.asarray(t_min)[:, None])

    def fixed_levels(self, steps: int, batch: int):
        """The levels [batch, steps + 1] of evaluation and sampling, from self.t_min to 1."""
        return self.levels(steps, jnp.full(batch, self.t_min))

    def level_at_fraction(self, fraction):
        """Noise levels t [B] at fractions [B] of the way from clean data, 0, to pure noise, 1.

        They are those of a trajectory of infinitely many steps that starts at t_0 = 0.
        """
        return self.level(fraction, 1, 0.0)


def _between(s, t):
    """(t-s)(t+s-2ts), which is (1-s)^2 times the variance of the transition.

    It avoids the cancellation of t^2 - a^2 s^2.
    """
    return (t - s) * (t + s - 2 * t * s)


def transition(s, t):
    """(a, sig) of the Markov step x_t = a x_s + sig eps from level s up to t > s (2.2, A.4)."""
    return (1 - t) / (1 - s), jnp.sqrt(_between(s, t)) / (1 - s)


def posterior(s, t, r=0.0):
    """(A, B, C) of the reverse posterior q(x_s | x_t, x_r) = N(A x_t + B x_r, C^2 I) (2.3, A.6).

    0 <= r < s < t <= 1; r = 0 is the clean x.
    """
    below, above, across = _between(r, s), _between(s, t), _between(r, t)
    a = below / across * (1 - t) / (1 - s)
    b = above / across * (1 - r) / (1 - s)
    c = jnp.sqrt(below / across * above) / (1 - s)
    return a, b, c


def covariance(t):
    """Covariance across levels of a trajectory given x: t [..., K] ascending -> S [..., K, K].

    S_kk = t_k^2, and S_kT = 0 for k < T.
    """
    rows, columns = t[..., :, None], t[..., None, :]
    low, high = jnp.minimum(rows, columns), jnp.maximum(rows, columns)
    across = low * low * (1 - high) / jnp.where(low == 1, 1, 1 - low)
    return jnp.where(low == high, low * low, across)


def noise_forward(x_0, t, noise):
    """Runs the forward process up from x_0 [B, N, D] -> x_0..x_T, [B, T+1, N, D].

    noise: [B, T, N, D]; t: levels [B, T+1].
    """
    xs = [x_0]
    for k in range(t.shape[1] - 1):
        a, sig = transition(t[:, k], t[:, k + 1])
        xs.append(per_example(a, x_0) * xs[-1] + per_example(sig, x_0) * noise[:, k])
    return jnp.stack(xs, 1)


def noise_first_level(x, t_0, noise):
    """x_0 = (1 - t_0) x + t_0 eps (eq. 2.1): x [B, N, D], t_0 [B], noise [B, N, D]."""
    return (1 - per_example(t_0, x)) * x + per_example(t_0, x) * noise


def simulate(x, t, noise):
    """Trajectories [B, K, N, D] of clean tokens x [B, N, D] at levels t [B, K].

    noise: standard normal, [B, K, N, D]. Of pixels, see core.pixels for their noise at t_0.
    """
    return noise_forward(noise_first_level(x, t[:, 0], noise[:, 0]), t, noise[:, 1:])


def log_reverse(xs, t, x_r, r=0.0):
    """log q(x_k | x_{k+1}, x_r) in nats for k = 0..K-2, [B, K-1].

    xs: [B, K, N, D] at levels t [B, K]; x_r: [B, N, D] at a lower level r, [B, 1] or 0.

    Their sum with log q(x_T) = log N(x_T; 0, I) is log q(x_0..x_T | x_r).
    """
    a, b, c = (per_example(v, xs) for v in posterior(t[:, :-1], t[:, 1:], r))
    return jnp.sum(log_normal(xs[:, :-1], a * xs[:, 1:] + b * x_r[:, None], c), (2, 3))


def example_noise(keys, shape):
    """Standard normal noise [B, *shape] from keys [B], one draw of `shape` for each example."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def example_keys(root, name: str, index):
    """Keys [B] for the draws called `name` of the examples `index` [B], under root."""
    named = jax.random.fold_in(root, zlib.crc32(name.encode()))
    return jax.vmap(lambda i: jax.random.fold_in(named, i))(index)


def draw_keys(keys, number):
    """Keys [B] for the draw of this number of each example, from the examples' keys [B]."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
