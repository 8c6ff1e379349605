"""Secrets in text that is printed or stored: credentials in URLs and values of secret environment variables become `***`.

A recipe with credentials in a URL is refused (process/settings.py); this is for text of other origin, such as a library's error.
"""

import json
import os
import re
from urllib.parse import quote, quote_plus

HIDDEN = "***"
_NAMES = re.compile(
    r"(?<!MON)KEY(?!STONE|BOARD)|SECRET|TOKEN|PASS(W|PHRASE|CODE|\d*(_|$))|AUTH(ORIZATION|ENTICATION|_HEADER|_CONFIG)?$|_PWD$|_PAT$|CREDENTIAL|CONNECTION_STRING|COOKIE|WEBHOOK",
    re.IGNORECASE,
)
"""Parts of the names of environment variables whose values are secret."""
_FILES = re.compile("(_FILE|_PATH|_DIR)$", re.IGNORECASE)
"""Ends of the names of variables that name a file, such as RAY_AUTH_TOKEN_PATH: errors must be able to name the file."""
_SHORTEST = 8
"""Least number of characters of a secret value; shorter values, such as `false`, are words of any text."""
_PASSWORD = r"[^\s/?#:@'\"]{0,1000}:(?!\d+/)[^\s'\"]{0,4000}"
"""User and password of a URL; a password may have any character, but `host:5000/` has none. Bounded for long lines."""
_IN_URLS = re.compile(rf"(?:(?<=://){_PASSWORD}|(?:(?<=http://)|(?<=https://))[^\s/@'\"]+)(?=@)")
"""User and password of a URL in a text, and any user of HTTP."""
_PARAMETERS = re.compile(
    r"((?:Signature|Security-Token|Credential|AccountKey|"
    r"[?&;#](?:sig|pwd|key|code|auth|jwt|[\w.-]*(?:token|pass(?:w(?:or)?d|phrase)?\d*|secret|[_-]key|(?:api|access)key(?:id)?)))=)"
    r"[^&;\s'\"]+",
    re.IGNORECASE,
)
"""Secret parameters of a URL, of its signature and of a connection string."""
_HEADERS = re.compile(
    r"(\b(?:Authorization\b\W{1,4}(?:Basic|Bearer|Token)\s+|Authorization['\"]?:\s*['\"]?|X-[\w-]*(?:Key|Token|Secret)\b\W{1,4}|"
    r"(?:aws_|db_)?(?:password|secret|secret_access_key|(?:session_|access_|auth_)?token)(?:=|['\"]\s*:\s*)['\"]?))[^\s'\",}&;]+",
    re.IGNORECASE,
)
"""Secrets in HTTP's headers, in the spelling of any library, and in the settings of a database's or a store's client."""
_WHOLE = re.compile(r"(https://hooks\.slack\.com/services/|\bCookie['\"]?:\s*['\"]?)[^'\"\r\n]+", re.IGNORECASE)
"""Addresses whose path is the secret, and cookies."""
_PASSWORDS = re.compile(rf"https?://[^/?#]*@|://{_PASSWORD}@", re.IGNORECASE)
"""Password of a URL, and any user of HTTP, which may be a token; `postgresql://user@host` and `abfs://container@host` have none."""


def redact(text: str) -> str:
    """Return the text without secrets that can be recognised."""
    values = {line.strip() for name, value in os.environ.items() if _secret(name) for line in value.splitlines()}
    spellings = {each for value in values if len(value) >= _SHORTEST for each in _spellings(value)}
    for secret in sorted(spellings, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _IN_URLS.sub(HIDDEN, text)
    for pattern in (_PARAMETERS, _HEADERS, _WHOLE):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def _spellings(secret: str) -> set[str]:
    """Return a secret as it is, quoted as in a URL, and as in JSON and Python's strings, without their quotation marks."""
    return {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1]}


def has_credentials(url: str) -> bool:
    """Return whether a URL has a password, or is signed."""
    return "://" in url and bool(_PASSWORDS.search(url) or _PARAMETERS.search(url))


def _secret(name: str) -> bool:
    return bool(_NAMES.search(name)) and not _FILES.search(name)
