"""Secrets in text that is stored: credentials in URLs and values of secret environment variables are replaced by `***`."""

import os
import re

HIDDEN = "***"
_NAMES = re.compile("KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)
"""Parts of the names of environment variables whose values are secret."""
_SHORTEST = 8
"""Characters of a secret value; shorter ones, such as `false`, are words of any text."""
_IN_URLS = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
"""User and password of a URL."""
_SIGNED = re.compile(r"((?:Signature|Security-Token|Credential|[?&]sig|[?&]token)=)[^&\s'\"]+", re.IGNORECASE)
"""Parameters of a signed URL."""


def redact(text: str) -> str:
    """Return the text without secrets that can be recognised."""
    values = {line.strip() for name, value in os.environ.items() if _NAMES.search(name) for line in value.splitlines()}
    for secret in sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _SIGNED.sub(rf"\1{HIDDEN}", _IN_URLS.sub(HIDDEN, text))
