"""Imported by programs that use tests/bucket.py, with --import: how they reach the bucket.

gcsfs looks for no credentials, and waits a fiftieth of its time before it repeats a call.
"""

import asyncio
import os
import types

import fsspec.config

# gcsfs would ask by gRPC, which the emulator lacks, what kind of bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import gcsfs.retry

fsspec.config.conf.setdefault("gcs", {})["token"] = "anon"
gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))
