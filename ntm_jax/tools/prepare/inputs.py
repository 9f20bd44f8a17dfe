"""Opens the input of a preparation by name, and lists its items."""

from ntm_jax.errors import UserError
from ntm_jax.tools.prepare import from_folder, from_tars, from_tfds
from ntm_jax.tools.prepare.captioned import Input


def open_input(
    name: str,
    captions: str = "",
    feature: str = "caption",
    split: str = "train",
    follow_outside: bool = False,
) -> Input:
    """Opens `folder:PATH`, `tfds:NAME_OR_BUILDER_DIR` or `tars:GLOB`.

    Args:
      captions: for a folder, the .jsonl or .csv file with file_name (or image), caption (or text)
        and optionally label in every row; by default metadata.jsonl or metadata.csv in the folder.
        File names are relative to the folder.
      feature: for tfds, the feature that holds the caption; a/b is the feature b in a. Of several
        captions the first is taken.
      split: for tfds, the records to take.
      follow_outside: for a folder, whether its list may name files outside it, by ../, an absolute
        path or a link.
    Raises:
      UserError: there is no such input, or a list, tar or data set is not understood. Images are
        read by captioned.load.
    """
    kind, _, where = name.partition(":")
    if kind not in ("folder", "tfds", "tars") or not where:
        raise UserError(
            f"--input={name} is not known: expected folder:PATH, tfds:NAME_OR_BUILDER_DIR or "
            "tars:GLOB"
        )
    if kind == "folder":
        given = from_folder.open_folder(where, captions, follow_outside)
    elif kind == "tfds":
        given = from_tfds.open_tfds(where, split, feature)
    else:
        given = from_tars.open_tars(where)
    if not given.items:
        raise UserError(f"--input={name} lists no images: expected at least one")
    return given
