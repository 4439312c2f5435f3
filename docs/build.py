"""mkdocs hooks: formulas become MathML at build time, and `::: name` lines become the reference of that object.

The pages load nothing from elsewhere. The reference is read from the docstrings, in the project's own form:
one line, then `name: text` entries whose continuation lines are indented.
"""

import dataclasses
import functools
import html
import importlib
import inspect
import re

# Entries of a docstring that are not parameters.
SECTIONS = (
    *("Equation", "Equations", "Order", "Returns", "Raises", "Communicates", "Mutates", "Precision", "Grad", "Source"),
    *("Note", "Example", "Memory", "Bound", "Yields", "Fields"),
)
ENTRY = re.compile(r"^(?P<name>\*{0,2}[A-Za-z_]\w*(?:, *\*{0,2}\w+)*): ?(?P<text>.*)$")


def parse_docstring(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a docstring into its prose and its `(name, text)` entries, in order.

    A section may follow another on the same line, after a full stop: `Communicates: nothing. Mutates: nothing.`
    """
    prose, entries = [], []
    in_prose = True
    for line in inspect.cleandoc(text).splitlines():
        found = ENTRY.match(line)
        if found:
            entries.append([found["name"], found["text"]])
            in_prose = False
        elif not line.strip():
            # A paragraph may stand between entries; it belongs to the prose.
            in_prose = True
            prose.append("")
        elif entries and line.startswith(" "):
            entries[-1][1] += "\n" + line.strip()
        elif in_prose:
            prose.append(line)
        else:
            entries[-1][1] += "\n" + line
    split = []
    for name, body in entries:
        pieces = re.split(r"(?<=\.) (?=(?:Mutates|Communicates|Precision|Grad|Returns|Raises): )", body)
        split.append((name, pieces[0].strip()))
        split += [tuple(piece.split(": ", 1)) for piece in pieces[1:]]
    return "\n".join(prose).strip(), split


def resolve(name: str):
    """The object behind a dotted name: the longest importable module, then attributes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], found)
    raise ImportError(name)


def reference(name: str) -> str:
    target = resolve(name)
    prose, entries = parse_docstring(inspect.getdoc(target) or "")
    if dataclasses.is_dataclass(target):
        # Options carry the sentence that a command line shows for them; it is theirs here too.
        helped = ((field.name, field.metadata.get("help")) for field in dataclasses.fields(target))
        entries = [(field, text) for field, text in helped if text] + entries
    kind = "class " if inspect.isclass(target) else ""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        signature = ""
    short = name.rsplit(".", 1)[-1]
    called = f"{kind}{short}{_unquoted(signature)}"
    if len(called) > 100 and signature:
        inside = ",\n    ".join(_parameters(signature))
        returns = "" if kind else re.sub(r"^.*\)(?= -> |$)", "", _unquoted(signature), flags=re.S)
        called = f"{kind}{short}(\n    {inside},\n){returns}"
    lines = [f"### `{short}` {{ #{short.lower()} }}", "", "```python", called, "```", "", _linked(prose), ""]
    for entry, text in entries:
        label = f"**{entry}**" if entry in SECTIONS else f"`{entry}`"
        lines += [label, f":   {_linked(text)}".replace("\n", "\n    "), ""]
    return "\n".join(lines)


def _parameters(signature: inspect.Signature) -> list[str]:
    parts, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        parts.append(_unquoted(parameter))
    return parts


def _unquoted(signature) -> str:
    """Annotations are strings under `from __future__ import annotations`; readers want them bare."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature))


def _linked(text: str) -> str:
    """Equation numbers lead to the equation; brackets and stars of shapes are not Markdown."""

    def link(found):
        return re.sub(r"\((\d+)\)", r"[(\1)](math.md#eq-\1)", found[0])

    pieces = re.split(r"(`[^`\n]+`)", text)
    pieces[::2] = [re.sub(r"([\[\]*_])", r"\\\1", piece).replace("<", "&lt;") for piece in pieces[::2]]
    return re.sub(r"docs/math\.md[^\n]*", link, "".join(pieces))


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"^::: ([\w.]+)$", lambda found: reference(found[1]), markdown, flags=re.M)


def on_page_content(content: str, **_) -> str:
    """Arithmatex leaves `\\(...\\)` and `\\[...\\]`; browsers show MathML without any script."""
    from latex2mathml.converter import convert

    def inline(found):
        return convert(html.unescape(found[1])).replace("\\_", "_")  # inside \\text the converter keeps the backslash

    def display(found):
        source = html.unescape(found[1])
        number = re.search(r"\\tag\{(\d+)\}", source)
        formula = convert(re.sub(r"\\tag\{\d+\}", "", source), display="block").replace("\\_", "_")
        label = f'<span class="equation-number">({number[1]})</span>' if number else ""
        anchor = f' id="eq-{number[1]}"' if number else ""
        return f'<div class="equation"{anchor}>{formula}{label}</div>'

    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.S)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', display, content, flags=re.S)
