"""botocore's client, and its exceptions as sentences that never show a key."""

from __future__ import annotations

import ipaddress
import os
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from logitcache.errors import RemoteError
from logitcache.store.location import S3Location

ATTEMPTS = 5
CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0
CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (AWS_NO_SIGN_REQUEST=1 reads a public bucket "
    "without any)"
)
WRONG_REGION = {"301", "307", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
BUSY = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout", "429"}


def connect() -> Any:
    """A client for the endpoint and the credentials that the environment and AWS' own files name.

    Raises:
        RemoteError: botocore is not installed, or the environment makes no sense.
    """
    try:
        import botocore
        import botocore.session
        from botocore.config import Config
    except ImportError as error:
        raise RemoteError("s3:// needs botocore; install it: pip install 'logitcache[s3]'") from error
    from botocore.exceptions import BotoCoreError

    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    try:
        endpoint = _endpoint(session)
        unsigned = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")
        config = Config(
            retries={"mode": "standard", "total_max_attempts": session.get_config_variable("max_attempts") or ATTEMPTS},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=32,
            # Checksums that not every endpoint understands; what arrives is compared by us (objects.py).
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"} if endpoint else None,
            signature_version=botocore.UNSIGNED if unsigned else None,
            user_agent_extra="logitcache",
        )
        region = session.get_config_variable("region") or "us-east-1"
        return session.create_client("s3", region_name=region, endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise RemoteError(f"S3 cannot be used: {error}; mend the AWS_ variables or the files in ~/.aws") from error


@cache
def _loader() -> Any:
    """Descriptions of S3, which take longer to parse than all else here."""
    from botocore.loaders import create_loader

    return create_loader()


def _endpoint(session: Any) -> str | None:
    """The endpoint that is not AWS' own, if one is set."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = named or session.get_scoped_config().get("endpoint_url")
    if not endpoint:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RemoteError("AWS_ENDPOINT_URL is no URL; write it as https://host or http://host:port")
    try:
        local = ipaddress.ip_address(parts.hostname).is_link_local
    except ValueError:
        return str(endpoint)
    if local:
        raise RemoteError(
            f"AWS_ENDPOINT_URL names the link-local address {parts.hostname}, which is no object store; set it to one"
        )
    return str(endpoint)


def status_of(error: Exception) -> int:
    """HTTP status that botocore's ClientError carries, else 0."""
    answer = getattr(error, "response", None) or {}
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Exception) -> str:
    """S3's name of the error, or the status where an answer has no body."""
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def explained(error: Exception, client: Any, place: S3Location, name: str, done: str) -> RemoteError:
    """What botocore raised as one sentence.

    Args:
        error: a ClientError or BotoCoreError.
        client: whose endpoint is named.
        place, name: the object.
        done: "read", "written", ...
    """
    from botocore import exceptions as known

    where = f"{place}/{name}".rstrip("/")
    parts = urlsplit(client.meta.endpoint_url)
    endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    code, status = code_of(error), status_of(error)
    answer = f"{where} cannot be {done}: {endpoint} answers {status} {code if code != str(status) else ''}".rstrip()
    if code == "NoSuchBucket":
        return RemoteError(f"there is no bucket {place.bucket!r} at {endpoint}; check its name and AWS_ENDPOINT_URL")
    if code in WRONG_REGION:
        return RemoteError(f"{answer}; the bucket is in another region: set AWS_REGION to it")
    if status in (401, 403):
        return RemoteError(f"{answer}; check the credentials, and what they may do in this bucket")
    if status >= 500 or code in BUSY:
        return RemoteError(f"{answer} again and again; try the same later")
    if status:
        return RemoteError(answer + "; check the bucket, AWS_ENDPOINT_URL and AWS_REGION")
    if isinstance(error, known.NoCredentialsError):
        return RemoteError(f"{where} cannot be {done}: no S3 credentials are found; {CREDENTIALS}")
    if isinstance(error, known.ConnectionError | known.HTTPClientError | known.IncompleteReadError):
        return RemoteError(
            f"{where} cannot be {done}: {endpoint} cannot be reached or breaks off ({type(error).__name__}); check "
            "AWS_ENDPOINT_URL and the network, then try again"
        )
    return RemoteError(f"{where} cannot be {done} ({type(error).__name__}); {CREDENTIALS}")
