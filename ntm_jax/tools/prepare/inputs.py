"""Opens the input of a preparation by name, and lists its items."""

from ntm_jax.errors import UserError
from ntm_jax.tools.prepare import from_folder, from_tars, from_tfds
from ntm_jax.tools.prepare.captioned import Input
from ntm_jax.tools.prepare.plan import PrepareOptions


def open_input(options: PrepareOptions, follow_outside: bool = False) -> Input:
    """Opens the input of a preparation; its images are read by captioned.load.

    follow_outside: for a folder, whether its list may name files outside it, by ../, an absolute
    path or a link. Raises UserError if there is no such input, or a list, tar or data set is not
    understood.
    """
    name = options.input
    kind, _, where = name.partition(":")
    if kind not in ("folder", "tfds", "tars") or not where:
        raise UserError(
            f"--input={name} is not known: expected folder:PATH, tfds:NAME_OR_BUILDER_DIR or "
            "tars:GLOB"
        )
    if kind == "folder":
        given = from_folder.open_folder(where, options.captions, follow_outside)
    elif kind == "tfds":
        given = from_tfds.open_tfds(where, options.tfds_split, options.caption_feature)
    else:
        given = from_tars.open_tars(where)
    if not given.items:
        raise UserError(f"--input={name} lists no images: expected at least one")
    return given
