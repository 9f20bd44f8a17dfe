"""Text-to-image NTM of Twemoji's 1,903 pictures with their names: 32 x 32 pixels, on white.

1,600 pictures train, 303 are held out. Needs `pip install -e '.[emoji]'`: all-MiniLM-L6-v2 encodes
the names. Expected, in 50 minutes of one CPU core: bound 4.82 bits/dim; the picture of a held-out
name is among the five nearest to its sample for 3.6% of names (chance 0.26%).
`:runlocal` is a few steps of a tiny model, in seconds.
"""

from ntm_jax.experiments import default


def get_config(variant: str = "ntm"):
    default.check_variant(__file__, variant, "ntm", "runlocal")
    c = default.get_config()
    c.data.update(
        source="emoji", patch_size=8, image_size=32,
        text="minilm:20")  # the longest name has 18 tokens
    c.trajectory.update(shift=1.5, t_min=0.07, t_min_range=(0.05, 0.09))
    c.model.update(positions="rotary", log_scale_bound=5.0, data_std=0.6, condition="text")
    c.train.log_every = 20
    c.optimizer.weight_decay = 0.3
    c.evaluate.update(batch_size=101, images=303, features="cnn")
    c.sample.guidance = 0.5
    if variant == "runlocal":
        default.shrink(c)
        c.data.update(image_size=16, split="train[:64]")
        c.model.update(
            width=32, head_size=16, kv_heads=2, transporter_width=32, transporter_layers=1,
            predictor_layers=1)
        c.evaluate.update(images=16, features="pixels")
    return c
