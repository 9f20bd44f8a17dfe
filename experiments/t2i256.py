"""Text-to-image NTM at 256 x 256 from scratch: 3.2 billion parameters, for a TPU pod.

Its figures are of latents of 16 x 16 x 32 with 128 text states of width 2048. Shapes come from the
records, which launch/prepare.py writes. Expected: fits v5p:8x8x8 and v6e:16x16 with this mesh
(launch/compile.py). Not trained by us.
"""

from ntm_jax.experiments import default


@default.variants("", smoke_source="mock:16x16x32,text=8x32")
def get_config():
    c = default.get_config()
    c.data.update(
        source="records:/data/t2i256-latents", mock="mock:16x16x32,text=128x2048", batch_size=1024,
        workers=8)
    c.trajectory.update(t_min=0.02, t_min_range=(0.01, 0.05))
    c.model.update(
        width=3072, head_size=128, kv_heads=8, positions="rotary", transporter_width=3072,
        transporter_layers=4, predictor_layers=24, condition="text", dtype="bfloat16",
        remat="dots", scan=True)
    c.train.update(
        steps=500_000, save_every=5000, evaluate_every=25_000, log_every=100, keep=50_000)
    c.optimizer.update(
        learning_rate=1e-4, warmup_steps=5000, weight_decay=1e-4, ema_decay=0.9999)
    c.mesh.fsdp = 16  # with fsdp over all of a large slice, XLA reduces where it could gather
    c.evaluate.batch_size = 1024
    c.sample.guidance = 0.5
    return c
