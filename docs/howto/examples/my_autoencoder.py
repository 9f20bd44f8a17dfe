"""An autoencoder without parameters: sample.autoencoder=squares:2."""

from ntm_jax.data import autoencoder, transforms


def open_squares(argument: str) -> autoencoder.Autoencoder:
    """Each square of pixels is one position with many channels; nothing is lost."""
    side = int(argument or 2)

    def encode(params, images):
        count, height, width, _ = images.shape
        tokens = transforms.patchify(autoencoder.scaled(images), side)
        return tokens.reshape(count, height // side, width // side, -1)

    def decode(params, latents):
        count, height, width, channels = latents.shape
        tokens = latents.reshape(count, height * width, channels)
        return transforms.unpatchify(tokens, (side * height, side * width, 3), side)

    return autoencoder.Autoencoder(f"squares:{side}", side, 3 * side**2, {}, encode, decode)


autoencoder.register("squares", open_squares)
