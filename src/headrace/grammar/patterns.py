r"""Regular expressions of JSON Schema (ECMA-262), written for the dialect of llguidance, which is Rust's.

The dialects differ silently: `[a[b]`, `&&`, `.` and `\s` mean other things in each. `\d`, `\w` and `\s` match what
ECMA-262, Python and Rust all match, and `\D`, `\W` and `\S` what all do, so that a text is valid for every validator.
"""

from __future__ import annotations

import re

__all__ = ["escaped", "rust_fault", "rust_pattern"]

BLANK = r"\t\n\x0b\x0c\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
NARROW = {"d": "0-9", "w": "0-9A-Za-z_", "s": BLANK}
"""What every dialect has in a class, as the inside of a class."""
WIDE = {
    "d": r"\p{Nd}",
    "w": r"\p{Alphabetic}\p{L}\p{N}\p{M}\p{Pc}\p{Join_Control}",
    "s": BLANK + r"\x{1c}-\x{1f}\x{85}\x{180e}\x{200b}\x{feff}",
}
"""What any dialect has in it."""
SIGNS = frozenset(r"\.+*?()|[]{}^$#&-~")
"""Characters that mean something, in Rust's dialect."""
CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
GROUPS = {
    "(?=": "a lookahead, (?=…)",
    "(?!": "a negative lookahead, (?!…)",
    "(?<=": "a lookbehind, (?<=…)",
    "(?<!": "a negative lookbehind, (?<!…)",
    "(?P=": "a backreference, (?P=…)",
    "(?>": "an atomic group, (?>…)",
    "(?(": "a conditional group, (?(…)",
}
"""Groups that no automaton has, the longest first among those that begin alike."""
NAMED = re.compile(r"\(\?P?<[A-Za-z_$][\w$]*>")
COUNT = re.compile(r"\{(\d{1,9})(,(\d{1,9})?)?\}")
AT_MOST = re.compile(r"\{,\d+\}")
LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
PROPERTY = re.compile(r"[pP]\{[A-Za-z_]+(=[A-Za-z_]+)?\}")
CODE = re.compile(r"u\{([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|c([A-Za-z])")


def rust_pattern(pattern: str) -> str:
    """A pattern of ECMA-262 in Rust's dialect, of the same texts or fewer. Raises `ValueError` that names a fault."""
    return _Reader(pattern).read()


def rust_fault(pattern: str) -> str | None:
    """What a pattern in Rust's dialect has that no automaton can match, in words; None: nothing found."""
    position, inside = 0, 0
    while position < len(pattern):
        here = pattern[position]
        if here == "\\":
            following = pattern[position + 1 : position + 2]
            if not inside and following in "bB" and following:
                return rf"a word boundary, \{following}"
            if not inside and (following in "123456789k" and following):
                return rf"a backreference, \{following}"
            position += 2
            continue
        if here == "[":
            inside += 1
            position += pattern.startswith("^", position + 1)
            position += pattern.startswith("]", position + 1)  # the first one stands for itself
        elif here == "]":
            inside = max(0, inside - 1)
        elif here == "(" and not inside and (fault := _group_fault(pattern, position)):
            return fault
        position += 1
    return None


def escaped(text: str) -> str:
    """A pattern that matches exactly this text, in both dialects."""
    return "".join(_literal(character) for character in text)


def _group_fault(pattern: str, position: int) -> str | None:
    for start, words in GROUPS.items():
        if pattern.startswith(start, position):
            return words
    named = NAMED.match(pattern, position)
    if named and named[0].rstrip(">").endswith("<stop"):
        return 'a group named "stop", which has a meaning of its own: give it another name'
    return None


def _literal(character: str) -> str:
    if character in SIGNS:
        return "\\" + character
    return character if character.isprintable() else rf"\x{{{ord(character):x}}}"


class _Reader:
    """Reads a pattern of ECMA-262 once, from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.position, self.out, self.open = pattern, 0, list[str](), 0

    def read(self) -> str:
        repeatable = False
        while self.position < len(self.pattern):
            here = self.pattern[self.position]
            if here in "*+?{" and (count := self._quantifier()):
                if not repeatable:
                    raise ValueError(f"nothing stands before the {count} to repeat")
                self.out.append(count)
                repeatable = False
                continue
            repeatable = here not in "(|^"
            self._one(here)
        if self.open:
            raise ValueError("a ( is not closed")
        return "".join(self.out)

    def _one(self, here: str) -> None:
        if here == "\\":
            self.position += 1
            self.out.append(self._escape())
        elif here == "[":
            self.out.append(self._class())
        elif here == "(":
            self._group()
        else:
            self.position += 1
            if here == ")":
                self.open -= 1
                if self.open < 0:
                    raise ValueError("a ) closes nothing")
            self.out.append(here if here in ")|^$" else r"[^\n\r\x{2028}\x{2029}]" if here == "." else _literal(here))

    def _group(self) -> None:
        named = NAMED.match(self.pattern, self.position)
        if not named and (fault := _group_fault(self.pattern, self.position)):
            raise ValueError(f"it has {fault}, which no automaton can match")
        start = named[0] if named else "(?:" if self.pattern.startswith("(?:", self.position) else "("
        self.position += len(start)
        if start == "(" and self.pattern.startswith("?", self.position):
            raise ValueError(
                f"ECMA-262 has no group that begins with {self.pattern[self.position - 1 : self.position + 3]}"
            )
        self.open += 1
        self.out.append("(?:")

    def _quantifier(self) -> str:
        """The quantifier here, greedy, as laziness changes no language; "" where a { stands for itself."""
        here = self.pattern[self.position]
        if here == "{":
            found = COUNT.match(self.pattern, self.position)
            if not found:
                if AT_MOST.match(self.pattern, self.position):
                    raise ValueError("{,n} has other meanings elsewhere: write {0,n}")
                return ""
            if found[3] and int(found[1]) > int(found[3]):
                raise ValueError(f"{found[0]} counts down")
            here = found[0]
        self.position += len(here)
        if self.pattern.startswith("?", self.position):
            self.position += 1
        elif self.pattern.startswith("+", self.position):
            raise ValueError(f"it has a possessive quantifier, {here}+, which no automaton can match")
        return here

    def _escape(self) -> str:
        """What stands after a backslash, outside a class."""
        here = self.pattern[self.position : self.position + 1]
        if here in ("b", "B"):
            raise ValueError(rf"it has a word boundary, \{here}, which no automaton of llguidance can match")
        if here in (*"123456789", "k"):
            raise ValueError(rf"it has a backreference, \{here}, which no automaton can match")
        if here and here in "dwsDWS":
            self.position += 1
            return f"[{NARROW[here]}]" if here in NARROW else f"[^{WIDE[here.lower()]}]"
        if found := PROPERTY.match(self.pattern, self.position):
            self.position = found.end()
            return "\\" + found[0]
        return _literal(self._character())

    def _character(self) -> str:
        """The one character that an escape stands for."""
        here = self.pattern[self.position : self.position + 1]
        if not here:
            raise ValueError("a backslash stands at its end")
        if found := CODE.match(self.pattern, self.position):
            self.position = found.end()
            if found[4]:
                return chr(ord(found[4]) % 32)
            return self._code_point(int(found[1] or found[2] or found[3], 16))
        self.position += 1
        if here in CONTROLS:
            return CONTROLS[here]
        if here == "0" and not self.pattern[self.position : self.position + 1].isdigit():
            return "\0"
        if here.isalnum():
            raise ValueError(rf"ECMA-262 has no escape \{here}")
        return here

    def _code_point(self, code: int) -> str:
        low = LOW_SURROGATE.match(self.pattern, self.position)
        if 0xD800 <= code < 0xDC00 and low:
            self.position = low.end()
            return chr(0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00)
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise ValueError(f"U+{code:04X} is no character")
        return chr(code)

    def _class(self) -> str:
        self.position += 1
        negated = self.pattern.startswith("^", self.position)
        self.position += negated
        items = list[str]()
        while not self.pattern.startswith("]", self.position):
            first = self._item(negated)
            after = self.pattern[self.position + 1 : self.position + 2]
            if len(first) > 1 or not self.pattern.startswith("-", self.position) or after in ("]", ""):
                items.append(first if len(first) > 1 else _literal(first))
                continue
            self.position += 1
            last = self._item(negated)
            if len(last) > 1:  # a class in a range: the hyphen stands for itself
                items += [_literal(first), _literal("-"), last]
            elif first > last:
                raise ValueError(f"the range {first}-{last} counts down")
            else:
                items.append(f"{_literal(first)}-{_literal(last)}")
        self.position += 1
        if not items:
            return r"[\x{0}-\x{10ffff}]" if negated else r"[^\x{0}-\x{10ffff}]"
        return f"[{'^' if negated else ''}{''.join(items)}]"

    def _item(self, negated: bool) -> str:
        """A character of a class, or the text of a smaller class, which has more than one character."""
        here = self.pattern[self.position : self.position + 1]
        if not here:
            raise ValueError("a [ is not closed")
        self.position += 1
        if here != "\\":
            return here
        here = self.pattern[self.position : self.position + 1]
        if here and here in "dwsDWS":
            self.position += 1
            sets = WIDE if negated else NARROW  # what the class leaves out is what any dialect may have
            others = NARROW if negated else WIDE
            return f"[{sets[here]}]" if here in sets else f"[^{others[here.lower()]}]"
        if here == "b":
            self.position += 1
            return "\b"
        if found := PROPERTY.match(self.pattern, self.position):
            self.position = found.end()
            return "\\" + found[0]
        return self._character()
