"""Loaded images and captions to the examples that records hold: pixels or latents, and text states.

S image side, C channels, M, E text tokens and width.
"""

import itertools
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np

from ntm_jax.data import text
from ntm_jax.data.autoencoder import open_autoencoder
from ntm_jax.data.records import Layout
from ntm_jax.errors import UserError
from ntm_jax.runtime import autoencode, sharding
from ntm_jax.runtime.config import Mesh
from ntm_jax.tools.prepare.captioned import Input, Loaded
from ntm_jax.tools.prepare.plan import PrepareOptions
from ntm_jax.tools.prepare.shards import Tally


class Encoder:
    """Encodes images and captions as the options say, images on all devices of the process.

    layout: of the records, without the mean and std of latents. digest: SHA-256 of the
    autoencoder's files, '' without one.

    Raises UserError for latents or a text encoder that are unknown or not there.
    """

    def __init__(self, options: PrepareOptions, given: Input):
        if options.text and not given.captioned:
            raise UserError(f"--text={options.text} encodes captions, and --input={options.input} "
                            "has none: leave --text out")
        size = options.image_size
        self._autoencoder, self.digest, shape = None, "", (size, size, 3)
        if options.autoencoder:
            self._autoencoder = open_autoencoder(options.autoencoder)
            self._mesh = sharding.make_mesh(Mesh(), jax.local_devices())
            self.digest = self._autoencoder.digest
            shape = self._autoencoder.latent_shape(size, size)
        self._text = text.open_encoder(options.text) if options.text else None
        self.layout = Layout(
            shape,
            pixel_levels=0 if options.autoencoder else 256,
            num_classes=len(given.classes),
            text_tokens=self._text.tokens if self._text else 0,
            text_width=self._text.width if self._text else 0,
            text=options.text,
            captions=given.captioned,
        )

    def examples(
        self, loaded: Iterator[Loaded], tally: Tally, batch: int, flip: bool
    ) -> Iterator[dict[str, Any]]:
        """The examples of a shard, `batch` images encoded at a time, counted in `tally`."""
        channels = self.layout.image_shape[-1]
        sums, squares = np.zeros(channels), np.zeros(channels)
        while several := list(itertools.islice(loaded, batch)):
            tally.images += len(several)
            tally.bad += [[item.key, item.bad] for item in several if item.bad]
            good = [item for item in several if not item.bad]
            if not good:
                continue
            for item in good:
                if item.null and self.layout.captions:
                    tally.null_captions[item.null] += 1
            images = np.stack([cast(np.ndarray, item.image) for item in good])
            views = [images, images[:, :, ::-1]] if flip else [images]
            views = [self._encode_images(view, batch) for view in views]
            states = []
            if self._text:
                states, cut = self._text.encode([item.caption for item in good])
                tally.cut_captions += sum(cut)
            for i, item in enumerate(good):
                example: dict[str, Any] = {}
                if self.layout.captions:
                    example["caption"] = item.caption
                if self.layout.num_classes:
                    example["label"] = item.label
                if states:
                    example["text"] = states[i]
                for view in views:
                    tally.records += 1
                    if self._autoencoder:
                        values = view[i].reshape(-1, channels).astype(np.float64)
                        sums, squares = sums + values.sum(0), squares + (values**2).sum(0)
                    yield {"image": view[i], **example}
        if self._autoencoder:
            tally.sums, tally.squares = sums.tolist(), squares.tolist()

    def _encode_images(self, images: np.ndarray, batch: int) -> np.ndarray:
        """[n, S, S, 3] uint8 -> the same, or latents [n, h, w, C] float16, `batch` at a time."""
        if self._autoencoder is None:
            return images
        return autoencode.encode(self._autoencoder, images, self._mesh, batch).astype(np.float16)
