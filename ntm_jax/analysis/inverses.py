"""Both inverses of the transporter by batch, tokens and width: timed here, and predicted for chips.

The predictions, and the choice between the two, are those of sampling.inverses.
"""

import itertools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.analysis.benchmark import aligned
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.transporter import INVERSES, Transporter
from ntm_jax.runtime import attention, sharding
from ntm_jax.runtime.chips import Chip, chip_of
from ntm_jax.runtime.chips.gpu import CARDS
from ntm_jax.runtime.chips.tpu import CHIPS
from ntm_jax.runtime.config import Mesh
from ntm_jax.sampling import inverses

SIZES = tuple(itertools.product((16, 64, 256), (64, 256), (1, 8, 32)))  # tokens, width, rows
PREDICTED = tuple(itertools.product((16, 256, 1024), (64, 256, 2048), (1, 16, 256)))
PREDICTED_CHIPS = ("v5e", "v5p", "v6e", "h100")
SECONDS = 0.3  # of each timing, at least


def model(tokens: int, width: int) -> ModelConfig:
    """The sizes of a transporter of one block of two layers, at the precision of exact inverses."""
    side, head = int(tokens**0.5), min(width, 128) // 2 if width < 2048 else 128
    return ModelConfig(
        grid=(side, tokens // side), dim=16, num_classes=0, steps=(4,), width=width,
        head_size=head, kv_heads=width // head, mlp_ratio=4, positions="rotary",
        transporter_width=width, transporter_blocks=1, transporter_layers=2, predictor_layers=1,
        head="direct", log_scale_bound=2.0, data_std=1.0, dtype=jnp.float32,
        transporter_dtype=jnp.float32, remat="none", scan=False, flat=True).exact()


def predicted() -> list[dict]:
    """The predicted seconds of both inverses of a block on PREDICTED_CHIPS, and the choice."""
    chips = {name: CHIPS[name] if name in CHIPS else CARDS[name].chip for name in PREDICTED_CHIPS}
    return [{"tokens": tokens, "width": width, "rows": rows,
             "chips": {name: _prediction(tokens, width, rows, chip)
                       for name, chip in chips.items()}}
            for tokens, width, rows in PREDICTED]


def _prediction(tokens: int, width: int, rows: int, chip: Chip) -> dict:
    found = inverses.seconds(model(tokens, width), rows, chip)
    return found | {"auto": inverses.faster(found)}


def measured(runs: int) -> list[dict]:
    """Seconds of both inverses of a block on one device of this machine, at all SIZES.

    On a CPU they are CPU seconds, which other work on the machine disturbs less. The parameters are
    random; the parallel inverse's time is that of a sweep times inverses.typical_sweeps.
    """
    mesh = sharding.make_mesh(Mesh(slices=1, data=1, fsdp=1, tensor=1, sequence=1),
                              jax.devices()[:1])
    return [_measure(*size, runs, mesh) for size in SIZES]


def _measure(tokens: int, width: int, rows: int, runs: int, mesh) -> dict:
    config = model(tokens, width)
    module = Transporter(config, attention.choose(mesh, tokens))
    random = np.random.default_rng(0)
    u = random.normal(size=(rows, tokens, config.dim)).astype(np.float32)
    inputs = u, np.full(rows, 0.3, np.float32), np.full(rows, 4), np.zeros(rows, np.int32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *(a[:1] for a in inputs)))
    kernel = params["params"]["blocks_0"]["project"]["kernel"]  # 0: the identity, in one sweep
    noise = 0.1 * random.normal(size=kernel.shape) / width**0.5
    params["params"]["blocks_0"]["project"]["kernel"] = noise.astype(np.float32)
    found, sweeps = {}, 0
    for how in INVERSES:
        invert = jax.jit(lambda params, *inputs, how=how: module.apply(
            params, *inputs, how=how, method=Transporter.inverse))
        with sharding.use(mesh):
            sweeps = int(np.max(invert(params, *inputs)[1])) if how == "parallel" else sweeps
            found[how] = _least(lambda invert=invert: invert(params, *inputs), runs)
    found["sweep"] = found["parallel"] / sweeps
    found["parallel"] = found["sweep"] * inverses.typical_sweeps(tokens)
    auto = inverses.choose("auto", config, rows, mesh)
    better = min(found["parallel"], found["sequential"])
    predicted = inverses.seconds(config, rows, chip_of(mesh.devices.flat[0]))
    found |= {"tokens": tokens, "width": width, "rows": rows}
    return found | {"auto": auto, "lost": found[auto] / better - 1, "predicted": predicted}


def _least(once, runs: int) -> float:
    """The least seconds of a call, of `runs` timings."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(once())
    least, spent, count = float("inf"), 0.0, 0
    while count < runs or spent < SECONDS:
        begin = clock()
        jax.block_until_ready(once())
        seconds = clock() - begin
        least, spent, count = min(least, seconds), spent + seconds, count + 1
    return least


def measured_table(rows: list[dict]) -> str:
    """The text of the rows of `measured`, in milliseconds."""
    lines: list[tuple[str, ...]] = [(
        "tokens", "width", "rows", "sequential", "a sweep", "break-even", "parallel", "auto",
        "loses", "predicted")]
    for row in rows:
        typical = inverses.typical_sweeps(row["tokens"])
        lines.append((
            *_sizes(row), _ms(row["sequential"]), _ms(row["sweep"]),
            f"{row['sequential'] / row['sweep']:.1f} sweeps",
            f"{_ms(row['parallel'])} in {typical:g}", row["auto"], f"{row['lost']:.0%}",
            f"{_ms(row['predicted']['sequential'])}, {_ms(row['predicted']['parallel'])}"))
    return aligned(lines, 0)


def predicted_table(rows: list[dict]) -> str:
    """The text of the rows of `predicted`: milliseconds, sequential / parallel, and the choice."""
    lines: list[tuple[str, ...]] = [("tokens", "width", "rows", *PREDICTED_CHIPS)]
    for row in rows:
        cells = (f"{_ms(c['sequential'])} / {_ms(c['parallel'])} {c['auto'][0]}"
                 for c in row["chips"].values())
        lines.append((*_sizes(row), *cells))
    return aligned(lines, 0)


def _sizes(row: dict) -> tuple[str, ...]:
    return tuple(f"{row[name]:,}" for name in ("tokens", "width", "rows"))


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
