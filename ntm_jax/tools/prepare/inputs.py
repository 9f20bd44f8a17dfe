"""Opens the inputs of a preparation by name, and lists their items."""

import functools
import io
import tarfile
from typing import Any

from ntm_jax.errors import UserError, first_line
from ntm_jax.files import regular
from ntm_jax.tools.prepare import from_folder, from_tars, from_tfds
from ntm_jax.tools.prepare.captioned import Input, Item, Request
from ntm_jax.tools.prepare.plan import PrepareOptions

_KINDS = {
    "folder": from_folder.open_folder,
    "tfds": from_tfds.open_tfds,
    "tars": from_tars.open_tars,
}


def open_input(options: PrepareOptions, follow_outside: bool = False) -> Input:
    """Opens the input of a preparation, and that of its test images if one is given.

    Its images are read by captioned.load. follow_outside: for a folder, whether its list may name
    files outside it, by ../, an absolute path or a link. Raises UserError if there is no such
    input, a list, tar or data set is not understood, or both inputs have other classes.
    """
    asked = Request(
        f"--input={options.input}", options.input, options.captions, options.caption_feature,
        options.tfds_split, follow_outside)
    given = _open(asked)
    if not options.test_input:
        if options.test_labels:
            raise UserError("--test_labels names the classes of --test_input, which is not given")
        return given
    test = _open(asked._replace(
        flag=f"--test_input={options.test_input}", where=options.test_input, captions="",
        tfds_split=options.test_tfds_split, classes=given.classes,
        labels=read_labels(options.test_labels) if options.test_labels else None))
    items = [*given.items, *(item._replace(held_out=True) for item in test.items)]
    read = functools.partial(_read, given.read, test.read)
    return Input(items, read, given.classes, given.captioned or test.captioned)


def _open(asked: Request) -> Input:
    kind, _, where = asked.where.partition(":")
    if kind not in _KINDS or not where:
        raise UserError(f"{asked.flag} is not known: expected folder:PATH, "
                        "tfds:NAME_OR_BUILDER_DIR or tars:GLOB")
    given = _KINDS[kind](asked._replace(where=where))
    if not given.items:
        raise UserError(f"{asked.flag} lists no images: expected at least one")
    return given


def _read(train, test, item: Item):
    return (test if item.held_out else train)(item)


def read_labels(path: str) -> list[str]:
    """The classes that a file lists, a line for each image in the order of the images' names.

    ImageNet's devkit, ILSVRC2012_devkit_t12.tar.gz, is such a file, of the validation images; its
    classes are WordNet's numbers, such as n01440764. Raises UserError for any other archive.
    """
    content = regular(path).read_bytes()
    if not tarfile.is_tarfile(io.BytesIO(content)):
        lines = content.decode(errors="surrogateescape").splitlines()
        return [line.strip() for line in lines if line.strip()]
    from scipy.io import loadmat

    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files: dict[str, Any] = {
                member.name.rpartition("/")[2]: tar.extractfile(member)
                for member in tar if member.isfile()}
            synsets = loadmat(files["meta.mat"], squeeze_me=True)["synsets"]
            names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
            truth = files["ILSVRC2012_validation_ground_truth.txt"].read().split()
            return [names[int(number)] for number in truth]
    except Exception as error:  # tarfile and scipy raise a dozen kinds on damaged files
        raise UserError(f"--test_labels={path} is neither a text of classes nor ImageNet's devkit "
                        f"({first_line(error)}): give ILSVRC2012_devkit_t12.tar.gz, or the class "
                        "of each image on a line") from None
