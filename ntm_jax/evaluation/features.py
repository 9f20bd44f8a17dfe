"""Scores of generated images against real ones: Frechet distance, precision and recall of features, and the extractors of these.

n, m count real and generated images, d is the features' width; H, W, C image height, width, channels. Only with Inception's features is the
Frechet distance an FID: pixels and the small classifier are proxies, whose scores compare models of one data set and nothing else.
"""

import dataclasses
import functools
import hashlib
import io
import warnings
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import plots

_BATCH = 64  # images that an extractor takes at once
_WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Images [n, H, W, C] uint8, the source's values 0..levels-1 -> features [n, d] float32.

    digest: of what defines it; scores compare only where it is the same. proxy: its Frechet distance is no FID. compute: of one batch.
    """

    name: str
    digest: str
    proxy: bool
    compute: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)

    def __call__(self, images) -> np.ndarray:
        return np.concatenate([self.compute(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)])


def make_extractor(name: str, source: Source, inception_weights: str | None = None) -> Extractor:
    """The extractor called pixels, cnn or inception, for images like those of `source`, the training split."""
    if not source.levels:
        raise UserError(f"{source.name} holds latents, and image scores are of pixels: set config.evaluate.features=none")
    match name:
        case "pixels":
            return pixels(source.levels)
        case "cnn":
            return cnn(source)
        case "inception":
            if source.image_shape[-1] not in (1, 3):
                raise UserError(f"{source.name} has images of {source.image_shape[-1]} channels, and Inception takes 1 or 3: "
                                "set config.evaluate.features=pixels")
            if not inception_weights:
                raise UserError(f"config.evaluate.features=inception needs its weights: give --inception_weights=FILE, {_WEIGHTS}")
            return inception(inception_weights, source.levels)
    raise UserError(f"config.evaluate.features={name!r} is not known: expected pixels, cnn or inception")


def pixels(levels: int) -> Extractor:
    """The pixels in [0, 1], d = H W C."""
    def compute(images):
        return images.reshape(len(images), -1).astype(np.float32) / (levels - 1)

    return Extractor("pixels", _digest(f"pixels {levels}".encode()), True, compute)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


_SIDE, _RECORDS = 32, 20_000  # the classifier's: larger images are shrunk to this side; read of the training split at most
_STEPS, _TRAIN_BATCH, _RATE = 1_000, 64, 3e-3


class _Classifier(nn.Module):
    """Images [n, h, w, C] -> (features [n, 64], logits [n, classes]): two convolutions of stride 2, a dense layer and the logits."""

    classes: int

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, precision="highest")  # or else the features would be bfloat16's on a TPU
        for width in (16, 32):
            x = nn.gelu(dense(width)(_patches(x)))
        features = nn.gelu(dense(64)(x.reshape(len(x), -1)))
        return features, dense(self.classes)(features)


def _patches(x):
    """[n, h, w, c] -> the 3 x 3 neighbourhoods of every other pixel, [n, ceil(h/2), ceil(w/2), 9 c].

    With a dense layer a convolution; XLA's own is many times slower inside a loop on a CPU.
    """
    height, width = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    x = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
    return jnp.concatenate([x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i in range(3) for j in range(3)], -1)


@functools.partial(jax.jit, static_argnames="levels")
def _prepare(images, levels):
    """uint8 [n, H, W, C] -> float32 in [-1, 1], no side longer than 32."""
    x = images.astype(jnp.float32) * (2 / (levels - 1)) - 1
    return jax.image.resize(x, (len(x), *(min(side, _SIDE) for side in x.shape[1:3]), x.shape[3]), "linear")


@functools.partial(jax.jit, static_argnames="model")
def _fit(model, seed, x, label, rows):
    """Parameters after one step of Adam for each batch of rows [steps, batch] of images x and their labels."""
    params = model.init(jax.random.key(seed), x[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, len(rows)))

    def loss(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x[batch])[1], label[batch]).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]


@functools.partial(jax.jit, static_argnames=("model", "levels"))
def _classify(model, levels, params, images):
    return model.apply(params, _prepare(images, levels))


def cnn(source: Source, seed: int = 0) -> Extractor:
    """The 64 penultimate activations of a small classifier, trained here on at most 20,000 images of `source`, evenly spread.

    Every process trains the same one on a device of its own. On one machine and number of threads its digest is always the same.
    """
    if not source.num_classes:
        raise UserError(f"config.evaluate.features=cnn learns classes, and {source.name} has none: set config.evaluate.features=pixels")
    chosen = np.linspace(0, len(source.records) - 1, min(len(source.records), _RECORDS)).astype(int)
    x, label = [], []
    for batch in np.array_split(chosen, -(-len(chosen) // 500)):
        records = [source.records[i] for i in batch]
        x.append(np.asarray(_prepare(np.stack([r["image"] for r in records]), source.levels)))
        label += [r["label"] for r in records]
    rows = np.random.RandomState(seed).randint(len(label), size=(_STEPS, _TRAIN_BATCH))
    data = jax.device_put((np.concatenate(x), np.array(label, np.int32), rows.astype(np.int32)), jax.local_devices()[0])
    model = _Classifier(source.num_classes)
    params = _fit(model, seed, *data)
    # Rounded, since another compilation or number of threads changes last bits: that seldom gives the same classifier another name.
    leaves = [(np.round(leaf, 2) + 0.0).tobytes() for leaf in jax.tree.leaves(jax.device_get(params))]  # -0 + 0 is 0
    digest = _digest(b"".join([f"cnn {source.name} {source.version} {source.levels}".encode(), *leaves]))
    return Extractor("cnn", digest, True, lambda images: np.asarray(_classify(model, source.levels, params, images)[0]))


def inception(weights_file: str, levels: int = 256) -> Extractor:
    """The 2,048 pooled activations of torch-fidelity's 'inception-v3-compat', those of FID, on the CPU, with the user's weights."""
    try:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError("config.evaluate.features=inception needs torch-fidelity, not installed here: pip install -e '.[fid]'") from None
    content, weights = _read_weights(weights_file)
    safe = io.BytesIO()
    torch.save(weights, safe)  # torch-fidelity would unpickle the user's file, or download its own
    safe.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
    except RuntimeError:  # names or shapes are not the network's
        raise UserError(f"--inception_weights={weights_file} is of another network, with {len(weights)} arrays, the first "
                        f"{next(iter(weights))!r}: expected {_WEIGHTS}") from None

    def compute(images):
        images = plots.displayable(images, levels)
        images = np.repeat(images, 3, -1) if images.shape[-1] == 1 else images
        with torch.no_grad():
            return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()

    return Extractor("inception", _digest(content), False, compute)


def _read_weights(path: str) -> tuple[bytes, dict]:
    """A file that torch.save or safetensors wrote -> (its bytes, {name: tensor}); no code in it is run."""
    import safetensors.torch
    import torch

    try:
        content = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--inception_weights={path} cannot be read ({error.strerror}): expected {_WEIGHTS}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a TorchScript file before it refuses it
            weights = (safetensors.torch.load(content) if path.endswith(".safetensors")
                       else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        if not all(isinstance(name, str) and torch.is_tensor(array) for name, array in weights.items()) or not weights:
            raise TypeError
    except Exception:  # torch raises a dozen kinds on a file that is not its own
        raise UserError(f"--inception_weights={path} is no file of weights alone: expected {_WEIGHTS} or its safetensors") from None
    return content, dict(weights)
