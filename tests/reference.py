"""The likelihood of one example in float64 NumPy and plain loops.

It is written from the mathematics, docs/concepts.md, sections 3, 4 and 9, and shares no code with
ntm_jax, so that the two agree only where both are right.

Symbols: T steps, K = T+1 levels ascending, N tokens, D token channels, W width, H heads,
G key-value heads, C head size, V pixel levels. `params` is a checkpoint's nested dict, with a
network's layers stacked along a first axis; `config` has the attributes of core.config.ModelConfig.
Units are nats. Models are conditioned on a class or nothing, not on text.
"""

import math

import numpy as np
from scipy.special import log_ndtr

LOG_2PI = math.log(2 * math.pi)


# The forward process


def log_normal(x, mean, scale):
    """log N(x; mean, scale^2) of numbers."""
    return -0.5 * ((x - mean) / scale) ** 2 - math.log(scale) - 0.5 * LOG_2PI


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
    xs, x, t = np.float64(xs), np.float64(x), np.float64(t)
    total = 0.0
    for n in range(x.shape[0]):
        for d in range(x.shape[1]):
            if pixels:
                total += log_normal(xs[0, n, d], (1 - t[0]) * x[n, d], t[0])
            for k in range(len(t) - 1):
                a, sig = transition(t[k], t[k + 1])
                total += log_normal(xs[k + 1, n, d], a * xs[k, n, d], sig)
    return total


def log_bin(x, mean, scale, pixel_levels):
    """Log-probability of the bin of x, one of V values from -1 to 1, under N(mean, scale^2).

    The outermost bins are open.
    """
    v = round((x + 1) / 2 * (pixel_levels - 1))
    low, high = -math.inf, math.inf
    if v > 0:
        low = ((2 * v - 1) / (pixel_levels - 1) - 1 - mean) / scale
    if v < pixel_levels - 1:
        high = ((2 * v + 1) / (pixel_levels - 1) - 1 - mean) / scale
    # the same probability in the lower tail, where it is a difference of small numbers and not of
    # ones
    if low > 0:
        low, high = -high, -low
    return log_ndtr(high) + math.log1p(-math.exp(log_ndtr(low) - log_ndtr(high)))


# The layers of a network


def dense(p, x):
    """A linear layer on a vector [inputs] -> [outputs]."""
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def layer_norm(x, scale=1.0):
    """A vector [W] to mean 0 and variance 1."""
    centred = x - np.mean(x)
    return scale * centred / math.sqrt(np.mean(centred**2) + 1e-6)


def rms_norm(x, scale):
    """A head's query or key [C] to mean square 1."""
    return scale * x / math.sqrt(np.mean(x**2) + 1e-6)


def gelu(x):
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def soft_bound(g, bound):
    return bound * np.tanh(g / bound)


def rotate(x, row, column):
    """Rotary position of a head's query or key [C].

    Pairs (i, i + C/2) are rotated, half of them by the row, half by the column.
    """
    half, quarter = len(x) // 2, len(x) // 4
    y = np.zeros(len(x))
    for i in range(half):
        place, j = (row, i) if i < quarter else (column, i - quarter)
        angle = place * 100 ** (-j / quarter)
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def attention(p, config, tokens, causal, order):
    """Tokens, N vectors [W], -> N vectors [W].

    order: each token's row-major place in the image, for rotary positions.
    """
    size, heads, kv_heads = config.head_size, len(tokens[0]) // config.head_size, config.kv_heads
    queries, keys, values = [], [], []  # [N][H or G], vectors [C]
    for x, place in zip(tokens, order, strict=True):
        split = {name: dense(p[name], x).reshape(-1, size) for name in ("query", "key", "value")}
        q = [rms_norm(head, p["query_norm"]["scale"]) for head in split["query"]]
        k = [rms_norm(head, p["key_norm"]["scale"]) for head in split["key"]]
        if config.positions == "rotary":
            row, column = divmod(place, config.grid[1])
            q, k = [rotate(head, row, column)
                    for head in q], [rotate(head, row, column) for head in k]
        queries.append(q)
        keys.append(k)
        values.append(split["value"])
    out = []
    for n in range(len(tokens)):
        seen = range(n + 1) if causal else range(len(tokens))
        results = []
        for head in range(heads):
            group = head // (heads // kv_heads)  # consecutive heads share a key and a value
            scores = np.array([queries[n][head] @ keys[m][group] / math.sqrt(size) for m in seen])
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            results.append(
                sum(weight * values[m][group] for weight, m in zip(weights, seen, strict=True)))
        out.append(dense(p["out"], np.concatenate(results)))
    return out


def pick(p, index):
    """One layer's parameters of a stack."""
    return {name: pick(child, index) for name, child in p.items()} if isinstance(p, dict) else p[
        index]


def transformer(p, config, depth, tokens, modulation, causal, order):
    """`depth` pre-norm layers over N vectors [W]; modulation [6, W]."""
    for index in range(depth):
        layer = pick(p["layers"], index)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation + layer["table"]
        attended = attention(layer["attention"], config, [layer_norm(x) * (1 + scale_1) + shift_1
                                                          for x in tokens], causal, order)
        tokens = [x + (1 + gate_1) * h for x, h in zip(tokens, attended, strict=True)]
        for n, x in enumerate(tokens):
            h = layer_norm(x) * (1 + scale_2) + shift_2
            tokens[n] = x + (1 + gate_2) * dense(layer["down"], gelu(dense(layer["up"], h)))
    return tokens


def sinusoidal(value, width):
    """Cosines and sines [width] of a number at frequencies from 1 down towards 1/10,000."""
    angles = [value * 10_000 ** (-i / (width // 2)) for i in range(width // 2)]
    return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


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
        total = total + dense(p[f"{name}_out"],
                              silu(dense(p[f"{name}_in"], sinusoidal(value, min(inner, 256)))))
    if config.num_classes:
        total = total + p["class"]["embedding"][label]
    return dense(p["modulation"], silu(total)).reshape(6, width)


# The model


def block(p, config, x, modulation, flipped):
    """One autoregressive block: x [N, D] -> (u [N, D], log|det du/dx|).

    A token's shift and scale depend on the tokens before it.
    """
    count = len(x)
    # the image's places in the block's order
    order = list(range(count - 1, -1, -1) if flipped else range(count))
    inputs = [p["start"]] + [dense(p["embed"], x[place]) for place in order[:-1]]
    if config.positions == "learned":
        inputs = [h + p["positions"]["table"][place]
                  for h, place in zip(inputs, order, strict=True)]
    hidden = transformer(p["stack"], config, config.transporter_layers, inputs, modulation, True,
                         order)
    u, log_det = np.zeros(x.shape), 0.0
    for h, place in zip(hidden, order, strict=True):
        output = dense(p["project"], layer_norm(h, p["norm"]["scale"]))
        for d in range(config.dim):
            m, g = output[d], soft_bound(output[config.dim + d], config.log_scale_bound)
            u[place, d] = (x[place, d] - m) * math.exp(-g)
            log_det += -g
    return u, log_det


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
    places = list(range(len(u)))
    variance = (1 - t) ** 2 * r**2 + t**2  # of x_t, for Gaussian data
    inputs = [dense(p["embed"], u[n] / math.sqrt(variance)) for n in places]
    if config.positions == "learned":
        inputs = [h + p["positions"]["table"][n] for h, n in zip(inputs, places, strict=True)]
    modulation = condition(p["condition"], config, config.width, [t, s], steps, label)
    hidden = transformer(p["stack"], config, config.predictor_layers, inputs, modulation, False,
                         places)
    mean, log_sigma = np.zeros(u.shape), np.zeros(u.shape)
    for n in places:
        output = dense(p["project"], layer_norm(hidden[n], p["norm"]["scale"]))
        for d in range(config.dim):
            value, delta = output[d], soft_bound(output[config.dim + d], 10.0)
            if config.head == "direct":
                mean[n, d], log_sigma[n, d] = value, delta
            else:
                a, b, c = posterior(s, t)
                # r_t, the deviation of x given x_t for Gaussian data
                spread = r * t / math.sqrt(variance)
                # its mean, and what the network adds
                clean = (1 - t) * r**2 / variance * u[n, d] + spread * value
                mean[n, d] = a * u[n, d] + b * clean
                log_sigma[n, d] = math.log(math.sqrt(c**2 + b**2 * spread**2)) + delta
    return mean, log_sigma


def float64(params):
    """The nested dict of parameters in float64."""
    return {name: float64(child)
            for name, child in params.items()} if isinstance(params, dict) else np.float64(params)


def trajectory_nll(params, config, xs, t, steps, label):
    """The terms of -log p(x_k | x_{k+1}), k = 0..T-1, of one trajectory, T dicts.

    xs: [K, N, D] at levels t [K]. -log p = quadratic + log_scale - log_det + constant.
    """
    if getattr(config, "text_width", 0):
        raise ValueError("a model of text is not covered")
    params, xs, t = float64(params), np.float64(xs), np.float64(t)
    last = len(t) - 1
    latents, log_dets = [], []
    for k in range(last):
        u, log_det = transport(params, config, xs[k], t[k], steps, label)
        latents.append(u)
        log_dets.append(log_det)
    latents.append(xs[last])  # pure noise is its own latent
    factors = []
    for k in range(last):
        mean, log_sigma = predict(params, config, latents[k + 1], t[k + 1], t[k], steps, label)
        quadratic = log_scale = constant = 0.0
        for n in range(xs.shape[1]):
            for d in range(xs.shape[2]):
                quadratic += 0.5 * ((latents[k][n, d] - mean[n, d])
                                    / math.exp(log_sigma[n, d])) ** 2
                log_scale += log_sigma[n, d]
                constant += 0.5 * LOG_2PI
        factors.append({"quadratic": quadratic, "log_scale": log_scale, "log_det": log_dets[k],
                        "constant": constant})
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
    for n in range(x.shape[0]):
        for d in range(x.shape[1]):
            total += log_normal(xs[-1, n, d], 0.0, 1.0)
            if pixel_levels:
                total += log_bin(x[n, d], xs[0, n, d] / (1 - t[0]), t[0] / (1 - t[0]), pixel_levels)
    return total - forward_log_density(xs, x, t, pixel_levels > 0)
