"""Class-conditional NTM of ImageNet at 256 x 256: 1.4 billion parameters, for a TPU pod.

Its figures are of latents of 16 x 16 x 32, the paper's, such as those of the public AutoencoderKL
REPA-E/e2e-vavae-hf (docs/howto/imagenet.md). Shapes come from the records. Expected: fits
v5p:4x4x4, v5p:8x8x8, v5e:16x16 and v6e:16x16 with this mesh (launch/compile.py). Not trained by us.
The variant `pixels` needs neither latents nor an autoencoder.
"""

from ntm_jax.experiments import default


@default.variants("", "pixels")
def get_config(variant: str):
    c = default.get_config()
    c.data.update(
        source="records:/data/imagenet256-latents", mock="mock:16x16x32,classes=1000",
        batch_size=1024, workers=8)
    c.trajectory.update(t_min=0.02, t_min_range=(0.01, 0.05))
    c.model.update(
        width=2048, head_size=128, kv_heads=16, positions="rotary", transporter_width=2048,
        predictor_layers=24, dtype="bfloat16", remat="dots", scan=True)
    c.train.update(
        steps=250_000, save_every=5000, evaluate_every=25_000, log_every=100, keep=50_000)
    c.optimizer.update(
        learning_rate=1e-4, warmup_steps=5000, weight_decay=1e-4, ema_decay=0.9999)
    c.mesh.fsdp = 16  # with fsdp over all of a large slice, XLA reduces where it could gather
    c.evaluate.batch_size = 1024
    c.sample.guidance = 0.5
    if variant == "pixels":
        c.data.update(
            source="tfds:imagenet2012", mock="mock:256x256x3,levels=256,classes=1000",
            patch_size=16, image_size=256)
        c.model.data_std = 0.5  # of pixels on [-1, 1]
        c.evaluate.split = "validation"
    return c
