"""Secrets in text that is printed or stored: credentials in URLs and values of secret environment variables become `***`.

A recipe with credentials in a URL is refused (recipe/settings.py); this is for text of other origin, such as a library's error.
"""

import os
import re

HIDDEN = "***"
_NAMES = re.compile("KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)
"""Parts of the names of environment variables whose values are secret."""
_FILES = re.compile("(_FILE|_PATH|_DIR)$", re.IGNORECASE)
"""Ends of the names of variables that name a file, such as RAY_AUTH_TOKEN_PATH; errors must be able to name it, too."""
_SHORTEST = 8
"""Characters of a secret value; shorter ones, such as `false`, are words of any text."""
_IN_URLS = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
"""User and password of a URL."""
_SIGNED = re.compile(r"((?:Signature|Security-Token|Credential|[?&]sig|[?&]token)=)[^&\s'\"]+", re.IGNORECASE)
"""Parameters of a signed URL."""
_PASSWORDS = re.compile(r"https?://[^/?#]*@|://[^/?#:]*:[^/?#]*@", re.IGNORECASE)
"""Password of a URL, and any user of HTTP, which may be a token; `postgresql://user@host` and `abfs://container@host` are none."""


def redact(text: str) -> str:
    """Return the text without secrets that can be recognised."""
    values = {line.strip() for name, value in os.environ.items() if _secret(name) for line in value.splitlines()}
    for secret in sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _SIGNED.sub(rf"\1{HIDDEN}", _IN_URLS.sub(HIDDEN, text))


def has_credentials(url: str) -> bool:
    """Return whether a URL has a password, or is signed."""
    return "://" in url and bool(_PASSWORDS.search(url) or _SIGNED.search(url))


def _secret(name: str) -> bool:
    return bool(_NAMES.search(name)) and not _FILES.search(name)
