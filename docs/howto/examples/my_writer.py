"""A writer of metrics: --writer=table:NAME."""

import csv

from ntm_jax.training import writers


class Table:
    """Writes WORKDIR/NAME.csv: a row for each scalar."""

    def __init__(self, name):
        self.name = name or "table"  # what follows the colon in --writer=table:NAME

    def open(self, workdir, start_step, settings):
        mode = "a" if start_step else "w"
        self.file = open(f"{workdir}/{self.name}.csv", mode, newline="")  # noqa: SIM115
        self.rows = csv.writer(self.file)

    def scalars(self, step, scalars):
        self.rows.writerows((step, name, value) for name, value in scalars.items())

    def picture(self, step, path):
        self.rows.writerow((step, "picture", path))

    def close(self):
        self.file.close()


writers.register("table", Table, "[:NAME]")
