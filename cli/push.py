"""`logitcache push`."""

from __future__ import annotations

import click

from .console import debug_option, json_option
from .options import NewPath
from .transfer import transfer

EXAMPLE = """
\b
Example:
  logitcache push cache s3://bucket/caches/prose
  logitcache push cache file:///mnt/share/prose

Credentials, region and endpoint are those of every AWS tool: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE,
AWS_REGION, and AWS_ENDPOINT_URL for any other S3 endpoint. The manifest goes last, so a half copy never opens as a
whole one; run the same line again to go on. Another cache at the destination is never touched.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""


@click.command(epilog=EXAMPLE)
@click.argument("cache", type=click.Path())
@click.argument("destination", type=NewPath(), metavar="URL")
@json_option
@debug_option
def push(cache: str, destination: str, as_json: bool) -> None:
    """Copy a finished cache to an object store, with a dataset card."""
    from logitcache.store import push as push_cache

    transfer("push", push_cache, cache, destination, as_json)
