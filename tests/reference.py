"""The likelihood of one example in float64 NumPy.

It is written from the mathematics, docs/concepts.md, sections 3, 4 and 9, and shares no code with
ntm_jax, so that the two agree only where both are right.

Symbols: T steps, K = T+1 levels ascending, N tokens, D token channels, W width, H heads,
G key-value heads, C head size, V pixel levels. `params` is a checkpoint's nested dict, with a
network's layers stacked along a first axis; `config` has the attributes of core.config.ModelConfig.
Units are nats. Models are conditioned on a class or nothing, not on text.
"""

import math

import numpy as np
from scipy.special import log_ndtr, softmax

LOG_2PI = math.log(2 * math.pi)


# The forward process


def log_normal(x, mean, scale):
    """Elementwise log N(x; mean, scale^2)."""
    return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale) - 0.5 * LOG_2PI


def transition(s, t):
    """(a, sig) of the step x_t = a x_s + sig eps from level s up to t; t^2 = a^2 s^2 + sig^2."""
    return (1 - t) / (1 - s), math.sqrt((t - s) * (t + s - 2 * t * s)) / (1 - s)


def posterior(s, t):
    """A, B, C of q(x_s | x_t, x) = N(A x_t + B x, C^2)."""
    a, sig = transition(s, t)
    # Bayes: the prior N((1-s) x, s^2) times N(x_t; a x_s, sig^2)
    return a * s**2 / t**2, (1 - s) * sig**2 / t**2, s * sig / t


def forward_log_density(xs, x, t, pixels):
    """log q(x_1..x_T | x_0), or with `pixels` log q(x_0..x_T | x), a number.

    xs: [K, N, D]; x: [N, D]; t: [K].
    """
    total = np.sum(log_normal(xs[0], (1 - t[0]) * x, t[0])) if pixels else 0.0
    for k in range(len(t) - 1):
        a, sig = transition(t[k], t[k + 1])
        total += np.sum(log_normal(xs[k + 1], a * xs[k], sig))
    return total


def log_bin(x, mean, scale, pixel_levels):
    """Log-probability of the bins of x, of V values from -1 to 1, under N(mean, scale^2).

    The outermost bins are open.
    """
    v, top = np.round((x + 1) / 2 * (pixel_levels - 1)), pixel_levels - 1
    low = np.where(v > 0, ((2 * v - 1) / top - 1 - mean) / scale, -np.inf)
    high = np.where(v < top, ((2 * v + 1) / top - 1 - mean) / scale, np.inf)
    # the same probability in the lower tail, where it is a difference of small numbers and not of
    # ones
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
    return log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high)))


# The layers of a network


def dense(p, x):
    """A linear layer [..., inputs] -> [..., outputs]."""
    return x @ p["kernel"] + p.get("bias", 0)


def layer_norm(x, scale=1.0):
    """Vectors [..., W] to mean 0 and variance 1."""
    return rms_norm(x - np.mean(x, -1, keepdims=True), scale)


def rms_norm(x, scale):
    """Vectors to mean square 1."""
    return scale * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


def gelu(x):
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def soft_bound(g, bound):
    return bound * np.tanh(g / bound)


def rotate(x, rows, columns):
    """Rotary positions of queries or keys [N, H, C] at places rows and columns [N].

    Pairs (i, i + C/2) are rotated, half of them by the row, half by the column.
    """
    quarter = x.shape[-1] // 4
    frequencies = 100 ** (-np.arange(quarter) / quarter)
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], 1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def attention(p, config, tokens, causal, order):
    """Tokens [N, W] -> [N, W].

    order: each token's row-major place in the image, for rotary positions.
    """
    count, size = len(tokens), config.head_size
    q, k, v = (dense(p[name], tokens).reshape(count, -1, size)
               for name in ("query", "key", "value"))
    q, k = rms_norm(q, p["query_norm"]["scale"]), rms_norm(k, p["key_norm"]["scale"])
    if config.positions == "rotary":
        places = np.divmod(order, config.grid[1])
        q, k = rotate(q, *places), rotate(k, *places)
    group = q.shape[1] // config.kv_heads  # consecutive heads share a key and a value
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("nhc,mhc->hnm", q, k) / math.sqrt(size)
    if causal:
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
    mixed = np.einsum("hnm,mhc->nhc", softmax(scores, -1), v)
    return dense(p["out"], mixed.reshape(count, -1))


def pick(p, index):
    """One layer's parameters of a stack."""
    return {name: pick(child, index) for name, child in p.items()} if isinstance(p, dict) else p[
        index]


def transformer(p, config, depth, tokens, modulation, causal, order):
    """`depth` pre-norm layers over tokens [N, W]; modulation [6, W]."""
    for index in range(depth):
        layer = pick(p["layers"], index)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation + layer["table"]
        h = layer_norm(tokens) * (1 + scale_1) + shift_1
        tokens = tokens + (1 + gate_1) * attention(layer["attention"], config, h, causal, order)
        h = layer_norm(tokens) * (1 + scale_2) + shift_2
        tokens = tokens + (1 + gate_2) * dense(layer["down"], gelu(dense(layer["up"], h)))
    return tokens


def sinusoidal(value, width):
    """Cosines and sines [width] of a number at frequencies from 1 down towards 1/10,000."""
    angles = value * 10_000 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)])


def condition(p, config, width, times, steps, label):
    """The modulation [6, W] of a network's layers.

    It depends on levels, on T where several are trained together, and on the class.
    """
    scalars = {f"level_{i}": 1000 * t for i, t in enumerate(times)}
    if len(config.steps) > 1:
        scalars["steps"] = 10 * steps
    inner = min(width, 512)
    total = np.zeros(inner)
    for name, value in scalars.items():
        h = silu(dense(p[f"{name}_in"], sinusoidal(value, min(inner, 256))))
        total = total + dense(p[f"{name}_out"], h)
    if "class" in p:
        total = total + p["class"]["embedding"][label]
    return dense(p["modulation"], silu(total)).reshape(6, width)


# The model


def block(p, config, x, modulation, flipped):
    """One autoregressive block: x [N, D] -> (u [N, D], log|det du/dx|).

    A token's shift and scale depend on the tokens before it.
    """
    order = np.arange(len(x))[:: -1 if flipped else 1]  # the image's places in the block's order
    inputs = np.concatenate([p["start"][None], dense(p["embed"], x[order[:-1]])])
    if config.positions == "learned":
        inputs = inputs + p["positions"]["table"][order]
    hidden = transformer(p["stack"], config, config.transporter_layers, inputs, modulation, True,
                         order)
    m, g = np.split(dense(p["project"], layer_norm(hidden, p["norm"]["scale"])), 2, -1)
    g, u = soft_bound(g, config.log_scale_bound), np.zeros(x.shape)
    u[order] = (x[order] - m) * np.exp(-g)
    return u, -np.sum(g)


def transport(params, config, x, t, steps, label):
    """The transporter f_T: x [N, D] at level t < 1 -> (u [N, D], log|det du/dx|)."""
    log_det = 0.0
    if config.transporter_blocks:
        p = params["transporter"]
        modulation = condition(p["condition"], config, config.transporter_width, [t], steps, label)
        for index in range(config.transporter_blocks):
            x, block_log_det = block(p[f"blocks_{index}"], config, x, modulation, index % 2 == 1)
            log_det += block_log_det
    return x, log_det


def predict(params, config, u, t, s, steps, label):
    """The predictor f_P: mean and log-scale of the latent at level s given u at level t > s.

    All are [N, D].
    """
    p, r = params["predictor"], config.data_std
    variance = (1 - t) ** 2 * r**2 + t**2  # of x_t, for Gaussian data
    inputs = dense(p["embed"], u / math.sqrt(variance))
    if config.positions == "learned":
        inputs = inputs + p["positions"]["table"]
    modulation = condition(p["condition"], config, config.width, [t, s], steps, label)
    hidden = transformer(p["stack"], config, config.predictor_layers, inputs, modulation, False,
                         np.arange(len(u)))
    value, delta = np.split(dense(p["project"], layer_norm(hidden, p["norm"]["scale"])), 2, -1)
    delta = soft_bound(delta, 10.0)
    if config.head == "direct":
        return value, delta
    a, b, c = posterior(s, t)
    spread = r * t / math.sqrt(variance)  # r_t, the deviation of x given x_t for Gaussian data
    clean = (1 - t) * r**2 / variance * u + spread * value  # its mean, and what the network adds
    return a * u + b * clean, math.log(math.sqrt(c**2 + b**2 * spread**2)) + delta


def float64(params):
    """The nested dict of parameters in float64."""
    return {name: float64(child)
            for name, child in params.items()} if isinstance(params, dict) else np.float64(params)


def trajectory_nll(params, config, xs, t, steps, label):
    """The terms of -log p(x_k | x_{k+1}), k = 0..T-1, of one trajectory, T dicts.

    xs: [K, N, D] at levels t [K]. -log p = quadratic + log_scale - log_det + constant.
    """
    params, xs, t = float64(params), np.float64(xs), np.float64(t)
    last = len(t) - 1
    moved = [transport(params, config, xs[k], t[k], steps, label) for k in range(last)]
    latents = [u for u, _ in moved] + [xs[last]]  # pure noise is its own latent
    factors = []
    for k in range(last):
        mean, log_sigma = predict(params, config, latents[k + 1], t[k + 1], t[k], steps, label)
        factors.append({
            "quadratic": 0.5 * np.sum(((latents[k] - mean) / np.exp(log_sigma)) ** 2),
            "log_scale": np.sum(log_sigma), "log_det": moved[k][1],
            "constant": 0.5 * LOG_2PI * mean.size})
    return factors


def nll(factor):
    """One factor's -log p(x_k | x_{k+1}) from its terms."""
    return factor["quadratic"] + factor["log_scale"] - factor["log_det"] + factor["constant"]


def log_weight(params, config, xs, x, t, steps, label, pixel_levels):
    """log w of one trajectory xs [K, N, D] of clean x [N, D] at levels t [K].

    Pixels, V > 0: log p(x | x_0) + log p(x_0..x_T) - log q(x_0..x_T | x).
    Latents, V = 0: log p(x_0..x_T) - log q(x_1..x_T | x_0).
    """
    xs, x, t = np.float64(xs), np.float64(x), np.float64(t)
    total = -sum(nll(factor) for factor in trajectory_nll(params, config, xs, t, steps, label))
    total += np.sum(log_normal(xs[-1], 0.0, 1.0))
    if pixel_levels:
        total += np.sum(log_bin(x, xs[0] / (1 - t[0]), t[0] / (1 - t[0]), pixel_levels))
    return total - forward_log_density(xs, x, t, pixel_levels > 0)
