"""The features of images by which samples are compared with real images, and their extractors.

Symbols: n images; H, W, C image height, width, channels; h, w shrunk height, width; d features; V
pixel levels. Only with Inception's features is the Frechet distance an FID. Pixels and the small
classifier are proxies, whose scores compare models of one data set and nothing else.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import inception as network
from ntm_jax.runtime import plots, sharding

_BATCH = 64  # images that an extractor takes at once
_PER_DEVICE = 25  # images that each device takes at once, of Inception


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A function of images [n, H, W, C] uint8, 0..V-1, -> features [n, d] float32."""

    name: str
    digest: str  # of all that defines the features; scores compare only where it is the same
    proxy: bool  # True where the Frechet distance of the features is not an FID
    compute: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)  # for one batch
    batch: int = _BATCH  # images at once

    def __call__(self, images) -> np.ndarray:
        batches = [images[i : i + self.batch] for i in range(0, len(images), self.batch)]
        return np.concatenate([self.compute(batch) for batch in batches])


def make_extractor(name: str, source: Source, pixel_levels: int, inception_weights: str = "",
                   mesh=None) -> Extractor:
    """The extractor called pixels, cnn or inception, for pictures like those of the training split.

    source: the training split, which the classifier learns. pixel_levels: V of the pictures.
    inception_weights: the file of Inception's weights. mesh: of the devices that Inception runs on.
    Raises UserError where the extractor does not fit the images.
    """
    if name == "pixels":
        return pixels(pixel_levels)
    if name == "cnn":
        return cnn(source)
    if not inception_weights:
        raise UserError("config.evaluate.features=inception needs its weights: give "
                        "--inception_weights=FILE of launch.evaluate, or "
                        f"--config.evaluate.inception_weights=FILE of a run, {network.WEIGHTS}")
    return inception(inception_weights, mesh, pixel_levels)


def pixels(pixel_levels: int) -> Extractor:
    """The extractor of the pixels themselves in [0, 1], d = H W C."""
    return Extractor(
        "pixels", _digest(f"pixels {pixel_levels}".encode()), True,
        lambda images: images.reshape(len(images), -1).astype(np.float32) / (pixel_levels - 1))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


_SIDE = 32  # larger images are shrunk to this side for the classifier
_RECORDS = 20_000  # at most so many records of the training split train the classifier
_STEPS, _TRAIN_BATCH, _RATE = 1_000, 64, 3e-3


class _Classifier(nn.Module):
    """Images [n, h, w, C] -> (features [n, 64], logits [n, classes]).

    Two convolutions of stride 2, a dense layer and the logits.
    """

    classes: int

    @nn.compact
    def __call__(self, x):
        # The default precision would round features to bfloat16 on a TPU.
        dense = functools.partial(nn.Dense, precision="highest")
        for width in (16, 32):
            x = nn.gelu(dense(width)(_patches(x)))
        features = nn.gelu(dense(64)(x.reshape(len(x), -1)))
        return features, dense(self.classes)(features)


def _patches(x):
    """[n, h, w, c] -> 3 x 3 neighbourhoods of every other pixel, [n, ceil(h/2), ceil(w/2), 9 c].

    A dense layer after it makes a convolution; XLA's own is many times slower in a loop on a CPU.
    """
    height, width = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    x = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
    return jnp.concatenate([x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
                            for i in range(3) for j in range(3)], -1)


@functools.partial(jax.jit, static_argnames="pixel_levels")
def _prepare(images, pixel_levels):
    """uint8 [n, H, W, C] -> float32 in [-1, 1], no side longer than 32."""
    x = images.astype(jnp.float32) * (2 / (pixel_levels - 1)) - 1
    sides = (min(side, _SIDE) for side in x.shape[1:3])
    return jax.image.resize(x, (len(x), *sides, x.shape[3]), "linear")


@functools.partial(jax.jit, static_argnames="model")
def _fit(model, seed, x, label, rows):
    """The classifier's parameters after one step of Adam for each batch of images.

    x: images [n, h, w, C]; label: [n]; rows: the batches as indices [steps, batch].
    """
    params = model.init(jax.random.key(seed), x[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, len(rows)))

    def loss(params, batch):
        logits = model.apply(params, x[batch])[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label[batch]).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]


@functools.partial(jax.jit, static_argnames=("model", "pixel_levels"))
def _classify(model, pixel_levels, params, images):
    return model.apply(params, _prepare(images, pixel_levels))


def classify(source: Source, params, images) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, 64], logits [n, classes]) of images [n, H, W, C], 0..V-1.

    params: of the classifier that fit_classifier trained for the source.
    """
    model, batches = _Classifier(source.num_classes), range(0, len(images), _BATCH)
    # The last batch is repeated to the size of all others, so that one program serves all.
    parts = [_classify(model, source.pixel_levels, params,
                       np.resize(images[i : i + _BATCH], (_BATCH, *images.shape[1:])))
             for i in batches]
    features, logits = (np.concatenate(values)[: len(images)]
                        for values in zip(*jax.device_get(parts), strict=True))
    return features, logits


def check_classes(source: Source) -> None:
    """Raises UserError for a source that no classifier can learn."""
    if not (source.num_classes and source.pixel_levels):
        missing = "classes" if source.pixel_levels else "pixels"
        raise UserError(f"a classifier learns classes from pixels, and {source.name} has no "
                        f"{missing}: compare samples by features=pixels, or by another reward")


def abstract_classifier(source: Source) -> dict:
    """The shapes of the parameters of fit_classifier's classifier."""
    image = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    x = jax.eval_shape(lambda image: _prepare(image, source.pixel_levels), image)
    return jax.eval_shape(_Classifier(source.num_classes).init, jax.random.key(0), x)


def fit_classifier(source: Source, seed: int) -> dict:
    """The parameters of a small classifier of the source's classes, trained here.

    At most 20,000 records, evenly spread, are learned from, without those of unknown class. Every
    process trains the same classifier on one of its own devices. Raises UserError for a source
    without classes or pixels.
    """
    check_classes(source)
    images, label = [], []
    chosen = source.evenly_spread(_RECORDS)
    for batch in np.array_split(chosen, -(-len(chosen) // 500)):
        records = [source.records[i] for i in batch]
        images.append(_prepare(np.stack([r["image"] for r in records]), source.pixel_levels))
        label += [r["label"] for r in records]
    label = np.array(label, np.int32)
    x, label = np.concatenate(images)[label >= 0], label[label >= 0]
    rows = np.random.RandomState(seed).randint(len(label), size=(_STEPS, _TRAIN_BATCH))
    data = jax.device_put((x, label, rows.astype(np.int32)), jax.local_devices()[0])
    return _fit(_Classifier(source.num_classes), seed, *data)


def cnn(source: Source, seed: int = 0) -> Extractor:
    """The extractor of the 64 penultimate activations of a small classifier, which it trains here.

    source: the training split; see fit_classifier. On one machine with one number of threads its
    digest is always the same.
    """
    params = fit_classifier(source, seed)
    # Rounded, since another compilation or number of threads changes last bits, which so seldom
    # change the digest. Adding 0 turns -0 into 0.
    leaves = [np.round(leaf, 2) + 0.0 for leaf in jax.tree.leaves(jax.device_get(params))]
    name = f"cnn {source.name} {source.version} {source.pixel_levels}".encode()
    digest = _digest(b"".join([name, *(leaf.tobytes() for leaf in leaves)]))
    return Extractor("cnn", digest, True, lambda images: classify(source, params, images)[0])


def inception(weights_file: str, mesh, pixel_levels: int = 256) -> Extractor:
    """The extractor of FID's features: the 2,048 pooled activations of an Inception network.

    The images of a batch are split over all devices of the mesh, and every process must call it
    with the same ones. Raises UserError like inception.read_weights.
    """
    params, digest = network.read_weights(weights_file)
    params = jax.device_put(params, sharding.replicated(mesh))
    split = sharding.by_device(mesh)

    def compute(images):
        channels = images.shape[-1]
        if channels not in (1, 3):
            raise UserError("Inception's features are of images with 1 or 3 channels, and these "
                            f"have {channels}: set config.evaluate.features to pixels or cnn")
        shown = plots.displayable(images, pixel_levels)
        # Repeated to a power of two on each device, or to a whole batch: few programs serve all.
        own = 1 << (-(-len(shown) // mesh.size) - 1).bit_length()
        size = min(own, _PER_DEVICE) * mesh.size
        padded = np.resize(shown, (size, *shown.shape[1:]))
        batch = jax.make_array_from_callback(padded.shape, split, lambda own: padded[own])
        return sharding.to_host(network.pool_features(params, batch))[: len(images)]

    return Extractor("inception", digest, False, compute, _PER_DEVICE * mesh.size)
