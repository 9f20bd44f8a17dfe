"""Captioned images as records to train on: python -m launch.prepare --input=folder:/data/photos --out=/data/records --image_size=256.

Writes sharded ArrayRecord of pixels or latents, text states, captions and labels, and a manifest. Stopped at any time, the same command
goes on. Given again when all is done, it verifies every shard and makes again what is missing, damaged or exchanged. Several processes
need nothing of each other but the folder: give each --num_processes and its own --process_id.
"""

import dataclasses
import sys

from absl import flags

from . import program

flags.DEFINE_string("input", None, "folder:PATH (with metadata.jsonl or .csv), tfds:NAME_OR_BUILDER_DIR or tars:GLOB (webdataset).")
flags.DEFINE_string("out", None, "The folder of the records: a new one, or that of the same call, stopped.")
flags.DEFINE_string("captions", "", "Of a folder: its .jsonl or .csv of file_name, caption and, if wished, label.")
flags.DEFINE_bool("follow_outside", False, "Of a folder: read files that its list names outside it, by ../, an absolute path or a link.")
flags.DEFINE_string("caption_feature", "caption", "Of tfds: the feature with the caption, a/b for b in a; the first of several.")
flags.DEFINE_string("tfds_split", "train", "Of tfds: the records to take; --test cuts them again.")
flags.DEFINE_integer("image_size", 256, "The side of the images: their central square is resized to it.", lower_bound=1)
flags.DEFINE_bool("flip", False, "After every training image its mirror image: twice the records.")
flags.DEFINE_string("latents", "", "flux2:FOLDER, the autoencoder (diffusers' layout) whose latents are kept in place of pixels.")
flags.DEFINE_enum("latent_scale", "measured", ["measured", "encoder"],
                  "Latents are read at mean 0 and variance 1 by channel, or as the encoder gives them, which FLUX.2 was trained on.")
flags.DEFINE_string("text", "", "The encoder of captions, as --config.data.text; none: captions alone.")
flags.DEFINE_float("test", 0.05, "The share of the images held out as the split test, or, from 1 on, their number.", lower_bound=0)
flags.DEFINE_integer("shard_size", 2000, "Images a shard.", lower_bound=1)
flags.DEFINE_float("max_bad", 0.01, "The share of images that may be bad, and are left out.", lower_bound=0, upper_bound=1)
flags.DEFINE_integer("batch", 32, "Images encoded at a time.", lower_bound=1)
flags.DEFINE_integer("workers", 0, "Processes that decode images; 0: this one does.", lower_bound=0)
flags.DEFINE_integer("num_processes", 1, "How many calls share the work.", lower_bound=1)
flags.DEFINE_integer("process_id", 0, "This call's number, from 0.", lower_bound=0)
flags.mark_flags_as_required(["input", "out"])


def main():
    from ntm_jax.data import prepare

    f = program.FLAGS
    choices = prepare.Choices(**{field.name: f[field.name].value for field in dataclasses.fields(prepare.Choices)})
    try:
        prepare.prepare(choices, f.out, f.max_bad, f.batch, f.workers, f.num_processes, f.process_id, f.follow_outside)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")


if __name__ == "__main__":
    program.run(main)
