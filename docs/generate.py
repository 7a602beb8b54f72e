"""Writes what would otherwise drift: the tree in the README, docs/config.md, every --help block.

    python docs/generate.py           rewrite what is out of date
    python docs/generate.py --check   name it and exit 1

A page holds a generated block between `<!-- NAME -->` and `<!-- /NAME -->`; text outside is kept.
"""

import ast
import contextlib
import io
import os
import re
import sys
from pathlib import Path

from postgrad import cli, config, console

ROOT = Path(__file__).resolve().parent.parent
VERBS = (
    *("demo", "run", "estimate", "train", "evaluate", "compare"),
    *("report", "export", "runs", "explain", "doctor"),
)
FOLDERS = {
    "recipes": "Recipes: only what differs from the defaults",
    "examples": "The same training without our abstractions",
    "benchmarks": "Speed and quality against named peers",
    "docs": "A page per verb, and decisions",
    "tests": "Mirrors src; test_shape.py holds the budgets",
}


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, up to a full stop or a semicolon."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    words = " ".join(text.split("\n\n", 1)[0].split())
    return re.split(r"[.;] |[.]$", words, maxsplit=1)[0]


def tree() -> str:
    """Return src/postgrad and the folders beside it, one line per file."""
    lines: list[tuple[str, str]] = []
    package = ROOT / "src" / "postgrad"

    def walk(folder: Path, depth: int) -> None:
        entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
        for path in entries:
            indent = "  " * depth
            if path.is_dir() and (path / "__init__.py").exists():
                lines.append((f"{indent}{path.name}/", first_sentence(path / "__init__.py")))
                walk(path, depth + 1)
            elif path.suffix == ".py" and not path.name.startswith("__"):
                lines.append((f"{indent}{path.name}", first_sentence(path)))

    lines.append(("src/postgrad/", ""))
    walk(package, 1)
    for name, meaning in FOLDERS.items():
        if (ROOT / name).is_dir():
            lines.append((f"{name}/", meaning))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines)


def help_text(verb: str | None) -> str:
    """Return what `postgrad [VERB] --help` prints at a width of 100."""
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        cli.call([verb, "--help"] if verb else ["--help"])
    return text.getvalue().rstrip()


def keys_page() -> str:
    """Return docs/config.md: every key of a recipe with type, default and meaning."""
    known = config.fields()
    lines = [
        "# Recipe keys",
        "",
        "Generated from the code by `make docs`. `postgrad explain KEY` prints the same,",
        "`postgrad explain --schema` the JSON Schema for your editor. How a recipe is written,",
        "merged and checked: [run](run.md).",
    ]
    section = None
    for key, entry in known.items():
        top = key.split(".")[0]
        if top != section and (entry["type"] == "section" or section is None):
            section = top
            title = top if entry["type"] == "section" else "top level"
            meaning = entry["meaning"] if entry["type"] == "section" else ""
            lines += ["", f"## {title}", *(["", meaning] if meaning else [])]
            lines += ["", "| key | takes | default | meaning |", "|---|---|---|---|"]
        if not entry["type"].startswith("section"):
            default = console.plain(entry["default"])
            cells = [f"`{key}`", entry["type"], f"`{default}`", entry["meaning"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def checks_table() -> str:
    """Return the pre-flight checks in order, each with the first line of its docstring."""
    folder = ROOT / "src" / "postgrad" / "train" / "preflight"
    laws: dict[str, str] = {}
    names: list[str] = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                laws[node.name] = (ast.get_docstring(node) or "").split("\n", 1)[0]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES":
                names = ast.literal_eval(node.value)
    rows = [f"| `{name}` | {laws[name.replace('-', '_')].rstrip('.')} |" for name in names]
    return "\n".join(["| check | what must hold |", "|---|---|", *rows])


def fenced(text: str) -> str:
    """Return text as a code block."""
    return f"```text\n{text}\n```"


def with_block(text: str, name: str, content: str) -> str:
    """Return the page with its block replaced; a page without the block is returned as it is."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def pages() -> dict[Path, str]:
    """Return the wanted content of every page that holds something generated."""
    wanted = {ROOT / "docs" / "config.md": keys_page()}
    readme = ROOT / "README.md"
    wanted[readme] = with_block(readme.read_text(encoding="utf-8"), "tree", fenced(tree()))
    index = ROOT / "docs" / "index.md"
    wanted[index] = with_block(index.read_text(encoding="utf-8"), "help", fenced(help_text(None)))
    for verb in VERBS:
        page = ROOT / "docs" / f"{verb}.md"
        if page.exists():
            text = page.read_text(encoding="utf-8")
            wanted[page] = with_block(text, "help", fenced(help_text(verb)))
    train = ROOT / "docs" / "train.md"
    wanted[train] = with_block(wanted[train], "checks", checks_table())
    return wanted


def main(arguments: list[str]) -> int:
    """Rewrite or check; return the exit code."""
    stale = {
        page: text
        for page, text in pages().items()
        if not page.exists() or page.read_text(encoding="utf-8") != text
    }
    for page, text in stale.items():
        if "--check" in arguments:
            print(f"{page.relative_to(ROOT)} is out of date: run `make docs`", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
