"""Secrets never reach a run's folder: what looks like one is replaced before anything is written.

Three nets, since each lets something through: names that say "secret" (`api_key`, `DB_PASSWORD`), shapes that are
secrets (`ghp_...`, a PEM block, `user:password@` in a URL), and the values of secret environment variables, wherever
they turn up. A word too many is lost now and then; that is the cheaper mistake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

REDACTED = "[redacted]"

_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "pwd", "passphrase", "credential", "credentials"} | {
    "authorization",
    "apikey",
    "cookie",
}
_KEY_WORDS = {"api", "auth", "access", "refresh", "private", "account", "encryption", "signing", "ssh"}  # before "key"
_TEXT_WORDS = {"eos", "bos", "pad", "unk", "mask", "sep", "cls", "special", "end", "start", "next", "per"}
_HARMLESS_ENDS = {"path", "file", "dir", "url", "uri", "mode", "id", "ids", "type", "count", "expiry"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

_SHAPES = re.compile(
    r"""-----BEGIN[ A-Z]*PRIVATE\ KEY-----.*?(?:-----END[ A-Z]*PRIVATE\ KEY-----|\Z)
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                                  # AWS access key
    | \bgh[pousr]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{16,} | \bglpat-[\w-]{16,}
    | \bhf_[A-Za-z0-9]{16,} | \bsk-[\w-]{16,} | \bxox[abeprs]-[\w-]{10,} | \bAIza[\w-]{30,} | \bdapi[0-9a-f]{32}
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*                              # JSON web token
    | (?<=[Bb]earer\ )[\w.~+/=-]{8,} | (?<=[Bb]asic\ )[A-Za-z0-9+/=]{12,}
    | (?<=://)[^\s/@'"]*:[^\s/@'"]+(?=@)                             # user:password in a URL
    """,
    re.VERBOSE | re.DOTALL,
)
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<sign>["']?\s*(?:[:=]|=>)\s*)"""
    r"""(?P<value>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s"'&,;(){}\[\]]+)(?!\w*[(\[])"""
)
_TYPE_NAMES = {"str", "int", "float", "bool", "bytes", "None", "Any", "True", "False", "null", "true", "false"}


def is_secret_name(name: str) -> bool:
    """Whether a setting, option or variable of this name holds a secret ("tokens" and "eos_token" do not)."""
    words = [word.lower() for word in _WORD.findall(name)]
    if name in ("PWD", "OLDPWD"):  # the shell's working folder, which stands in every path
        return False
    if words and words[-1] in _HARMLESS_ENDS:
        return False
    return any(_is_secret_word(word, previous) for previous, word in pairwise(["", *words]))


def _is_secret_word(word: str, previous: str) -> bool:
    if word in _SECRET_WORDS:
        return True
    if word == "token":
        return previous not in _TEXT_WORDS
    return word in ("key", "keys", "tokens") and previous in _KEY_WORDS


class Redactor:
    """Takes secrets out of texts, mappings and argument lists.

    environ: its variables with secret names are looked for by value, if they have at least 8 characters.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        known = {value for name, value in environ.items() if is_secret_name(name) and len(value) >= 8}
        longest_first = sorted(known, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if known else None

    def text(self, text: str) -> str:
        """Without known secrets, secret shapes, and what is assigned to a secret name."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        return _ASSIGNMENT.sub(_redact_assignment, _SHAPES.sub(REDACTED, text))

    def value(self, value: Any, name: str = "") -> Any:
        """The same nested mappings, lists and scalars without secrets; `name` is the key that holds `value`."""
        if isinstance(value, Mapping):
            hide = name if is_secret_name(name) else ""
            return {key: self.value(item, hide or str(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(item, name) for item in value)
        if value is None or isinstance(value, bool) or value == "":
            return value
        if is_secret_name(name):
            return REDACTED
        return self.text(value) if isinstance(value, str) else value

    def argv(self, argv: Sequence[str]) -> list[str]:
        """A command line: `--token X`, `--token=X`, `key=X` and secrets by their value or shape."""
        redacted, hide = [], False
        for argument in argv:
            name, sign, value = argument.partition("=")
            if hide and not argument.startswith("-"):
                redacted.append(REDACTED)
            elif sign:
                redacted.append(f"{name}={self.value(value, name)}")
            else:
                redacted.append(self.text(argument))
            hide = argument.startswith("-") and not sign and is_secret_name(argument)
        return redacted


def _redact_assignment(match: re.Match[str]) -> str:
    name, sign, value = match["name"], match["sign"], match["value"]
    if not is_secret_name(name) or value in _TYPE_NAMES or value == REDACTED:
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{sign}{quote}{REDACTED}{quote}"
