"""Makes records to train on from images with captions, labels or both.

    python -m launch.prepare --input=folder:/data/photos --out=/data/records --image_size=256

Writes sharded ArrayRecord files of pixels or latents, text states, captions and labels, and a
manifest. The same command resumes a stopped preparation. Several processes share the work through
the folder alone: give each --num_processes and its own --process_id.

    python -m launch.prepare --verify=/data/records

compares every shard of finished records with the SHA-256 in their manifest.
"""

from absl import flags

from ntm_jax.errors import UserError

from . import program

flags.DEFINE_string(
    "input", None, "folder:PATH with metadata.jsonl, metadata.csv, a .txt beside each image or a "
    "sub-folder for each class, tfds:NAME_OR_BUILDER_DIR, or tars:GLOB (webdataset, or tars of "
    "classes such as ILSVRC2012_img_train.tar).")
flags.DEFINE_string(
    "test_input", "", "The input of the split test, such as the official validation set; then all "
    "images of --input are in train.")
flags.DEFINE_string(
    "test_labels", "", "For a --test_input without labels: a file with the class of each image on "
    "a line, in the order of their names, or ILSVRC2012_devkit_t12.tar.gz.")
flags.DEFINE_string("test_tfds_split", "validation", "For a --test_input of tfds: the split.")
flags.DEFINE_string(
    "out", None, "The records' folder: a new one, or that of a stopped preparation.")
flags.DEFINE_string(
    "captions", "", "For a folder: a .jsonl or .csv file with file_name, caption and, optionally, "
    "label; by default metadata.jsonl or metadata.csv in the folder, or else the .txt beside each "
    "image.")
flags.DEFINE_bool(
    "follow_outside", False, "For a folder: also reads files outside it that its list names by "
    "../, an absolute path or a link.")
flags.DEFINE_string(
    "caption_feature", "caption", "For tfds: the feature that holds the caption; a/b is feature b "
    "in a. The first of several captions is used.")
flags.DEFINE_string(
    "tfds_split", "train", "For tfds: the split to read.")
flags.DEFINE_integer(
    "image_size", 256, "Side of the images: the central square is resized to it.", lower_bound=1)
flags.DEFINE_bool(
    "flip", False, "Adds the mirror image of every training image, which doubles the records.")
flags.DEFINE_string(
    "autoencoder", "", "Writes the latents of an autoencoder in diffusers' layout, kl:FOLDER or "
    "flux2:FOLDER; pixels by default.")
flags.DEFINE_enum(
    "latent_scale", "measured", ["measured", "encoder"], "measured normalises each latent channel "
    "to mean 0 and variance 1; encoder keeps the autoencoder's scale, as FLUX.2 expects.")
flags.DEFINE_string(
    "text", "", "The captions' text encoder, as --config.data.text_encoder; captions alone by "
    "default.")
flags.DEFINE_float(
    "test", 0.05, "Without --test_input, the held-out images, the split test: their share if below "
    "1, otherwise their number.", lower_bound=0)
flags.DEFINE_integer("shard_size", 2000, "Images in a shard.", lower_bound=1)
flags.DEFINE_float(
    "max_bad", 0.01, "Largest share of missing or unreadable images, which are left out.",
    lower_bound=0, upper_bound=1)
flags.DEFINE_integer("batch", 32, "Images encoded at a time.", lower_bound=1)
flags.DEFINE_integer(
    "workers", 0, "Processes that decode images; 0 decodes in this one.", lower_bound=0)
flags.DEFINE_integer(
    "num_processes", 1, "Number of processes that share the work.", lower_bound=1)
flags.DEFINE_integer("process_id", 0, "Number of this process, from 0.", lower_bound=0)
flags.DEFINE_string(
    "verify", None, "A folder of finished records: compares its shards with their manifest, and "
    "prepares nothing.")


def main():
    from ntm_jax.data import records
    from ntm_jax.tools import prepare

    f = program.FLAGS
    if f.verify:
        print(f"{f.verify}: {records.verify(f.verify)} shards agree with their manifest")
        return
    if not f.input or not f.out:
        raise UserError("--input and --out are missing: give both, or --verify=FOLDER")
    prepare.prepare(
        program.from_flags(prepare.PrepareOptions), f.out, f.max_bad, f.batch, f.workers,
        f.num_processes, f.process_id, f.follow_outside)


if __name__ == "__main__":
    program.run(main)
