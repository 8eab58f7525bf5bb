"""The documents: code that runs, right commands and links, tables that are the code's, and a site that is whole."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import torch
from libraries import library
from markdown_it import MarkdownIt

import stepladder as sl
from stepladder.bench import traffic
from stepladder.cli import main

ROOT = Path(__file__).parents[1]
SHOWN = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
# Of the blocks of a document.
LIBRARIES = {"docs/frameworks.md": ("transformers", "accelerate", "lightning", "timm")}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def name(path):
    return str(path.relative_to(ROOT))


def tokens(path):
    """Of Markdown, those within paragraphs and cells among them."""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def code(path):
    return [token for token in tokens(path) if token.type == "fence" and token.info == "python"]


@pytest.mark.parametrize("path", [path for path in SHOWN if code(path)], ids=name)
def test_code(path, tmp_path, monkeypatch):
    """A document's blocks run one after another, as a reader would type them."""
    for needed in LIBRARIES.get(name(path), ()):
        library(needed)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in code(path):
        # Tracebacks then give the lines of the document.
        exec(compile("\n" * (block.map[0] + 1) + block.content, name(path), "exec"), namespace)


def test_documents_with_code():
    """None of them is passed over."""
    written = {name(path) for path in SHOWN if "```python" in path.read_text(encoding="utf-8")}
    assert written == {name(path) for path in SHOWN if code(path)}
    assert {"README.md", "docs/getting-started.md", "docs/migration.md", "docs/muon.md", *LIBRARIES} <= written


def commands(path):
    """The lines of all blocks that call stepladder, without comments and prompts; and what is quoted within a text."""
    for token in tokens(path):
        if token.type == "code_inline":
            lines = [token.content]
        elif token.type == "code_block" or (token.type == "fence" and token.info in ("", "console", "sh", "bash")):
            lines = token.content.replace("\\\n", " ").splitlines()
        else:
            continue
        for line in lines:
            words = shlex.split(line, comments=True) if "stepladder " in line else []
            words = words[words[:1] == ["$"] :]
            if len(words) > 1 and Path(words[0]).name == "stepladder":
                yield token.type == "code_inline", words[1:]


@pytest.mark.parametrize("path", [path for path in SHOWN if any(commands(path))], ids=name)
def test_commands(path):
    """Each would be taken as it stands; within a text its command and options exist."""
    context = click.Context(main, info_name="stepladder", **main.context_settings)
    for quoted, (first, *words) in commands(path):
        if quoted:
            command = main if first.startswith("-") else main.commands[first]
            known = {flag for option in command.get_params(context) for flag in (*option.opts, *option.secondary_opts)}
            flags = {word.partition("=")[0] for word in (first, *words) if word.startswith("-")}
            assert flags <= known, (first, words)
            continue
        with click.Context(main.commands[first], context, first) as own:
            values, left, given = own.command.make_parser(own).parse_args(list(words))
            assert left == [] or any(isinstance(param, click.Argument) for param in given), words
            for param in given:
                # An argument that is left out is among those given; files that a command reads need not be there.
                left_out = isinstance(param, click.Argument) and not isinstance(values[param.name], (str, tuple))
                if not left_out and not isinstance(param.type, (click.Path, click.File)):
                    param.type_cast_value(own, values[param.name])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links(path):
    """What a link within the repository names is there. The figures of the site are drawn when it is made."""
    targets = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(path) if token.nesting >= 0]
    files = {target.partition("#")[0] for target in targets if target and "://" not in target}
    drawn = {file: ROOT / "examples" / "figures" / f"{Path(file).stem}.py" for file in files if "figures/" in file}
    assert [file for file in files if not drawn.get(file, path.parent / file).exists()] == []


def rows_of_optimizers():
    """The cells of both tables in docs/choosing.md, a row for each optimizer: what it is for, what it costs."""
    parsed = MarkdownIt("commonmark").enable("table").parse((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8"))
    tables, inside = [], False
    for token in parsed:
        if token.type == "tbody_open":
            tables.append([])
        inside = (inside or token.type == "tbody_open") and token.type != "tbody_close"
        if inside and token.type == "tr_open":
            tables[-1].append([])
        elif inside and token.type == "inline":
            tables[-1][-1].append("".join(child.content for child in token.children))
    return tables


REASONS, COSTS = rows_of_optimizers()


def constructed(text):
    """An optimizer, and its name, from a call as it stands in the table; over a square matrix."""
    call = ast.parse(text, mode="eval").body
    arguments = {}
    if isinstance(call, ast.Call):
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        call = call.func
    w = torch.zeros(64, 64).normal_().requires_grad_()
    w.grad = torch.randn(64, 64)
    return getattr(sl, call.id)([w], **arguments), call.id


@pytest.mark.parametrize("row", COSTS, ids=lambda row: row[0])
def test_table_of_optimizers(row):
    """States, their bytes, and the bytes that a step moves are those of the code."""
    text, states, state_bytes, moved = row
    optimizer, _ = constructed(text)
    optimizer.step()
    (w,) = optimizer.param_groups[0]["params"]
    names = [state for state in optimizer.state[w] if state != "step"]
    assert states == (", ".join(names) or "–")
    # Counts and norms, a few bytes for each parameter tensor, do not reach a byte for an element.
    assert int(state_bytes) == optimizer.state_bytes() // w.numel()
    if moved == "–":
        assert isinstance(optimizer, (sl.Muon, sl.MuonH, sl.Shampoo, sl.SOAP))
    else:
        assert int(moved) == traffic.bytes_per_element(optimizer.rule(optimizer.param_groups[0]), 4, 4, 4)


def test_table_has_every_optimizer():
    assert [row[0] for row in REASONS] == [row[0] for row in COSTS]
    listed = {constructed(row[0])[1] for row in COSTS}
    assert listed == {name for name in sl.__all__ if name[0].isupper() and name != "ParamGroups"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The documents as they are, with a grey dot for each figure, beside what they link to."""
    root = tmp_path_factory.mktemp("site")
    dot = pytest.importorskip("PIL.Image", reason="writes a PNG; comes with matplotlib").new("L", (1, 1), 128)
    for folder in ("docs", "examples", "bench/results"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("python/**/*.csv")):
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / path.relative_to(ROOT))
    (root / "docs" / "figures").mkdir(exist_ok=True)
    for path in (ROOT / "examples" / "figures").glob("*.py"):
        dot.save(root / "docs" / "figures" / f"{path.stem}.png")
    return root


def build(root):
    absent = [module for module in ("sphinx", "furo", "myst_parser") if find_spec(module) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed, and makes the site: pip install 'stepladder[docs]'")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", "site"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})


@pytest.fixture(scope="module")
def site(source):
    process = build(source)
    assert process.returncode == 0, process.stderr
    return source / "site"


def pages(site):
    from bs4 import BeautifulSoup

    return {
        str(path.relative_to(site)): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in site.rglob("*.html")
    }


def test_site_has_every_public_name(site):
    documented = {tag["id"] for page in pages(site).values() for tag in page.find_all(id=True)}
    for module in (sl, sl.ops, sl.reference):
        names = {f"{module.__name__}.{name}" for name in module.__all__}
        names -= {"stepladder.ops", "stepladder.reference"}
        assert names <= documented, names - documented
    assert {"module-stepladder.ops", "module-stepladder.reference"} <= documented


def test_site_is_whole_and_needs_no_network(site):
    for path, page in pages(site).items():
        here = (site / path).parent
        sources = [
            tag[key] for key in ("src", "href") for tag in page.find_all(("script", "img", "link")) if tag.get(key)
        ]
        assert [source for source in sources if "://" in source or source.startswith("//")] == [], path
        links = [tag["href"] for tag in page.find_all("a", href=True) if "://" not in tag["href"]]
        for file in {source.partition("#")[0].partition("?")[0] for source in (*sources, *links)} - {""}:
            assert (here / file).exists(), (path, file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("[there](muon.md#nothing-of-this-name)", "nothing-of-this-name"),
    ],
)
def test_broken_links_fail(site, source, text, says):
    page = source / "docs" / "numerics.md"
    whole = page.read_text(encoding="utf-8")
    page.write_text(f"{whole}\n{text}\n", encoding="utf-8")
    try:
        process = build(source)
    finally:
        page.write_text(whole, encoding="utf-8")
    assert process.returncode != 0
    assert says in process.stderr
    assert "numerics.md" in process.stderr
